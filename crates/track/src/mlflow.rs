//! MLflow: a server ([`follower`]), or without one: `mlflow.db`, an SQLite file that `mlflow ui` opens, and `mlruns/` for artifacts.
//!
//! The file has the tables of an early revision of MLflow's schema; MLflow migrates it when it opens it, and the
//! statements here work before and after, also while a server has it open. A thread of its own writes, so the loop
//! never waits for the database: numbers are collected and written in one transaction at least every 2 s. What cannot
//! be written, because the file is locked or the disk full, is kept, within limits, and tried again.
//!
//! SQLite's write-ahead log needs a local disk: on a network file system two machines would spoil the file.

mod access;
mod follower;
mod journal;
mod rest;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{self, Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{
    self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, TrySendError,
};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

pub use access::{Access, Credentials, without_login};
pub(crate) use follower::{Follower, Said};
pub use follower::{Synced, sync};
pub use rest::Dataset;

use crate::{Point, Resume, Summary, milliseconds, replace};

/// Where MLflow's store is.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// `mlflow.db` and `mlruns/` in a directory, which is made if it is missing. It must be on a local disk.
    Directory(PathBuf),
    /// A server.
    Server(Box<Access>),
}

/// An MLflow store, and what it says about the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlflow {
    /// The store.
    pub place: Place,
    /// Name of the experiment, made if it is missing. A run that resumes stays in the one that it began in.
    pub experiment: String,
    /// Name of the run.
    pub run: String,
    /// What was started: the spec file.
    pub source: String,
    /// The run's parameters: keys and values of the spec. Those of the last start stay. MLflow's limit is 6000
    /// characters a value; what is longer is cut.
    pub params: BTreeMap<String, String>,
    /// Tags beside those of git, of the user and of the source.
    pub tags: BTreeMap<String, String>,
    /// What the run reads. Only a server is told: the file's tables, until MLflow migrates them, have no place for it.
    pub datasets: Vec<Dataset>,
    /// The run that this one is part of, by what its directory's `mlflow-run` holds.
    pub parent: Option<String>,
    /// Files that are copied to the run's artifacts at the start. Results follow at the end.
    pub artifacts: Vec<PathBuf>,
}

const SCHEMA: &str = include_str!("mlflow/schema.sql");
/// In the run directory: the run's identifier in MLflow, so that a resume continues it.
const RUN: &str = "mlflow-run";
/// Between two transactions.
const PACE: Duration = Duration::from_secs(2);
/// A transaction is due before its time when so many points wait.
const BATCH: usize = 1000;
/// Points that may wait in the thread, and as many on the way to it.
const ROOM: usize = 1 << 14;
/// How long SQLite waits for another program's lock. MLflow's migration holds it for less than a second.
const BUSY: Duration = Duration::from_secs(30);
/// How long the loop waits at a checkpoint.
const SYNC: Duration = Duration::from_secs(5);
/// How long the end waits: somewhat longer than SQLite.
const END: Duration = Duration::from_secs(35);
/// MLflow's limits, in characters.
const PARAM_LENGTH: usize = 6000;
const TAG_LENGTH: usize = 5000;

