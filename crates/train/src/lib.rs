//! The run in steps: [`train`] is the loop; [`Plan`] says what happens when; checkpoints make a resume exact.
//!
//! This crate sees a `dyn Engine` and batches of images. It knows no shapes, no devices and no command line, and
//! trackers can never stop it.

mod checkpoint;
mod compare;
mod error;
mod input;
mod pace;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use engine::{Engine, Metrics, Pixels, Started};
use track::{Best, EvalMetrics, EvalSummary, Trackers};

pub use checkpoint::{Checkpoints, Meta, Progress, find, load};
pub use compare::{Comparison, compare};
pub use error::Error;
pub use input::{Input, eval_config};
pub use pace::Pace;
pub use plan::Plan;
use plan::Scored;

/// A run that is ready to go.
pub struct Job<'a> {
    /// What happens when.
    pub plan: &'a Plan,
    /// What is read.
    pub input: &'a Input,
    /// Where checkpoints go.
    pub checkpoints: &'a Checkpoints,
    /// How many of them stay.
    pub keep: usize,
    /// What they say about the run.
    pub meta: Meta,
    /// The step to stop at: the plan's last, or one before it.
    pub until: u64,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// Why [`train`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The plan is done.
    Done,
    /// It was told to stop, or has come to [`Job::until`]; what was done is saved.
    Interrupted,
}

/// Trains from `at` to the end of the plan or to `until`, or until it is told to stop; `at` moves along.
///
/// Each step: update, log, checkpoint, evaluate. The checkpoint is written before the evaluation of its step, and an
/// evaluation that is due and not in the checkpoint is made up for at the start. So a run that is killed at any
/// moment loses at most the steps since the last checkpoint, and no evaluation.
///
/// # Errors
/// If input, disk or engine fail, or the loss is not finite. What was saved stays.
pub fn train(
    mut job: Job<'_>,
    at: &mut Progress,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<Ended, Error> {
    let config = job
        .input
        .train
        .as_ref()
        .expect("a run that trains has training data");
    let mut batches = data::train(config, at.cursor.clone())?;
    job.checkpoints.point_to(at)?;
    at.is_eval_due |= job.is_eval_due(at.step);
    if at.is_eval_due && !evaluate(&job, at, engine, trackers, pace)? {
        return Ok(Ended::Interrupted);
    }
    // A device of its own computes while the next batch is made: `under_way` is the step that it does.
    let mut under_way: Option<(Started, data::Cursor)> = None;
    while at.step < job.until {
        let first = match under_way.take() {
            Some(step) => Ok(step),
            None => start(&job, at.step, &mut batches, engine, trackers, pace),
        };
        let (step, cursor) = match first {
            Ok(step) => step,
            Err(error) => {
                // An engine that fails has nothing to save.
                if at.step > 0 && !matches!(error, Error::Engine(_)) {
                    save(&mut job, at, engine, trackers, pace)?;
                }
                return Err(error);
            }
        };
        // Where nothing is to be saved or scored after this step, the next one need not wait for its end.
        let mut failed = None;
        if matches!(step, Started::Running(_)) && !job.pauses_after(at.step + 1) {
            match start(&job, at.step + 1, &mut batches, engine, trackers, pace) {
                Ok(next) => under_way = Some(next),
                Err(error) => failed = Some(error),
            }
        }
        let hyper = job.plan.hyper(at.step);
        let waits = Instant::now();
        let metrics = engine.finish_step(step)?;
        let blocked = waits.elapsed();
        at.step += 1;
        at.cursor = cursor;
        at.is_eval_due = job.is_eval_due(at.step);
        let goes_on = under_way.is_some();
        let (lr, ends) = (hyper.lr, (blocked, goes_on));
        trackers.step(&pace.step(job.plan, at.step, lr, &metrics, ends, trackers.busy()));
        if !metrics.loss().is_finite() {
            return Err(Error::Diverged { step: at.step });
        }
        if let Some(error) = failed {
            if !matches!(error, Error::Engine(_)) {
                save(&mut job, at, engine, trackers, pace)?;
            }
            return Err(error);
        }

        // A step that is under way is finished first: it has changed what would be saved.
        let is_stopping = under_way.is_none() && job.stop.load(Ordering::Relaxed);
        if is_stopping || at.step == job.until || job.plan.is_checkpoint_due(at.step) {
            save(&mut job, at, engine, trackers, pace)?;
        }
        if is_stopping || at.is_eval_due && !evaluate(&job, at, engine, trackers, pace)? {
            return Ok(Ended::Interrupted);
        }
    }
    if at.step < job.plan.steps {
        // With the evaluation, so that the next start need not make up for it.
        write(&mut job, at, &engine.state(), trackers)?;
        return Ok(Ended::Interrupted);
    }
    Ok(Ended::Done)
}

impl Job<'_> {
    /// Whether an evaluation follows a step: where the plan has one, and where the run stops.
    fn is_eval_due(&self, step: u64) -> bool {
        let is_last = step == self.until && self.plan.eval_every.is_some();
        is_last || self.plan.is_eval_due(step)
    }

    /// Whether something happens after a step that needs the state as it is then.
    fn pauses_after(&self, step: u64) -> bool {
        step >= self.until
            || self.stop.load(Ordering::Relaxed)
            || self.plan.is_checkpoint_due(step)
            || self.is_eval_due(step)
    }
}

