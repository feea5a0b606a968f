//! The run in steps: [`train`] is the loop; [`Plan`] says what happens when; checkpoints make a resume exact.
//!
//! This crate sees a `dyn Engine` and batches of images. It knows no shapes, no devices and no command line, and
//! trackers can never stop it.

mod checkpoint;
mod compare;
mod confusion;
mod error;
mod input;
mod mirror;
mod pace;
mod plan;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use engine::{Engine, Metrics, Pixels, Started};
use spec::BestMetric;
use track::{Best, EvalMetrics, EvalSummary, Trackers};

pub use checkpoint::{Checkpoints, Meta, Progress, Row, encode, find, load, results};
pub use compare::{Comparison, compare};
pub use confusion::Confusion;
pub use error::Error;
pub use input::{Input, eval_config, image_config};
pub use mirror::Mirror;
pub use pace::Pace;
pub use plan::Plan;
use plan::Scored;
use writer::{Snapshot, Writer};

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
    /// When the run goes back to a checkpoint.
    pub limits: Limits,
    /// By what the best evaluation is the best.
    pub best: BestMetric,
    /// Set from outside to stop after the current step.
    pub stop: &'a AtomicBool,
}

/// What a run takes for divergence, and how often it goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// The largest mean loss of a step; none if any finite loss will do.
    pub max_loss: Option<f64>,
    /// How often the run goes back to its last checkpoint before it fails.
    pub max_rewinds: u64,
}

impl Limits {
    /// Those of a spec.
    pub fn of(run: &spec::Run) -> Self {
        Self {
            max_loss: run.train.max_loss,
            max_rewinds: run.train.max_rewinds,
        }
    }

    /// What is wrong with a loss, if anything is.
    fn excess(&self, loss: f64) -> Option<String> {
        if !loss.is_finite() {
            return Some("the loss is not finite".into());
        }
        let max = self.max_loss.filter(|max| loss > *max)?;
        Some(format!(
            "the loss is {loss:.4}, above train.max_loss = {max},"
        ))
    }
}

/// Why [`train`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The plan is done.
    Done,
    /// It was told to stop, or has come to [`Job::until`]; what was done is saved.
    Interrupted,
    /// A step diverged: engine and progress are those of the last checkpoint again, and the batch of that step will be
    /// passed over. To be called again, after the trackers have been cut to the checkpoint.
    Rewound,
}

