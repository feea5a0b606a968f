//! `runner predict`: what a checkpoint sees in images.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use engine::{Engine, Pixels};
use serde_json::{Value, json};
use store::tfrecord::Reader;

use crate::cli::PredictArgs;
use crate::failure::Failure;
use crate::{evaluate, network, output};

/// An image to look at.
struct Image {
    /// Its file.
    path: PathBuf,
    /// Its number in a file of records.
    record: Option<u64>,
    /// The class that the record says.
    class: Option<i64>,
    file: Result<Vec<u8>, String>,
}

/// `runner predict`. An image that cannot be read gets a line that says why, the others are looked at, and the exit code
/// is 3.
pub(crate) fn predict(args: &PredictArgs) -> Result<ExitCode, Failure> {
    // It need not say where the data of the run were.
    let fixed = ["mode=eval", "data.source=fake"];
    let (_, meta, state, run) = evaluate::open(&args.checkpoint, &args.set, &fixed)?;
    let mut files = vec![];
    for input in &args.inputs {
        // A file of that name, brackets and all, comes before a pattern.
        match Path::new(input).is_file() {
            true => files.push(input.into()),
            false => files.extend(store::glob(input)?),
        }
    }
    let state = evaluate::to_use(state, &run);
    let mut engine = network::engine(&run, &network::network(&run), Some(state))?;
    let size = args.batch.unwrap_or(run.train.bn_batch());
    let mut look = Look {
        config: train::image_config(&run),
        labels: meta.labels.as_deref(),
        label_offset: run.data.label_offset,
        args,
        engine: &mut *engine,
        bad: 0,
    };
    let mut batch = vec![];
    for path in files {
        look.file(&path, &mut batch, size)?;
    }
    look.batch(&mut batch)?;
    match look.bad {
        0 => Ok(ExitCode::SUCCESS),
        bad => Err(Failure::Input(format!(
            "{bad} of the images cannot be read\nhint: only whole JPEG files, and TFRecords of them, can be"
        ))),
    }
}

struct Look<'a> {
    config: data::Config,
    labels: Option<&'a [String]>,
    label_offset: i64,
    args: &'a PredictArgs,
    engine: &'a mut dyn Engine,
    bad: u64,
}

