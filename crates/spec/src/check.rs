//! What a well-typed run may still have wrong: ranges, and keys that contradict each other.

use std::fmt::Debug;
use std::ops::RangeInclusive;

use crate::length::{Length, Unit};
use crate::run::{DEPTHS, Data, Mode, OptimizerKind, Run, ScheduleKind, Source};

/// What whole numbers can be; the schema says the same (`run`). The upper ends are far above what anybody trains, and
/// low enough for every product of them: a batch stays within what `data` can index, an epoch within what a double
/// counts exactly.
const WHOLE: [(&str, RangeInclusive<u64>); 17] = [
    ("seed", 0..=u64::MAX),
    ("model.classes", 2..=1_000_000),
    ("model.drop_block_size", 1..=65_536),
    ("data.lanes", 1..=65_536),
    ("data.shuffle_window", 1..=10_000_000),
    ("data.train_examples", 1..=1_000_000_000_000),
    ("data.eval_examples", 1..=1_000_000_000_000),
    ("data.max_bad_records", 0..=1_000_000_000_000),
    ("data.cache_gb", 1..=1_000_000),
    ("data.augment_ops", 1..=16),
    ("data.augment_magnitude", 0..=30),
    ("train.batch_size", 1..=65_536),
    ("train.bn_batch", 1..=65_536),
    ("train.threads", 0..=1024),
    ("train.max_rewinds", 0..=1000),
    ("eval.wait", 0..=100_000_000),
    ("checkpoint.keep", 1..=1_000_000),
];

/// What the whole number of a key can be, in words; none if the key holds something else.
pub(crate) fn whole(path: &str) -> Option<String> {
    match path {
        "model.depth" => {
            let depths = DEPTHS.map(|depth| depth.to_string()).join(", ");
            Some(format!("one of {depths}"))
        }
        "model.resolution" => Some("a multiple of 32 from 32 to 448".into()),
        _ => {
            let (_, range) = WHOLE.iter().find(|(key, _)| *key == path)?;
            let (least, most) = (range.start(), range.end());
            Some(format!("a whole number from {least} to {most}"))
        }
    }
}

/// What is wrong with a place that is not on this machine.
pub(crate) fn remote(place: &str) -> Option<(String, Option<String>)> {
    let (scheme, _) = place.split_once("://")?;
    if scheme.is_empty() || !scheme.chars().all(|c| c.is_ascii_alphanumeric()) {
        return None;
    }
    let yet = match scheme {
        "gs" | "s3" | "az" => " yet",
        _ => "",
    };
    let what = format!("{scheme}:// is not supported{yet}");
    Some((what, Some("give a path on this machine".into())))
}

/// What names of rows of Bigtable begin with.
const TABLE: &str = "bigtable://";

/// Whether a place is in a bucket, from which shards can be read.
fn is_bucket(place: &str) -> bool {
    ["gs://", "s3://", "az://"]
        .iter()
        .any(|scheme| place.starts_with(scheme))
}

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
    /// A single key with a whole number.
    fn whole(&mut self, key: &'static str, value: u64, is_inside: bool) {
        let range = whole(key).expect("the key holds a whole number");
        self.range(key, value, is_inside, &range);
    }

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
    mirror(run, &mut found);
    whole_numbers(run, &mut found);
    data(&run.data, &mut found);
    shards(run, &mut found);
    batches(run, &mut found);
    numbers(run, &mut found);
    lengths(run, &mut found);
    milestones(run, &mut found);
    progressive(run, &mut found);
    found.0
}

fn names(run: &Run, found: &mut Findings) {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    found.range(
        "name",
        &run.name,
        run.name.chars().all(is_plain) && run.name.contains(|c| c != '.') && run.name.len() <= 200,
        "at most 200 letters, digits, '.', '_' and '-'",
    );
    let experiment = &run.track.experiment;
    found.range(
        "track.experiment",
        experiment,
        !experiment.is_empty(),
        "a name",
    );
    let model = run.track.register_model.as_deref();
    found.range(
        "track.register_model",
        model.unwrap_or_default(),
        model != Some(""),
        "a name",
    );
    let places = [
        ("run_dir", &run.run_dir),
        ("model.labels", &run.model.labels),
        ("data.cache", &run.data.cache),
        ("data.index", &run.data.index),
        ("model.weights", &run.model.weights),
        ("data.train", &run.data.train),
        ("data.eval", &run.data.eval),
    ];
    for (key, place) in places {
        // Shards are read from buckets, directories are not.
        let is_read =
            ["data.train", "data.eval"].contains(&key) && run.data.source != Source::Folder;
        if is_read && place.as_deref().is_some_and(is_bucket) {
            continue;
        }
        let is_table = place.as_deref().is_some_and(|p| p.starts_with(TABLE));
        if is_read && (run.data.source == Source::Bigtable || is_table) {
            table(run.data.source, key, place.as_deref(), found);
            continue;
        }
        if let Some((what, hint)) = place.as_deref().and_then(remote) {
            let hint = match is_read {
                true => hint.map(|hint| hint + ", or gs://, s3:// or az://"),
                false => hint,
            };
            found.key(key, what, hint);
        }
    }
}

