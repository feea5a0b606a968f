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
    /// Of the step that runs: when it began to wait, and how long it did.
    began: Instant,
    waited: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let zero = Duration::ZERO;
        Self {
            images: 0,
            stepping: zero,
            waiting: zero,
            began: Instant::now(),
            waited: zero,
        }
    }
}

impl Pace {
    /// A step begins: it waits for its batch.
    pub(crate) fn wait_for(&mut self, batches: &mut data::Loader) -> Result<data::Batch, Error> {
        self.began = Instant::now();
        let batch = batches.next().expect("training data has no end")?;
        self.waited = self.began.elapsed();
        Ok(batch)
    }

    /// The step ends.
    pub(crate) fn step(
        &mut self,
        plan: &Plan,
        step: u64,
        lr: f64,
        metrics: &Metrics,
    ) -> StepMetrics {
        let taken = self.began.elapsed();
        self.images += metrics.images as u64;
        self.stepping += taken;
        self.waiting += self.waited;
        StepMetrics {
            step,
            total: plan.steps,
            epoch: plan.epoch(step),
            loss: metrics.loss(),
            top1: metrics.top1(),
            lr,
            images_per_s: metrics.images as f64 / taken.as_secs_f64(),
            input_wait_fraction: self.waited.as_secs_f64() / taken.as_secs_f64(),
        }
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
