//! Follows the journal of a run and tells a server, from a thread of its own; `runner track sync` does the same later.
//!
//! How far it has come is in `mlflow.sent`, per server. Everything may be sent again: metrics, parameters, tags and
//! files are the same when they come twice, a run is found by its tag `runner.key`, a model by its run.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::access::Access;
use super::journal::{self, Event, JOURNAL, Journal, Start};
use super::rest::{Client, ENTITIES, Metric, NewRun, PARAMS, Pair, Refusal, Run, plain_key};
use super::{END, Mlflow, PACE, PARAM_LENGTH, RUN, TAG_LENGTH, first, git_tags, identifier, user};
use crate::{Point, Resume, milliseconds, replace};

/// In the run directory: what of the journal each server has.
const SENT: &str = "mlflow.sent";
/// The tag by which a run is found again.
const KEY: &str = "runner.key";
/// The tag that names the run that a run is part of.
const PARENT: &str = "runner.parent";
const MLFLOW_PARENT: &str = "mlflow.parentRunId";

/// What the thread has to say.
pub(crate) enum Said {
    /// Something to know.
    Note(String),
    /// Something is lost, or waits in the journal when the run ends.
    Failure(String),
}

/// The loop's end: what it is told is in the journal when it returns.
pub(crate) struct Follower {
    journal: Journal,
    end: Sender<Sender<()>>,
    saying: Sender<Said>,
    said: Receiver<Said>,
}

impl Follower {
    /// Opens the journal of a run directory and starts the thread that sends it.
    pub(crate) fn start(
        dir: &Path,
        config: &Mlflow,
        access: &Access,
        resume: Option<Resume>,
    ) -> io::Result<Self> {
        let key_file = dir.join(RUN);
        let mut start = Start {
            key: identifier(&key_file)?,
            time: milliseconds(),
            experiment: config.experiment.clone(),
            run: config.run.clone(),
            source: config.source.clone(),
            user: user(),
            parent: config.parent.clone(),
            params: config.params.clone(),
            tags: config.tags.clone(),
            datasets: config.datasets.clone(),
        };
        start.tag(git_tags(Path::new(".")));
        let renew = || {
            fs::remove_file(&key_file)?;
            identifier(&key_file)
        };
        let mut journal = Journal::open(dir, resume, start, renew)?;
        for file in &config.artifacts {
            journal.append(&Event::Artifact {
                file: relative(file, dir),
            })?;
        }
        let (end, ends) = mpsc::channel();
        let (saying, said) = mpsc::channel();
        match Courier::new(dir, access, saying.clone()) {
            Ok(courier) => {
                let builder = thread::Builder::new().name("mlflow".into());
                builder.spawn(move || courier.follow(&ends))?;
            }
            // The journal is kept all the same.
            Err(what) => drop(saying.send(Said::Failure(what))),
        }
        Ok(Self {
            journal,
            end,
            saying,
            said,
        })
    }

    pub(crate) fn write(&mut self, point: Point) {
        let scalars = point.scalars.into_iter();
        let scalars = scalars.map(|(name, value)| (name.into_owned(), value));
        let written = self
            .journal
            .metrics(point.milliseconds, point.step, scalars);
        self.count(written.map(drop));
    }

    /// A checkpoint is to be a model.
    pub(crate) fn model(&mut self, dir: &Path, file: &Path, name: &str, step: u64) {
        let written = self.journal.append(&Event::Model {
            file: relative(file, dir),
            name: name.into(),
            step,
            time: milliseconds(),
        });
        self.count(written);
    }

    /// Sets a tag of the run.
    pub(crate) fn tag(&mut self, key: &str, value: &str) {
        let tags = BTreeMap::from([(key.to_string(), value.to_string())]);
        let written = self.journal.append(&Event::Tags { tags });
        self.count(written);
    }

    /// Forces the journal to the disk; the server is not waited for.
    pub(crate) fn sync(&mut self) {
        let synced = self.journal.sync();
        self.count(synced);
    }

