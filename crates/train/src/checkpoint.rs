//! Checkpoints: everything a run needs to go on as if it had never stopped, in one safetensors file.
//!
//! Tensors are the engine's [`State`]: parameters by torchvision's names, `optimizer.momentum.*`, running statistics.
//! The header's metadata has one entry, `runner`: [`Meta`] as JSON. A file is written beside its place, fsynced and
//! renamed, so a file that has a checkpoint's name is whole.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use engine::{State, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use track::{Best, EvalSummary};

use crate::Error;

/// Version of [`Meta`] and of the tensors' names.
const FORMAT: u32 = 1;
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
        }
    }
}

/// The checkpoints of one run directory.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
}

fn file_name(step: u64) -> String {
    format!("step-{step:010}.safetensors")
}

impl Checkpoints {
    /// Those in `run_dir/checkpoints`, which need not exist yet.
    pub fn of(run_dir: &Path) -> Self {
        Self {
            dir: run_dir.join("checkpoints"),
        }
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
        let step = |name: &String| {
            name.strip_prefix("step-")?
                .strip_suffix(".safetensors")?
                .parse()
                .ok()
        };
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The file of the latest checkpoint.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn latest(&self) -> Result<Option<PathBuf>, Error> {
        Ok(self
            .steps()?
            .last()
            .map(|&step| self.dir.join(file_name(step))))
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

    /// Writes a checkpoint, points `latest` to it and removes the oldest beyond `keep`; the best stays.
    ///
    /// # Errors
    /// If the disk refuses, or a value is not finite. Earlier checkpoints are then untouched.
    pub fn save(&self, meta: &Meta, state: &State, keep: usize) -> Result<(), Error> {
        let finite = |t: &Tensor| t.values.iter().all(|v| v.is_finite());
        if !state.values().all(finite) {
            return Err(Error::Diverged {
                step: meta.progress.step,
            });
        }
        std::fs::create_dir_all(&self.dir)
            .map_err(|source| Error::io("create", &self.dir, source))?;
        let step = meta.progress.step;
        store::write_atomic(&self.dir.join(file_name(step)), &[&encode(meta, state)])?;
        self.point_to(&meta.progress)?;
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
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        std::fs::remove_file(&path).map_err(|source| Error::io("remove", &path, source))
    }

    /// Makes `latest` and `best` name the checkpoints that `at` says, where there are any.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn point_to(&self, at: &Progress) -> Result<(), Error> {
        let best = at.best.as_ref().map(|best| best.step);
        let latest = self.steps()?.last().copied();
        for (name, step) in [("latest", latest), ("best", best)] {
            if let Some(step) = step {
                let text = file_name(step) + "\n";
                store::write_atomic(&self.dir.join(name), &[text.as_bytes()])?;
            }
        }
        Ok(())
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
    let meta = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
    let mut state = State::new();
    for (name, view) in tensors.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(damaged(format!(
                "tensor {name} is {:?}, not F32",
                view.dtype()
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
    Ok((meta, state))
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

fn encode(meta: &Meta, state: &State) -> Vec<u8> {
    let meta = serde_json::to_string(meta).expect("the metadata has string keys");
    let metadata = HashMap::from([(KEY.to_owned(), meta)]);
    let tensors = state.iter().map(|(name, t)| (name.as_str(), view(t)));
    safetensors::serialize(tensors, Some(metadata)).expect("names are unique and sizes fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(step: u64, best: Option<u64>) -> Meta {
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

    fn state() -> State {
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
        check_damaged(&encode(&later, &state()), "format 2");
        let bare =
            safetensors::serialize(std::iter::empty::<(&str, TensorView<'_>)>(), None).unwrap();
        check_damaged(&bare, "no metadata of a run");
    }

    #[test]
    fn no_checkpoint_says_where_it_looked() {
        let error = find(Path::new("no/such/run")).unwrap_err().to_string();
        assert!(error.starts_with("no/such/run: no checkpoint"), "{error}");
    }
}
