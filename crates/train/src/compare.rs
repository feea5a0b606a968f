//! Whether two runs computed the same, bit by bit.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Progress, find, load};

/// What two finished runs have in common, and where they differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Tensors that both have.
    pub tensors: usize,
    /// Values in them.
    pub values: usize,
    /// Lines of metrics.
    pub lines: usize,
    /// What differs, one line each; empty for equal runs.
    pub differences: Vec<String>,
}

/// Keys of metrics.jsonl that tell times, which no two runs share.
const TIMES: [&str; 2] = ["train/images_per_s", "train/input_wait_fraction"];

/// Compares the last checkpoints of two run directories (every bit of every tensor, and the position in data and
/// plan) and their metrics but for the times.
///
/// # Errors
/// If one of them has no checkpoint or no metrics.
pub fn compare(a: &Path, b: &Path) -> Result<Comparison, Error> {
    let ((meta_a, state_a), (meta_b, state_b)) = (load(&find(a)?)?, load(&find(b)?)?);
    let mut found = Comparison::default();
    for name in state_a
        .keys()
        .chain(state_b.keys().filter(|name| !state_a.contains_key(*name)))
    {
        let (Some(x), Some(y)) = (state_a.get(name), state_b.get(name)) else {
            found
                .differences
                .push(format!("tensor {name} is in one of them only"));
            continue;
        };
        found.tensors += 1;
        found.values += x.values.len();
        let pairs = x.values.iter().zip(&y.values);
        let differing = pairs.filter(|(x, y)| x.to_bits() != y.to_bits()).count();
        if differing > 0 || x.shape != y.shape {
            let all = x.values.len();
            found
                .differences
                .push(format!("tensor {name}: {differing} of {all} values differ"));
        }
    }
    // The offset counts the digits of the rates too.
    let timeless = |mut progress: Progress| {
        (progress.metrics_bytes, progress.seconds) = (0, 0.0);
        let hours = progress.evaluations.iter_mut().map(|row| &mut row.hours);
        hours.for_each(|hours| *hours = 0.0);
        progress
    };
    let (at_a, at_b) = (timeless(meta_a.progress), timeless(meta_b.progress));
    if at_a != at_b {
        found
            .differences
            .push(format!("progress: {at_a:?} and {at_b:?}"));
    }
    let (lines_a, lines_b) = (metrics(a)?, metrics(b)?);
    found.lines = lines_a.len();
    if lines_a.len() != lines_b.len() {
        found.differences.push(format!(
            "metrics: {} and {} lines",
            lines_a.len(),
            lines_b.len()
        ));
    }
    for (i, (x, y)) in lines_a
        .iter()
        .zip(&lines_b)
        .enumerate()
        .filter(|(_, (x, y))| x != y)
    {
        found
            .differences
            .push(format!("metrics, line {}: {x} and {y}", i + 1));
    }
    Ok(found)
}

/// The lines of metrics.jsonl without times.
fn metrics(dir: &Path) -> Result<Vec<Value>, Error> {
    let path = dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).map_err(|e| Error::Damaged {
            path: path.clone(),
            what: e.to_string(),
        })?;
        if let Some(keys) = line.as_object_mut() {
            keys.retain(|key, _| !TIMES.contains(&key.as_str()));
        }
        Ok(line)
    };
    text.lines().map(timeless).collect()
}
