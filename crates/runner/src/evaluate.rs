//! `runner eval`: the score of a checkpoint; mode `eval`: of a run's latest one, or of all of them as they come.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::{AVERAGE_PREFIX, Metrics, State};
use serde::{Deserialize, Serialize};
use serde_json::json;
use spec::{EmaEval, Run};
use train::{Checkpoints, Confusion, Meta, Plan, Row};

use crate::cli::EvalArgs;
use crate::failure::{Failure, INTERRUPTED};
use crate::run::stop_on_signals;
use crate::{config, network, output};

/// `runner eval`.
pub(crate) fn evaluate(args: &EvalArgs) -> Result<ExitCode, Failure> {
    // A run that only trained need not have said what to evaluate on.
    let (path, meta, state, run) = open(&args.checkpoint, &args.set, &["mode=eval"])?;
    score(
        &path,
        &meta,
        state,
        &run,
        (args.json, args.details.as_deref()),
    )
}

/// A checkpoint, and the run that its spec describes under the environment, `sets` and, over all, `fixed`.
pub(crate) fn open(
    checkpoint: &Path,
    sets: &[String],
    fixed: &[&str],
) -> Result<(PathBuf, Meta, State, Run), Failure> {
    let path = train::find(checkpoint)?;
    let (meta, state) = train::load(&path)?;
    let origin = format!("{} (spec)", path.display());
    let fixed = fixed.iter().map(|set| (*set).to_owned());
    let sets: Vec<String> = sets.iter().cloned().chain(fixed).collect();
    let run = spec::parse_over(&meta.spec, &origin, &config::environment(), &sets)?;
    train::check_network(&path, &meta, &run)?;
    Ok((path, meta, state, run))
}

/// A run whose mode is `eval`: the latest checkpoint of its directory, on the evaluation set of its own spec.
pub(crate) fn latest(run: &Run, fresh: bool) -> Result<ExitCode, Failure> {
    if fresh {
        let what = "mode: a run that only evaluates has nothing to start anew";
        return Err(Failure::Spec(format!("{what}\nhint: leave --fresh out")));
    }
    if let Some(seconds) = run.eval.wait {
        return watch(run, Duration::from_secs(seconds));
    }
    let path = train::find(&run.run_dir())?;
    let (meta, state) = train::load(&path)?;
    train::check_network(&path, &meta, run)?;
    score(&path, &meta, state, run, (false, None))
}

/// A line of `evaluations.jsonl`: a checkpoint that has been scored.
#[derive(Debug, Serialize, Deserialize)]
struct Scored {
    step: u64,
    epoch: f64,
    hours: f64,
    top1: f64,
    top5: f64,
    loss: f64,
    images: usize,
}

/// How often a directory is looked into for new checkpoints.
const POLL: Duration = Duration::from_millis(500);

/// Scores every checkpoint of the run's directory once, oldest first, and waits for new ones, until that of the last step
/// of `train.length` has been scored. `evaluations.jsonl` says which have been, so another start goes on; `evaluations.tsv` is the same for
/// DAWNBench. Both are this command's alone: the run itself may be training meanwhile.
fn watch(run: &Run, longest: Duration) -> Result<ExitCode, Failure> {
    let (dir, stop) = (run.run_dir(), stop_on_signals());
    let (lines, table) = (dir.join("evaluations.jsonl"), dir.join("evaluations.tsv"));
    let read = std::fs::read_to_string(&lines).unwrap_or_default();
    let mut scored: Vec<Scored> = vec![];
    for (i, line) in read.lines().enumerate() {
        let damaged = |e: serde_json::Error| {
            Failure::Run(format!(
                "{}:{}: {e}\nhint: remove the line",
                lines.display(),
                i + 1
            ))
        };
        scored.push(serde_json::from_str(line).map_err(damaged)?);
    }
    let config = train::eval_config(run)?;
    let (mut engine, mut last) = (None, None);
    // Time that nobody sets: a clock that jumps changes nothing.
    let mut since = Instant::now();
    loop {
        let files = Checkpoints::of(&dir).files()?;
        let is_new = |path: &&PathBuf| {
            step_of(path).is_some_and(|step| scored.iter().all(|s| s.step != step))
        };
        let Some(path) = files.iter().rev().find(is_new) else {
            if let (None, Some(path)) = (last, files.first()) {
                last = last_step(run, &train::load(path)?.0);
            }
            if last.is_some_and(|last| scored.iter().any(|s| s.step >= last)) {
                return Ok(ExitCode::SUCCESS);
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(ExitCode::from(INTERRUPTED));
            }
            if since.elapsed() >= longest {
                let seconds = longest.as_secs();
                eprintln!(
                    "{}: no new checkpoint for {seconds} s; start it again to wait on",
                    dir.display()
                );
                return Ok(ExitCode::from(INTERRUPTED));
            }
            std::thread::sleep(POLL);
            continue;
        };
        let (meta, state) = match train::load(path) {
            Ok(loaded) => loaded,
            // Training removes old ones.
            Err(_) if !path.exists() => continue,
            Err(error) => return Err(error.into()),
        };
        train::check_network(path, &meta, run)?;
        let state = to_use(state, run);
        let engine = match &mut engine {
            Some(engine) => engine,
            none => none.insert(network::engine(run, &network::network(run), None)?),
        };
        engine.load(&state)?;
        let started = Instant::now();
        let found = train::score(&config, &mut **engine, &stop, None, |bad| {
            eprintln!("{bad}")
        })?;
        let Some(m) = found else {
            return Ok(ExitCode::from(INTERRUPTED));
        };
        let step = meta.progress.step;
        last = last_step(run, &meta);
        let examples = examples(&meta).max(1);
        let trained = spec::parse(&meta.spec, "checkpoint", &[])?;
        let line = Scored {
            step,
            epoch: step as f64 * trained.train.batch_size as f64 / examples as f64,
            hours: meta.progress.seconds / 3600.0,
            top1: m.top1(),
            top5: m.top5(),
            loss: m.loss(),
            images: m.images,
        };
        let (top1, top5, loss, seconds) = (
            line.top1,
            line.top5,
            line.loss,
            started.elapsed().as_secs_f64(),
        );
        scored.push(line);
        let text = |s: &Scored| serde_json::to_string(s).expect("plain keys") + "\n";
        let text: String = scored.iter().map(text).collect();
        store::write_atomic(&lines, &[text.as_bytes()])?;
        let row = |s: &Scored| Row {
            step: s.step,
            epoch: s.epoch,
            hours: s.hours,
            top1: s.top1,
            top5: s.top5,
        };
        let rows: Vec<Row> = scored.iter().map(row).collect();
        store::write_atomic(&table, &[train::results(&rows).as_bytes()])?;
        output::print(&format!(
            "{} at step {step}\ntop1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}  {} images in {seconds:.1} s\n",
            path.display(),
            m.images
        ));
        since = Instant::now();
    }
}

