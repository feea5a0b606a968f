//! How fast this process trains, and how much of the time it waits.

use std::time::{Duration, Instant};

use engine::Metrics;
use track::{Spent, StepMetrics, Summary, Trackers};

use crate::{Error, Plan, Progress};

/// A device that goes on for more than this share of a step when the next batch is there has not waited for it.
const BUSY: f64 = 0.05;

/// Where the time of this process goes. Rates are those of steps: evaluations and checkpoints do not count in them.
pub struct Pace {
    images: u64,
    stepping: Duration,
    waiting: Duration,
    /// Of the step that runs: when the one before ended, or it began to wait, and how long it waited.
    began: Option<Instant>,
    waited: Duration,
    /// Of that, while a device was computing.
    hidden: Duration,
    /// Of the input's time so far, what it took to read records.
    reading_share: f64,
    spent: Spent,
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
            hidden: zero,
            reading_share: 0.0,
            spent: Spent::default(),
        }
    }
}

impl Pace {
    /// Waits for a batch. A step begins, unless the one before is still under way: then it begins when that ends.
    pub(crate) fn wait_for(&mut self, batches: &mut data::Loader) -> Result<data::Batch, Error> {
        let now = Instant::now();
        let is_hidden = self.began.is_some();
        self.began.get_or_insert(now);
        let batch = batches.next().expect("training data has no end")?;
        let waited = now.elapsed();
        self.waited += waited;
        if is_hidden {
            self.hidden += waited;
        }
        self.reading_share = batches.reading_share();
        Ok(batch)
    }

    /// A part of the loop that is no step. What it tells the trackers is not its time but theirs.
    pub(crate) fn part<T>(
        &mut self,
        part: impl FnOnce(&mut Spent) -> &mut f64,
        trackers: &mut Trackers,
        work: impl FnOnce(&mut Trackers) -> T,
    ) -> T {
        let (began, busy) = (Instant::now(), trackers.busy());
        let done = work(trackers);
        let told = trackers.busy() - busy;
        *part(&mut self.spent) += began.elapsed().saturating_sub(told).as_secs_f64();
        self.spent.tracking = trackers.busy().as_secs_f64();
        done
    }

    /// The step ends, for which the loop has waited last for `blocked`; `goes_on` says whether another one is under
    /// way.
    pub(crate) fn step(
        &mut self,
        plan: &Plan,
        step: u64,
        lr: f64,
        metrics: &Metrics,
        (blocked, goes_on): (Duration, bool),
        busy: Duration,
    ) -> StepMetrics {
        let now = Instant::now();
        let began = self.began.take().unwrap_or(now);
        self.began = goes_on.then_some(now);
        let (taken, waited) = (now - began, std::mem::take(&mut self.waited));
        self.images += metrics.images as u64;
        self.stepping += taken;
        self.waiting += waited;
        // Of what was waited while a device computed, nothing held it up if it was not done even then.
        let hidden = std::mem::take(&mut self.hidden);
        let is_busy = blocked.as_secs_f64() > BUSY * taken.as_secs_f64();
        let stalled = if is_busy { waited - hidden } else { waited };
        let stalled = stalled.min(taken).as_secs_f64();
        self.spent.read += stalled * self.reading_share;
        self.spent.decode += stalled * (1.0 - self.reading_share);
        self.spent.engine += taken.as_secs_f64() - stalled;
        self.spent.tracking = busy.as_secs_f64();
        StepMetrics {
            step,
            total: plan.steps,
            epoch: plan.epoch(step),
            loss: metrics.loss(),
            top1: metrics.top1(),
            lr,
            images_per_s: metrics.images as f64 / taken.as_secs_f64(),
            input_wait_fraction: waited.as_secs_f64() / taken.as_secs_f64(),
            spent: self.spent,
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
            time: self.spent.time(),
            reason,
        }
    }
}