/// Rows of a table are named as such, and nothing else is.
fn table(source: Source, key: &'static str, place: Option<&str>, found: &mut Findings) {
    let Some(place) = place else {
        return; // which is said where shards are asked for
    };
    let with = &["data.source"];
    let Some(rest) = place.strip_prefix(TABLE) else {
        let what = format!("{place} names no rows of Bigtable");
        let hint = format!("write {TABLE}PROJECT/INSTANCE/TABLE/PREFIX, or another data.source");
        found.keys(key, with, what, Some(hint));
        return;
    };
    if source != Source::Bigtable {
        let what = "rows of Bigtable are no files".into();
        let hint = "data.source = \"bigtable\" reads them".into();
        found.keys(key, with, what, Some(hint));
    } else if rest.splitn(4, '/').count() < 4 || rest.split('/').take(3).any(str::is_empty) {
        let hint = format!(
            "write {TABLE}PROJECT/INSTANCE/TABLE/PREFIX, with ?column=FAMILY:QUALIFIER unless it is tfexample:example"
        );
        found.keys(key, with, format!("{place} names no rows"), Some(hint));
    }
}

/// A mirror is in a bucket.
fn mirror(run: &Run, found: &mut Findings) {
    if let Some(place) = run.checkpoint.mirror.as_deref().filter(|p| !is_bucket(p)) {
        let what = format!("{place} is in no bucket");
        let hint = "give a URL of gs://, s3:// or az://; on this machine checkpoints are in the run directory";
        found.key("checkpoint.mirror", what, Some(hint.into()));
    }
}

fn model(run: &Run, found: &mut Findings) {
    let model = &run.model;
    let (depth, resolution) = (model.depth, model.resolution);
    found.whole("model.depth", depth as u64, DEPTHS.contains(&depth));
    let is_compiled_in = resolution.is_multiple_of(32) && (32..=448).contains(&resolution);
    found.whole("model.resolution", resolution as u64, is_compiled_in);
}

/// The whole numbers of [`WHOLE`].
fn whole_numbers(run: &Run, found: &mut Findings) {
    let Run {
        model,
        data,
        train,
        checkpoint,
        ..
    } = run;
    let value = |key: &str| match key {
        "seed" => Some(run.seed),
        "model.classes" => Some(model.classes as u64),
        "model.drop_block_size" => Some(model.drop_block_size as u64),
        "data.lanes" => Some(data.lanes as u64),
        "data.shuffle_window" => Some(data.shuffle_window as u64),
        "data.train_examples" => data.train_examples,
        "data.eval_examples" => data.eval_examples,
        "data.max_bad_records" => Some(data.max_bad_records),
        "data.cache_gb" => Some(data.cache_gb),
        "data.augment_ops" => Some(data.augment_ops as u64),
        "data.augment_magnitude" => Some(data.augment_magnitude as u64),
        "train.batch_size" => Some(train.batch_size as u64),
        "train.bn_batch" => train.bn_batch.map(|n| n as u64),
        "train.threads" => Some(train.threads as u64),
        "train.max_rewinds" => Some(train.max_rewinds),
        "eval.wait" => run.eval.wait,
        "checkpoint.keep" => Some(checkpoint.keep as u64),
        other => unreachable!("{other} has a range and no value"),
    };
    for (key, range) in &WHOLE {
        if let Some(value) = value(key) {
            found.whole(key, value, range.contains(&value));
        }
    }
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
        0.0 < low && low <= high && high <= 1000.0,
        "two increasing numbers above 0 and at most 1000",
    );
    let [brightness, contrast, saturation, hue] = data.color_jitter;
    found.range(
        "data.color_jitter",
        data.color_jitter,
        [brightness, contrast, saturation]
            .iter()
            .all(|x| (0.0..=10.0).contains(x))
            && (0.0..=0.5).contains(&hue),
        "four numbers, the first three from 0 to 10 and the last from 0 to 0.5",
    );
    found.range(
        "data.random_erasing",
        data.random_erasing,
        (0.0..=1.0).contains(&data.random_erasing),
        "from 0 to 1",
    );
}

