//! What a well-typed run may still have wrong: ranges, and keys that contradict each other.

use std::fmt::Debug;

use crate::length::{Length, Unit};
use crate::run::{DEPTHS, Data, Mode, Run, ScheduleKind, Source};

/// Something wrong, before it is known where the key was written.
pub(crate) struct Finding {
    /// The key to point at.
    pub(crate) key: &'static str,
    /// The other keys that were read; where one of them is wrong in itself, this finding means nothing.
    pub(crate) others: &'static [&'static str],
    pub(crate) what: String,
    pub(crate) hint: Option<String>,
}

struct Findings(Vec<Finding>);

impl Findings {
    /// A single key whose value must be in a range.
    fn range(&mut self, key: &'static str, value: impl Debug, is_inside: bool, range: &str) {
        if !is_inside {
            self.key(key, format!("expected {range}, not {value:?}"), None);
        }
    }

    /// A single key.
    fn key(&mut self, key: &'static str, what: String, hint: Option<String>) {
        self.keys(key, &[], what, hint);
    }

    /// A key that does not fit others.
    fn keys(
        &mut self,
        key: &'static str,
        others: &'static [&'static str],
        what: String,
        hint: Option<String>,
    ) {
        self.0.push(Finding {
            key,
            others,
            what,
            hint,
        });
    }
}

/// Everything wrong with the values of a run.
pub(crate) fn check(run: &Run) -> Vec<Finding> {
    let mut found = Findings(vec![]);
    names(run, &mut found);
    model(run, &mut found);
    data(&run.data, &mut found);
    shards(run, &mut found);
    batches(run, &mut found);
    numbers(run, &mut found);
    lengths(run, &mut found);
    milestones(run, &mut found);
    found.0
}

fn names(run: &Run, found: &mut Findings) {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    found.range(
        "name",
        &run.name,
        run.name.chars().all(is_plain) && run.name.contains(|c| c != '.'),
        "letters, digits, '.', '_' and '-'",
    );
    let experiment = &run.track.experiment;
    found.range(
        "track.experiment",
        experiment,
        !experiment.is_empty(),
        "a name",
    );
    let places = [
        ("run_dir", &run.run_dir),
        ("model.labels", &run.model.labels),
        ("data.train", &run.data.train),
        ("data.eval", &run.data.eval),
    ];
    for (key, place) in places {
        let scheme = place.as_deref().and_then(|place| place.split_once("://"));
        if let Some((scheme @ ("gs" | "s3" | "az"), _)) = scheme {
            found.key(
                key,
                format!("{scheme}:// is not supported yet"),
                Some("give a path on this machine".into()),
            );
        }
    }
}

fn model(run: &Run, found: &mut Findings) {
    let model = &run.model;
    let depths = DEPTHS.map(|depth| depth.to_string()).join(", ");
    found.range(
        "model.depth",
        model.depth,
        DEPTHS.contains(&model.depth),
        &format!("one of {depths}"),
    );
    found.range(
        "model.resolution",
        model.resolution,
        model.resolution.is_multiple_of(32) && (32..=448).contains(&model.resolution),
        "a multiple of 32 from 32 to 448",
    );
    found.range(
        "model.classes",
        model.classes,
        model.classes >= 2,
        "at least 2",
    );
}

fn data(data: &Data, found: &mut Findings) {
    let [low, high] = data.crop_area;
    found.range(
        "data.crop_area",
        data.crop_area,
        0.0 < low && low <= high && high <= 1.0,
        "two increasing numbers above 0 and at most 1",
    );
    let [low, high] = data.crop_aspect;
    found.range(
        "data.crop_aspect",
        data.crop_aspect,
        0.0 < low && low <= high && high.is_finite(),
        "two increasing numbers above 0",
    );
    let counts = [
        ("data.lanes", Some(data.lanes as u64)),
        ("data.shuffle_window", Some(data.shuffle_window as u64)),
        ("data.train_examples", data.train_examples),
        ("data.eval_examples", data.eval_examples),
    ];
    for (key, count) in counts {
        if let Some(count) = count {
            found.range(key, count, count >= 1, "at least 1");
        }
    }
}

/// TFRecords come from somewhere.
fn shards(run: &Run, found: &mut Findings) {
    if run.data.source != Source::Tfrecord {
        return;
    }
    let needed = [
        ("data.train", &run.data.train, run.mode != Mode::Eval),
        ("data.eval", &run.data.eval, run.mode != Mode::Train),
    ];
    for (key, glob, is_needed) in needed {
        if is_needed && glob.is_none() {
            found.keys(
                key,
                &["data.source", "mode"],
                "missing".into(),
                Some(format!(
                    "write {key} = \"path/to/shards-*\", or data.source = \"fake\" to do without data"
                )),
            );
        }
    }
}

