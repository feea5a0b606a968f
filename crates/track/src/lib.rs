//! Numbers leave the program: `metrics.jsonl`, `log.txt`, `summary.json` and the terminal; an MLflow store in an SQLite
//! file and TensorBoard's event files if a [`Config`] asks for them. No server and no network.
//!
//! Tracking can never stop a run: no method of [`Trackers`] returns an error. What could not be written is counted,
//! said once when it begins, and said again at the end. A thread writes to MLflow's database, so a step never waits for
//! a program that has locked it. This crate computes nothing that a run depends on.
//!
//! A run that resumes has every number once in every place: see [`Resume`].

#![expect(
    clippy::disallowed_methods,
    reason = "the trackers' files are written here and nowhere else"
)]

mod metrics;
mod mlflow;
mod summary;
mod tensorboard;
mod terminal;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

pub use metrics::{EvalMetrics, StepMetrics};
use metrics::{MetricsFile, Scalar};
pub use mlflow::Mlflow;
pub use summary::{Best, EvalSummary, Summary, read_summary};
use tensorboard::EventFile;
use terminal::Screen;
pub use terminal::Terminal;

/// Which trackers there are beside the run directory's own files; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The MLflow store, if the run is to be in one.
    pub mlflow: Option<Mlflow>,
    /// Whether the run directory gets `events.out.tfevents.*`.
    pub tensorboard: bool,
}

/// The checkpoint at which a run goes on.
///
/// What came before it are the training numbers of steps up to its own, the evaluations of earlier steps, and the
/// evaluation of its own step if it says so. All else is removed from `metrics.jsonl`, the event files and MLflow when
/// the trackers open; the run writes it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// Steps done.
    pub step: u64,
    /// Whether the evaluation of that step was done too. Most checkpoints are written before it.
    pub is_evaluated: bool,
    /// What [`Trackers::sync`] returned for the checkpoint.
    pub metrics_bytes: u64,
}

impl Resume {
    /// Whether a number came before the checkpoint.
    fn keeps(&self, name: &str, step: u64) -> bool {
        let is_own = step == self.step && (self.is_evaluated || !name.starts_with("eval/"));
        step < self.step || is_own
    }
}

/// The clock that MLflow uses: milliseconds since 1970.
fn milliseconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}

/// Writes beside, forces to the disk, renames: a reader sees the old file or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let mut file = File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// Everywhere that the numbers of a run go.
pub struct Trackers {
    dir: PathBuf,
    metrics: MetricsFile,
    events: Option<EventFile>,
    mlflow: Option<mlflow::Writer>,
    log: Option<File>,
    screen: Screen,
    failures: u64,
    /// What failed first.
    first: Option<String>,
}

impl Trackers {
    /// Opens the trackers of a run directory, which is made if it is missing.
    ///
    /// A run that resumes keeps what came before its checkpoint, see [`Resume`], and stays the same run in MLflow. A
    /// `metrics.jsonl` that is already shorter is kept, and noted. Without a checkpoint all files start anew, and so
    /// does the run in MLflow if the directory has one.
    pub fn open(dir: &Path, resume: Option<Resume>, config: &Config, terminal: Terminal) -> Self {
        let metrics_bytes = resume.map_or(0, |resume| resume.metrics_bytes);
        let mut trackers = Self {
            dir: dir.into(),
            metrics: MetricsFile::new(dir.join("metrics.jsonl"), metrics_bytes),
            events: config.tensorboard.then(|| EventFile::new(dir)),
            mlflow: None,
            log: None,
            screen: Screen::new(terminal),
            failures: 0,
            first: None,
        };
        let made = fs::create_dir_all(dir);
        trackers.count(made, "");

        let log = dir.join("log.txt");
        let opened = OpenOptions::new().create(true).append(true).open(log);
        let opened = opened.and_then(|file| match resume {
            Some(_) => Ok(file),
            None => file.set_len(0).map(|()| file),
        });
        trackers.log = trackers.count(opened, "log.txt");

        let opened = trackers.metrics.open();
        if let Some(Some(found)) = trackers.count(opened, "metrics.jsonl") {
            trackers.note(&format!(
                "metrics.jsonl has {found} bytes, less than the {metrics_bytes} of the checkpoint: the steps between \
                 are missing"
            ));
        }
        trackers.open_events(resume);
        if let Some(config) = &config.mlflow {
            let started = mlflow::Writer::start(dir, config.clone(), resume);
            trackers.mlflow = trackers.count(started, "mlflow-run");
        }
        trackers
    }