impl Look<'_> {
    /// Adds what a file holds to the batch, and looks at the batch whenever it is full.
    fn file(&mut self, path: &Path, batch: &mut Vec<Image>, size: usize) -> Result<(), Failure> {
        let image = |record, class, file| Image {
            path: path.into(),
            record,
            class,
            file,
        };
        let begin = beginning(path);
        if begin
            .as_ref()
            .is_ok_and(|begin| !begin.starts_with(b"\xff\xd8"))
            && let Ok(mut reader) = Reader::open(path)
        {
            // Whether these are records shows with the first.
            let mut first = true;
            loop {
                match reader.next() {
                    Ok(None) => return Ok(()),
                    Ok(Some(record)) => {
                        let parsed = match record.verify() {
                            true => data::parse(&record.bytes).map_err(|e| e.to_string()),
                            false => Err("its checksum does not match".into()),
                        };
                        let class = parsed
                            .as_ref()
                            .ok()
                            .and_then(|(_, label)| label.checked_sub(self.label_offset));
                        let file = parsed.map(|(jpeg, _)| jpeg.to_vec());
                        batch.push(image(Some(record.index), class, file));
                    }
                    Err(_) if first => break,
                    Err(error) => {
                        batch.push(image(Some(reader.record()), None, Err(error.to_string())));
                        return Ok(());
                    }
                }
                first = false;
                if batch.len() == size {
                    self.batch(batch)?;
                }
            }
        }
        let file = std::fs::read(path).map_err(|e| format!("cannot read: {e}"));
        batch.push(image(None, None, file));
        match batch.len() == size {
            true => self.batch(batch),
            false => Ok(()),
        }
    }

    /// Looks at some images, in one go, and prints a line for each.
    fn batch(&mut self, batch: &mut Vec<Image>) -> Result<(), Failure> {
        if batch.is_empty() {
            return Ok(());
        }
        let files: Vec<&[u8]> = batch
            .iter()
            .map(|image| image.file.as_deref().unwrap_or_default())
            .collect();
        let (pixels, decoded) = data::prepare(&self.config, &files).map_err(train::Error::from)?;
        let logits = self.engine.predict(match &pixels {
            data::Pixels::U8(p) => Pixels::U8(p),
            data::Pixels::F32(p) => Pixels::F32(p),
        })?;
        let classes = self.config.classes;
        let mut text = String::new();
        for (i, (image, decoded)) in batch.drain(..).zip(decoded).enumerate() {
            let wrong = match (image.file.as_ref().err(), decoded) {
                (Some(error), _) => Some(error.clone()),
                (None, Err(reason)) => Some(reason.to_string()),
                (None, Ok(())) => None,
            };
            self.bad += u64::from(wrong.is_some());
            let best = match wrong {
                Some(wrong) => Err(wrong),
                None => Ok(top(&logits[i * classes..][..classes], self.args.top)),
            };
            text += &match self.args.json {
                true => self.json(&image, best),
                false => self.line(&image, best),
            };
            text.push('\n');
        }
        output::print(&text);
        Ok(())
    }

    fn label(&self, class: usize) -> Option<&str> {
        self.labels?.get(class).map(String::as_str)
    }

    fn json(&self, image: &Image, best: Result<Vec<(usize, f64)>, String>) -> String {
        let mut line = json!({ "input": image.path.display().to_string() });
        if let Some(record) = image.record {
            line["record"] = record.into();
        }
        if let Some(class) = image.class {
            line["true_class"] = class.into();
        }
        match best {
            Err(wrong) => line["error"] = wrong.into(),
            Ok(best) => {
                let entry = |&(class, probability): &(usize, f64)| -> Value {
                    json!({ "class": class, "label": self.label(class), "probability": probability })
                };
                line["top"] = best.iter().map(entry).collect();
            }
        }
        line.to_string()
    }

    fn line(&self, image: &Image, best: Result<Vec<(usize, f64)>, String>) -> String {
        let mut line = image.path.display().to_string();
        if let Some(record) = image.record {
            line += &format!(", record {record}");
        }
        match best {
            Err(wrong) => line += &format!(": {wrong}"),
            Ok(best) => {
                for (class, probability) in best {
                    let label = self.label(class).map_or(class.to_string(), str::to_owned);
                    line += &format!("  {label} {probability:.4}");
                }
            }
        }
        line
    }
}

/// The first two bytes of a file.
fn beginning(path: &Path) -> std::io::Result<[u8; 2]> {
    let mut begin = [0; 2];
    File::open(path)?.read_exact(&mut begin)?;
    Ok(begin)
}

/// The classes that score highest, with their probabilities, best first; the lower class first where they tie.
fn top(logits: &[f32], count: usize) -> Vec<(usize, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |value: f32| (f64::from(value) - f64::from(most)).exp();
    let sum: f64 = logits.iter().map(|&value| weight(value)).sum();
    let mut classes: Vec<usize> = (0..logits.len()).collect();
    classes.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    classes.truncate(count);
    let entry = |class: usize| (class, weight(logits[class]) / sum);
    classes.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_probabilities_are_a_softmax() {
        let found = top(&[1.0, 3.0, 1.0, 2.0], 3);
        let classes: Vec<usize> = found.iter().map(|(class, _)| *class).collect();
        assert_eq!(classes, [1, 3, 0]);
        let sum: f64 = [1.0, 3.0, 1.0, 2.0f64].iter().map(|v| v.exp()).sum();
        assert!((found[0].1 - 3f64.exp() / sum).abs() < 1e-12);
        assert_eq!(top(&[1000.0, 0.0], 9).len(), 2);
    }
}