/// A name of MLflow's and a value.
pub(crate) type Tag = (&'static str, String);

enum Message {
    Point(Point),
    Tag(String, String),
    /// Answered when everything before it is in the database; hung up if that failed.
    Sync(Sender<()>),
    /// The run's status, the last artifacts; answered as above.
    End(&'static str, Vec<PathBuf>, Sender<()>),
}

/// MLflow's status for how a run ended.
pub(crate) fn status(summary: &Summary) -> &'static str {
    match summary.status.as_str() {
        "done" => "FINISHED",
        "interrupted" => "KILLED",
        _ => "FAILED",
    }
}

/// The loop's end of the thread that writes.
pub(crate) struct Writer {
    db: String,
    inbox: SyncSender<Message>,
    failed: Sender<String>,
    failures: Receiver<String>,
    /// The answer that the last sync waited for in vain.
    owed: Option<Receiver<()>>,
}

impl Writer {
    /// Starts the thread, which opens the store and begins or continues the run.
    pub(crate) fn start(
        run_dir: &Path,
        dir: &Path,
        config: Mlflow,
        resume: Option<Resume>,
    ) -> io::Result<Self> {
        let dir = path::absolute(dir)?;
        let (inbox, messages) = mpsc::sync_channel(ROOM);
        let (failed, failures) = mpsc::channel();
        let path = dir.join("mlflow.db");
        let db = path.display().to_string();
        let run_file = run_dir.join(RUN);
        let mut worker = Worker {
            path,
            dir,
            config,
            run: String::new(),
            tags: vec![],
            resume,
            open: None,
            pending: vec![],
            words: vec![],
            is_failing: false,
            failed: failed.clone(),
        };
        thread::Builder::new()
            .name("mlflow".into())
            .spawn(move || {
                worker.run = match identifier(&run_file) {
                    Ok(run) => run,
                    Err(error) => {
                        worker.fail(format!("{error}; a resume will be another run"));
                        draw()
                    }
                };
                worker.tags = git_tags(Path::new("."));
                worker.work(&messages);
            })?;
        Ok(Self {
            db,
            inbox,
            failed,
            failures,
            owed: None,
        })
    }

    /// Hands the numbers of a step over, or drops them if the thread is far behind.
    pub(crate) fn write(&self, point: Point) {
        let step = point.step;
        match self.inbox.try_send(Message::Point(point)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.fail(&dropped(step)),
            Err(TrySendError::Disconnected(_)) => self.fail(GONE),
        }
    }

    /// Sets a tag of the run.
    pub(crate) fn tag(&self, key: &str, value: &str) {
        let tag = Message::Tag(key.into(), value.into());
        if self.inbox.try_send(tag).is_err() {
            self.fail("its thread takes nothing more");
        }
    }

    /// Waits until everything is written, but not for long, and not while an earlier sync has no answer.
    pub(crate) fn sync(&mut self) {
        let is_behind = |owed: &Receiver<()>| owed.try_recv() == Err(TryRecvError::Empty);
        if self.owed.as_ref().is_some_and(is_behind) {
            return self.fail("still locked; what was measured waits in memory");
        }
        self.owed = None;
        let (reply, answer) = mpsc::channel();
        if self.inbox.try_send(Message::Sync(reply)).is_err() {
            return self.fail("its thread takes nothing more");
        }
        // A failure to write hangs up and has said why.
        if answer.recv_timeout(SYNC) == Err(RecvTimeoutError::Timeout) {
            let seconds = SYNC.as_secs();
            self.fail(&format!(
                "locked for more than {seconds} s; what was measured waits in memory"
            ));
            self.owed = Some(answer);
        }
    }

    /// Writes what waits, ends the run with a status, and waits for that.
    pub(crate) fn end(&self, status: &'static str, artifacts: Vec<PathBuf>) {
        let lost =
            || format!("locked for too long; the last numbers and the status {status} are lost");
        let (reply, answer) = mpsc::channel();
        let deadline = Instant::now() + END;
        let mut end = Message::End(status, artifacts, reply);
        loop {
            match self.inbox.try_send(end) {
                Ok(()) => break,
                // The thread has been waiting for a lock for long.
                Err(TrySendError::Full(unsent)) if Instant::now() < deadline => end = unsent,
                Err(TrySendError::Full(_)) => return self.fail(&lost()),
                Err(TrySendError::Disconnected(_)) => return self.fail(GONE),
            }
            thread::sleep(Duration::from_millis(20));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // A failure to write hangs up and has said why.
        if answer.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            self.fail(&lost());
        }
    }

    /// What failed since the last time.
    pub(crate) fn failures(&self) -> impl Iterator<Item = String> {
        self.failures.try_iter()
    }

    fn fail(&self, text: &str) {
        // The other end is ours too.
        let _ = self.failed.send(format!("{}: {text}", self.db));
    }
}

const GONE: &str = "its thread is gone";

fn dropped(step: u64) -> String {
    format!("too much is waiting to be written; the numbers of step {step} are dropped")
}

/// The thread's end.
struct Worker {
    path: PathBuf,
    /// Where it is.
    dir: PathBuf,
    config: Mlflow,
    run: String,
    /// Of git.
    tags: Vec<Tag>,
    resume: Option<Resume>,
    open: Option<Store>,
    pending: Vec<Point>,
    /// Tags that are not written yet.
    words: Vec<(String, String)>,
    /// Whether the last attempt failed.
    is_failing: bool,
    failed: Sender<String>,
}

/// The database with the run in it.
struct Store {
    db: Connection,
    artifacts: PathBuf,
}

impl Worker {
    fn work(mut self, messages: &Receiver<Message>) {
        let mut due = Instant::now();
        loop {
            let is_full = self.pending.len() >= BATCH && !self.is_failing;
            if is_full || Instant::now() >= due {
                self.flush();
                due = Instant::now() + PACE;
            }
            let wait = due.saturating_duration_since(Instant::now());
            match messages.recv_timeout(wait) {
                Ok(Message::Point(point)) if self.pending.len() < ROOM => self.pending.push(point),
                Ok(Message::Point(point)) => self.fail(dropped(point.step)),
                Ok(Message::Tag(key, value)) => self.words.push((key, value)),
                Ok(Message::Sync(reply)) => {
                    if self.flush() {
                        // The loop may have stopped waiting.
                        let _ = reply.send(());
                    }
                    due = Instant::now() + PACE;
                }
                Ok(Message::End(status, artifacts, reply)) => {
                    if self.flush() && self.end(status, &artifacts) {
                        // Whoever reads the file next finds one file and no log beside it.
                        self.open = None;
                        let _ = reply.send(());
                    }
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Writes what is pending; whether it is written.
    fn flush(&mut self) -> bool {
        let flushed = self.try_flush();
        self.is_failing = flushed.is_err();
        match flushed {
            Ok(()) => {
                self.pending.clear();
                self.words.clear();
            }
            Err(error) => self.fail(error),
        }
        !self.is_failing
    }

    fn try_flush(&mut self) -> Result<(), Box<dyn Error>> {
        // Writing to a file that someone removed succeeds, so ask for it by name.
        if self.open.is_some() && !self.path.exists() {
            self.open = None;
            self.fail("it was removed; what was in it is lost, and it is made anew");
        }
        let store = match &mut self.open {
            Some(store) => store,
            None => {
                let store = Store::begin(self)?;
                for file in &self.config.artifacts {
                    self.copy(file, &store.artifacts);
                }
                self.open.insert(store)
            }
        };
        store.write(&self.run, &self.pending)?;
        store.tag(&self.run, &self.words)?;
        Ok(())
    }

    fn end(&self, status: &str, artifacts: &[PathBuf]) -> bool {
        let store = self.open.as_ref().expect("a flush has opened it");
        for file in artifacts {
            self.copy(file, &store.artifacts);
        }
        let ended = store.end(&self.run, status);
        let is_ended = ended.is_ok();
        if let Err(error) = ended {
            self.fail(error);
        }
        is_ended
    }

    fn copy(&self, file: &Path, artifacts: &Path) {
        let Some(name) = file.file_name() else { return };
        let copied =
            fs::create_dir_all(artifacts).and_then(|()| fs::copy(file, artifacts.join(name)));
        if let Err(error) = copied {
            self.fail(format!(
                "the artifact {} is missing: {error}",
                file.display()
            ));
        }
    }

    fn fail(&self, what: impl ToString) {
        // After the end nobody listens.
        let _ = self
            .failed
            .send(format!("{}: {}", self.path.display(), what.to_string()));
    }
}

/// The run's identifier that the run directory keeps, or a new one, which is kept.
fn identifier(file: &Path) -> io::Result<String> {
    let kept = fs::read_to_string(file).unwrap_or_default();
    let kept = kept.trim_end();
    if kept.len() == 32 && kept.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(kept.into());
    }
    let id = draw();
    replace(file, &format!("{id}\n"))
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))?;
    Ok(id)
}

/// A new identifier: 32 hexadecimal digits.
fn draw() -> String {
    // Keys that the operating system drew; the rest is so that nothing hangs on them alone.
    let half = || RandomState::new().hash_one((std::process::id(), milliseconds()));
    format!("{:016x}{:016x}", half(), half())
}

/// Who runs this.
fn user() -> String {
    let names = ["LOGNAME", "USER"];
    let user = names.iter().find_map(|name| env::var(name).ok());
    user.unwrap_or_else(|| "unknown".into())
}

impl Store {
    /// Opens or makes the database and begins the run, or continues it as the checkpoint left it.
    fn begin(worker: &Worker) -> Result<Self, Box<dyn Error>> {
        let (config, run) = (&worker.config, worker.run.as_str());
        fs::create_dir_all(&worker.dir)?;
        let mut db = Connection::open(&worker.path)?;
        db.busy_timeout(BUSY)?;
        // Readers and the writer do not lock each other out. Where that cannot be, SQLite keeps its rollback journal.
        db.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let root = worker.dir.join("mlruns");
        make_tables(&transaction, &root)?;
        let begun = transaction
            .query_row(
                "SELECT experiment_id FROM runs WHERE run_uuid = ?1",
                [run],
                |row| row.get(0),
            )
            .optional()?;
        let experiment: i64 = match begun {
            Some(experiment) => experiment,
            None => experiment(&transaction, &config.experiment, &root)?,
        };
        let artifacts = root.join(format!("{experiment}/{run}/artifacts"));
        if begun.is_none() {
            insert_run(&transaction, config, run, experiment)?;
        }
        // A directory that was moved has its artifacts with it.
        transaction.execute(
            "UPDATE runs SET status = 'RUNNING', end_time = NULL, lifecycle_stage = 'active', artifact_uri = ?2
             WHERE run_uuid = ?1",
            params![run, artifacts.display().to_string()],
        )?;
        cut(&transaction, run, worker.resume)?;
        describe(&transaction, run, config, &worker.tags)?;
        transaction.commit()?;
        Ok(Self { db, artifacts })
    }

    fn write(&mut self, run: &str, points: &[Point]) -> rusqlite::Result<()> {
        if points.is_empty() {
            return Ok(());
        }
        let transaction = self
            .db
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut latest = BTreeMap::new();
        {
            let mut insert = transaction.prepare(
                "INSERT OR IGNORE INTO metrics (\"key\", value, timestamp, step, is_nan, run_uuid)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            for point in points {
                let step = point.step as i64;
                for (key, value) in &point.scalars {
                    let (value, is_nan) = stored(*value);
                    insert.execute(params![key, value, point.milliseconds, step, is_nan, run])?;
                    latest.insert(key, (value, point.milliseconds, step, is_nan));
                }
            }
            let mut insert = transaction.prepare(
                "INSERT OR REPLACE INTO latest_metrics (\"key\", value, timestamp, step, is_nan, run_uuid)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            for (key, (value, milliseconds, step, is_nan)) in latest {
                insert.execute(params![key, value, milliseconds, step, is_nan, run])?;
            }
        }
        transaction.commit()
    }

    fn tag(&mut self, run: &str, tags: &[(String, String)]) -> rusqlite::Result<()> {
        if tags.is_empty() {
            return Ok(());
        }
        let behavior = TransactionBehavior::Immediate;
        let transaction = self.db.transaction_with_behavior(behavior)?;
        for (key, value) in tags {
            insert_tag(&transaction, run, key, value)?;
        }
        transaction.commit()
    }

    fn end(&self, run: &str, status: &str) -> rusqlite::Result<()> {
        self.db
            .execute(
                "UPDATE runs SET status = ?2, end_time = ?3 WHERE run_uuid = ?1",
                params![run, status, milliseconds()],
            )
            .map(drop)
    }
}

/// MLflow's columns hold no number that is not finite.
fn stored(value: f64) -> (f64, bool) {
    match value.is_nan() {
        true => (0.0, true),
        false => (value.clamp(f64::MIN, f64::MAX), false),
    }
}

/// Makes the tables and the experiment that always is, if the file is new.
fn make_tables(db: &Transaction<'_>, root: &Path) -> Result<(), Box<dyn Error>> {
    let count = |name: &str| {
        let query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name LIKE ?1";
        db.query_row(query, [name], |row| row.get::<_, i64>(0))
    };
    if count("alembic_version")? == 1 {
        return Ok(());
    }
    if count("%")? > 0 {
        return Err("it is a database, but not one of MLflow\nhint: move it away".into());
    }
    db.execute_batch(SCHEMA)?;
    insert_experiment(db, 0, "Default", root)?;
    Ok(())
}

/// The experiment of that name; it is made if it is missing.
fn experiment(db: &Transaction<'_>, name: &str, root: &Path) -> Result<i64, Box<dyn Error>> {
    let query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?1";
    let found: Option<(i64, String)> = db
        .query_row(query, [name], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match found {
        Some((id, stage)) if stage == "active" => Ok(id),
        Some((id, _)) => Err(format!(
            "the experiment {name:?} is deleted\nhint: name another, or `mlflow experiments restore -x {id}`"
        )
        .into()),
        None => {
            let query = "SELECT coalesce(max(experiment_id), 0) + 1 FROM experiments";
            let id = db.query_row(query, [], |row| row.get(0))?;
            insert_experiment(db, id, name, root)?;
            Ok(id)
        }
    }
}

fn insert_experiment(
    db: &Transaction<'_>,
    id: i64,
    name: &str,
    root: &Path,
) -> rusqlite::Result<()> {
    let location = root.join(id.to_string()).display().to_string();
    db.execute(
        "INSERT INTO experiments
         (experiment_id, name, artifact_location, lifecycle_stage, creation_time, last_update_time)
         VALUES (?1, ?2, ?3, 'active', ?4, ?4)",
        params![id, name, location, milliseconds()],
    )
    .map(drop)
}

fn insert_run(
    db: &Transaction<'_>,
    config: &Mlflow,
    run: &str,
    experiment: i64,
) -> rusqlite::Result<()> {
    let user = user();
    db.execute(
        "INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
                           source_version, lifecycle_stage, experiment_id)
         VALUES (?1, ?2, 'LOCAL', ?3, '', ?4, 'RUNNING', ?5, '', 'active', ?6)",
        params![
            run,
            config.run,
            config.source,
            user,
            milliseconds(),
            experiment
        ],
    )?;
    let tags = [
        ("mlflow.runName", config.run.as_str()),
        ("mlflow.user", &user),
        ("mlflow.source.name", config.source.as_str()),
        ("mlflow.source.type", "LOCAL"),
    ];
    tags.iter()
        .try_for_each(|(key, value)| insert_tag(db, run, key, value))
}

/// Removes what came after the checkpoint, and makes the newest values that are left the latest.
fn cut(db: &Transaction<'_>, run: &str, resume: Option<Resume>) -> rusqlite::Result<()> {
    match resume {
        // The rule is that of `Resume::keeps`.
        Some(resume) => db.execute(
            "DELETE FROM metrics
             WHERE run_uuid = ?1 AND (step > ?2 OR step = ?2 AND NOT ?3 AND substr(\"key\", 1, 5) = 'eval/')",
            params![run, resume.step as i64, resume.is_evaluated],
        )?,
        None => {
            db.execute(
                "UPDATE runs SET start_time = ?2 WHERE run_uuid = ?1",
                params![run, milliseconds()],
            )?;
            db.execute("DELETE FROM metrics WHERE run_uuid = ?1", [run])?
        }
    };
    db.execute("DELETE FROM latest_metrics WHERE run_uuid = ?1", [run])?;
    // SQLite takes the other columns of a group from the row that has the maximum.
    db.execute(
        "INSERT INTO latest_metrics (\"key\", value, timestamp, step, is_nan, run_uuid)
         SELECT \"key\", value, timestamp, max(step), is_nan, run_uuid FROM metrics
         WHERE run_uuid = ?1 GROUP BY \"key\"",
        [run],
    )?;
    Ok(())
}

/// What this start knows about the run.
fn describe(
    db: &Transaction<'_>,
    run: &str,
    config: &Mlflow,
    tags: &[Tag],
) -> rusqlite::Result<()> {
    db.execute("DELETE FROM params WHERE run_uuid = ?1", [run])?;
    for (key, value) in &config.params {
        db.execute(
            "INSERT INTO params (\"key\", value, run_uuid) VALUES (?1, ?2, ?3)",
            [key.as_str(), first(value, PARAM_LENGTH), run],
        )?;
    }
    for (key, value) in &config.tags {
        insert_tag(db, run, key, value)?;
    }
    if let Some(parent) = &config.parent {
        insert_tag(db, run, "mlflow.parentRunId", parent)?;
    }
    tags.iter()
        .try_for_each(|(key, value)| insert_tag(db, run, key, value))
}

fn insert_tag(db: &Transaction<'_>, run: &str, key: &str, value: &str) -> rusqlite::Result<()> {
    db.execute(
        "INSERT OR REPLACE INTO tags (\"key\", value, run_uuid) VALUES (?1, ?2, ?3)",
        [key, first(value, TAG_LENGTH), run],
    )
    .map(drop)
}

/// The first characters of a text.
fn first(text: &str, characters: usize) -> &str {
    match text.char_indices().nth(characters) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// The commit that a directory is at, its branch, and whether tracked files differ from it; nothing where there is no
/// git or no commit. Nothing is written, no lock is taken.
fn git_tags(dir: &Path) -> Vec<Tag> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.arg("--no-optional-locks").arg("-C").arg(dir);
        command.args(arguments).stdin(Stdio::null());
        let output = command.output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let Some(commit) = git(&["rev-parse", "HEAD"]) else {
        return vec![];
    };
    let mut tags = vec![("mlflow.source.git.commit", commit)];
    let branch = git(&["rev-parse", "--abbrev-ref", "HEAD"]);
    // A detached head has no branch and is called that.
    tags.extend(
        branch
            .filter(|branch| branch != "HEAD")
            .map(|branch| ("mlflow.source.git.branch", branch)),
    );
    let changes = git(&["status", "--porcelain", "--untracked-files=no"]);
    tags.extend(changes.map(|c| ("mlflow.source.git.dirty", (!c.is_empty()).to_string())));
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_not_finite_is_stored_as_mlflow_does() {
        assert_eq!(stored(0.5), (0.5, false));
        assert_eq!(stored(f64::NAN), (0.0, true));
        assert_eq!(stored(f64::INFINITY), (1.797_693_134_862_315_7e308, false));
        assert_eq!(
            stored(f64::NEG_INFINITY),
            (-1.797_693_134_862_315_7e308, false)
        );
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(first("äöü", 2), "äö");
        assert_eq!(first("äöü", 3), "äöü");
        assert_eq!(first("", 0), "");
    }

    #[test]
    fn a_summary_has_a_status() {
        let check = |text: &str, expected| {
            let summary = Summary {
                time: None,
                status: text.into(),
                step: 0,
                eval: None,
                best: None,
                images_per_s: 0.0,
                input_wait_fraction: 0.0,
                reason: None,
            };
            assert_eq!(status(&summary), expected);
        };
        check("done", "FINISHED");
        check("interrupted", "KILLED");
        check("failed", "FAILED");
    }

    fn git(dir: &Path, arguments: &str) -> Option<String> {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=x", "-c", "user.email=x@example.com", "-C"]);
        let output = command.arg(dir).args(arguments.split(' ')).output().ok()?;
        assert!(output.status.success(), "{output:?}");
        Some(String::from_utf8(output.stdout).unwrap().trim().into())
    }

    #[test]
    fn git_says_commit_branch_and_changes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        if git(dir.path(), "init --quiet --initial-branch=trunk").is_none() {
            eprintln!("SKIP: there is no git; install it to test the tags that it gives");
            return;
        }
        assert_eq!(git_tags(dir.path()), [], "there is no commit yet");
        fs::write(&file, "one").unwrap();
        git(dir.path(), "add file");
        git(dir.path(), "commit --quiet --message=one");
        let commit = git(dir.path(), "rev-parse HEAD").unwrap();
        let tags = |branch: Option<&str>, is_dirty: &str| {
            let commit = Some(("mlflow.source.git.commit", commit.clone()));
            let branch = branch.map(|b| ("mlflow.source.git.branch", b.to_string()));
            let dirty = Some(("mlflow.source.git.dirty", is_dirty.to_string()));
            [commit, branch, dirty]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        };
        fs::write(dir.path().join("untracked"), "").unwrap();
        assert_eq!(git_tags(dir.path()), tags(Some("trunk"), "false"));
        fs::write(&file, "two").unwrap();
        assert_eq!(git_tags(dir.path()), tags(Some("trunk"), "true"));
        git(dir.path(), "checkout --quiet --detach");
        assert_eq!(git_tags(dir.path()), tags(None, "true"));
    }

    #[test]
    fn without_git_there_are_no_tags() {
        assert_eq!(git_tags(Path::new("/nowhere/at/all")), []);
    }
}
