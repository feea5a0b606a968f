//! Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.
//!
//! Tensors are the engine's [`State`]: parameters by torchvision's names, `optimizer.momentum.*`, running statistics.
//! The header's metadata has one entry, `runner`: [`Meta`] as JSON. A file is written beside its place, fsynced and
//! renamed, so a file that has a checkpoint's name is whole; what a disk does to it later, the checksums find.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use engine::{State, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use track::{Best, EvalSummary};

use crate::Error;
use crate::confusion::Confusion;
use crate::mirror::Mirror;

/// Version of [`Meta`] and of the tensors' names. Earlier ones are read by [`migrate`].
/// 1: no checksums, no batches that were passed over.
const FORMAT: u32 = 2;
/// The metadata's key.
const KEY: &str = "runner";

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Updates made.
    pub step: u64,
    /// Position in the training data.
    pub cursor: data::Cursor,
    /// The plan asks for an evaluation of this step; a checkpoint is written before it.
    pub is_eval_due: bool,
    /// The last evaluation, and the step that it scored.
    pub eval: Option<(u64, EvalSummary)>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Length of metrics.jsonl at this step.
    pub metrics_bytes: u64,
    /// Batches drawn, those that were passed over included.
    pub drawn: u64,
    /// Numbers, from 0, of the batches that are passed over, because a step on them diverged.
    pub skip: BTreeSet<u64>,
    /// How often the run has gone back to a checkpoint.
    pub rewinds: u64,
    /// The step that diverged last.
    pub bad_step: Option<u64>,
    /// Seconds spent training, over all starts; evaluations do not count.
    pub seconds: f64,
    /// Every evaluation so far, for `results.tsv`.
    pub evaluations: Vec<Row>,
}

/// A line of `results.tsv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Steps done.
    pub step: u64,
    /// Passes over the training set.
    pub epoch: f64,
    /// Hours of training.
    pub hours: f64,
    /// Share of top-1 hits, from 0 to 1.
    pub top1: f64,
    /// Share of top-5 hits, from 0 to 1.
    pub top5: f64,
}

/// Evaluations as DAWNBench asks for them: epoch, hours, accuracies in percent, separated by tabs (its rules for
/// submissions of ImageNet training).
pub fn results(rows: &[Row]) -> String {
    let mut text = "epoch\thours\ttop1Accuracy\ttop5Accuracy\n".to_owned();
    for row in rows {
        let (epoch, hours) = (row.epoch, row.hours);
        let (top1, top5) = (100.0 * row.top1, 100.0 * row.top5);
        text += &format!("{epoch:.2}\t{hours:.8}\t{top1:.2}\t{top5:.2}\n");
    }
    text
}

impl Progress {
    /// Whether this step has been evaluated.
    pub fn is_evaluated(&self) -> bool {
        self.eval
            .as_ref()
            .is_some_and(|(step, _)| *step == self.step)
    }
}

/// What a checkpoint says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Version of the format.
    pub format: u32,
    /// The resolved spec as TOML.
    pub spec: String,
    /// What decides the numbers, key by key; a resume needs the same.
    pub computation: BTreeMap<String, String>,
    /// Names of the classes, where the spec names a file of them.
    pub labels: Option<Vec<String>>,
    /// How far the run has come.
    pub progress: Progress,
    /// CRC-32C of each tensor's bytes. [`load`] has compared and then forgets them.
    pub checksums: BTreeMap<String, u32>,
}

impl Meta {
    /// Describes a checkpoint of this version.
    pub fn new(
        run: &spec::Run,
        computation: BTreeMap<String, String>,
        labels: Option<Vec<String>>,
    ) -> Self {
        Self {
            format: FORMAT,
            spec: run.to_toml(),
            computation,
            labels,
            progress: Progress::default(),
            checksums: BTreeMap::new(),
        }
    }
}

/// The checkpoints of one run directory.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    mirror: Option<Mirror>,
}

fn file_name(step: u64) -> String {
    format!("step-{step:010}.safetensors")
}

