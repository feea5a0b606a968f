//! What will happen, in steps: the spec's lengths resolved against the number of examples.

use engine::{Decay, Hyper};
use spec::{Length, LengthError, Mode, Run, ScheduleKind};

/// A run in steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The step to train to, counted from the start of the run.
    pub steps: u64,
    /// Training examples, that is one epoch.
    pub examples: u64,
    /// Images in a step.
    pub batch_size: u64,
    /// Steps between evaluations; none if the run only trains.
    pub eval_every: Option<u64>,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Learning rate after the warmup.
    pub peak_lr: f64,
    /// Length of the warmup in steps, not rounded: the reference's rate is linear in epochs.
    pub warmup: f64,
    shape: Shape,
    hyper: Hyper,
}

/// The learning rate after the warmup.
#[derive(Clone, Debug, PartialEq)]
enum Shape {
    /// `factor` at each of the steps.
    Step { milestones: Vec<u64>, factor: f64 },
    /// Half a cosine down to 0 at the end.
    Cosine,
    /// The peak.
    Constant,
}

impl Plan {
    /// Resolves the lengths of `run` for a training set of `examples`.
    ///
    /// # Errors
    /// If the run's own length is a percentage.
    pub fn new(run: &Run, examples: u64) -> Result<Self, LengthError> {
        let batch_size = run.train.batch_size as u64;
        let total = run.train.length.steps(examples, batch_size, None)?;
        let steps = |length: &Length| length.steps(examples, batch_size, Some(total));
        let shape = match run.schedule.kind {
            ScheduleKind::Step => Shape::Step {
                milestones: run
                    .schedule
                    .milestones
                    .iter()
                    .map(steps)
                    .collect::<Result<_, _>>()?,
                factor: run.schedule.factor,
            },
            ScheduleKind::Cosine => Shape::Cosine,
            ScheduleKind::Constant => Shape::Constant,
        };
        let decay = match run.optimizer.decay {
            spec::Decay::All => Decay::All,
            spec::Decay::NoNorm => Decay::NoNorm,
            spec::Decay::NoNormNoBias => Decay::NoNormNoBias,
        };
        let evaluates = run.mode != Mode::Train;
        Ok(Self {
            steps: total,
            examples,
            batch_size,
            eval_every: if evaluates {
                Some(steps(&run.eval.every)?.max(1))
            } else {
                None
            },
            checkpoint_every: steps(&run.checkpoint.every)?.max(1),
            peak_lr: run.schedule.base_lr * batch_size as f64 / 256.0,
            warmup: run
                .schedule
                .warmup
                .exact_steps(examples, batch_size, Some(total))?,
            shape,
            hyper: Hyper {
                lr: 0.0,
                momentum: run.optimizer.momentum,
                nesterov: run.optimizer.nesterov,
                weight_decay: run.optimizer.weight_decay,
                decay,
                label_smoothing: run.loss.label_smoothing,
            },
        })
    }

    /// Learning rate of the update that follows `step` updates: linear from 0 through the warmup, then the shape
    /// (the reference, whose first update has rate 0).
    pub fn lr(&self, step: u64) -> f64 {
        let at = step as f64;
        if at < self.warmup {
            return self.peak_lr * at / self.warmup;
        }
        match &self.shape {
            Shape::Constant => self.peak_lr,
            Shape::Step { milestones, factor } => {
                let passed = milestones.iter().filter(|&&m| step >= m).count();
                self.peak_lr * factor.powi(passed as i32)
            }
            Shape::Cosine => {
                let done = (at - self.warmup) / (self.steps as f64 - self.warmup).max(1.0);
                self.peak_lr * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }

    /// Everything the update after `step` updates depends on besides the gradient.
    pub fn hyper(&self, step: u64) -> Hyper {
        Hyper {
            lr: self.lr(step),
            ..self.hyper
        }
    }

    /// Passes over the training set after `step` updates.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 * self.batch_size as f64 / self.examples as f64
    }

    /// How many evaluations there are.
    pub fn evaluations(&self) -> u64 {
        self.eval_every
            .map_or(0, |every| self.steps.div_ceil(every))
    }

    /// How many checkpoints there are.
    pub fn checkpoints(&self) -> u64 {
        let (a, last) = (self.checkpoint_every, self.steps.saturating_sub(1));
        let every = |n: u64| last / n;
        let at_evaluations = self
            .eval_every
            .map_or(0, |b| every(b) - every(least_common_multiple(a, b)));
        every(a) + at_evaluations + self.steps.min(1)
    }

    /// Whether an evaluation follows update number `step`; the last one always is followed by one.
    pub fn is_eval_due(&self, step: u64) -> bool {
        let is_due = |every: u64| step.is_multiple_of(every) || step >= self.steps;
        step > 0 && self.eval_every.is_some_and(is_due)
    }

    /// Whether a checkpoint follows update number `step`; every evaluation has one before it.
    pub fn is_checkpoint_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.checkpoint_every) || step == self.steps || self.is_eval_due(step)
    }
}