/// Trains from `at` to the end of the plan or to `until`, or until it is told to stop; `at` moves along.
///
/// Each step: update, log, checkpoint, evaluate. The checkpoint is written before the evaluation of its step, and an
/// evaluation that is due and not in the checkpoint is made up for at the start. So a run that is killed at any
/// moment loses at most the steps since the last checkpoint, and no evaluation. Checkpoints are written by a thread of
/// their own; where the disk refuses, training goes on (docs/decisions/0017).
///
/// # Errors
/// If input or engine fail, if a step diverges more often than the limits allow, or if the last checkpoint cannot be
/// written. What was saved stays.
pub fn train(
    job: Job<'_>,
    at: &mut Progress,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<Ended, Error> {
    let mut saver = Saver {
        writer: Writer::start(job.checkpoints, job.keep)?,
        last: None,
        skipped: 0,
    };
    let ended = steps(&job, &mut saver, at, engine, trackers, pace);
    let (notes, written) = saver.writer.finish();
    notes.iter().for_each(|note| trackers.note(note));
    match (ended, written) {
        (Ok(ended), Ok(())) => Ok(ended),
        (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// The loop itself.
fn steps(
    job: &Job<'_>,
    saver: &mut Saver,
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
    let mut stream = Stream {
        batches: data::train(config, at.cursor.clone())?,
        drawn: at.drawn,
        skip: at.skip.clone(),
    };
    job.checkpoints.point_here(at)?;
    let before_now = at.seconds - pace.seconds();
    at.is_eval_due |= job.is_eval_due(at.step);
    if job.limits.max_rewinds > 0 {
        saver.last = Some(job.snapshot(at, engine.state()?));
    }
    if at.is_eval_due && !evaluate(job, saver, at, engine, trackers, pace)? {
        return Ok(Ended::Interrupted);
    }
    // A device of its own computes while the next batch is made: `under_way` is the step that it does.
    let mut under_way: Option<(Started, Drawn)> = None;
    let mut before: Option<Drawn> = None;
    while at.step < job.until {
        let first = match under_way.take() {
            Some(step) => Ok(step),
            None => start(job, at.step, &mut stream, engine, trackers, pace),
        };
        let (step, drawn) = match first {
            Ok(step) => step,
            Err(error) => {
                // An engine that fails has nothing to save.
                if at.step > 0 && !matches!(error, Error::Engine(_)) {
                    save(job, saver, at, engine, trackers, pace)?;
                }
                return Err(error);
            }
        };
        // Where nothing is to be saved or scored after this step, the next one need not wait for its end.
        let mut failed = None;
        if matches!(step, Started::Running(_)) && !job.pauses_after(at.step + 1) {
            match start(job, at.step + 1, &mut stream, engine, trackers, pace) {
                Ok(next) => under_way = Some(next),
                // An engine that fails need not end the step before.
                Err(error @ Error::Engine(_)) => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        let hyper = job.plan.hyper(at.step);
        let waits = Instant::now();
        let metrics = engine.finish_step(step)?;
        let blocked = waits.elapsed();
        at.step += 1;
        at.cursor = drawn.cursor.clone();
        at.drawn = drawn.number + 1;
        at.is_eval_due = job.is_eval_due(at.step);
        let goes_on = under_way.is_some();
        let (lr, ends) = (hyper.lr, (blocked, goes_on));
        trackers.step(&pace.step(job.plan, at.step, lr, &metrics, ends, trackers.busy()));
        at.seconds = before_now + pace.seconds();
        saver.tell(trackers);
        if let Some(what) = job.limits.excess(metrics.loss()) {
            if let Some((next, _)) = under_way.take() {
                engine.finish_step(next)?;
            }
            return rewind(job, saver, at, &what, (before, drawn), engine, trackers);
        }
        if let Some(error) = failed {
            save(job, saver, at, engine, trackers, pace)?;
            return Err(error);
        }

        // A step that is under way is finished first: it has changed what would be saved.
        let is_stopping = under_way.is_none() && job.stop.load(Ordering::Relaxed);
        if is_stopping || at.step == job.until || job.plan.is_checkpoint_due(at.step) {
            match save(job, saver, at, engine, trackers, pace) {
                Err(Error::Diverged { what, .. }) => {
                    return rewind(job, saver, at, &what, (before, drawn), engine, trackers);
                }
                saved => saved?,
            }
        }
        if is_stopping || at.is_eval_due && !evaluate(job, saver, at, engine, trackers, pace)? {
            return Ok(Ended::Interrupted);
        }
        before = Some(drawn);
    }
    if at.step < job.plan.steps {
        // With the evaluation, so that the next start need not make up for it.
        write(job, saver, at, engine.state()?, trackers);
        return Ok(Ended::Interrupted);
    }
    Ok(Ended::Done)
}

/// Where batches come from.
struct Stream {
    batches: data::Loader,
    /// Number of the next batch.
    drawn: u64,
    /// Numbers of those that are passed over.
    skip: BTreeSet<u64>,
}

/// A batch that was drawn: what remains of it when the engine has it.
struct Drawn {
    /// From 0, those that were passed over included.
    number: u64,
    /// Where the data go on after it.
    cursor: data::Cursor,
    samples: Vec<data::SampleId>,
}

impl Stream {
    /// The next batch that is not passed over, and its number.
    fn next(&mut self, pace: &mut Pace) -> Result<(data::Batch, u64), Error> {
        loop {
            let batch = pace.wait_for(&mut self.batches)?;
            let number = self.drawn;
            self.drawn += 1;
            if !self.skip.contains(&number) {
                return Ok((batch, number));
            }
        }
    }
}

/// Goes back to the last snapshot, and passes over the batch of the step that diverged. Where the same step diverges
/// again on another batch, the update before it is to blame, and its batch is passed over too.
fn rewind(
    job: &Job<'_>,
    saver: &Saver,
    at: &mut Progress,
    what: &str,
    (before, bad): (Option<Drawn>, Drawn),
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
) -> Result<Ended, Error> {
    let step = at.step;
    let mut batches = vec![(step, bad)];
    if let (Some(before), true) = (before, at.bad_step == Some(step)) {
        batches.push((step - 1, before));
    }
    let config = job.input.train.as_ref();
    for (step, batch) in &batches {
        trackers.note(&format!("{what} after step {step}; it saw"));
        let lines = config.map(|config| data::describe(config, &batch.samples));
        for line in lines.into_iter().flatten() {
            trackers.note(&format!("  {line}"));
        }
    }
    let is_allowed = at.rewinds < job.limits.max_rewinds;
    let Some(last) = saver.last.as_ref().filter(|_| is_allowed) else {
        return Err(Error::Diverged {
            step,
            what: what.trim_end_matches(',').into(),
            rewinds: at.rewinds,
        });
    };
    let mut skip = at.skip.clone();
    skip.extend(batches.iter().map(|(_, batch)| batch.number));
    let back = &last.meta.progress;
    *at = Progress {
        skip,
        rewinds: at.rewinds + 1,
        bad_step: Some(step),
        seconds: at.seconds,
        ..back.clone()
    };
    engine.load(&last.state)?;
    trackers.note(&format!(
        "back to step {}, and on without these images (rewind {} of at most {})",
        at.step, at.rewinds, job.limits.max_rewinds
    ));
    Ok(Ended::Rewound)
}

impl Job<'_> {
    /// The run as it is at `at`.
    fn snapshot(&self, at: &Progress, state: engine::State) -> Arc<Snapshot> {
        let meta = Meta {
            progress: at.clone(),
            ..self.meta.clone()
        };
        Arc::new(Snapshot { meta, state })
    }

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

/// Starts the step after `done` with the next batch; what remains of that.
fn start(
    job: &Job<'_>,
    done: u64,
    stream: &mut Stream,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<(Started, Drawn), Error> {
    let (mut batch, number) = stream.next(pace)?;
    let (mix, seed) = job.plan.mix;
    let mixed = mix.apply(&mut batch, seed, done);
    let told = batch.bad_records.iter().chain(&batch.notes);
    told.for_each(|line| trackers.note(line));
    if let (0, Some(config)) = (done, &job.input.train) {
        let side = config.resolution;
        trackers.images(0, side, &first_images(&batch, side));
    }
    let step = engine.start_step(&view(&batch, mixed.as_ref()), &job.plan.hyper(done))?;
    stream.batches.reuse(batch.pixels);
    let (cursor, samples) = (batch.cursor, batch.samples);
    let drawn = Drawn {
        number,
        cursor,
        samples,
    };
    Ok((step, drawn))
}

/// Where checkpoints go.
struct Saver {
    writer: Writer,
    /// What a step that diverges goes back to; none if it may not.
    last: Option<Arc<Snapshot>>,
    /// Updates that the engine had left out when it was asked last.
    skipped: u64,
}

impl Saver {
    /// Tells what happened to the checkpoints in writing.
    fn tell(&self, trackers: &mut Trackers) {
        let notes = self.writer.notes();
        notes.iter().for_each(|note| trackers.note(note));
    }
}

/// Hands over a checkpoint of what has been done so far.
///
/// # Errors
/// If a value is not finite; nothing is written then.
fn save(
    job: &Job<'_>,
    saver: &mut Saver,
    at: &mut Progress,
    engine: &dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<(), Error> {
    pace.part(
        |spent| &mut spent.checkpoint,
        trackers,
        |trackers| hand_over(job, saver, at, engine, trackers),
    )
}

/// The same, without the bookkeeping of time.
fn hand_over(
    job: &Job<'_>,
    saver: &mut Saver,
    at: &mut Progress,
    engine: &dyn Engine,
    trackers: &mut Trackers,
) -> Result<(), Error> {
    let state = engine.state()?;
    if let Some(name) = checkpoint::not_finite(&state) {
        return Err(Error::Diverged {
            step: at.step,
            what: format!("tensor {name} is not finite"),
            rewinds: at.rewinds,
        });
    }
    let skipped = engine.skipped_steps()?;
    if skipped > saver.skipped {
        trackers.note(&format!(
            "{} updates since the last checkpoint were left out: in f16 a gradient overflowed, and the loss scale was halved",
            skipped - saver.skipped
        ));
    }
    saver.skipped = skipped;
    trackers.tensors(
        at.step,
        state
            .iter()
            .map(|(name, t)| (histogram(name), &t.values[..])),
    );
    write(job, saver, at, state, trackers);
    Ok(())
}

fn write(
    job: &Job<'_>,
    saver: &mut Saver,
    at: &mut Progress,
    state: engine::State,
    trackers: &mut Trackers,
) {
    // The numbers first: a checkpoint says how long their file was.
    at.metrics_bytes = trackers.sync();
    let snapshot = job.snapshot(at, state);
    if saver.last.is_some() {
        saver.last = Some(Arc::clone(&snapshot));
    }
    saver.writer.save(snapshot);
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
    saver: &Saver,
    at: &mut Progress,
    engine: &mut dyn Engine,
    trackers: &mut Trackers,
    pace: &mut Pace,
) -> Result<bool, Error> {
    let Some(config) = job.input.eval.as_ref().filter(|_| !at.is_evaluated()) else {
        return Ok(true);
    };
    let started = Instant::now();
    // What the run has come to, class by class.
    let is_last = at.step == job.plan.steps;
    let mut classes = None;
    let mut score = |engine: &mut dyn Engine, trackers: &mut Trackers| {
        classes = is_last.then(|| Confusion::new(config.classes));
        pace.part(
            |spent| &mut spent.evaluation,
            trackers,
            |trackers| {
                let note = |bad: &str| trackers.note(bad);
                score(config, engine, job.stop, classes.as_mut(), note)
            },
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
        engine.swap_average()?;
        let scored = score(engine, trackers);
        engine.swap_average()?;
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
    at.evaluations.push(Row {
        step: at.step,
        epoch: job.plan.epoch(at.step),
        hours: at.seconds / 3600.0,
        top1,
        top5,
    });
    let written = job.checkpoints.write_results(&at.evaluations);
    let written = written.and_then(|()| match &classes {
        Some(classes) => {
            let labels = job.meta.labels.as_deref();
            job.checkpoints.write_classes(classes, labels)
        }
        None => Ok(()),
    });
    if let Err(error) = written {
        trackers.note(&error.to_string());
    }
    // An average that is scored beside the parameters is what the run is for.
    let (metric, value) = match (job.best, average) {
        (BestMetric::Top1, None) => ("top1", top1),
        (BestMetric::Top5, None) => ("top5", top5),
        (BestMetric::Loss, None) => ("loss", loss),
        (BestMetric::Top1, Some(m)) => ("ema_top1", m.top1()),
        (BestMetric::Top5, Some(m)) => ("ema_top5", m.top5()),
        (BestMetric::Loss, Some(m)) => ("ema_loss", m.loss()),
    };
    let is_better = |best: &Best| match job.best {
        BestMetric::Loss => value < best.value,
        _ => value > best.value,
    };
    // The best by another metric, from before the spec was changed, is the best no more.
    let best = at.best.as_ref().filter(|best| best.metric == metric);
    if best.is_none_or(is_better) {
        at.best = Some(Best {
            metric: metric.into(),
            value,
            step: at.step,
        });
        saver.writer.point_to(at);
    }
    Ok(true)
}

/// Scores a whole set, every image once; the last batch has what is left. None if `stop` was set meanwhile; `classes`
/// is told what was taken for what; `note` hears of each bad record.
///
/// # Errors
/// If input or engine fail, or there is nothing to score.
pub fn score(
    config: &data::Config,
    engine: &mut dyn Engine,
    stop: &AtomicBool,
    mut classes: Option<&mut Confusion>,
    mut note: impl FnMut(&str),
) -> Result<Option<Metrics>, Error> {
    let mut total = Metrics::default();
    let mut batches = data::eval(config)?;
    while let Some(batch) = batches.next() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let batch = batch?;
        batch.bad_records.iter().for_each(|bad| note(bad));
        if batch.labels.is_empty() {
            continue;
        }
        let view = view(&batch, None);
        let mut logits = vec![];
        let wanted = classes.is_some().then_some(&mut logits);
        total.add(&engine.score(&view, wanted)?);
        if let Some(classes) = &mut classes {
            classes.add(&logits, view.labels);
        }
        batches.reuse(batch.pixels);
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

/// Where a run in `dir` goes on: its last whole checkpoint, if it computes what `meta` says. Files that are damaged are
/// put aside as `NAME.damaged`; `note` hears of each. To be called by whoever holds the directory's lease.
///
/// # Errors
/// If a checkpoint cannot be read, if all are damaged, or if the last whole one holds another computation; all differing
/// keys are named.
pub fn resume(
    dir: &Path,
    meta: &Meta,
    mut note: impl FnMut(&str),
) -> Result<Option<(Progress, engine::State)>, Error> {
    let files = Checkpoints::of(dir).files()?;
    let mut damaged = vec![];
    for path in &files {
        let (found, state) = match load(path) {
            Err(error @ Error::Damaged { .. }) if damaged.len() + 1 < files.len() => {
                damaged.push((path, error));
                continue;
            }
            loaded => loaded?,
        };
        check_equal(dir, &computation(&found), &meta.computation, |_| true)?;
        for (path, error) in damaged {
            let mut aside = path.clone().into_os_string();
            aside.push(".damaged");
            store::rename(path, aside.as_ref())?;
            let (text, aside) = (error.to_string(), Path::new(&aside).display().to_string());
            let first = text.lines().next().unwrap_or_default();
            note(&format!(
                "{first}; it is now {aside}, and the run goes on from step {}, the checkpoint before",
                found.progress.step
            ));
        }
        return Ok(Some((found.progress, state)));
    }
    Ok(None)
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
        "model.shortcut",
        "model.se_ratio",
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