/// Records and files come from somewhere.
fn shards(run: &Run, found: &mut Findings) {
    if matches!(run.data.source, Source::Fake | Source::Zeros) {
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
    let is_inside = |key: &str, size: usize| {
        let mut ranges = WHOLE.iter().filter(|(name, _)| *name == key);
        ranges.all(|(_, range)| range.contains(&(size as u64)))
    };
    if !is_inside("train.batch_size", batch_size) || !is_inside("train.bn_batch", bn_batch) {
        return; // which has been said
    }
    // Where the last plane is 1 x 1, one image is one value, and a normalisation makes that 0.
    let has_32 = run.model.resolution == 32 || run.progressive.resolution.contains(&32);
    if has_32 && bn_batch == 1 && run.mode != Mode::Eval {
        let key = match train.bn_batch {
            Some(_) => "train.bn_batch",
            None => "train.batch_size",
        };
        let larger = (2..=batch_size).find(|&d| batch_size.is_multiple_of(d));
        let larger = match larger {
            Some(divisor) => format!("train.bn_batch = {divisor} or more"),
            None => "train.batch_size = 2 or more".into(),
        };
        found.keys(
            key,
            &["train.batch_size", "train.bn_batch", "model.resolution", "mode"],
            "1 image at a time cannot be normalised at model.resolution = 32: the last planes are 1 x 1, and one \
             value has no variance"
                .into(),
            Some(format!("{larger}, or model.resolution = 64 or more")),
        );
    }
    if batch_size.is_multiple_of(bn_batch) {
        return;
    }
    // One image at a time is slow, and at some resolutions refused: said only if there is nothing else.
    let divides = |d: &usize| batch_size.is_multiple_of(*d);
    let below = (2..bn_batch).rev().find(divides);
    let above = (bn_batch..=batch_size).find(divides);
    let hint = match (below, above) {
        (Some(below), Some(above)) => format!("train.bn_batch = {below} or {above} does"),
        (below, above) => format!("train.bn_batch = {} does", below.or(above).unwrap_or(1)),
    };
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
    if let Some(max_loss) = run.train.max_loss {
        found.range("train.max_loss", max_loss, positive(max_loss), "above 0");
    }
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
    let dropout = run.model.dropout;
    found.range(
        "model.dropout",
        dropout,
        fraction(dropout),
        "at least 0 and below 1",
    );
    let connect = run.model.drop_connect;
    found.range(
        "model.drop_connect",
        connect,
        fraction(connect),
        "at least 0 and below 1",
    );
    let squares = run.model.drop_block;
    found.range(
        "model.drop_block",
        squares,
        fraction(squares),
        "at least 0 and below 1",
    );
    for &group in &run.model.drop_block_groups {
        let is_group = (1..=4).contains(&group);
        found.range("model.drop_block_groups", group, is_group, "from 1 to 4");
    }
    if squares > 0.0 && (connect > 0.0 || run.model.se_ratio > 0.0) {
        found.keys(
            "model.drop_block",
            &["model.drop_connect", "model.se_ratio"],
            "a branch has squares dropped, or is scaled or dropped as a whole".into(),
            Some("leave model.drop_block at 0, or the others".into()),
        );
    }
    let ratio = run.model.se_ratio;
    let is_ratio = (0.0..=1.0).contains(&ratio);
    found.range("model.se_ratio", ratio, is_ratio, "from 0 to 1");
    let (power, end_lr) = (schedule.power, schedule.end_lr);
    found.range("schedule.power", power, positive(power), "above 0");
    let is_rate = end_lr >= 0.0 && end_lr.is_finite();
    found.range("schedule.end_lr", end_lr, is_rate, "at least 0");
    let trust = optimizer.trust;
    found.range("optimizer.trust", trust, positive(trust), "above 0");
    if let Some(norm) = optimizer.clip_norm {
        found.range("optimizer.clip_norm", norm, positive(norm), "above 0");
    }
    if optimizer.kind != OptimizerKind::Sgd && optimizer.nesterov {
        found.keys(
            "optimizer.nesterov",
            &["optimizer.kind"],
            "LARS has no Nesterov".into(),
            Some("write optimizer.nesterov = false".into()),
        );
    }
    let mixup = &run.mixup;
    for (key, alpha) in [
        ("mixup.alpha", mixup.alpha),
        ("mixup.cutmix_alpha", mixup.cutmix_alpha),
    ] {
        let is_inside = (0.0..=1000.0).contains(&alpha);
        found.range(key, alpha, is_inside, "at least 0 and at most 1000");
    }
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
    for (key, length) in [
        ("eval.every", Some(run.eval.every)),
        ("checkpoint.every", Some(run.checkpoint.every)),
        ("ema.half_life", run.ema.half_life),
    ] {
        if let Some(length) = length {
            let shown = length.to_string();
            found.range(key, shown, length.value > 0.0, "a length above 0");
        }
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

fn progressive(run: &Run, found: &mut Findings) {
    let (until, sides) = (&run.progressive.until, &run.progressive.resolution);
    let is_compiled_in = |side: &usize| side.is_multiple_of(32) && (32..=448).contains(side);
    found.range(
        "progressive.resolution",
        sides,
        sides.iter().all(is_compiled_in),
        "multiples of 32 from 32 to 448",
    );
    if until.len() != sides.len() {
        let (lengths, sides) = (until.len(), sides.len());
        found.keys(
            "progressive.until",
            &["progressive.resolution"],
            format!("expected a length for each of progressive.resolution: {sides}, not {lengths}"),
            Some("after the last length the images have model.resolution".into()),
        );
    }
    for pair in until.windows(2) {
        if is_longer(pair[1], pair[0], run) == Some(false) {
            found.keys(
                "progressive.until",
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