/// Saturates, which is as good as never.
fn least_common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str, examples: u64) -> Plan {
        let run = spec::parse(
            &format!("name = \"t\"\ndata.source = \"fake\"\n{text}"),
            "t.toml",
            &[],
        );
        Plan::new(&run.unwrap_or_else(|e| panic!("{e}")), examples).unwrap()
    }

    fn close(ours: f64, expected: f64) {
        assert!(
            (ours - expected).abs() <= 1e-6 * expected,
            "{ours} is not {expected}"
        );
    }

    /// docs/reference/vectors.json, `lr_step_schedule`: computed in float32, so good to 1e-6.
    #[test]
    fn rates_are_the_references() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        let mut checked = 0;
        for (batch, points) in vectors["lr_step_schedule"].as_object().unwrap() {
            let plan = plan(&format!("train.batch_size = {batch}"), 1_281_167);
            for point in points.as_array().unwrap() {
                let step = point["step"].as_u64().unwrap();
                close(plan.lr(step), point["lr"].as_f64().unwrap());
                checked += 1;
            }
        }
        for (batch, milestones) in vectors["lr_boundaries"].as_object().unwrap() {
            let plan = plan(&format!("train.batch_size = {batch}"), 1_281_167);
            let phases = [1.0, 0.1, 0.01, 0.001];
            for (milestone, factor) in milestones.as_array().unwrap().iter().zip(phases) {
                let step = milestone[1].as_u64().unwrap();
                close(plan.lr(step), plan.peak_lr * factor);
                assert!(
                    plan.lr(step - 1) != plan.lr(step),
                    "batch {batch}: step {step} begins a phase"
                );
                checked += 1;
            }
        }
        assert!(checked > 100, "{checked} rates were found");
    }

    #[test]
    fn a_cosine_ends_at_zero() {
        let plan = plan(
            "train.length = \"100 steps\"\ntrain.batch_size = 256\nschedule.kind = \"cosine\"\nschedule.warmup = \"20 steps\"",
            2560,
        );
        close(plan.lr(10), 0.05);
        close(plan.lr(20), 0.1);
        close(plan.lr(60), 0.05);
        assert!(plan.lr(100).abs() < 1e-12);
    }

    #[test]
    fn what_is_due_when() {
        let text = "train.length = \"10 epochs\"\ntrain.batch_size = 64\neval.every = \"2 epochs\"\ncheckpoint.every = \"30 steps\"";
        let plan = plan(text, 1000);
        // 10 epochs of 1000 by 64 are 156.25 steps.
        assert_eq!(
            (plan.steps, plan.eval_every, plan.checkpoint_every),
            (157, Some(32), 30)
        );
        assert_eq!((plan.evaluations(), plan.checkpoints()), (5, 10));
        let due = |f: &dyn Fn(u64) -> bool| (1..=157).filter(|&s| f(s)).collect::<Vec<_>>();
        assert_eq!(due(&|s| plan.is_eval_due(s)), [32, 64, 96, 128, 157]);
        assert_eq!(
            due(&|s| plan.is_checkpoint_due(s)),
            [30, 32, 60, 64, 90, 96, 120, 128, 150, 157]
        );
        close(plan.epoch(157), 10.048);
    }
}