/// The step in a checkpoint's name.
fn step_of(path: &Path) -> Option<u64> {
    path.file_stem()?
        .to_str()?
        .strip_prefix("step-")?
        .parse()
        .ok()
}

/// Training examples of the run that wrote a checkpoint.
fn examples(meta: &Meta) -> u64 {
    let found = meta.computation.get("data.train_examples");
    found.and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// The last step of `run`, whose epochs have as many examples as those of the run that wrote a checkpoint.
fn last_step(run: &Run, meta: &Meta) -> Option<u64> {
    Plan::new(run, examples(meta)).ok().map(|plan| plan.steps)
}

/// What a training run would score of a checkpoint's state: the parameters, their average, or both, and whether it is both.
/// The optimizer's tensors are of no use to an evaluation.
fn to_score(state: State, run: &Run) -> (Vec<State>, bool) {
    let is_needed = |name: &String| !name.starts_with("optimizer.");
    let state = state.into_iter().filter(|(name, _)| is_needed(name));
    let (average, raw): (State, State) =
        state.partition(|(name, _)| name.starts_with(AVERAGE_PREFIX));
    let bare = |name: &str| name.strip_prefix(AVERAGE_PREFIX).map(str::to_owned);
    let average: State = (average.into_iter())
        .filter_map(|(name, tensor)| Some((bare(&name)?, tensor)))
        .collect();
    let has_average = !average.is_empty() && run.ema.half_life.is_some();
    match run.ema.eval {
        EmaEval::Average if has_average => (vec![average], false),
        EmaEval::Both if has_average => (vec![raw, average], true),
        _ => (vec![raw], false),
    }
}

/// What a checkpoint is for: the average of the parameters where it is scored, also beside them, else the parameters.
pub(crate) fn to_use(state: State, run: &Run) -> State {
    to_score(state, run).0.pop().expect("there is one")
}

fn score(
    path: &Path,
    meta: &Meta,
    state: State,
    run: &Run,
    (json, details): (bool, Option<&Path>),
) -> Result<ExitCode, Failure> {
    let config = train::eval_config(run)?;
    let (states, has_both) = to_score(state, run);
    let mut states = states.into_iter();
    let mut engine = network::engine(run, &network::network(run), states.next())?;
    let started = Instant::now();
    let note = |bad: &str| eprintln!("{bad}");
    let mut scores: Vec<Metrics> = vec![];
    loop {
        // The details are of what is scored first.
        let dir = details.filter(|_| scores.is_empty());
        let mut classes = dir.map(|_| Confusion::new(config.classes));
        let never = AtomicBool::new(false);
        let found = train::score(&config, &mut *engine, &never, classes.as_mut(), note)?;
        let found = found.expect("nobody stops it");
        if let (Some(dir), Some(classes)) = (dir, &classes) {
            write_details(dir, classes, &found, meta.labels.as_deref())?;
        }
        scores.push(found);
        match states.next() {
            Some(state) => engine.load(&state)?,
            None => break,
        }
    }
    let (step, seconds) = (meta.progress.step, started.elapsed().as_secs_f64());
    let m = &scores[0];
    let (checkpoint, images) = (path.display(), m.images);
    let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
    let average = scores.get(1).filter(|_| has_both);
    output::print(&if json {
        let checkpoint = checkpoint.to_string();
        let mut report = json!({ "checkpoint": checkpoint, "step": step, "images": images, "top1": top1, "top5": top5, "loss": loss });
        if let Some(m) = average {
            report["ema_top1"] = m.top1().into();
            report["ema_top5"] = m.top5().into();
            report["ema_loss"] = m.loss().into();
        }
        format!("{report}\n")
    } else {
        let average = average.map_or(String::new(), |m| {
            let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
            format!("average: top1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}\n")
        });
        format!(
            "{checkpoint} at step {step}\n\
             top1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}  {images} images in {seconds:.1} s\n{average}"
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// Accuracy by class, and what was taken for what.
fn write_details(
    dir: &Path,
    classes: &Confusion,
    found: &Metrics,
    labels: Option<&[String]>,
) -> Result<(), Failure> {
    std::fs::create_dir_all(dir)
        .map_err(|e| Failure::Run(format!("{}: cannot create: {e}", dir.display())))?;
    classes.write(dir, labels)?;
    let json = format!("{}\n", classes.json(found, labels));
    Ok(store::write_atomic(
        &dir.join("confusion.json"),
        &[json.as_bytes()],
    )?)
}