    /// Cuts the event files of earlier starts, also if this one writes none, and begins another.
    fn open_events(&mut self, resume: Option<Resume>) {
        let cut = match self.dir.exists() {
            true => tensorboard::cut(&self.dir, resume),
            false => Ok(()), // already counted
        };
        self.count(cut, EVENTS);
        let opened = self.events.as_mut().map_or(Ok(()), EventFile::open);
        self.count(opened, EVENTS);
    }

    /// Records a training step.
    pub fn step(&mut self, m: &StepMetrics) {
        self.write(m, m.step, m.scalars());
        self.screen.step(m);
    }

    /// Records an evaluation.
    pub fn eval(&mut self, m: &EvalMetrics) {
        self.write(m, m.step, m.scalars());
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

    /// Forces the numbers so far to the disk; the length of `metrics.jsonl` in bytes, to be kept in the checkpoint of
    /// the same step.
    ///
    /// MLflow's database may be locked by another program. It is waited for, but at most 5 s, and not again until it
    /// has caught up.
    pub fn sync(&mut self) -> u64 {
        let synced = self.metrics.sync();
        self.count(synced, "metrics.jsonl");
        let synced = self.events.as_mut().map_or(Ok(()), EventFile::sync);
        self.count(synced, EVENTS);
        if let Some(mlflow) = &mut self.mlflow {
            mlflow.sync();
        }
        self.hear();
        self.metrics.length()
    }

    /// Ends the run: writes `summary.json` whole or not at all, waits for MLflow (35 s at most, if it is locked), and
    /// tells how much could not be written. In MLflow a run that is dropped without this has failed.
    pub fn finish(&mut self, s: &Summary) {
        // The numbers first: a summary that says `done` must not outlive the lines before it.
        let synced = self.metrics.sync();
        self.count(synced, "metrics.jsonl");
        let written = summary::write(&self.dir, s);
        self.count(written, summary::NAME);
        let synced = self.events.as_mut().map_or(Ok(()), EventFile::sync);
        self.count(synced, EVENTS);
        if let Some(mlflow) = &mut self.mlflow {
            mlflow.end(mlflow::status(s), Some(self.dir.join(summary::NAME)));
        }
        self.hear();
        self.mlflow = None; // it is over
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

    fn write(&mut self, line: &impl Serialize, step: u64, scalars: Vec<Scalar>) {
        let written = self.metrics.write(line);
        self.count(written, "metrics.jsonl");
        let written = match &mut self.events {
            Some(events) => events.write(step, &scalars),
            None => Ok(()),
        };
        self.count(written, EVENTS);
        if let Some(mlflow) = &mut self.mlflow {
            mlflow.write(step, scalars);
        }
        self.hear();
    }

    /// Counts what failed in MLflow's thread since the last time.
    fn hear(&mut self) {
        let failures: Vec<_> = self.mlflow.iter().flat_map(|m| m.failures()).collect();
        for failure in failures {
            self.fail(failure);
        }
    }

    /// Counts a failure of a file of the run directory (empty for the directory itself).
    fn count<T>(&mut self, result: io::Result<T>, file: &str) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(format!("{}: {error}", self.dir.join(file).display()));
                None
            }
        }
    }

    /// Counts a failure, and says the first.
    fn fail(&mut self, failure: String) {
        self.failures += 1;
        if self.first.is_none() {
            self.screen.line(&format!(
                "tracking fails, the run goes on without it: {failure}"
            ));
            self.first = Some(failure);
        }
    }
}

/// A run that has not been finished has failed.
impl Drop for Trackers {
    fn drop(&mut self) {
        if let Some(mlflow) = &self.mlflow {
            mlflow.end("FAILED", None);
        }
        self.hear();
    }
}

/// How failures name the event files.
const EVENTS: &str = "events.out.tfevents";