/// The step that a file is named by.
pub(crate) fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?
        .strip_suffix(".safetensors")?
        .parse()
        .ok()
}

impl Checkpoints {
    /// Those in `run_dir/checkpoints`, which need not exist yet.
    pub fn of(run_dir: &Path) -> Self {
        Self {
            dir: run_dir.join("checkpoints"),
            mirror: None,
        }
    }

    /// The same, each copied to `mirror` when it is written.
    pub fn mirrored(self, mirror: Option<Mirror>) -> Self {
        Self { mirror, ..self }
    }

    /// Names of the files, none if there is no such directory.
    fn names(&self) -> Result<Vec<String>, Error> {
        let failed = |source| Error::io("read", &self.dir, source);
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(e) => return Err(failed(e)),
        };
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            Ok(entry
                .map_err(failed)?
                .file_name()
                .to_string_lossy()
                .into_owned())
        };
        entries.map(name).collect()
    }

    /// The steps that have a checkpoint, oldest first.
    fn steps(&self) -> Result<Vec<u64>, Error> {
        let names = self.names()?;
        let mut steps: Vec<u64> = names.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The files of all checkpoints, latest first.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn files(&self) -> Result<Vec<PathBuf>, Error> {
        let steps = self.steps()?.into_iter().rev();
        Ok(steps.map(|step| self.dir.join(file_name(step))).collect())
    }

    /// The step of the latest checkpoint.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn latest_step(&self) -> Result<Option<u64>, Error> {
        Ok(self.steps()?.last().copied())
    }

    /// The file of the latest checkpoint.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn latest(&self) -> Result<Option<PathBuf>, Error> {
        let step = self.latest_step()?;
        Ok(step.map(|step| self.dir.join(file_name(step))))
    }

    /// The checkpoint of the best evaluation of a run that has come to `at`, and its step; the latest where there was
    /// no evaluation.
    ///
    /// # Errors
    /// If there is none.
    pub fn best(&self, at: &Progress) -> Result<(PathBuf, u64), Error> {
        let step = at.best.as_ref().map_or(at.step, |best| best.step);
        let path = self.dir.join(file_name(step));
        match path.is_file() {
            true => Ok((path, step)),
            false => Err(Error::NoCheckpoint { path }),
        }
    }

    /// Writes a checkpoint, points `latest` to it and removes the oldest beyond `keep`; the best stays. The same then in
    /// the mirror.
    ///
    /// # Errors
    /// If the disk refuses, or the mirror. Earlier checkpoints are then untouched.
    pub fn save(&self, meta: &Meta, state: &State, keep: usize) -> Result<(), Error> {
        std::fs::create_dir_all(&self.dir)
            .map_err(|source| Error::io("create", &self.dir, source))?;
        let step = meta.progress.step;
        let bytes = encode(meta, state);
        store::write_atomic(&self.dir.join(file_name(step)), &[&bytes])?;
        self.point_here(&meta.progress)?;
        let best = meta.progress.best.as_ref().map(|b| b.step);
        let steps = self.steps()?;
        let old = steps.iter().rev().skip(keep);
        for &old in old.filter(|&&old| Some(old) != best && old != step) {
            self.remove(&file_name(old))?;
        }
        // What a kill in the middle of an earlier write has left.
        for name in self.names()?.iter().filter(|n| n.starts_with(".step-")) {
            self.remove(name)?;
        }
        if let Some(mirror) = &self.mirror {
            let run_dir = self.dir.parent().unwrap_or(&self.dir);
            mirror.put(run_dir, &file_name(step), &bytes)?;
            mirror.point(&self.pointers(&meta.progress)?)?;
            mirror.retain(&self.steps()?)?;
        }
        Ok(())
    }

    /// Writes `results.tsv` into the run directory.
    pub(crate) fn write_results(&self, rows: &[Row]) -> Result<(), Error> {
        let path = self.dir.with_file_name("results.tsv");
        Ok(store::write_atomic(&path, &[results(rows).as_bytes()])?)
    }

    /// Writes accuracy by class and the confusion matrix into the run directory.
    pub(crate) fn write_classes(
        &self,
        found: &Confusion,
        labels: Option<&[String]>,
    ) -> Result<(), Error> {
        let dir = self.dir.parent().unwrap_or(Path::new(""));
        Ok(found.write(dir, labels)?)
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        std::fs::remove_file(&path).map_err(|source| Error::io("remove", &path, source))
    }

    /// Makes `latest` and `best` name the checkpoints that `at` says, where there are any.
    ///
    /// # Errors
    /// If the disk refuses, or the mirror.
    pub fn point_to(&self, at: &Progress) -> Result<(), Error> {
        self.point_here(at)?;
        match &self.mirror {
            Some(mirror) => mirror.point(&self.pointers(at)?),
            None => Ok(()),
        }
    }

    /// The same, but for the mirror.
    pub(crate) fn point_here(&self, at: &Progress) -> Result<(), Error> {
        for (name, text) in self.pointers(at)? {
            store::write_atomic(&self.dir.join(name), &[text.as_bytes()])?;
        }
        Ok(())
    }

    /// The pointers that there are, and what they say.
    fn pointers(&self, at: &Progress) -> Result<Vec<(&'static str, String)>, Error> {
        let best = at.best.as_ref().map(|best| best.step);
        // A disk that refused for a while may have cost the best its file.
        let has_file = |step: &u64| self.dir.join(file_name(*step)).is_file();
        let named = [("latest", self.latest_step()?), ("best", best)].into_iter();
        let there = named.filter_map(|(name, step)| Some((name, step.filter(has_file)?)));
        Ok(there
            .map(|(name, step)| (name, file_name(step) + "\n"))
            .collect())
    }
}