    /// Says that the run ends, and waits until the server knows, but not for long.
    pub(crate) fn end(&mut self, status: &str, artifacts: &[PathBuf]) {
        for file in artifacts {
            let dir = file.parent().unwrap_or(Path::new(""));
            let written = self.journal.append(&Event::Artifact {
                file: relative(file, dir),
            });
            self.count(written);
        }
        let written = self.journal.append(&Event::End {
            time: milliseconds(),
            status: status.into(),
        });
        self.count(written);
        self.sync();
        let (reply, answer) = mpsc::channel();
        // A thread that is gone has said why.
        if self.end.send(reply).is_ok()
            && answer.recv_timeout(END) == Err(RecvTimeoutError::Timeout)
        {
            let path = self.journal.path().display();
            let seconds = END.as_secs();
            self.fail(format!(
                "{path}: not all sent after {seconds} s; it is kept\n{}",
                hint(self.journal.path())
            ));
        }
    }

    /// What there is to say since the last time.
    pub(crate) fn said(&self) -> impl Iterator<Item = Said> {
        self.said.try_iter()
    }

    fn count(&self, written: io::Result<()>) {
        if let Err(error) = written {
            self.fail(format!("{}: {error}", self.journal.path().display()));
        }
    }

    fn fail(&self, what: String) {
        // The other end is ours too.
        let _ = self.saying.send(Said::Failure(what));
    }
}

/// How to send what a server has missed.
fn hint(journal: &Path) -> String {
    let dir = journal.parent().unwrap_or(journal);
    format!(
        "hint: when the server is back: runner track sync {}",
        dir.display()
    )
}

/// A file of the run directory by its path there, so that the directory may move.
fn relative(file: &Path, dir: &Path) -> PathBuf {
    match file.strip_prefix(dir) {
        Ok(inside) => inside.into(),
        // Readers start from the run directory, not from where we are.
        Err(_) => std::path::absolute(file).unwrap_or_else(|_| file.into()),
    }
}

/// How far a server is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sent {
    /// Bytes of the journal.
    bytes: u64,
    /// The run that the bytes end in.
    #[serde(default)]
    key: String,
    /// What the server calls it.
    #[serde(default)]
    run: String,
    #[serde(default)]
    experiment: String,
    #[serde(default)]
    artifacts: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    held: Vec<Held>,
}

/// A file or a model that the server has not taken. What follows it in the journal is sent all the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    /// Where its event begins in the journal.
    at: u64,
    /// The run that it belongs to, as in [`Sent`].
    run: String,
    experiment: String,
    artifacts: String,
}

/// Carries a journal to a server.
pub(crate) struct Courier {
    access: Access,
    client: Client,
    dir: PathBuf,
    journal: PathBuf,
    sent: Sent,
    saying: Sender<Said>,
    /// Events that the server refuses, or that were lost.
    dropped: u64,
    delivered: u64,
    /// When what is held is tried again, and how often it was.
    again: Instant,
    tries: u32,
}

impl Courier {
    fn new(dir: &Path, access: &Access, saying: Sender<Said>) -> Result<Self, String> {
        let journal = dir.join(JOURNAL);
        let sent = all_sent(dir).remove(&access.url).unwrap_or_default();
        // A journal that a crash has cut may be shorter than what the server got: sent again, it changes nothing there.
        let written = std::fs::metadata(&journal).map_or(0, |m| m.len());
        let sent = if sent.bytes > written {
            Sent::default()
        } else {
            sent
        };
        Ok(Self {
            client: Client::new(access)?,
            access: access.clone(),
            dir: dir.into(),
            journal,
            sent,
            saying,
            dropped: 0,
            delivered: 0,
            again: Instant::now(),
            tries: 0,
        })
    }