/// Starts the step after `done` with the next batch; where the data go on after it.
fn start(
    job: &Job<'_>,
    done: u64,
    batches: &mut data::Loader,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<(Started, data::Cursor), Error> {
    let mut batch = pace.wait_for(batches)?;
    let (mix, seed) = job.plan.mix;
    let mixed = mix.apply(&mut batch, seed, done);
    batch.bad_records.iter().for_each(|bad| trackers.note(bad));
    if let (0, Some(config)) = (done, &job.input.train) {
        let side = config.resolution;
        trackers.images(0, side, &first_images(&batch, side));
    }
    let step = engine.start_step(&view(&batch, mixed.as_ref()), &job.plan.hyper(done))?;
    Ok((step, batch.cursor))
}

/// Writes a checkpoint of what has been done so far.
fn save(
    job: &mut Job<'_>,
    at: &mut Progress,
    engine: &dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<(), Error> {
    pace.part(
        |spent| &mut spent.checkpoint,
        trackers,
        |trackers| {
            let state = engine.state();
            trackers.tensors(
                at.step,
                state
                    .iter()
                    .map(|(name, t)| (histogram(name), &t.values[..])),
            );
            write(job, at, &state, trackers)
        },
    )
}

fn write(
    job: &mut Job<'_>,
    at: &mut Progress,
    state: &engine::State,
    trackers: &mut Trackers,
) -> Result<(), Error> {
    at.metrics_bytes = trackers.sync();
    job.meta.progress = at.clone();
    job.checkpoints.save(&job.meta, state, job.keep)
}

/// How TensorBoard calls a tensor of the state. The momentum is the running sum of the gradients, all of them that
/// engines give.
fn histogram(name: &str) -> String {
    if let Some(name) = name.strip_prefix(engine::MOMENTUM_PREFIX) {
        return format!("gradients (momentum)/{}", name.trim_start_matches('.'));
    }
    match name.strip_prefix(engine::AVERAGE_PREFIX) {
        Some(name) => format!("average/{name}"),
        None => format!("weights/{name}"),
    }
}

/// The first eight images of a batch, as whole numbers.
fn first_images(batch: &data::Batch, side: usize) -> Vec<u8> {
    let count = batch.labels.len().min(8) * side * side * 3;
    match &batch.pixels {
        data::Pixels::U8(pixels) => pixels[..count].to_vec(),
        data::Pixels::F32(pixels) => pixels[..count].iter().map(|p| p.round() as u8).collect(),
    }
}

/// Evaluates, unless this step has been evaluated or the run only trains; false if it was told to stop before the
/// end.
fn evaluate(
    job: &Job<'_>,
    at: &mut Progress,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<bool, Error> {
    let Some(config) = job.input.eval.as_ref().filter(|_| !at.is_evaluated()) else {
        return Ok(true);
    };
    let started = Instant::now();
    let mut score = |engine: &mut dyn Engine, trackers: &mut Trackers| {
        pace.part(
            |spent| &mut spent.evaluation,
            trackers,
            |trackers| score(config, engine, job.stop, |bad| trackers.note(bad)),
        )
    };
    let mut raw = None;
    if job.plan.scored != Scored::Average {
        raw = score(engine, trackers)?;
        if raw.is_none() {
            return Ok(false);
        }
    }
    let mut average = None;
    if job.plan.scored != Scored::Raw {
        engine.swap_average();
        let scored = score(engine, trackers);
        engine.swap_average();
        average = scored?;
        if average.is_none() {
            return Ok(false);
        }
    }
    // The average is scored beside the parameters, or in their place.
    let (metrics, average) = match raw {
        Some(raw) => (raw, average),
        None => (average.expect("one of the two is scored"), None),
    };
    let (loss, top1, top5) = (metrics.loss(), metrics.top1(), metrics.top5());
    let ema_top1 = average.map(|m| m.top1());
    trackers.eval(&EvalMetrics {
        step: at.step,
        epoch: job.plan.epoch(at.step),
        loss,
        top1,
        top5,
        ema_loss: average.map(|m| m.loss()),
        ema_top1,
        ema_top5: average.map(|m| m.top5()),
        images: metrics.images as u64,
        seconds: started.elapsed().as_secs_f64(),
    });
    let summary = EvalSummary {
        top1,
        top5,
        loss,
        ema_top1,
    };
    at.eval = Some((at.step, summary));
    let (metric, value) = match ema_top1 {
        Some(top1) => ("ema_top1", top1),
        None => ("top1", top1),
    };
    // `ema.eval` may have changed since the last start.
    let is_better = |best: &Best| best.metric != metric || value > best.value;
    if at.best.as_ref().is_none_or(is_better) {
        at.best = Some(Best {
            metric: metric.into(),
            value,
            step: at.step,
        });
        job.checkpoints.point_to(at)?;
    }
    Ok(true)
}

/// Scores a whole set, every image once; the last batch has what is left. None if `stop` was set meanwhile; `note`
/// hears of each bad record.
///
/// # Errors
/// If input or engine fail, or there is nothing to score.
pub fn score(
    config: &data::Config,
    engine: &mut dyn Engine,
    stop: &AtomicBool,
    mut note: impl FnMut(&str),
) -> Result<Option<Metrics>, Error> {
    let mut total = Metrics::default();
    for batch in data::eval(config)? {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batch?;
        batch.bad_records.iter().for_each(|bad| note(bad));
        if !batch.labels.is_empty() {
            total.add(&engine.eval_step(&view(&batch, None))?);
        }
    }
    match total.images {
        0 => Err(Error::NothingScored),
        _ => Ok(Some(total)),
    }
}

/// A batch as the engine takes it.
fn view<'a>(batch: &'a data::Batch, mixed: Option<&'a data::Mixed>) -> engine::Batch<'a> {
    let pixels = match &batch.pixels {
        data::Pixels::U8(p) => Pixels::U8(p),
        data::Pixels::F32(p) => Pixels::F32(p),
    };
    engine::Batch {
        pixels,
        labels: &batch.labels,
        mixed: mixed.map(|mixed| engine::Mixed {
            labels: &mixed.labels,
            share: mixed.share,
        }),
    }
}

/// Where a run in `dir` goes on: its last checkpoint, if it computes what `meta` says.
///
/// # Errors
/// If the checkpoint cannot be read, or holds another computation; all differing keys are named.
pub fn resume(dir: &Path, meta: &Meta) -> Result<Option<(Progress, engine::State)>, Error> {
    let Some(path) = Checkpoints::of(dir).latest()? else {
        return Ok(None);
    };
    let (found, state) = load(&path)?;
    check_equal(dir, &computation(&found), &meta.computation, |_| true)?;
    Ok(Some((found.progress, state)))
}

/// What a checkpoint computes; keys that its version of the program did not have are at their defaults, which keep
/// what that version did.
fn computation(meta: &Meta) -> BTreeMap<String, String> {
    let mut keys = match spec::parse(&meta.spec, "checkpoint", &[]) {
        Ok(run) => run.computation(),
        Err(_) => BTreeMap::new(),
    };
    keys.extend(meta.computation.clone());
    keys
}

/// Checks that the checkpoint at `path`, which says `meta`, holds the network of `run`.
///
/// # Errors
/// Names the keys that differ.
pub fn check_network(path: &Path, meta: &Meta, run: &spec::Run) -> Result<(), Error> {
    let keys = [
        "model.depth",
        "model.classes",
        "model.recipe",
        "model.stem",
        "model.stem_pool",
    ];
    check_equal(path, &computation(meta), &run.computation(), |key| {
        keys.contains(&key)
    })
}

fn check_equal(
    at: &Path,
    there: &BTreeMap<String, String>,
    here: &BTreeMap<String, String>,
    matters: impl Fn(&str) -> bool,
) -> Result<(), Error> {
    let keys: BTreeSet<&String> = there
        .keys()
        .chain(here.keys())
        .filter(|key| matters(key))
        .collect();
    let value = |map: &BTreeMap<String, String>, key| {
        map.get(key).cloned().unwrap_or_else(|| "unset".into())
    };
    let values = keys
        .into_iter()
        .map(|key| (key.clone(), value(there, key), value(here, key)));
    let keys: Vec<_> = values.filter(|(_, there, here)| there != here).collect();
    match keys.is_empty() {
        true => Ok(()),
        false => Err(Error::Different {
            path: at.into(),
            keys,
        }),
    }
}
