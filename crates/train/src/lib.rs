//! The run in steps: [`train`] is the loop; [`Plan`] says what happens when; checkpoints make a resume exact.
//!
//! This crate sees a `dyn Engine` and batches of images. It knows no shapes, no devices and no command line, and
//! trackers can never stop it.

mod checkpoint;
mod error;
mod input;
mod plan;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::{Engine, Metrics, Pixels};
use track::{Best, EvalMetrics, EvalSummary, StepMetrics, Summary, Trackers};

pub use checkpoint::{Checkpoints, Meta, Progress, find, load};
pub use error::Error;
pub use input::{Input, eval_config};
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
    /// What they say about the run; the progress in it is where the run starts.
    pub meta: Meta,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// Trains from where the job's progress is to the end of its plan, or until it is told to stop.
///
/// Each step: update, log, checkpoint, evaluate. The checkpoint is written before its evaluation and says that one is
/// owed, so a run that is killed at any moment loses at most the steps since the last checkpoint, and no evaluation.
///
/// # Errors
/// If input, disk or engine fail, or the loss is not finite. What was saved stays.
pub fn train(
    mut job: Job<'_>,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
) -> Result<Summary, Error> {
    let config = job
        .input
        .train
        .as_ref()
        .expect("a run that trains has training data");
    let mut at = std::mem::take(&mut job.meta.progress);
    let mut batches = data::train(config, at.cursor.clone())?;
    let mut pace = Pace::new(job.plan.batch_size);
    if at.eval_pending {
        evaluate(&job, engine, &mut at, trackers)?;
        pace.resume();
    }
    while at.step < job.plan.steps {
        let batch = pace.wait_for(&mut batches)?;
        batch.bad_records.iter().for_each(|bad| trackers.note(bad));
        let hyper = job.plan.hyper(at.step);
        let metrics = engine.train_step(&view(&batch), &hyper)?;
        at.step += 1;
        at.cursor = batch.cursor;
        trackers.step(&pace.step(job.plan, at.step, hyper.lr, &metrics));
        if !metrics.loss().is_finite() {
            return Err(Error::Diverged { step: at.step });
        }

        let is_stopping = job.stop.load(Ordering::Relaxed);
        at.eval_pending = job.plan.is_eval_due(at.step);
        if is_stopping || job.plan.is_checkpoint_due(at.step) {
            at.metrics_bytes = trackers.sync();
            job.meta.progress = at.clone();
            job.checkpoints.save(&job.meta, &engine.state(), job.keep)?;
        }
        if is_stopping {
            return Ok(pace.summary("interrupted", &at));
        }
        if at.eval_pending {
            evaluate(&job, engine, &mut at, trackers)?;
        }
        pace.resume();
    }
    Ok(pace.summary("done", &at))
}

fn evaluate(
    job: &Job<'_>,
    engine: &mut dyn Engine,
    at: &mut Progress,
    trackers: &mut Trackers,
) -> Result<(), Error> {
    let config = job
        .input
        .eval
        .as_ref()
        .expect("a run that evaluates has evaluation data");
    let started = Instant::now();
    let metrics = score(config, engine, |bad| trackers.note(bad))?;
    at.eval_pending = false;
    at.eval = Some(EvalSummary {
        top1: metrics.top1(),
        top5: metrics.top5(),
        loss: metrics.loss(),
    });
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

/// Scores a whole set, every image once; the last batch has what is left. `note` hears of each bad record.
///
/// # Errors
/// If input or engine fail.
pub fn score(
    config: &data::Config,
    engine: &mut dyn Engine,
    mut note: impl FnMut(&str),
) -> Result<Metrics, Error> {
    let mut total = Metrics::default();
    for batch in data::eval(config)? {
        let batch = batch?;
        batch.bad_records.iter().for_each(|bad| note(bad));
        if !batch.labels.is_empty() {
            total.add(&engine.eval_step(&view(&batch))?);
        }
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
    let value = |keys: &Meta, key: &str| {
        keys.computation
            .get(key)
            .cloned()
            .unwrap_or_else(|| "unset".into())
    };
    let mut keys: Vec<&String> = found
        .computation
        .keys()
        .chain(meta.computation.keys())
        .collect();
    keys.sort();
    keys.dedup();
    let differing = keys
        .into_iter()
        .map(|key| (key.clone(), value(&found, key), value(meta, key)));
    let differing: Vec<_> = differing.filter(|(_, there, here)| there != here).collect();
    if differing.is_empty() {
        Ok(Some((found.progress, state)))
    } else {
        Err(Error::Different {
            dir: dir.into(),
            keys: differing,
        })
    }
}

/// Time of this process, in steps and in waiting for input; evaluations and checkpoints do not count.
struct Pace {
    batch_size: u64,
    steps: u64,
    stepping: Duration,
    waiting: Duration,
    step_started: Instant,
    step_waited: Duration,
}

impl Pace {
    fn new(batch_size: u64) -> Self {
        let zero = Duration::ZERO;
        Self {
            batch_size,
            steps: 0,
            stepping: zero,
            waiting: zero,
            step_started: Instant::now(),
            step_waited: zero,
        }
    }

    /// The clock runs again, after something that is no step.
    fn resume(&mut self) {
        self.step_started = Instant::now();
    }

    fn wait_for(&mut self, batches: &mut data::Loader) -> Result<data::Batch, Error> {
        let started = Instant::now();
        let batch = batches.next().expect("training data has no end")?;
        self.step_waited = started.elapsed();
        Ok(batch)
    }

    fn step(&mut self, plan: &Plan, step: u64, lr: f64, metrics: &Metrics) -> StepMetrics {
        let taken = self.step_started.elapsed();
        self.steps += 1;
        self.stepping += taken;
        self.waiting += self.step_waited;
        StepMetrics {
            step,
            total: plan.steps,
            epoch: plan.epoch(step),
            loss: metrics.loss(),
            top1: metrics.top1(),
            lr,
            images_per_s: self.batch_size as f64 / taken.as_secs_f64(),
            input_wait_fraction: self.step_waited.as_secs_f64() / taken.as_secs_f64(),
        }
    }

    fn summary(&self, status: &str, at: &Progress) -> Summary {
        let seconds = self.stepping.as_secs_f64();
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        Summary {
            status: status.into(),
            step: at.step,
            eval: at.eval.clone(),
            best: at.best.clone(),
            images_per_s: per_second((self.steps * self.batch_size) as f64),
            input_wait_fraction: per_second(self.waiting.as_secs_f64()),
            reason: None,
        }
    }
}