/// A checkpoint by any of its names: the file, a pointer (`latest`, `best`) or a run directory.
///
/// # Errors
/// If there is none, or it is not on this machine.
pub fn find(path: &Path) -> Result<PathBuf, Error> {
    if let Some(text) = path.to_str() {
        store::check_local(text)?;
    }
    let none = || Error::NoCheckpoint { path: path.into() };
    if path.is_dir() {
        return Checkpoints::of(path).latest()?.ok_or_else(none);
    }
    if path.extension().is_some_and(|e| e == "safetensors") {
        return if path.is_file() {
            Ok(path.into())
        } else {
            Err(none())
        };
    }
    let name = std::fs::read_to_string(path).map_err(|_| none())?;
    let target = path.with_file_name(name.trim());
    if target.is_file() {
        Ok(target)
    } else {
        Err(none())
    }
}

/// Reads a checkpoint.
///
/// # Errors
/// If the file cannot be read, is no checkpoint, or is one of a later format.
pub fn load(path: &Path) -> Result<(Meta, State), Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, source))?;
    let damaged = |what: String| Error::Damaged {
        path: path.into(),
        what,
    };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
    let no_meta = || damaged("it has no metadata of a run".into());
    let text = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(KEY))
        .ok_or_else(no_meta)?;
    let version: Version = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
    if version.format > FORMAT {
        return Err(Error::Format {
            path: path.into(),
            found: version.format,
            known: FORMAT,
        });
    }
    let meta: serde_json::Value = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
    let meta = migrate(version.format, meta);
    let mut meta: Meta = serde_json::from_value(meta).map_err(|e| damaged(e.to_string()))?;
    let checksums = std::mem::take(&mut meta.checksums);
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let mut state = State::new();
    for (name, view) in tensors.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(format!(
                "tensor {name} is {:?}, not F32",
                view.dtype()
            )));
        }
        if checksums
            .get(&name)
            .is_some_and(|sum| *sum != store::crc32c(view.data()))
        {
            return Err(damaged(format!(
                "the values of tensor {name} are not those that were written"
            )));
        }
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("chunks of four bytes"));
        let values = view.data().chunks_exact(4).map(value).collect();
        state.insert(
            name,
            Tensor {
                shape: view.shape().to_vec(),
                values,
            },
        );
    }
    if let Some(name) = checksums.keys().find(|name| !state.contains_key(*name)) {
        return Err(damaged(format!("tensor {name} is missing")));
    }
    Ok((meta, state))
}

