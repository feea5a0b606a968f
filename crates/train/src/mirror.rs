//! A copy of a run in a bucket, for machines that do not come back: the checkpoints, and the files of the run directory that
//! a resume elsewhere goes on with.
//!
//! Files go first, then the checkpoint, then the pointers: whatever a kill leaves is a state that a resume knows, for it cuts
//! files to what the checkpoint says.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::checkpoint::step_of;

/// What goes with the checkpoints, where it is there.
const FILES: [&str; 7] = [
    "spec.toml",
    "metrics.jsonl",
    "results.tsv",
    "log.txt",
    "mlflow-run",
    "mlflow.journal",
    "mlflow.sent",
];

/// The URL of the copy, without a slash at the end.
#[derive(Clone, Debug)]
pub struct Mirror {
    url: String,
}

impl Mirror {
    /// The copy at `url`, which need not exist yet.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.trim_end_matches('/').into(),
        }
    }

    fn place(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}/{name}", self.url))
    }

    fn checkpoint(&self, name: &str) -> PathBuf {
        self.place(&format!("checkpoints/{name}"))
    }

    /// Names of the checkpoints that are there, and their steps, oldest first.
    fn checkpoints(&self) -> Result<Vec<(u64, String)>, Error> {
        let pattern = format!("{}/checkpoints/step-*.safetensors", self.url);
        let found = match store::glob(&pattern) {
            Err(store::Error::NoMatch { .. }) => vec![],
            found => found?,
        };
        let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
        let named = found.iter().filter_map(name);
        let mut all: Vec<_> = named.filter_map(|n| Some((step_of(&n)?, n))).collect();
        all.sort_unstable();
        Ok(all)
    }

    /// The step of the latest checkpoint there.
    ///
    /// # Errors
    /// The bucket does not answer.
    pub fn latest(&self) -> Result<Option<u64>, Error> {
        Ok(self.checkpoints()?.last().map(|(step, _)| *step))
    }

    /// Brings the latest checkpoint and the files to `dir`, and says its step, if it is later than step `than` there.
    ///
    /// # Errors
    /// The bucket does not answer, or the disk refuses.
    pub fn fetch(&self, dir: &Path, than: Option<u64>) -> Result<Option<u64>, Error> {
        let all = self.checkpoints()?;
        let Some((step, latest)) = all.last().filter(|(step, _)| Some(*step) > than) else {
            return Ok(None);
        };
        let checkpoints = dir.join("checkpoints");
        std::fs::create_dir_all(&checkpoints)
            .map_err(|source| Error::io("create", &checkpoints, source))?;
        let best = store::read(&self.checkpoint("best"))?;
        let best = best.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
        let best = best.filter(|best| best != latest && all.iter().any(|(_, name)| name == best));
        // The latest comes last: once it is here, nothing is fetched again.
        for name in FILES {
            if let Some(bytes) = store::read(&self.place(name))? {
                store::write_atomic(&dir.join(name), &[&bytes])?;
            }
        }
        for name in best.iter().chain([latest]) {
            if let Some(bytes) = store::read(&self.checkpoint(name))? {
                store::write_atomic(&checkpoints.join(name), &[&bytes])?;
            }
        }
        Ok(Some(*step))
    }

    /// Copies the files of the run directory `dir` and a checkpoint of these bytes.
    pub(crate) fn put(&self, dir: &Path, name: &str, checkpoint: &[u8]) -> Result<(), Error> {
        for file in FILES {
            if let Some(bytes) = store::read(&dir.join(file))? {
                store::write_atomic(&self.place(file), &[&bytes])?;
            }
        }
        Ok(store::write_atomic(&self.checkpoint(name), &[checkpoint])?)
    }

    /// Writes the pointers.
    pub(crate) fn point(&self, pointers: &[(&str, String)]) -> Result<(), Error> {
        for (name, text) in pointers {
            store::write_atomic(&self.checkpoint(name), &[text.as_bytes()])?;
        }
        Ok(())
    }

    /// Removes all checkpoints but those of these steps.
    pub(crate) fn retain(&self, kept: &[u64]) -> Result<(), Error> {
        for (step, name) in self.checkpoints()? {
            if !kept.contains(&step) {
                store::remove(&self.checkpoint(&name))?;
            }
        }
        Ok(())
    }
}
