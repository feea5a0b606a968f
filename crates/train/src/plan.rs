//! What will happen, in steps: the spec's lengths resolved against the number of examples.

use data::Mix;
use engine::{Decay, Dropout, Hyper, Rule};
use spec::{EmaEval, Length, LengthError, Mode, OptimizerKind, Run, ScheduleKind};

use crate::Progress;

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
    /// How training images are mixed, and the seed of that.
    pub(crate) mix: (Mix, u64),
    /// What an evaluation scores.
    pub(crate) scored: Scored,
    /// The last step of each resolution, and the resolution; increasing, the last one is the run's.
    phases: Vec<(u64, usize)>,
    shape: Shape,
    average: Option<Average>,
    /// What is dropped at the end of the run.
    dropout: Dropout,
    hyper: Hyper,
}

/// What an evaluation scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scored {
    /// The parameters.
    Raw,
    /// Their moving average.
    Average,
    /// Both.
    Both,
}

/// The moving average of parameters and running statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Average {
    /// What a step keeps of it.
    decay: f64,
    /// Whether the first steps keep less.
    is_warmed_up: bool,
}

/// The learning rate after the warmup.
#[derive(Clone, Debug, PartialEq)]
enum Shape {
    /// `factor` at each of the steps.
    Step { milestones: Vec<u64>, factor: f64 },
    /// Half a cosine down to `end` at the end.
    Cosine { end: f64 },
    /// Down to `end` at the end, by a power of the part of the run that is left.
    Polynomial { power: f64, end: f64 },
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
            ScheduleKind::Cosine => Shape::Cosine {
                end: run.schedule.end_lr,
            },
            ScheduleKind::Polynomial => Shape::Polynomial {
                power: run.schedule.power,
                end: run.schedule.end_lr,
            },
            ScheduleKind::Constant => Shape::Constant,
        };
        let decay = match run.optimizer.decay {
            spec::Decay::All => Decay::All,
            spec::Decay::NoNorm => Decay::NoNorm,
            spec::Decay::NoNormNoBias => Decay::NoNormNoBias,
        };
        let trust = run.optimizer.trust;
        let rule = match run.optimizer.kind {
            OptimizerKind::Sgd => Rule::Sgd,
            OptimizerKind::Lars2018 => Rule::Lars2018 { trust },
            OptimizerKind::Lars => Rule::Lars { trust },
        };
        let average = match run.ema.half_life {
            None => None,
            Some(half_life) => {
                let steps = half_life.exact_steps(examples, batch_size, Some(total))?;
                Some(Average {
                    decay: 0.5f64.powf(1.0 / steps),
                    is_warmed_up: run.ema.warmup,
                })
            }
        };
        let mut phases = vec![];
        for (until, &side) in run
            .progressive
            .until
            .iter()
            .zip(&run.progressive.resolution)
        {
            phases.push((steps(until)?.min(total), side));
        }
        phases.push((total, run.model.resolution));
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
            mix: (
                Mix {
                    mixup: run.mixup.alpha,
                    cutmix: run.mixup.cutmix_alpha,
                },
                run.seed,
            ),
            scored: match (average, run.ema.eval) {
                (None, _) | (Some(_), EmaEval::Raw) => Scored::Raw,
                (Some(_), EmaEval::Average) => Scored::Average,
                (Some(_), EmaEval::Both) => Scored::Both,
            },
            phases,
            shape,
            average,
            dropout: Dropout {
                rate: run.model.dropout,
                path_rate: run.model.drop_connect,
                block_rate: run.model.drop_block,
                seed: run.seed,
                step: 0,
            },
            hyper: Hyper {
                rule,
                lr: 0.0,
                momentum: run.optimizer.momentum,
                nesterov: run.optimizer.nesterov,
                weight_decay: run.optimizer.weight_decay,
                decay,
                label_smoothing: run.loss.label_smoothing,
                clip_norm: run.optimizer.clip_norm,
                average: None,
                dropout: None,
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
            Shape::Cosine { end } => {
                let done = (at - self.warmup) / (self.steps as f64 - self.warmup).max(1.0);
                let left = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
                end + (self.peak_lr - end) * left
            }
            // The reference counts whole steps from the warmup's last, and one more to the end than there are.
            Shape::Polynomial { .. } if at == self.warmup => self.peak_lr,
            Shape::Polynomial { power, end } => {
                let whole = (self.steps as f64 - self.warmup.floor() + 1.0).max(1.0);
                let done = (at - self.warmup.floor()).clamp(1.0, whole);
                end + (self.peak_lr - end) * (1.0 - done / whole).powf(*power)
            }
        }
    }

    /// Everything the update after `step` updates depends on besides the gradient.
    pub fn hyper(&self, step: u64) -> Hyper {
        Hyper {
            lr: self.lr(step),
            average: self.average.map(|average| average.decay(step)),
            dropout: self.dropout(step),
            ..self.hyper
        }
    }

    /// What the update after `step` updates drops. Of squares, a part that grows with the steps, as the reference has it.
    fn dropout(&self, step: u64) -> Option<Dropout> {
        let Dropout {
            rate,
            path_rate,
            block_rate,
            ..
        } = self.dropout;
        let is_any = rate > 0.0 || path_rate > 0.0 || block_rate > 0.0;
        is_any.then(|| Dropout {
            block_rate: block_rate * (step as f64 / self.steps as f64).min(1.0),
            step,
            ..self.dropout
        })
    }

    /// The resolution of the images of the update that follows where a run has come to, and the last step that has it. An
    /// evaluation that is still due belongs to the steps before it.
    pub fn phase(&self, at: &Progress) -> (u64, usize) {
        let owes = at.is_eval_due && !at.is_evaluated();
        let is_open = |&&(end, _): &&(u64, usize)| at.step < end || owes && at.step == end;
        let last = self.phases.last();
        let phase = self.phases.iter().find(is_open).or(last);
        *phase.expect("a run has a resolution")
    }

    /// Every resolution that there is and the last step that has it, in their order.
    pub fn phases(&self) -> &[(u64, usize)] {
        &self.phases
    }

    /// Passes over the training set after `step` updates.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 * self.batch_size as f64 / self.examples as f64
    }

    /// How many evaluations there are.
    pub fn evaluations(&self) -> u64 {
        let Some(every) = self.eval_every else {
            return 0;
        };
        let between = self.changes().filter(|step| !step.is_multiple_of(every));
        self.steps.div_ceil(every) + between.count() as u64
    }

    /// How many checkpoints there are.
    pub fn checkpoints(&self) -> u64 {
        let (a, last) = (self.checkpoint_every, self.steps.saturating_sub(1));
        let every = |n: u64| last / n;
        let at_evaluations = self
            .eval_every
            .map_or(0, |b| every(b) - every(least_common_multiple(a, b)));
        let is_counted = |step: u64| {
            let at_evaluation = self.eval_every.is_some_and(|b| step.is_multiple_of(b));
            step.is_multiple_of(a) || at_evaluation
        };
        let between = self.changes().filter(|&step| !is_counted(step));
        every(a) + at_evaluations + between.count() as u64 + self.steps.min(1)
    }

    /// The steps after which the resolution changes.
    fn changes(&self) -> impl Iterator<Item = u64> {
        let mut last = 0;
        let ends = self.phases.iter().map(|&(end, _)| end);
        let is_new = move |end: &u64| std::mem::replace(&mut last, *end) != *end;
        ends.filter(is_new).filter(|&end| end < self.steps)
    }

    /// Whether an evaluation follows update number `step`; the last one of the run and of each resolution always is
    /// followed by one.
    pub fn is_eval_due(&self, step: u64) -> bool {
        let is_due = |every: u64| {
            let changes = || self.changes().any(|change| change == step);
            step.is_multiple_of(every) || step >= self.steps || changes()
        };
        step > 0 && self.eval_every.is_some_and(is_due)
    }

    /// Whether a checkpoint follows update number `step`; every evaluation has one before it.
    pub fn is_checkpoint_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.checkpoint_every)
            || step == self.steps
            || self.is_eval_due(step)
            || self.changes().any(|change| change == step)
    }
}