/// Makes the metadata of an earlier format one of this format: what it did not have gets the value that says what that
/// version did.
fn migrate(found: u32, mut meta: serde_json::Value) -> serde_json::Value {
    if found < 2 {
        meta["checksums"] = serde_json::json!({});
        let step = meta["progress"]["step"].clone();
        let progress = &mut meta["progress"];
        if progress.is_object() {
            progress["drawn"] = step;
            progress["skip"] = serde_json::json!([]);
            progress["rewinds"] = 0.into();
            progress["bad_step"] = serde_json::Value::Null;
            progress["seconds"] = 0.0.into();
            progress["evaluations"] = serde_json::json!([]);
        }
    }
    meta["format"] = FORMAT.into();
    meta
}

/// The first tensor with a value that is not a finite number.
pub(crate) fn not_finite(state: &State) -> Option<&str> {
    let is_finite = |t: &Tensor| t.values.iter().all(|v| v.is_finite());
    let mut broken = state.iter().filter(|(_, tensor)| !is_finite(tensor));
    broken.next().map(|(name, _)| name.as_str())
}

/// The part of the metadata that every version has.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

fn view(tensor: &Tensor) -> TensorView<'_> {
    TensorView::new(
        Dtype::F32,
        tensor.shape.clone(),
        bytemuck::cast_slice(&tensor.values),
    )
    .expect("a tensor has as many values as its shape says")
}

