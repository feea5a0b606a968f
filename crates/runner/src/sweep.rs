//! `runner sweep`: many runs from one file, each a process of its own.
//!
//! A run lives in a directory that is named after what it computes, so a sweep that is started again finds what it has:
//! finished runs are passed over, others go on. What a round of successive halving decides by is kept in `sweep.json`,
//! for a run that has gone on no longer says what it had reached then.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use spec::{Cell, Halving, Layers, Mode, Sweep};
use store::Lease;
use track::{EvalMetrics, Mlflow, Summary, Terminal, Trackers, read_summary};

use crate::cli::SweepArgs;
use crate::failure::{Failure, INTERRUPTED};
use crate::run::stop_on_signals;
use crate::{config, output, tracking};

/// What a run had reached at the end of a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Reached {
    step: u64,
    top1: f64,
    loss: f64,
}

/// How a run of the sweep stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Status {
    /// Not begun, or not far enough.
    Waiting,
    Done,
    /// The worse ones of a round.
    Stopped,
    Failed(String),
}

impl Status {
    fn name(&self) -> &'static str {
        match self {
            Status::Waiting => "unfinished",
            Status::Done => "done",
            Status::Stopped => "stopped early",
            Status::Failed(_) => "failed",
        }
    }
}

struct Entry<'a> {
    cell: &'a Cell,
    dir: PathBuf,
    status: Status,
    /// By round, those of this sweep's halving.
    reached: BTreeMap<u32, Reached>,
    summary: Option<Summary>,
    /// In this start.
    seconds: f64,
}

/// `sweep.json`: by hash and by the share of the length that was trained, such as `25%`. So it holds for another number
/// of rounds too.
type Rounds = BTreeMap<String, BTreeMap<String, Reached>>;

const ROUNDS: &str = "sweep.json";

/// `runner sweep`.
pub(crate) fn sweep(args: &SweepArgs) -> Result<ExitCode, Failure> {
    let mut environment = config::environment();
    // MLflow's own variable counts here as for a single run, below ours of the same meaning.
    let ours = "RUNNER__TRACK__EXPERIMENT";
    let find = |wanted: &str| environment.iter().find(|(name, _)| name == wanted);
    let experiment = find(config::EXPERIMENT).filter(|_| find(ours).is_none());
    let experiment = experiment.map(|(_, name)| format!("{name:?}"));
    if let Some(name) = experiment.filter(|name| name != "\"\"") {
        environment.push((ours.into(), name));
    }
    let sweep = spec::sweep(&Layers {
        file: &args.spec.config,
        profile: args.spec.changes.profile.as_deref(),
        environment: &environment,
        sets: &args.spec.changes.set,
    })?;
    if sweep.base.mode != Mode::TrainAndEval {
        return Err(Failure::Spec(
            "mode: a sweep ranks runs by their evaluations\nhint: mode = \"train_and_eval\"".into(),
        ));
    }
    let root = sweep.base.run_dir();
    std::fs::create_dir_all(&root)
        .map_err(|e| Failure::Run(format!("{}: cannot create: {e}", root.display())))?;
    let _lease = Lease::take(&root)?;
    let mut trackers = open(args, &sweep, &root)?;
    let stop = stop_on_signals();
    let kept = read_rounds(&root);
    let rungs = sweep.halving.map_or(1, |halving| halving.rungs);
    let until = |rung: u32| {
        let halving = sweep.halving.filter(|_| rung + 1 < rungs);
        halving.map(|halving| halving.percent(rung))
    };
    let known = |hash: &str| -> BTreeMap<u32, Reached> {
        let Some(kept) = kept.get(hash) else {
            return BTreeMap::new();
        };
        let rungs =
            (0..rungs).filter_map(|rung| Some((rung, kept.get(&share(until(rung)?))?.clone())));
        rungs.collect()
    };
    let mut entries: Vec<Entry<'_>> = sweep
        .cells
        .iter()
        .map(|cell| Entry {
            cell,
            dir: root.join(&cell.hash),
            status: Status::Waiting,
            reached: known(&cell.hash),
            summary: None,
            seconds: 0.0,
        })
        .collect();
    let halving = match sweep.halving {
        Some(halving) => format!(
            ", {} rounds, one of {} goes on after each",
            halving.rungs, halving.factor
        ),
        None => String::new(),
    };
    trackers.note(&format!(
        "{}: {} runs{halving}, {} at a time",
        sweep.base.name,
        entries.len(),
        args.jobs
    ));

    let shop = Shop {
        args,
        root: &root,
        stop: &stop,
        started: AtomicUsize::new(0),
    };
    for rung in 0..rungs {
        let is_last = rung + 1 == rungs;
        shop.round(&mut entries, rung, until(rung), &mut trackers);
        let is_open = entries.iter().any(|entry| entry.status == Status::Waiting);
        if stop.load(Ordering::Relaxed) || is_open && is_last {
            break;
        }
        if let Some(halving) = sweep.halving.filter(|_| !is_last) {
            if entries
                .iter()
                .any(|e| e.status == Status::Waiting && !e.reached.contains_key(&rung))
            {
                break; // --max-runs: the round is not over
            }
            halve(&mut entries, rung, halving);
        }
    }
    finish(args, &sweep, &entries, &mut trackers, &stop)
}