impl Average {
    /// Of the update that follows `step` updates: the half-life's, or (1 + t) / (10 + t) while that is less, as
    /// TensorFlow's ExponentialMovingAverage has it with a number of updates.
    fn decay(&self, step: u64) -> f64 {
        let t = step as f64;
        match self.is_warmed_up {
            true => self.decay.min((1.0 + t) / (10.0 + t)),
            false => self.decay,
        }
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

    /// docs/reference/vectors.json, `lars`; peak and warmup by batch are the tables' of docs/reference/spec.md, 6.4.
    #[test]
    fn polynomial_rates_are_the_references() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        let mut checked = 0;
        for (table, points) in vectors["lars"].as_object().unwrap() {
            for point in points.as_array().unwrap() {
                let number = |key: &str| point[key].as_u64().unwrap();
                let (batch, steps) = (number("batch"), number("train_steps"));
                let (peak, warmup) = match (table.as_str(), batch) {
                    (_, 16384) => (25.0, 5),
                    ("table_2018", 32768) => (34.0, 12),
                    (_, 32768) => (32.0, 14),
                    other => panic!("{other:?}"),
                };
                let base_lr = peak * 256.0 / batch as f64;
                let plan = plan(
                    &format!(
                        "train.batch_size = {batch}\ntrain.length = \"{steps} steps\"\nschedule.kind = \"polynomial\"\n\
                         schedule.base_lr = {base_lr:?}\nschedule.warmup = \"{warmup} epochs\"\nschedule.end_lr = 1e-4"
                    ),
                    1_281_167,
                );
                close(plan.lr(number("step")), point["lr"].as_f64().unwrap());
                checked += 1;
            }
        }
        assert!(checked > 20, "{checked} rates were found");
    }

