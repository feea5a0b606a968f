//! The run in steps: [`train`] is the loop; [`Plan`] says what happens when; checkpoints make a resume exact.
//!
//! This crate sees a `dyn Engine` and batches of images. It knows no shapes, no devices and no command line, and
//! trackers can never stop it.

mod checkpoint;
mod error;
mod input;
mod pace;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use engine::{Engine, Metrics, Pixels};
use track::{Best, EvalMetrics, EvalSummary, Trackers};

pub use checkpoint::{Checkpoints, Meta, Progress, find, load};
pub use error::Error;
pub use input::{Input, eval_config};
pub use pace::Pace;
pub use plan::Plan;

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
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// Why [`train`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The plan is done.
    Done,
    /// It was told to stop; what was done is saved.
    Interrupted,
}

/// Trains from `at` to the end of the plan, or until it is told to stop; `at` moves along.
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
    if let Some(best) = &at.best {
        job.checkpoints.point("best", best.step)?;
    }
    evaluate_if_due(&job, at, engine, trackers)?;
    while at.step < job.plan.steps {
        let batch = pace.wait_for(&mut batches)?;
        let hyper = job.plan.hyper(at.step);
        let metrics = engine.train_step(&view(&batch), &hyper)?;
        at.step += 1;
        at.cursor = batch.cursor;
        trackers.step(&pace.step(job.plan, at.step, hyper.lr, &metrics));
        if !metrics.loss().is_finite() {
            return Err(Error::Diverged { step: at.step });
        }

        let is_stopping = job.stop.load(Ordering::Relaxed);
        if is_stopping || job.plan.is_checkpoint_due(at.step) {
            at.metrics_bytes = trackers.sync();
            job.meta.progress = at.clone();
            job.checkpoints.save(&job.meta, &engine.state(), job.keep)?;
        }
        if is_stopping {
            return Ok(Ended::Interrupted);
        }
        evaluate_if_due(&job, at, engine, trackers)?;
    }
    Ok(Ended::Done)
}

/// Evaluates if the plan says so and it has not been done.
fn evaluate_if_due(
    job: &Job<'_>,
    at: &mut Progress,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
) -> Result<(), Error> {
    let is_done = at.eval.as_ref().is_some_and(|(step, _)| *step == at.step);
    if is_done || !job.plan.is_eval_due(at.step) {
        return Ok(());
    }
    let config = job
        .input
        .eval
        .as_ref()
        .expect("a run that evaluates has evaluation data");
    let started = Instant::now();
    let metrics = score(config, engine)?;
    let summary = EvalSummary {
        top1: metrics.top1(),
        top5: metrics.top5(),
        loss: metrics.loss(),
    };
    at.eval = Some((at.step, summary));
    trackers.eval(&EvalMetrics {
        step: at.step,
        epoch: job.plan.epoch(at.step),
        loss: metrics.loss(),
        top1: metrics.top1(),
        top5: metrics.top5(),
        images: metrics.images as u64,
        seconds: started.elapsed().as_secs_f64(),
    });
    if at
        .best
        .as_ref()
        .is_none_or(|best| metrics.top1() > best.value)
    {
        at.best = Some(Best {
            metric: "top1".into(),
            value: metrics.top1(),
            step: at.step,
        });
        job.checkpoints.point("best", at.step)?;
    }
    Ok(())
}

/// Scores a whole set, every image once; the last batch has what is left.
///
/// # Errors
/// If input or engine fail.
pub fn score(config: &data::Config, engine: &mut dyn Engine) -> Result<Metrics, Error> {
    let mut total = Metrics::default();
    for batch in data::eval(config)? {
        total.add(&engine.eval_step(&view(&batch?))?);
    }
    Ok(total)
}

/// A batch as the engine takes it.
fn view(batch: &data::Batch) -> engine::Batch<'_> {
    let pixels = match &batch.pixels {
        data::Pixels::U8(p) => Pixels::U8(p),
        data::Pixels::F32(p) => Pixels::F32(p),
    };
    engine::Batch {
        pixels,
        labels: &batch.labels,
    }
}

/// Where a run in `dir` goes on: its last checkpoint, if it computes what `meta` says.
///
/// # Errors
/// If the checkpoint cannot be read, or holds another computation; all differing keys are named.
pub fn resume(dir: &Path, meta: &Meta) -> Result<Option<(Progress, engine::State)>, Error> {
    let Some(path) = Checkpoints::of(dir).latest() else {
        return Ok(None);
    };
    let (found, state) = load(&path)?;
    check_equal(dir, &found.computation, &meta.computation, |_| true)?;
    Ok(Some((found.progress, state)))
}

/// Checks that the checkpoint at `path`, which says `meta`, holds the network of `run`.
///
/// # Errors
/// Names the keys that differ.
pub fn check_network(path: &Path, meta: &Meta, run: &spec::Run) -> Result<(), Error> {
    let keys = ["model.depth", "model.classes", "model.recipe"];
    check_equal(path, &meta.computation, &run.computation(), |key| {
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
