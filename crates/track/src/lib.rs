//! Numbers leave the program: `metrics.jsonl`, `log.txt`, `summary.json` and the terminal; an MLflow store in an SQLite
//! file or on a server, and TensorBoard's event files if a [`Config`] asks for them.
//!
//! Tracking can never stop a run: no method of [`Trackers`] returns an error. What could not be written is counted,
//! said once when it begins, and said again at the end. Threads of their own write to MLflow's database and talk to its
//! server, so a step waits for neither; what a server is told is in a journal first, and [`sync`] sends later what it
//! missed. This crate computes nothing that a run depends on.
//!
//! A run that resumes has every number once in every place: see [`Resume`].

#![expect(
    clippy::disallowed_methods,
    reason = "the trackers' files are written here and nowhere else"
)]

mod metrics;
mod mlflow;
mod spent;
mod summary;
mod system;
mod tensorboard;
mod terminal;
mod tui;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

pub use metrics::{EvalMetrics, StepMetrics};
use metrics::{MetricsFile, Scalar};
pub use mlflow::{Access, Credentials, Dataset, Mlflow, Place, Synced, sync, without_login};
use mlflow::{Follower, Said};
pub use spent::{Spent, Time};
pub use summary::{Best, EvalSummary, Summary, read_summary};
use system::Sampler;
use tensorboard::EventFile;
pub use tensorboard::GraphNode;
use terminal::Screen;
pub use terminal::Terminal;

/// Which trackers there are beside the run directory's own files; none by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// The MLflow store, if the run is to be in one.
    pub mlflow: Option<Mlflow>,
    /// Whether the run directory gets `events.out.tfevents.*`.
    pub tensorboard: bool,
    /// Whether MLflow, TensorBoard and the dashboard are told every 10 s how busy the machine is, under `system/`.
    pub system: bool,
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

/// The numbers of one step or evaluation, or of the machine at it.
pub(crate) struct Point {
    pub(crate) step: u64,
    pub(crate) milliseconds: i64,
    pub(crate) scalars: Vec<Scalar>,
}

/// MLflow, by its place.
enum Store {
    File(mlflow::Writer),
    Server(Box<Follower>),
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
    mlflow: Option<Store>,
    sampler: Option<Sampler>,
    /// Whether TensorBoard has been told that a session began: by this process, or by the one that it resumes.
    has_hparams: bool,
    /// Whether what fails now is said at the end anyway.
    is_ending: bool,
    log: Option<File>,
    screen: Screen,
    failures: u64,
    /// What failed first.
    first: Option<String>,
    busy: Duration,
}

impl Trackers {
    /// Opens the trackers of a run directory, which is made if it is missing.
    ///
    /// A run that resumes keeps what came before its checkpoint, see [`Resume`], and stays the same run in MLflow. A
    /// `metrics.jsonl` that is already shorter is kept, and noted. Without a checkpoint all files start anew, and so
    /// does the run in MLflow if the directory has one.
    pub fn open(dir: &Path, resume: Option<Resume>, config: &Config, terminal: Terminal) -> Self {
        let metrics_bytes = resume.map_or(0, |resume| resume.metrics_bytes);
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let mut trackers = Self {
            dir: dir.into(),
            metrics: MetricsFile::new(dir.join("metrics.jsonl"), metrics_bytes),
            events: config.tensorboard.then(|| EventFile::new(dir)),
            mlflow: None,
            sampler: None,
            has_hparams: resume.is_some(),
            is_ending: false,
            log: None,
            screen: Screen::new(terminal, &name),
            failures: 0,
            first: None,
            busy: Duration::ZERO,
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
            let started = match &config.place {
                Place::Directory(store) => {
                    mlflow::Writer::start(dir, store, config.clone(), resume).map(Store::File)
                }
                Place::Server(access) => Follower::start(dir, config, access, resume)
                    .map(|follower| Store::Server(Box::new(follower))),
            };
            trackers.mlflow = trackers.count(started, "mlflow-run");
        }
        let is_told = trackers.mlflow.is_some() || trackers.events.is_some();
        if config.system && (is_told || trackers.screen.shows_machine()) {
            let started = Sampler::start();
            trackers.sampler = trackers.count(started, "");
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
        self.timed(|trackers| {
            trackers.write(m, m.step, m.scalars());
            trackers.screen.step(m);
        });
    }

    /// How long the loop has been here so far. What the trackers' own threads do is not in it.
    pub fn busy(&self) -> Duration {
        self.busy
    }

    fn timed<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let began = Instant::now();
        let done = work(self);
        self.busy += began.elapsed();
        done
    }