    /// docs/reference/vectors.json, `lr_fast_1024`.
    #[test]
    fn the_fast_regime_is_a_step_schedule() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        let plan = plan(
            "schedule.warmup = \"4 epochs\"\nschedule.milestones = [\"21 epochs\", \"35 epochs\", \"43 epochs\"]\ntrain.length = \"62556 steps\"",
            1_281_167,
        );
        let boundaries = vectors["lr_fast_1024"]["boundaries"].as_array().unwrap();
        assert_eq!(boundaries.len(), 4);
        for (boundary, factor) in boundaries.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            let step = boundary[1].as_u64().unwrap();
            close(plan.lr(step), 0.4 * factor);
            assert!(plan.lr(step - 1) != plan.lr(step));
        }
    }

    #[test]
    fn phases_follow_each_other() {
        let text = "train.batch_size = 10\ntrain.length = \"10 epochs\"\nmodel.resolution = 288\n\
                    progressive.until = [\"2 epochs\", \"5 epochs\"]\nprogressive.resolution = [128, 224]";
        let plan = plan(text, 100);
        let at = |step, is_eval_due| {
            plan.phase(&Progress {
                step,
                is_eval_due,
                ..Progress::default()
            })
        };
        assert_eq!((at(0, false), at(19, false)), ((20, 128), (20, 128)));
        assert_eq!((at(20, false), at(20, true)), ((50, 224), (20, 128)));
        assert_eq!((at(50, true), at(50, false)), ((50, 224), (100, 288)));
        assert_eq!((at(100, true), at(100, false)), ((100, 288), (100, 288)));
        assert_eq!(plan.phases(), [(20, 128), (50, 224), (100, 288)]);
        // Every 10 steps, and both changes are among them.
        assert_eq!((plan.evaluations(), plan.checkpoints()), (10, 10));
        let text = format!("{text}\neval.every = \"40 steps\"\ncheckpoint.every = \"30 steps\"");
        let plan = self::plan(&text, 100);
        let due = |f: &dyn Fn(u64) -> bool| (1..=100).filter(|&s| f(s)).collect::<Vec<_>>();
        assert_eq!(due(&|s| plan.is_eval_due(s)), [20, 40, 50, 80, 100]);
        assert_eq!(
            due(&|s| plan.is_checkpoint_due(s)),
            [20, 30, 40, 50, 60, 80, 90, 100]
        );
        assert_eq!((plan.evaluations(), plan.checkpoints()), (5, 8));
    }

    /// docs/reference/vectors.json, `ema_decay_0.9999`: ln 2 / -ln 0.9999 is 6931.1 steps.
    #[test]
    fn decays_of_the_average_are_the_references() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        let half_life = format!("{:?}", 2f64.ln() / -0.9999f64.ln() / 1000.0);
        // 1000 steps are an epoch.
        let text = format!("train.batch_size = 10\nema.half_life = \"{half_life} epochs\"");
        let warmed = plan(&text, 10_000);
        for (step, decay) in vectors["ema_decay_0.9999"].as_object().unwrap() {
            let average = warmed.hyper(step.parse().unwrap()).average;
            close(average.unwrap(), decay.as_f64().unwrap());
        }
        let cold = plan(&format!("{text}\nema.warmup = false"), 10_000);
        close(cold.hyper(0).average.unwrap(), 0.9999);
        assert_eq!(plan("", 10_000).hyper(0).average, None);
        let half: f64 = (0..6931).map(|t| cold.hyper(t).average.unwrap()).product();
        assert!((half - 0.5).abs() < 1e-4, "{half}");
    }

    /// docs/reference/vectors.json, `dropblock_keep_0.9_by_group`: the share of the last group is all of the rate.
    #[test]
    fn more_squares_are_dropped_as_a_run_goes_on() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        let plan = plan("model.drop_block = 0.1", 10_000);
        let rate = |step| plan.hyper(step).dropout.unwrap().block_rate;
        for (progress, keeps) in vectors["dropblock_keep_0.9_by_group"].as_object().unwrap() {
            let step = (plan.steps as f64 * progress.parse::<f64>().unwrap()) as u64;
            close(1.0 - rate(step), keeps[3].as_f64().unwrap());
        }
        close(rate(0), 0.0);
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
