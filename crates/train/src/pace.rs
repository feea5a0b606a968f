//! How fast this process trains, and how much of the time it waits.

use std::time::{Duration, Instant};

use engine::Metrics;
use track::{StepMetrics, Summary};

use crate::{Error, Plan, Progress};

/// Time of this process in steps, and in waiting for input; evaluations and checkpoints do not count.
pub struct Pace {
    images: u64,
    stepping: Duration,
    waiting: Duration,
    /// Of the step that runs: when the one before ended, or it began to wait, and how long it waited.
    began: Option<Instant>,
    waited: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let zero = Duration::ZERO;
        Self {
            images: 0,
            stepping: zero,
            waiting: zero,
            began: None,
            waited: zero,
        }
    }
}

impl Pace {
    /// Waits for a batch. A step begins, unless the one before is still under way: then it begins when that ends.
    pub(crate) fn wait_for(&mut self, batches: &mut data::Loader) -> Result<data::Batch, Error> {
        let now = Instant::now();
        self.began.get_or_insert(now);
        let batch = batches.next().expect("training data has no end")?;
        self.waited += now.elapsed();
        Ok(batch)
    }

    /// The step ends; `goes_on` says whether another one is under way.
    pub(crate) fn step(
        &mut self,
        plan: &Plan,
        step: u64,
        lr: f64,
        metrics: &Metrics,
        goes_on: bool,
    ) -> StepMetrics {
        let now = Instant::now();
        let began = self.began.take().unwrap_or(now);
        self.began = goes_on.then_some(now);
        let (taken, waited) = (now - began, std::mem::take(&mut self.waited));
        self.images += metrics.images as u64;
        self.stepping += taken;
        self.waiting += waited;
        StepMetrics {
            step,
            total: plan.steps,
            epoch: plan.epoch(step),
            loss: metrics.loss(),
            top1: metrics.top1(),
            lr,
            images_per_s: metrics.images as f64 / taken.as_secs_f64(),
            input_wait_fraction: waited.as_secs_f64() / taken.as_secs_f64(),
        }
    }

    /// Seconds of training of this process.
    pub(crate) fn seconds(&self) -> f64 {
        self.stepping.as_secs_f64()
    }

    /// How a run ended that has come to `at`.
    pub fn summary(&self, status: &str, at: &Progress, reason: Option<String>) -> Summary {
        let seconds = self.stepping.as_secs_f64();
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        Summary {
            status: status.into(),
            step: at.step,
            eval: at.eval.as_ref().map(|(_, summary)| summary.clone()),
            best: at.best.clone(),
            images_per_s: per_second(self.images as f64),
            input_wait_fraction: per_second(self.waiting.as_secs_f64()),
            reason,
        }
    }
}