/// Stops the worse runs after a round.
fn halve(entries: &mut [Entry<'_>], rung: u32, halving: Halving) {
    let waiting = |entry: &Entry<'_>| entry.status == Status::Waiting;
    let mut order: Vec<usize> = (0..entries.len())
        .filter(|&i| waiting(&entries[i]))
        .collect();
    order.sort_by(|&a, &b| better(&entries[a].reached[&rung], &entries[b].reached[&rung]));
    let kept = halving.kept(order.len());
    for &i in &order[kept.min(order.len())..] {
        entries[i].status = Status::Stopped;
    }
}

/// The better first: by top1, then by the loss; a loss that is no number is the worst.
fn better(a: &Reached, b: &Reached) -> std::cmp::Ordering {
    let loss = |r: &Reached| {
        if r.loss.is_nan() {
            f64::INFINITY
        } else {
            r.loss
        }
    };
    b.top1.total_cmp(&a.top1).then(loss(a).total_cmp(&loss(b)))
}

/// Where runs are made.
struct Shop<'a> {
    args: &'a SweepArgs,
    root: &'a Path,
    stop: &'a AtomicBool,
    /// Processes so far, which `--max-runs` limits.
    started: AtomicUsize,
}

impl Shop<'_> {
    /// Brings every run that still takes part to the end of a round.
    fn round(
        &self,
        entries: &mut [Entry<'_>],
        rung: u32,
        until: Option<f64>,
        trackers: &mut Trackers,
    ) {
        let total = entries.len();
        let rounds = Mutex::new(read_rounds(self.root));
        let queue: Mutex<Vec<&mut Entry<'_>>> = Mutex::new(
            entries
                .iter_mut()
                .filter(|entry| entry.status == Status::Waiting)
                .rev()
                .collect(),
        );
        let said = Mutex::new(trackers);
        let note = |text: &str| {
            said.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .note(text);
        };
        thread::scope(|scope| {
            for _ in 0..self.args.jobs {
                scope.spawn(|| {
                    loop {
                        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
                        let Some(entry) = next else { return };
                        self.bring(entry, rung, until, &note);
                        if let (Some(reached), Some(until)) = (entry.reached.get(&rung), until) {
                            let mut rounds = rounds.lock().unwrap_or_else(PoisonError::into_inner);
                            let of_cell = rounds.entry(entry.cell.hash.clone()).or_default();
                            of_cell.insert(share(until), reached.clone());
                            if let Err(error) = write_rounds(self.root, &rounds) {
                                note(&error.to_string());
                            }
                        }
                        if entry.seconds > 0.0 {
                            note(&progress(entry, total));
                        }
                    }
                });
            }
        });
    }

    /// Brings one run to the end of a round, unless it has been there.
    fn bring(
        &self,
        entry: &mut Entry<'_>,
        rung: u32,
        until: Option<f64>,
        note: &(dyn Fn(&str) + Sync),
    ) {
        entry.seconds = 0.0;
        let is_here = |entry: &Entry<'_>| match until {
            Some(_) => entry.reached.contains_key(&rung),
            None => entry.summary.as_ref().is_some_and(|s| s.status == "done"),
        };
        entry.summary = read_summary(&entry.dir);
        if !is_here(entry) {
            if self.stop.load(Ordering::Relaxed) || !self.may_start() {
                return;
            }
            let started = Instant::now();
            let ended = self.run(entry, until, note);
            entry.seconds = started.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
            entry.summary = read_summary(&entry.dir);
            match ended {
                Ok(Some(code))
                    if code == 0 || until.is_some() && code == i32::from(INTERRUPTED) => {}
                Ok(Some(code)) if code == i32::from(INTERRUPTED) => return,
                Ok(_) if self.stop.load(Ordering::Relaxed) => return,
                Ok(code) => {
                    let code = code.map_or("a signal".into(), |code| format!("exit code {code}"));
                    entry.status = Status::Failed(self.reason(entry, &code));
                    return;
                }
                Err(what) => {
                    entry.status = Status::Failed(what);
                    return;
                }
            }
        }
        let Some(summary) = &entry.summary else {
            entry.status = Status::Failed("it left no summary.json".into());
            return;
        };
        if until.is_some() && !is_at_end(summary) {
            return; // it was stopped by a signal, and not by the end of the round
        }
        match &summary.eval {
            Some(eval) if until.is_some() && !entry.reached.contains_key(&rung) => {
                let reached = Reached {
                    step: summary.step,
                    top1: eval.top1,
                    loss: eval.loss,
                };
                entry.reached.insert(rung, reached);
            }
            Some(_) => {}
            None => {
                entry.status = Status::Failed("it was not evaluated".into());
                return;
            }
        }
        if until.is_none() && summary.status == "done" {
            entry.status = Status::Done;
        }
    }

    fn may_start(&self) -> bool {
        let limit = self.args.max_runs.unwrap_or(usize::MAX);
        self.started.fetch_add(1, Ordering::Relaxed) < limit
    }

    /// Runs the process of a run to its end; its exit code, if it has one.
    fn run(
        &self,
        entry: &Entry<'_>,
        until: Option<f64>,
        note: &(dyn Fn(&str) + Sync),
    ) -> Result<Option<i32>, String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("{}: cannot {what}: {error}", entry.dir.display())
        };
        std::fs::create_dir_all(&entry.dir).map_err(|e| failed("create", &e))?;
        self.wait_for_orphan(&entry.dir, note)?;
        let mut run = entry.cell.run.clone();
        if run.train.threads == 0 && self.args.jobs > 1 {
            let cores = thread::available_parallelism().map_or(1, |n| n.get());
            run.train.threads = (cores / self.args.jobs).max(1);
        }
        let spec = entry.dir.join("cell.toml");
        store::write_atomic(&spec, &[run.to_toml().as_bytes()]).map_err(|e| e.to_string())?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(entry))
            .map_err(|e| failed("write its output", &e))?;
        let again = log
            .try_clone()
            .map_err(|e| failed("write its output", &e))?;
        let program = std::env::current_exe().map_err(|e| failed("find this program", &e))?;
        let mut command = Command::new(program);
        command
            .arg(&spec)
            .stdin(Stdio::null())
            .stdout(again)
            .stderr(log);
        if let Some(percent) = until {
            command.args(["--until", &format!("{percent}%")]);
        }
        // The cell's spec is resolved: what lies over specs has been applied, and MLflow's run is its own.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RUNNER__") {
                command.env_remove(name);
            }
        }
        for name in ["MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"] {
            command.env_remove(name);
        }
        if let Ok(parent) = std::fs::read_to_string(self.root.join("mlflow-run")) {
            command.env(tracking::PARENT, parent.trim());
        }
        // A key at the terminal would reach it as well as us, and again by us: a second signal cuts a run short. In a
        // group of its own it hears of signals from us alone, and so always once.
        command.process_group(0);
        let mut child = command.spawn().map_err(|e| failed("start", &e))?;
        let mut is_told = false;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status.code()),
                Ok(None) => {}
                Err(error) => return Err(failed("wait", &error)),
            }
            if self.stop.load(Ordering::Relaxed) && !is_told {
                let id = child.id().to_string();
                let told = Command::new("kill").args(["-s", "TERM", &id]).status();
                if told.is_err() {
                    let _ = child.kill(); // its checkpoints are whole all the same
                }
                is_told = true;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A run that an earlier sweep started, and that has outlived it, is left to end.
    fn wait_for_orphan(&self, dir: &Path, note: &(dyn Fn(&str) + Sync)) -> Result<(), String> {
        let mut is_said = false;
        loop {
            match Lease::take(dir) {
                Ok(_) => return Ok(()),
                Err(store::Error::Held { .. }) if !self.stop.load(Ordering::Relaxed) => {
                    if !is_said {
                        note(&format!(
                            "{}: another process is at it; waiting for it to end",
                            dir.display()
                        ));
                        is_said = true;
                    }
                    thread::sleep(Duration::from_millis(200));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn log(&self, entry: &Entry<'_>) -> PathBuf {
        entry.dir.join("output.txt")
    }

    /// Why a process failed: the last of its lines.
    fn reason(&self, entry: &Entry<'_>, code: &str) -> String {
        let path = self.log(entry);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        let from = lines.len().saturating_sub(2);
        let last = lines[from..].join("\n");
        format!("{code}: {last}\n(all of it in {})", path.display())
    }
}

fn is_at_end(summary: &Summary) -> bool {
    summary.reason.as_deref() == Some("--until") || summary.status == "done"
}

/// How `sweep.json` calls a share of the length.
fn share(percent: f64) -> String {
    format!("{percent}%")
}

fn read_rounds(root: &Path) -> Rounds {
    let text = std::fs::read_to_string(root.join(ROUNDS)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn write_rounds(root: &Path, rounds: &Rounds) -> Result<(), store::Error> {
    let text = serde_json::to_string_pretty(rounds).expect("keys are strings") + "\n";
    store::write_atomic(&root.join(ROUNDS), &[text.as_bytes()])
}

/// The run in MLflow that those of the sweep are part of; it also keeps the sweep's own log and summary.
fn open(args: &SweepArgs, sweep: &Sweep, root: &Path) -> Result<Trackers, Failure> {
    let place = tracking::place(&sweep.base)?;
    let mut axes: BTreeMap<String, String> = BTreeMap::new();
    for cell in &sweep.cells {
        for (key, value) in &cell.keys {
            let values = axes.entry(key.clone()).or_default();
            if !values.split(", ").any(|known| known == value) {
                let comma = if values.is_empty() { "" } else { ", " };
                *values += &format!("{comma}{value}");
            }
        }
    }
    let mlflow = place.map(|place| Mlflow {
        place,
        experiment: sweep.base.track.experiment.clone(),
        run: sweep.base.name.clone(),
        source: args.spec.config.display().to_string(),
        params: axes,
        tags: BTreeMap::from([("runner.sweep".into(), sweep.cells.len().to_string())]),
        datasets: vec![],
        parent: None,
        artifacts: vec![args.spec.config.clone()],
    });
    let config = track::Config {
        mlflow,
        ..track::Config::default()
    };
    Ok(Trackers::open(root, None, &config, Terminal::Notes))
}

/// A line about a run that has ended.
fn progress(entry: &Entry<'_>, total: usize) -> String {
    let name = name(entry.cell);
    let seconds = entry.seconds;
    match (&entry.status, &entry.summary) {
        (Status::Failed(why), _) => format!("{name}: failed: {why}"),
        (status, Some(summary)) => {
            // The ranking is by this one.
            let best = summary.best.as_ref().map_or(f64::NAN, |best| best.value);
            let status = match status {
                Status::Waiting => "at",
                other => other.name(),
            };
            format!(
                "{name}: {status} step {}, best top1 {best:.4}, {seconds:.1} s (of {total} runs)",
                summary.step
            )
        }
        (_, None) => format!("{name}: nothing yet"),
    }
}

/// A run by what it varies.
fn name(cell: &Cell) -> String {
    let short = |key: &str| key.rsplit('.').next().unwrap_or(key).to_string();
    let keys = cell.keys.iter();
    let texts: Vec<String> = keys.map(|(k, v)| format!("{}={v}", short(k))).collect();
    texts.join(" ")
}

/// The ranking: runs that are done by their best, then those that were stopped, the later the better, then the rest.
fn rank<'e, 'c>(entries: &'e [Entry<'c>]) -> Vec<&'e Entry<'c>> {
    let group = |entry: &Entry<'_>| match entry.status {
        Status::Done => 0,
        Status::Stopped => 1,
        Status::Waiting => 2,
        Status::Failed(_) => 3,
    };
    let best = |entry: &Entry<'_>| match (&entry.status, &entry.summary) {
        (Status::Done, Some(summary)) => Reached {
            step: summary.step,
            top1: summary.best.as_ref().map_or(f64::NEG_INFINITY, |b| b.value),
            loss: summary.eval.as_ref().map_or(f64::INFINITY, |e| e.loss),
        },
        _ => entry.reached.values().last().cloned().unwrap_or(Reached {
            step: 0,
            top1: f64::NEG_INFINITY,
            loss: f64::INFINITY,
        }),
    };
    let mut ranked: Vec<&Entry<'_>> = entries.iter().collect();
    ranked.sort_by(|a, b| {
        let (x, y) = (best(a), best(b));
        let later = match a.status {
            Status::Done => std::cmp::Ordering::Equal,
            _ => y.step.cmp(&x.step),
        };
        group(a)
            .cmp(&group(b))
            .then(later)
            .then_with(|| better(&x, &y))
            .then_with(|| a.cell.hash.cmp(&b.cell.hash))
    });
    ranked
}

/// Says how it went: table or JSON, JUnit, MLflow, exit code.
fn finish(
    args: &SweepArgs,
    sweep: &Sweep,
    entries: &[Entry<'_>],
    trackers: &mut Trackers,
    stop: &Arc<AtomicBool>,
) -> Result<ExitCode, Failure> {
    let ranked = rank(entries);
    let count = |name: &str| entries.iter().filter(|e| e.status.name() == name).count();
    let (failed, unfinished) = (count("failed"), count("unfinished"));
    let winner = ranked
        .first()
        .filter(|entry| entry.status == Status::Done)
        .and_then(|entry| entry.summary.as_ref());
    let (status, reason) = match (failed, unfinished) {
        (0, 0) => ("done", None),
        (0, n) if stop.load(Ordering::Relaxed) => (
            "interrupted",
            Some(format!("a signal; {n} runs are unfinished")),
        ),
        (0, n) => (
            "interrupted",
            Some(format!("--max-runs; {n} runs are unfinished")),
        ),
        (n, _) => ("failed", Some(format!("{n} runs failed"))),
    };
    if let Some((eval, best)) = winner.and_then(|s| Some((s.eval.as_ref()?, s.best.as_ref()?))) {
        trackers.note(&format!("the best is {}", name(ranked[0].cell)));
        // A step of a sweep is a run that is done: a later start, which may have another winner, tells it as a later
        // point, and one that has nothing new tells nothing new.
        trackers.eval(&EvalMetrics {
            step: count("done") as u64,
            epoch: f64::NAN,
            loss: eval.loss,
            top1: best.value,
            top5: eval.top5,
            ema_loss: None,
            ema_top1: None,
            ema_top5: None,
            images: sweep.base.data.eval_examples().unwrap_or(0),
            seconds: 0.0,
        });
    }
    if let Some(entry) = winner.and(ranked.first()) {
        trackers.tag("runner.winner", &entry.cell.hash);
    }
    trackers.tag("mlflow.note.content", &markdown(&ranked));
    trackers.finish(&Summary {
        status: status.into(),
        step: winner.map_or(0, |s| s.step),
        eval: winner.and_then(|s| s.eval.clone()),
        best: winner.and_then(|s| s.best.clone()),
        images_per_s: winner.map_or(0.0, |s| s.images_per_s),
        input_wait_fraction: winner.map_or(0.0, |s| s.input_wait_fraction),
        time: None,
        reason,
    });
    if let Some(path) = &args.junit {
        let text = junit(&sweep.base.name, &ranked);
        store::write_atomic(path, &[text.as_bytes()])?;
    }
    output::print(&match args.json {
        true => format!("{}\n", as_json(sweep, &ranked, status)),
        false => table(&ranked),
    });
    Ok(match status {
        "done" => ExitCode::SUCCESS,
        "interrupted" => {
            eprintln!(
                "{unfinished} of {} runs are unfinished; start the sweep again to go on",
                entries.len()
            );
            ExitCode::from(INTERRUPTED)
        }
        _ => {
            for entry in &ranked {
                if let Status::Failed(why) = &entry.status {
                    eprintln!("{}: {why}", name(entry.cell));
                }
            }
            eprintln!(
                "{failed} of {} runs failed\nhint: start the sweep again to try only those again",
                entries.len()
            );
            ExitCode::from(4)
        }
    })
}

fn table(ranked: &[&Entry<'_>]) -> String {
    output::columns(&rows(ranked))
}

/// Room for a description in MLflow, in bytes.
const NOTE: usize = 4500;

/// The ranking as a table in Markdown, the first of the runs.
fn markdown(ranked: &[&Entry<'_>]) -> String {
    let rows = rows(ranked);
    let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | ").replace('\n', " "));
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        if text.len() > NOTE {
            let _ = writeln!(text, "\nand {} more", rows.len() - i);
            break;
        }
        text += &line(row);
        if i == 0 {
            text += &line(&vec!["---".into(); row.len()]);
        }
    }
    text
}

fn rows(ranked: &[&Entry<'_>]) -> Vec<Vec<String>> {
    let keys: Vec<&String> = ranked.iter().flat_map(|e| e.cell.keys.keys()).collect();
    let mut columns: Vec<&String> = vec![];
    for key in keys {
        if !columns.contains(&key) {
            columns.push(key);
        }
    }
    columns.sort();
    let mut rows = vec![];
    let mut header = vec!["rank".to_string()];
    header.extend(columns.iter().map(|key| key.to_string()));
    header.extend(["best top1", "top1", "step", "status", "run"].map(String::from));
    rows.push(header);
    for (i, entry) in ranked.iter().enumerate() {
        let mut row = vec![(i + 1).to_string()];
        let value = |key: &&String| entry.cell.keys.get(*key).cloned().unwrap_or_default();
        row.extend(columns.iter().map(value));
        let summary = entry.summary.as_ref();
        let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.4}"));
        row.push(number(summary.and_then(|s| Some(s.best.as_ref()?.value))));
        row.push(number(summary.and_then(|s| Some(s.eval.as_ref()?.top1))));
        row.push(summary.map_or("-".into(), |s| s.step.to_string()));
        row.push(entry.status.name().into());
        row.push(entry.dir.display().to_string());
        rows.push(row);
    }
    rows
}

fn as_json(sweep: &Sweep, ranked: &[&Entry<'_>], status: &str) -> serde_json::Value {
    let run = |(i, entry): (usize, &&Entry<'_>)| {
        let reason = match &entry.status {
            Status::Failed(why) => Some(why),
            _ => None,
        };
        json!({
            "rank": i + 1,
            "hash": entry.cell.hash,
            "dir": entry.dir,
            "keys": entry.cell.keys,
            "status": entry.status.name(),
            "reason": reason,
            "summary": entry.summary,
        })
    };
    let runs: Vec<_> = ranked.iter().enumerate().map(run).collect();
    json!({ "sweep": sweep.base.name, "status": status, "runs": runs })
}

/// What CI servers read: a test case for each run.
fn junit(sweep: &str, ranked: &[&Entry<'_>]) -> String {
    let count =
        |wanted: &dyn Fn(&Status) -> bool| ranked.iter().filter(|e| wanted(&e.status)).count();
    let failures = count(&|status| matches!(status, Status::Failed(_)));
    let skipped = count(&|status| matches!(status, Status::Waiting | Status::Stopped));
    let (tests, sweep) = (ranked.len(), escaped(sweep));
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n  <testsuite name=\"{sweep}\" tests=\"{tests}\" \
         failures=\"{failures}\" errors=\"0\" skipped=\"{skipped}\">\n"
    );
    for entry in ranked {
        let (name, seconds) = (escaped(&name(entry.cell)), entry.seconds);
        let inside = match &entry.status {
            Status::Done => String::new(),
            Status::Stopped | Status::Waiting => {
                format!("<skipped message=\"{}\"/>", entry.status.name())
            }
            Status::Failed(why) => format!("<failure message=\"{}\"/>", escaped(why)),
        };
        let top1 = entry
            .summary
            .as_ref()
            .and_then(|s| Some(s.best.as_ref()?.value));
        let top1 = top1.map_or(String::new(), |v| {
            format!("<system-out>best top1 {v}</system-out>")
        });
        let _ = writeln!(
            text,
            "    <testcase classname=\"{sweep}\" name=\"{name}\" time=\"{seconds:.3}\">{inside}{top1}</testcase>"
        );
    }
    text + "  </testsuite>\n</testsuites>\n"
}

/// Text as XML and HTML take it, in attributes too.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\n' => out += "&#10;",
            c if c.is_control() => out += " ",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use track::{Best, EvalSummary};

    use super::*;

    fn cells(count: usize) -> Vec<Cell> {
        let text = "name = \"t\"\ndata.source = \"fake\"";
        let run = spec::parse(text, "t.toml", &[]).unwrap();
        (0..count)
            .map(|i| Cell {
                hash: format!("{i:012x}"),
                keys: BTreeMap::from([("schedule.base_lr".into(), format!("0.{i}"))]),
                run: run.clone(),
            })
            .collect()
    }

    fn entry<'a>(cell: &'a Cell, status: Status, best: f64) -> Entry<'a> {
        let reached = Reached {
            step: 10,
            top1: best,
            loss: 1.0,
        };
        Entry {
            cell,
            dir: format!("runs/s/{}", cell.hash).into(),
            status,
            reached: BTreeMap::from([(0, reached)]),
            summary: Some(Summary {
                status: "done".into(),
                step: 40,
                eval: Some(EvalSummary {
                    top1: best,
                    top5: 1.0,
                    loss: 1.0,
                    ema_top1: None,
                }),
                best: Some(Best {
                    metric: "top1".into(),
                    value: best,
                    step: 30,
                }),
                images_per_s: 1.0,
                input_wait_fraction: 0.0,
                time: None,
                reason: None,
            }),
            seconds: 1.5,
        }
    }

    #[test]
    fn runs_are_ranked_by_their_best() {
        let cells = cells(5);
        let failed = Status::Failed("exit code 3: no \"data\" <there>".into());
        let entries = [
            entry(&cells[0], failed, 0.9),
            entry(&cells[1], Status::Done, 0.5),
            entry(&cells[2], Status::Stopped, 0.7),
            entry(&cells[3], Status::Done, 0.6),
            entry(&cells[4], Status::Waiting, 0.8),
        ];
        let ranked = rank(&entries);
        assert_eq!(
            table(&ranked),
            "\
rank  schedule.base_lr  best top1    top1  step         status                  run
   1               0.3     0.6000  0.6000    40           done  runs/s/000000000003
   2               0.1     0.5000  0.5000    40           done  runs/s/000000000001
   3               0.2     0.7000  0.7000    40  stopped early  runs/s/000000000002
   4               0.4     0.8000  0.8000    40     unfinished  runs/s/000000000004
   5               0.0     0.9000  0.9000    40         failed  runs/s/000000000000
"
        );
        let xml = junit("a&b", &ranked);
        assert!(
            xml.contains(
                "<testsuite name=\"a&amp;b\" tests=\"5\" failures=\"1\" errors=\"0\" skipped=\"2\">"
            ),
            "{xml}"
        );
        assert!(
            xml.contains("<failure message=\"exit code 3: no &quot;data&quot; &lt;there&gt;\"/>"),
            "{xml}"
        );
    }

    #[test]
    fn the_better_half_goes_on() {
        let cells = cells(5);
        let mut entries: Vec<_> = [0.1, 0.5, 0.3, f64::NEG_INFINITY, 0.5]
            .iter()
            .zip(&cells)
            .map(|(best, cell)| entry(cell, Status::Waiting, *best))
            .collect();
        let halving = Halving {
            rungs: 3,
            factor: 2,
        };
        halve(&mut entries, 0, halving);
        let waiting: Vec<bool> = entries
            .iter()
            .map(|e| e.status == Status::Waiting)
            .collect();
        assert_eq!(waiting, [false, true, true, false, true]);
        assert_eq!(
            [0, 1, 2].map(|rung| halving.percent(rung)),
            [25.0, 50.0, 100.0]
        );
        assert_eq!([1, 2, 3, 8].map(|runs| halving.kept(runs)), [1, 1, 2, 4]);
    }
}