    /// The thread: sends what is new every [`PACE`] until the end.
    fn follow(mut self, ends: &Receiver<Sender<()>>) {
        let (mut failures, mut wait) = (0, Duration::ZERO);
        loop {
            let reply = match ends.recv_timeout(wait) {
                Ok(reply) => Some(reply),
                Err(RecvTimeoutError::Timeout) => None,
                // Dropped without an end, which cannot be: `Trackers` ends what it drops.
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Some(reply) = reply {
                self.hurry();
                // The loop may have stopped waiting.
                let _ = reply.send(());
                return;
            }
            wait = match self.drain() {
                Ok(()) => {
                    if failures > 0 {
                        self.note(format!("{} answers again, and has all", self.access.url));
                    }
                    failures = 0;
                    PACE
                }
                Err(refusal) => {
                    if failures == 0 {
                        let path = self.journal.display();
                        self.note(format!(
                            "mlflow: {refusal}\nthe run goes on, and what it tells waits in {path}"
                        ));
                    }
                    failures += 1;
                    match refusal {
                        Refusal::Denied(_) => Duration::from_secs(60),
                        _ => self.access.pause(failures).max(PACE),
                    }
                }
            };
        }
    }

    /// The program ends: tries until all is sent, or often enough, or the time is up, or there is no point.
    fn hurry(&mut self) {
        let deadline = Instant::now() + END - PACE;
        let mut retry = 0;
        let refusal = loop {
            let refusal = match self.drain().and_then(|()| self.release()) {
                Ok(()) => return,
                Err(refusal) => refusal,
            };
            let next = Instant::now() + self.access.pause(retry).min(2 * PACE);
            let is_hopeless = !refusal.is_passing();
            if is_hopeless || retry >= self.access.retries || next > deadline {
                break refusal;
            }
            thread::sleep(next.saturating_duration_since(Instant::now()));
            retry += 1;
        };
        let waiting = self.waiting();
        let (path, hint) = (self.journal.display(), hint(&self.journal));
        self.fail(format!(
            "{waiting} events wait in {path}: {refusal}\n{hint}"
        ));
    }

    /// Events that are not sent yet.
    fn waiting(&self) -> u64 {
        let (mut count, mut offset) = (self.sent.held.len() as u64, self.sent.bytes);
        while let Ok(events) = journal::read(&self.journal, offset)
            && let Some((_, end)) = events.last()
        {
            (count, offset) = (count + events.len() as u64, *end);
        }
        count
    }

    /// Sends all that there is. Files and models that the server does not take are held; when their time has come they
    /// are tried again.
    fn drain(&mut self) -> Result<(), Refusal> {
        loop {
            let events = journal::read(&self.journal, self.sent.bytes)
                .map_err(|error| Refusal::Denied(format!("{}: {error}", self.journal.display())))?;
            if events.is_empty() {
                if Instant::now() >= self.again {
                    // Said when it began; the rest goes on.
                    let _ = self.release();
                }
                return Ok(());
            }
            let mut rest = &events[..];
            while let Some((event, end)) = rest.first() {
                let (result, count) = match event {
                    Some(Event::Metrics { .. }) => {
                        let count = batch(rest);
                        (self.metrics(&rest[..count]), count)
                    }
                    Some(event) => (self.event(event), 1),
                    None => {
                        let what = "a line of the journal is none of ours".to_string();
                        self.drop_events(1, &what);
                        (Ok(()), 1)
                    }
                };
                let end = rest.get(count - 1).map_or(*end, |(_, end)| *end);
                let is_file = matches!(event, Some(Event::Artifact { .. } | Event::Model { .. }));
                match result {
                    Ok(()) => self.delivered += count as u64,
                    Err(Refusal::Rejected { code, message }) => {
                        self.check_run()?;
                        self.drop_events(count, &format!("{code}: {message}"));
                    }
                    Err(refusal @ (Refusal::Failing(_) | Refusal::Denied(_))) if is_file => {
                        self.hold(&refusal);
                    }
                    Err(refusal) => return Err(refusal),
                }
                rest = &rest[count..];
                self.sent.bytes = end;
                self.save();
            }
        }
    }

    /// Puts the event behind what has been sent aside.
    fn hold(&mut self, refusal: &Refusal) {
        if self.sent.held.is_empty() {
            self.note(format!(
                "mlflow: a file is not taken, and is tried again later: {refusal}\nwhat comes after it is sent"
            ));
            self.tries = 0;
            self.again = Instant::now() + self.access.pause(1).max(PACE);
        }
        self.sent.held.push(Held {
            at: self.sent.bytes,
            run: self.sent.run.clone(),
            experiment: self.sent.experiment.clone(),
            artifacts: self.sent.artifacts.clone(),
        });
    }

    /// Tries again what is held.
    fn release(&mut self) -> Result<(), Refusal> {
        let mut result = Ok(());
        let held = std::mem::take(&mut self.sent.held);
        if held.is_empty() {
            return Ok(());
        }
        let now = self.sent.clone();
        for one in held {
            let events = journal::read(&self.journal, one.at);
            let event = events.ok().and_then(|events| events.into_iter().next()?.0);
            let Some(event) = event else {
                let what = "what was held is not in the journal any more";
                self.drop_events(1, what);
                continue;
            };
            (self.sent.run, self.sent.experiment, self.sent.artifacts) = (
                one.run.clone(),
                one.experiment.clone(),
                one.artifacts.clone(),
            );
            let told = self.event(&event);
            (self.sent.run, self.sent.experiment, self.sent.artifacts) = (
                now.run.clone(),
                now.experiment.clone(),
                now.artifacts.clone(),
            );
            match told {
                Ok(()) => self.delivered += 1,
                Err(Refusal::Rejected { code, message }) => {
                    self.drop_events(1, &format!("{code}: {message}"));
                }
                Err(refusal) => {
                    self.sent.held.push(one);
                    result = Err(refusal);
                }
            }
        }
        self.tries += 1;
        self.again = Instant::now() + self.access.pause(self.tries + 1).max(PACE);
        self.save();
        result
    }

    /// Whether the server still has the run: if not, what it refuses must not be dropped.
    fn check_run(&self) -> Result<(), Refusal> {
        let id = &self.sent.run;
        if id.is_empty() {
            return Ok(());
        }
        let (url, dir) = (&self.access.url, self.dir.display());
        match self.client.run(id) {
            Ok(run) if run.is_deleted => Err(Refusal::Denied(format!(
                "{url}: the run {id} is deleted there\nhint: `mlflow runs restore --run-id {id}`; what it missed follows"
            ))),
            Ok(_) => Ok(()),
            Err(refusal) if refusal.is("RESOURCE_DOES_NOT_EXIST") => Err(Refusal::Denied(format!(
                "{url}: the run {id} is gone there\nhint: remove {dir}/{SENT}, and it is made anew, with all that it \
                 told"
            ))),
            Err(Refusal::Rejected { .. }) => Ok(()),
            Err(refusal) => Err(refusal),
        }
    }

    /// Sends the numbers of some events; halves them where the server refuses, to lose no more than it refuses.
    fn metrics(&mut self, events: &[(Option<Event>, u64)]) -> Result<(), Refusal> {
        let mut metrics = vec![];
        for (event, _) in events {
            if let Some(Event::Metrics { time, step, values }) = event {
                metrics.extend(values.iter().map(|(key, value)| Metric {
                    key: plain_key(key),
                    value: *value,
                    timestamp: *time,
                    step: *step,
                }));
            }
        }
        let run = self.run()?.to_owned();
        let mut sent = Ok(());
        for chunk in metrics.chunks(ENTITIES) {
            sent = sent.and_then(|()| self.client.log_batch(&run, chunk, &[], &[]));
        }
        match sent {
            Err(Refusal::Rejected { .. }) if events.len() > 1 => {
                self.check_run()?;
                let (first, second) = events.split_at(events.len() / 2);
                for half in [first, second] {
                    match self.metrics(half) {
                        Err(Refusal::Rejected { code, message }) => {
                            self.drop_events(half.len(), &format!("{code}: {message}"));
                        }
                        other => other?,
                    }
                }
                Ok(())
            }
            sent => sent,
        }
    }

    fn event(&mut self, event: &Event) -> Result<(), Refusal> {
        match event {
            Event::Start(start) => self.begin(start),
            Event::Metrics { .. } => unreachable!("numbers go in batches"),
            Event::Tags { tags } => {
                let tags = tags.iter();
                let tags: Vec<Pair> = tags
                    .map(|(key, value)| Pair::new(&plain_key(key), first(value, TAG_LENGTH)))
                    .collect();
                self.client.log_batch(self.run()?, &[], &[], &tags)
            }
            Event::Artifact { file } => {
                self.run()?;
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                self.client
                    .upload(&self.sent.artifacts, &name, &self.dir.join(file))
            }
            Event::Model {
                file,
                name,
                step,
                time,
            } => self.model(file, name, *step, *time),
            Event::End { time, status } => {
                let run = self.run()?;
                self.client.update_run(run, status, Some(*time))
            }
        }
    }

    /// The server's identifier of the run that the journal is in.
    fn run(&self) -> Result<&str, Refusal> {
        match self.sent.run.as_str() {
            "" => Err(Refusal::Rejected {
                code: "NO_RUN".into(),
                message: "the journal does not say which run it is about".into(),
            }),
            run => Ok(run),
        }
    }

    /// Begins the run on the server, or finds it, and says what its start knows.
    fn begin(&mut self, start: &Start) -> Result<(), Refusal> {
        let run = match self.sent.key == start.key {
            true => self.client.run(&self.sent.run),
            false => self.find_or_create(start),
        };
        let run = run.map_err(|refusal| match refusal {
            // Without a run nothing else can be said: this is not to be passed over.
            Refusal::Rejected { code, message } => Refusal::Denied(format!(
                "{}: cannot begin the run: {code}: {message}",
                self.access.url
            )),
            other => other,
        })?;
        let is_new = self.sent.key != start.key;
        self.sent = Sent {
            bytes: self.sent.bytes,
            key: start.key.clone(),
            run: run.id.clone(),
            experiment: run.experiment.clone(),
            artifacts: run.artifacts.clone(),
            held: std::mem::take(&mut self.sent.held),
        };
        self.save();
        self.check_run()?;
        if !is_new {
            self.client.update_run(&run.id, "RUNNING", None)?;
        }
        let mut params = vec![];
        for (key, value) in &start.params {
            let pair = Pair::new(&plain_key(key), first(value, PARAM_LENGTH));
            match run.params.get(&pair.key) {
                None => params.push(pair),
                Some(there) if *there == pair.value => {}
                Some(there) => self.note(format!(
                    "mlflow: {} stays {there} there, which MLflow does not let change; it is {} now",
                    pair.key, pair.value
                )),
            }
        }
        let tags: Vec<Pair> = start
            .tags
            .iter()
            .map(|(key, value)| Pair::new(&plain_key(key), first(value, TAG_LENGTH)))
            .collect();
        for chunk in params.chunks(PARAMS) {
            self.client.log_batch(&run.id, &[], chunk, &[])?;
        }
        for chunk in tags.chunks(PARAMS) {
            self.client.log_batch(&run.id, &[], &[], chunk)?;
        }
        if !start.datasets.is_empty() {
            self.client.log_inputs(&run.id, &start.datasets)?;
        }
        self.adopt(start, &run)
    }

    fn find_or_create(&self, start: &Start) -> Result<Run, Refusal> {
        if let Some(id) = &self.access.run_id {
            let run = self.client.run(id)?;
            let key = [Pair::new(KEY, start.key.as_str())];
            self.client.log_batch(&run.id, &[], &[], &key)?;
            return Ok(run);
        }
        let experiment = match &self.access.experiment_id {
            Some(id) => id.clone(),
            None => self.client.experiment(&start.experiment)?,
        };
        let mut known = self.client.runs_tagged(&experiment, KEY, &start.key)?;
        if !known.is_empty() {
            return Ok(known.swap_remove(0));
        }
        let mut tags = vec![
            Pair::new(KEY, start.key.as_str()),
            Pair::new("mlflow.user", start.user.as_str()),
            Pair::new("mlflow.source.name", start.source.as_str()),
            Pair::new("mlflow.source.type", "LOCAL"),
            Pair::new("mlflow.runName", start.run.as_str()),
        ];
        if let Some(parent) = &start.parent {
            tags.push(Pair::new(PARENT, parent.as_str()));
            let parents = self.client.runs_tagged(&experiment, KEY, parent)?;
            if let Some(parent) = parents.first() {
                tags.push(Pair::new(MLFLOW_PARENT, parent.id.as_str()));
            }
        }
        self.client.create_run(&NewRun {
            experiment: &experiment,
            user: &start.user,
            name: &start.run,
            start: start.time,
            tags: &tags,
        })
    }

    /// Runs that are part of this one and came to the server first have not found it; and the other way round.
    fn adopt(&self, start: &Start, run: &Run) -> Result<(), Refusal> {
        let set = |child: &str, parent: &str| {
            let tag = [Pair::new(MLFLOW_PARENT, parent)];
            self.client.log_batch(child, &[], &[], &tag)
        };
        for child in self
            .client
            .runs_tagged(&run.experiment, PARENT, &start.key)?
        {
            set(&child.id, &run.id)?;
        }
        if let Some(parent) = &start.parent {
            let parents = self.client.runs_tagged(&run.experiment, KEY, parent)?;
            if let Some(parent) = parents.first() {
                set(&run.id, &parent.id)?;
            }
        }
        Ok(())
    }

    /// Makes a checkpoint a logged model and a version of a registered one.
    fn model(&self, file: &Path, name: &str, step: u64, time: i64) -> Result<(), Refusal> {
        let run = self.run()?;
        let experiment = &self.sent.experiment;
        let known = self.client.logged_model(experiment, run, name)?;
        let model = match known {
            Some(known) => known,
            None => {
                let tags = [Pair::new("runner.step", step.to_string())];
                self.client
                    .create_logged_model(experiment, run, name, &tags)?
            }
        };
        if model.status != "LOGGED_MODEL_READY" {
            let path = self.dir.join(file);
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            let uri = &model.artifact_uri;
            self.client.upload(uri, &file, &path)?;
            let text = mlmodel(&file, run, &model.model_id, time);
            self.client.upload_text(uri, "MLmodel", &text)?;
            self.client
                .finish_logged_model(run, &model.model_id, step)?;
        }
        let version = self.client.register(name, run, &model)?;
        self.note(format!(
            "mlflow: the best checkpoint is {name} version {version}"
        ));
        Ok(())
    }

    /// Keeps how far the server is. Should this fail, or be lost, all is sent again, which changes nothing.
    fn save(&self) {
        let mut all = all_sent(&self.dir);
        all.insert(self.access.url.clone(), self.sent.clone());
        let text = serde_json::to_string(&all).expect("keys are strings");
        let _ = replace(&self.dir.join(SENT), &format!("{text}\n"));
    }

    fn drop_events(&mut self, count: usize, why: &str) {
        self.dropped += count as u64;
        let url = &self.access.url;
        self.fail(format!(
            "{url} refuses {count} events, which are dropped: {why}"
        ));
    }

    fn note(&self, what: String) {
        // After the end nobody listens.
        let _ = self.saying.send(Said::Note(what));
    }

    fn fail(&self, what: String) {
        let _ = self.saying.send(Said::Failure(what));
    }
}

/// How many of the events, which begin with numbers, make a request: up to [`ENTITIES`] numbers, one event at least.
fn batch(events: &[(Option<Event>, u64)]) -> usize {
    let mut numbers = 0;
    let fitting = events.iter().take_while(|(event, _)| match event {
        Some(Event::Metrics { values, .. }) => {
            numbers += values.len();
            numbers <= ENTITIES
        }
        _ => false,
    });
    fitting.count().max(1)
}

fn all_sent(dir: &Path) -> BTreeMap<String, Sent> {
    let text = fs::read_to_string(dir.join(SENT)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// The file that makes a directory a model of MLflow. The flavour is ours: a checkpoint that `runner` reads.
fn mlmodel(file: &str, run: &str, model: &str, time: i64) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let time = utc(time);
    format!(
        "artifact_path: {model}\nflavors:\n  runner:\n    checkpoint: {file}\n    format: safetensors\n    \
         runner_version: {version}\nmodel_id: {model}\nmodel_uuid: {model}\nrun_id: {run}\n\
         utc_time_created: '{time}'\n"
    )
}

/// Milliseconds since 1970 as `2026-11-28 12:34:56.789000`.
fn utc(milliseconds: i64) -> String {
    let (days, rest) = (
        milliseconds.div_euclid(86_400_000),
        milliseconds.rem_euclid(86_400_000),
    );
    // Days to a date of the Gregorian calendar, counted in eras of 400 years from March 1 of the year 0, so that leap
    // days come last (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (seconds, millis) = (rest / 1000, rest % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{date:02} {hour:02}:{minute:02}:{second:02}.{millis:03}000")
}

/// What [`sync`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Synced {
    /// Events that the server has now and did not have before.
    pub sent: u64,
    /// Events that it refuses.
    pub dropped: u64,
}

/// Sends what a server has not got of the journal in a run directory; `say` hears of what is refused.
///
/// # Errors
/// If there is no journal, or the server does not answer after the retries that `access` allows, or lets nobody in.
/// What was sent until then stays sent.
pub fn sync(dir: &Path, access: &Access, mut say: impl FnMut(&str)) -> Result<Synced, String> {
    if !dir.join(JOURNAL).exists() {
        return Err(format!(
            "{}: there is no {JOURNAL}\nhint: a run has one if track.mlflow, or MLFLOW_TRACKING_URI, named a server \
             when it ran",
            dir.display()
        ));
    }
    let (saying, said) = mpsc::channel();
    let mut courier = Courier::new(dir, access, saying)?;
    let mut retry = 0;
    loop {
        let before = courier.sent.bytes;
        let drained = courier.drain();
        for said in said.try_iter() {
            let (Said::Note(text) | Said::Failure(text)) = said;
            say(&text);
        }
        if courier.sent.bytes > before {
            retry = 0;
        }
        match drained.and_then(|()| courier.release()) {
            Ok(()) => {
                return Ok(Synced {
                    sent: courier.delivered,
                    dropped: courier.dropped,
                });
            }
            Err(refusal) if refusal.is_passing() && retry < access.retries => {
                if retry == 0 {
                    say(&format!("{refusal}; trying again"));
                }
                thread::sleep(access.pause(retry));
                retry += 1;
            }
            Err(refusal) => {
                let waiting = courier.waiting();
                return Err(format!(
                    "{refusal}\n{waiting} events wait in {}",
                    courier.journal.display()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlflow::journal::Number;

    fn numbers(count: usize) -> (Option<Event>, u64) {
        let values = (0..count).map(|i| (i.to_string(), Number(0.0)));
        let event = Event::Metrics {
            time: 0,
            step: 0,
            values: values.collect(),
        };
        (Some(event), 0)
    }

    #[test]
    fn a_batch_has_at_most_a_thousand_numbers() {
        let end = Event::End {
            time: 0,
            status: "FINISHED".into(),
        };
        assert_eq!(batch(&[numbers(400), numbers(600), numbers(1)]), 2);
        assert_eq!(batch(&[numbers(999), numbers(2)]), 1);
        assert_eq!(batch(&[numbers(1500), numbers(2)]), 1);
        assert_eq!(batch(&[numbers(5), (Some(end), 0), numbers(5)]), 1);
        assert_eq!(batch(&[numbers(5), (None, 0)]), 1);
    }

    /// Against Python's `datetime.fromtimestamp(.., timezone.utc)`.
    #[test]
    fn times_are_dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00.000000");
        assert_eq!(utc(951_782_400_001), "2000-02-29 00:00:00.001000");
        assert_eq!(utc(1_795_824_000_000 - 1), "2026-11-27 23:59:59.999000");
        assert_eq!(utc(4_107_542_399_999), "2100-02-28 23:59:59.999000");
    }
}