/// The bytes of a checkpoint's file.
pub fn encode(meta: &Meta, state: &State) -> Vec<u8> {
    let sum = |t: &Tensor| store::crc32c(bytemuck::cast_slice(&t.values));
    let checksums = state.iter().map(|(name, t)| (name.clone(), sum(t)));
    let meta = Meta {
        checksums: checksums.collect(),
        ..meta.clone()
    };
    let meta = serde_json::to_string(&meta).expect("the metadata has string keys");
    let metadata = HashMap::from([(KEY.to_owned(), meta)]);
    let tensors = state.iter().map(|(name, t)| (name.as_str(), view(t)));
    safetensors::serialize(tensors, Some(metadata)).expect("names are unique and sizes fit")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn meta(step: u64, best: Option<u64>) -> Meta {
        let run = spec::parse("name = \"t\"\ndata.source = \"fake\"", "t.toml", &[])
            .unwrap_or_else(|e| panic!("{e}"));
        let mut meta = Meta::new(&run, run.computation(), None);
        meta.progress.step = step;
        meta.progress.best = best.map(|step| Best {
            metric: "top1".into(),
            value: 0.5,
            step,
        });
        meta
    }

    pub(crate) fn state() -> State {
        let values = vec![1.5, -0.0, f32::MIN_POSITIVE, 3.0e38];
        State::from([(
            "fc.weight".to_owned(),
            Tensor {
                shape: vec![2, 2],
                values,
            },
        )])
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::of(dir.path());
        checkpoints.save(&meta(7, None), &state(), 3).unwrap();
        let path = find(dir.path()).unwrap();
        assert_eq!(path.file_name().unwrap(), "step-0000000007.safetensors");
        let (found, tensors) = load(&path).unwrap();
        assert_eq!(found, meta(7, None));
        assert!(
            tensors["fc.weight"]
                .values
                .iter()
                .map(|v| v.to_bits())
                .eq(state()["fc.weight"].values.iter().map(|v| v.to_bits()))
        );
        let again = encode(&found, &tensors);
        assert_eq!(
            again,
            std::fs::read(&path).unwrap(),
            "equal runs write equal bytes"
        );
    }

    #[test]
    fn the_latest_and_the_best_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::of(dir.path());
        for step in 1..=6 {
            checkpoints
                .save(&meta(step, (step > 2).then_some(2)), &state(), 2)
                .unwrap();
        }
        assert_eq!(checkpoints.steps().unwrap(), [2, 5, 6]);
        let name = |pointer| find(&dir.path().join("checkpoints").join(pointer)).unwrap();
        assert!(name("best").ends_with("step-0000000002.safetensors"));
        assert!(name("latest").ends_with("step-0000000006.safetensors"));
    }

    #[test]
    fn half_a_file_beside_the_checkpoints_is_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::of(dir.path());
        checkpoints.save(&meta(3, None), &state(), 2).unwrap();
        let torn = dir
            .path()
            .join("checkpoints/.step-0000000004.safetensors.tmp");
        store::write_atomic(&torn, &[b"torn"]).unwrap();
        assert!(
            checkpoints
                .latest()
                .unwrap()
                .unwrap()
                .ends_with("step-0000000003.safetensors")
        );
        checkpoints.save(&meta(5, None), &state(), 2).unwrap();
        assert!(!torn.exists(), "the next checkpoint sweeps it away");
    }

    fn check_damaged(bytes: &[u8], expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        store::write_atomic(&path, &[bytes]).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("x.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn damaged_files_are_refused() {
        let whole = encode(&meta(1, None), &state());
        check_damaged(b"", "not a whole checkpoint");
        check_damaged(&whole[..whole.len() - 1], "not a whole checkpoint");
        let mut later = meta(1, None);
        later.format = FORMAT + 1;
        check_damaged(&encode(&later, &state()), "format 3");
        let bare =
            safetensors::serialize(std::iter::empty::<(&str, TensorView<'_>)>(), None).unwrap();
        check_damaged(&bare, "no metadata of a run");
    }

    #[test]
    fn results_are_dawnbench_s() {
        let row = |epoch, hours, top1, top5| Row {
            step: 0,
            epoch,
            hours,
            top1,
            top5,
        };
        let rows = [
            row(1.0, 0.5, 0.123_449, 0.3),
            row(90.0, 8.0, 0.766_7, 0.933_3),
        ];
        assert_eq!(
            results(&rows),
            "epoch\thours\ttop1Accuracy\ttop5Accuracy\n\
             1.00\t0.50000000\t12.34\t30.00\n90.00\t8.00000000\t76.67\t93.33\n"
        );
    }

    #[test]
    fn a_flipped_bit_is_found_and_its_tensor_named() {
        let mut whole = encode(&meta(1, None), &state());
        let last = whole.len() - 1;
        whole[last] ^= 1;
        check_damaged(
            &whole,
            "the values of tensor fc.weight are not those that were written",
        );
    }

    /// As version 0.1 wrote it: no checksums, nothing about batches that were passed over.
    #[test]
    fn format_1_is_read() {
        let mut json = serde_json::to_value(meta(7, Some(5))).unwrap();
        json["format"] = 1.into();
        json.as_object_mut().unwrap().remove("checksums");
        for key in [
            "drawn",
            "skip",
            "rewinds",
            "bad_step",
            "seconds",
            "evaluations",
        ] {
            json["progress"].as_object_mut().unwrap().remove(key);
        }
        let metadata = HashMap::from([(KEY.to_owned(), json.to_string())]);
        let state = state();
        let tensors = state.iter().map(|(name, t)| (name.as_str(), view(t)));
        let bytes = safetensors::serialize(tensors, Some(metadata)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        store::write_atomic(&path, &[&bytes]).unwrap();
        let (found, _) = load(&path).unwrap();
        let mut expected = meta(7, Some(5));
        expected.progress.drawn = 7; // a batch for each step
        assert_eq!(found, expected);
    }

    #[test]
    fn no_checkpoint_says_where_it_looked() {
        let error = find(Path::new("no/such/run")).unwrap_err().to_string();
        assert!(error.starts_with("no/such/run: no checkpoint"), "{error}");
    }
}
