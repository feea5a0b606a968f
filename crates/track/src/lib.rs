//! Numbers leave the program: `metrics.jsonl`, `log.txt`, `summary.json` and the terminal.
//!
//! Tracking can never stop a run: no method of [`Trackers`] returns an error. What could not be written is counted,
//! said once when it begins, and said again at the end. This crate computes nothing that a run depends on.

#![expect(
    clippy::disallowed_methods,
    reason = "the trackers' files are written here and nowhere else"
)]

mod metrics;
mod summary;
mod terminal;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use metrics::MetricsFile;
pub use metrics::{EvalMetrics, StepMetrics};
pub use summary::{Best, EvalSummary, Summary, read_summary};
use terminal::Screen;
pub use terminal::Terminal;

/// Everywhere that the numbers of a run go.
pub struct Trackers {
    dir: PathBuf,
    metrics: MetricsFile,
    log: Option<File>,
    screen: Screen,
    failures: u64,
    /// What failed first.
    first: Option<String>,
}

impl Trackers {
    /// Opens the trackers of a run directory, which is made if it is missing.
    ///
    /// A run that resumes gives the length of `metrics.jsonl` in bytes that [`Trackers::sync`] returned for its
    /// checkpoint: what was written after it is cut off. A file that is already shorter is kept, and noted. Without
    /// it the files start anew.
    pub fn open(dir: &Path, resume_at: Option<u64>, terminal: Terminal) -> Self {
        let mut trackers = Self {
            dir: dir.into(),
            metrics: MetricsFile::new(dir.join("metrics.jsonl"), resume_at.unwrap_or(0)),
            log: None,
            screen: Screen::new(terminal),
            failures: 0,
            first: None,
        };
        let made = fs::create_dir_all(dir);
        trackers.count(made, "");

        let log = dir.join("log.txt");
        let opened = OpenOptions::new().create(true).append(true).open(log);
        let opened = opened.and_then(|file| match resume_at {
            Some(_) => Ok(file),
            None => file.set_len(0).map(|()| file),
        });
        trackers.log = trackers.count(opened, "log.txt");

        let opened = trackers.metrics.open();
        if let Some(Some(found)) = trackers.count(opened, "metrics.jsonl") {
            trackers.note(&format!(
                "metrics.jsonl has {found} bytes, less than the {} of the checkpoint: the steps between are missing",
                resume_at.unwrap_or(0)
            ));
        }
        trackers
    }

    /// Records a training step.
    pub fn step(&mut self, m: &StepMetrics) {
        self.write(m);
        self.screen.step(m);
    }

    /// Records an evaluation.
    pub fn eval(&mut self, m: &EvalMetrics) {
        self.write(m);
        self.screen.line(&terminal::eval_line(m));
    }

    /// Records an event in words: on the terminal and in `log.txt`.
    pub fn note(&mut self, text: &str) {
        self.screen.line(text);
        let written = match &mut self.log {
            Some(log) => log.write_all(format!("{text}\n").as_bytes()),
            None => Err(io::Error::other("it could not be opened")),
        };
        self.count(written, "log.txt");
    }

    /// Forces `metrics.jsonl` to the disk; its length in bytes, to be kept in the checkpoint of the same step.
    pub fn sync(&mut self) -> u64 {
        let synced = self.metrics.sync();
        self.count(synced, "metrics.jsonl");
        self.metrics.length()
    }

    /// Ends the run: writes `summary.json` whole or not at all, and tells how much could not be written.
    pub fn finish(&mut self, s: &Summary) {
        let written = summary::write(&self.dir, s);
        self.count(written, "summary.json");
        self.screen.finish();
        if let Some(first) = &self.first {
            let text = format!(
                "{} writes of the trackers failed, first {first}",
                self.failures
            );
            self.note(&text);
        }
    }

    /// How many writes failed so far.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    fn write(&mut self, line: &impl Serialize) {
        let written = self.metrics.write(line);
        self.count(written, "metrics.jsonl");
    }

    /// Counts a failure of a file of the run directory (empty for the directory itself), and says the first.
    fn count<T>(&mut self, result: io::Result<T>, file: &str) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.failures += 1;
                if self.first.is_none() {
                    let first = format!("{}: {error}", self.dir.join(file).display());
                    self.screen.line(&format!(
                        "tracking fails, the run goes on without it: {first}"
                    ));
                    self.first = Some(first);
                }
                None
            }
        }
    }
}