    /// Tells TensorBoard what a run is, once, when it begins: its parameters, its spec, its network.
    pub fn describe(&mut self, params: &BTreeMap<String, String>, spec: &str, graph: &[GraphNode]) {
        self.has_hparams = true;
        self.timed_event(|events| {
            let params = params
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()));
            events.hparams(params, &["eval/top1", "eval/loss", "train/loss"])?;
            events.text("spec", 0, &format!("```toml\n{spec}```"))?;
            events.graph(graph)
        });
    }

    /// Shows TensorBoard some images as the network gets them: `side` x `side` RGB of 0 to 255, one after the other.
    pub fn images(&mut self, step: u64, side: usize, pixels: &[u8]) {
        self.timed_event(|events| {
            let images = pixels
                .chunks_exact(side * side * 3)
                .map(|rgb| png(side, rgb));
            let images = images.collect::<io::Result<Vec<_>>>()?;
            events.images("train/images", step, (side, side), &images)
        });
    }

    /// Shows TensorBoard how the values of tensors are spread. Of large ones a sample is looked at.
    pub fn tensors<'a>(&mut self, step: u64, tensors: impl Iterator<Item = (String, &'a [f32])>) {
        self.timed_event(|events| {
            for (name, values) in tensors {
                events.histogram(&name, step, values)?;
            }
            Ok(())
        });
    }

    fn timed_event(&mut self, write: impl FnOnce(&mut EventFile) -> io::Result<()>) {
        self.timed(|trackers| trackers.event(write));
    }

    /// Writes to the event file, if there is one.
    fn event(&mut self, write: impl FnOnce(&mut EventFile) -> io::Result<()>) {
        let written = self.events.as_mut().map_or(Ok(()), write);
        self.count(written, EVENTS);
    }

    /// Records an evaluation.
    pub fn eval(&mut self, m: &EvalMetrics) {
        self.timed(|trackers| trackers.tell_eval(m));
    }

    fn tell_eval(&mut self, m: &EvalMetrics) {
        self.write(m, m.step, m.scalars());
        self.event(|events| {
            let text = format!(
                "| step | epoch | top-1 | top-5 | loss | images |\n|---|---|---|---|---|---|\n| {} | {:.2} | {:.4} | {:.4} | {:.4} | {} |\n",
                m.step, m.epoch, m.top1, m.top5, m.loss, m.images
            );
            events.text("eval/results", m.step, &text)
        });
        self.screen.eval(m);
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
    /// has caught up. A server is not waited for.
    pub fn sync(&mut self) -> u64 {
        self.timed(Self::force)
    }

    fn force(&mut self) -> u64 {
        let synced = self.metrics.sync();
        self.count(synced, "metrics.jsonl");
        let synced = self.events.as_mut().map_or(Ok(()), EventFile::sync);
        self.count(synced, EVENTS);
        match &mut self.mlflow {
            Some(Store::File(writer)) => writer.sync(),
            Some(Store::Server(follower)) => follower.sync(),
            None => {}
        }
        self.hear();
        self.metrics.length()
    }

    /// Ends the run: writes `summary.json` whole or not at all, waits for MLflow (35 s at most, if it is locked), and
    /// tells how much could not be written. In MLflow a run that is dropped without this has failed.
    pub fn finish(&mut self, s: &Summary) {
        self.is_ending = true;
        self.sampler = None;
        // The numbers first: a summary that says `done` must not outlive the lines before it.
        let synced = self.metrics.sync();
        self.count(synced, "metrics.jsonl");
        let written = summary::write(&self.dir, s);
        self.count(written, summary::NAME);
        if self.has_hparams {
            self.event(|events| events.hparams_end(s.status == "done"));
        }
        let synced = self.events.as_mut().map_or(Ok(()), EventFile::sync);
        self.count(synced, EVENTS);
        let results = RESULTS.iter().map(|name| self.dir.join(name));
        let results = results.filter(|file| file.exists()).collect();
        self.end(mlflow::status(s), results);
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

    /// Makes a checkpoint a model of MLflow under `name`, and a version of the registered model of that name, once the
    /// server answers. To be said before [`Trackers::finish`].
    pub fn model(&mut self, file: &Path, name: &str, step: u64) {
        match &mut self.mlflow {
            Some(Store::Server(follower)) => follower.model(&self.dir, file, name, step),
            Some(Store::File(_)) => self.note(&format!(
                "the model {name} is not registered: MLflow without a server has no registry here\n\
                 hint: start `mlflow server` and name it with track.mlflow or MLFLOW_TRACKING_URI"
            )),
            None => {}
        }
        self.hear();
    }

    /// Sets a tag of the run in MLflow; `mlflow.note.content` is what its page shows as the description, in Markdown.
    pub fn tag(&mut self, key: &str, value: &str) {
        match &mut self.mlflow {
            Some(Store::File(writer)) => writer.tag(key, value),
            Some(Store::Server(follower)) => follower.tag(key, value),
            None => {}
        }
        self.hear();
    }

    fn write(&mut self, line: &impl Serialize, step: u64, scalars: Vec<Scalar>) {
        let written = self.metrics.write(line);
        self.count(written, "metrics.jsonl");
        self.point(Point {
            step,
            milliseconds: milliseconds(),
            scalars,
        });
        let samples: Vec<_> = self.sampler.iter().flat_map(Sampler::samples).collect();
        for (milliseconds, scalars) in samples {
            self.screen.machine(&scalars);
            self.point(Point {
                step,
                milliseconds,
                scalars,
            });
        }
        self.hear();
    }

    /// Tells TensorBoard and MLflow.
    fn point(&mut self, point: Point) {
        let written = match &mut self.events {
            Some(events) => events.write(&point),
            None => Ok(()),
        };
        self.count(written, EVENTS);
        match &mut self.mlflow {
            Some(Store::File(writer)) => writer.write(point),
            Some(Store::Server(follower)) => follower.write(point),
            None => {}
        }
    }

    /// Ends the run in MLflow.
    fn end(&mut self, status: &'static str, artifacts: Vec<PathBuf>) {
        match &mut self.mlflow {
            Some(Store::File(writer)) => writer.end(status, artifacts),
            Some(Store::Server(follower)) => follower.end(status, &artifacts),
            None => {}
        }
        self.hear();
    }

    /// Says and counts what MLflow's thread has said since the last time.
    fn hear(&mut self) {
        let said: Vec<Said> = match &self.mlflow {
            Some(Store::File(writer)) => writer.failures().map(Said::Failure).collect(),
            Some(Store::Server(follower)) => follower.said().collect(),
            None => vec![],
        };
        for said in said {
            match said {
                Said::Note(text) => self.note(&text),
                Said::Failure(text) => self.fail(text),
            }
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
            if !self.is_ending {
                self.screen.line(&format!(
                    "tracking fails, the run goes on without it: {failure}"
                ));
            }
            self.first = Some(failure);
        }
    }
}

/// A run that has not been finished has failed.
impl Drop for Trackers {
    fn drop(&mut self) {
        self.end("FAILED", vec![]);
    }
}

/// An image as a PNG file.
fn png(side: usize, rgb: &[u8]) -> io::Result<Vec<u8>> {
    let mut file = vec![];
    let mut encoder = png::Encoder::new(&mut file, side as u32, side as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(rgb));
    written.map_err(io::Error::other)?;
    Ok(file)
}

/// Files of a run directory that become artifacts when the run ends, where they are there.
const RESULTS: [&str; 4] = ["results.tsv", "classes.csv", "confusion.csv", summary::NAME];

/// How failures name the event files.
const EVENTS: &str = "events.out.tfevents";