fn batches(run: &Run, found: &mut Findings) {
    let train = &run.train;
    let (batch_size, bn_batch) = (train.batch_size, train.bn_batch());
    found.range(
        "train.batch_size",
        batch_size,
        batch_size >= 1,
        "at least 1",
    );
    if let Some(bn_batch) = train.bn_batch {
        found.range("train.bn_batch", bn_batch, bn_batch >= 1, "at least 1");
    }
    if batch_size == 0 || bn_batch == 0 || batch_size.is_multiple_of(bn_batch) {
        return;
    }
    let divisor = (1..=bn_batch.min(4096))
        .rev()
        .find(|&d| batch_size.is_multiple_of(d))
        .unwrap_or(1);
    let hint = format!("the nearest below is train.bn_batch = {divisor}");
    if train.bn_batch.is_some() {
        found.keys(
            "train.bn_batch",
            &["train.batch_size"],
            format!("{bn_batch} does not divide train.batch_size = {batch_size}"),
            Some(hint),
        );
    } else {
        found.keys(
            "train.batch_size",
            &["train.bn_batch"],
            format!("{batch_size} is no multiple of the default train.bn_batch = {bn_batch}"),
            Some(hint),
        );
    }
}

fn numbers(run: &Run, found: &mut Findings) {
    let positive = |x: f64| x > 0.0 && x.is_finite();
    let fraction = |x: f64| (0.0..1.0).contains(&x);
    let Run {
        optimizer,
        schedule,
        ..
    } = run;
    let momentum = optimizer.momentum;
    found.range(
        "optimizer.momentum",
        momentum,
        fraction(momentum),
        "at least 0 and below 1",
    );
    let decay = optimizer.weight_decay;
    found.range(
        "optimizer.weight_decay",
        decay,
        decay >= 0.0 && decay.is_finite(),
        "at least 0",
    );
    let base_lr = schedule.base_lr;
    found.range("schedule.base_lr", base_lr, positive(base_lr), "above 0");
    let factor = schedule.factor;
    found.range("schedule.factor", factor, positive(factor), "above 0");
    let smoothing = run.loss.label_smoothing;
    found.range(
        "loss.label_smoothing",
        smoothing,
        fraction(smoothing),
        "at least 0 and below 1",
    );
    let ratio = run.eval.crop_ratio;
    found.range(
        "eval.crop_ratio",
        ratio,
        ratio > 0.0 && ratio <= 1.0,
        "above 0 and at most 1",
    );
    let keep = run.checkpoint.keep;
    found.range("checkpoint.keep", keep, keep >= 1, "at least 1");
}

fn lengths(run: &Run, found: &mut Findings) {
    let length = run.train.length;
    if length.value == 0.0 {
        found.key(
            "train.length",
            format!("expected a length above 0, not \"{length}\""),
            Some("mode = \"eval\" scores the latest checkpoint without training".into()),
        );
    }
    let is_whole = length.unit != Unit::Percent;
    found.range(
        "train.length",
        length.to_string(),
        is_whole,
        "steps, epochs or examples, of which the other lengths can be a percentage",
    );
    for (key, every) in [
        ("eval.every", run.eval.every),
        ("checkpoint.every", run.checkpoint.every),
    ] {
        let shown = every.to_string();
        found.range(key, shown, every.value > 0.0, "a length above 0");
    }
}

fn milestones(run: &Run, found: &mut Findings) {
    if run.schedule.kind != ScheduleKind::Step {
        return;
    }
    for pair in run.schedule.milestones.windows(2) {
        if is_longer(pair[1], pair[0], run) == Some(false) {
            found.keys(
                "schedule.milestones",
                LENGTH_KEYS,
                format!(
                    "expected increasing lengths, but \"{}\" follows \"{}\"",
                    pair[1], pair[0]
                ),
                None,
            );
        }
    }
}

/// What the comparison of two lengths depends on.
const LENGTH_KEYS: &[&str] = &[
    "schedule.kind",
    "data.source",
    "data.train_examples",
    "train.batch_size",
    "train.length",
];

/// Whether a length is longer than another; unknown if one of them is in epochs and the spec does not say how many
/// examples those have.
fn is_longer(a: Length, b: Length, run: &Run) -> Option<bool> {
    if a.unit == b.unit {
        return Some(a.value > b.value);
    }
    Some(steps(a, run)? > steps(b, run)?)
}

/// A length in steps, where the spec says enough.
fn steps(length: Length, run: &Run) -> Option<u64> {
    let whole = run.train.length;
    let is_in = |unit| length.unit == unit || length.unit == Unit::Percent && whole.unit == unit;
    let examples = match is_in(Unit::Epochs) {
        true => run.data.train_examples()?,
        false => 1,
    };
    // Without batches, which is reported elsewhere, there are no steps.
    let batch_size = Some(run.train.batch_size as u64).filter(|size| *size > 0)?;
    let total = whole.steps(examples, batch_size, None).ok();
    length.steps(examples, batch_size, total).ok()
}
