//! `runner plan`: what a run is and costs, from the spec alone.

use std::fmt::Write;
use std::process::ExitCode;

use engine::cpu::Memory;
use graph::Graph;
use serde::Serialize;
use spec::{Mode, Resize, Run, Source};
use train::Plan;

use crate::cli::PlanArgs;
use crate::failure::Failure;
use crate::{config, doctor, network, output};

/// `runner plan`.
pub(crate) fn plan(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let run = config::load(&args.spec)?;
    let graph = network::network(&run);
    if args.check {
        check(&run)?;
    }
    let report = Report::new(&run, &graph, args.images_per_s)?;
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&report).expect("a report has string keys") + "\n",
        false => report.text(&run, &graph),
    });
    Ok(ExitCode::SUCCESS)
}

/// Everything that `runner plan` knows.
#[derive(Serialize)]
struct Report {
    name: String,
    model: Model,
    /// None for a run that only evaluates.
    steps: Option<Steps>,
    memory: MemoryReport,
    /// Null for a run on the CPU.
    card: Option<CardReport>,
    time: Time,
    data: Data,
    checkpoint: Checkpoint,
}

/// How long the steps take, at a rate that was measured or stated.
#[derive(Serialize)]
struct Time {
    images_per_s: Option<f64>,
    /// `stated`, or the summary that the rate is from.
    source: Option<String>,
    /// Seconds of training, evaluations and checkpoints not counted.
    seconds: Option<f64>,
}

#[derive(Serialize)]
struct Model {
    depth: usize,
    resolution: usize,
    classes: usize,
    params: usize,
    params_decayed: usize,
    macs_per_image: usize,
}

#[derive(Serialize)]
struct Steps {
    total: u64,
    epochs: f64,
    per_epoch: f64,
    batch_size: u64,
    bn_batch: usize,
    evaluations: u64,
    checkpoints: u64,
    peak_lr: f64,
    warmup: f64,
    /// The sides of the images, in their order.
    resolutions: Vec<Phase>,
}

#[derive(Serialize)]
struct Phase {
    /// The last step that has it.
    until: u64,
    resolution: usize,
}

/// Bytes.
#[derive(Serialize)]
struct MemoryReport {
    parameters: usize,
    gradients: usize,
    optimizer: usize,
    arena: usize,
    /// Weights of evaluation, with normalisations folded in.
    folded: usize,
    scratch: usize,
    /// Moving average of the parameters.
    average: usize,
    /// Batches that wait between decoding and the engine.
    batches: usize,
    /// Records that wait to be shuffled, and those that are read ahead.
    records: usize,
    /// Tensors and file of a checkpoint while it is written.
    checkpoint: usize,
    peak_bytes: usize,
    /// What this machine can give now; null where it does not say.
    available_bytes: Option<u64>,
    fits: Option<bool>,
    /// The largest `train.bn_batch` that fits and divides the batch; null where none does or nothing is known.
    largest_bn_batch: Option<usize>,
}

#[derive(Serialize)]
struct Data {
    train_examples: Option<u64>,
    eval_examples: Option<u64>,
}

#[derive(Serialize)]
struct Checkpoint {
    bytes: usize,
}

/// Bytes of a card's memory; `memory` is then what the CPU engine would take instead.
#[derive(Serialize)]
struct CardReport {
    device: String,
    cards: usize,
    parameters: usize,
    gradients: usize,
    optimizer: usize,
    average: usize,
    arena: usize,
    folded: usize,
    workspace: usize,
    /// Two batches of input.
    input: usize,
    /// What other cards send.
    exchange: usize,
    peak_bytes: usize,
    /// All that the card has; null if it is not on this machine.
    memory_bytes: Option<usize>,
    fits: Option<bool>,
}

impl CardReport {
    fn new(run: &Run, graph: &Graph) -> Option<Self> {
        let (cards, is_here) = network::cards(run)?;
        let card = cards.iter().min_by_key(|card| card.memory)?;
        let memory = network::cuda_memory(run, graph, card, cards.len());
        let memory_bytes = is_here.then_some(card.memory);
        let device = match (&cards[..], is_here) {
            ([card], true) => card.to_string(),
            ([card], false) => format!("cuda:{}, not on this machine", card.ordinal),
            (more, true) => format!("each of {} cards, the smallest {card}", more.len()),
            (more, false) => format!("each of {} cards, not on this machine", more.len()),
        };
        Some(Self {
            device,
            cards: cards.len(),
            parameters: memory.parameters,
            gradients: memory.gradients,
            optimizer: memory.optimizer,
            average: memory.average,
            arena: memory.arena,
            folded: memory.folded,
            workspace: memory.workspace,
            input: memory.input,
            exchange: memory.exchange,
            peak_bytes: memory.total(),
            memory_bytes,
            fits: memory_bytes.map(|bytes| memory.total() <= bytes),
        })
    }

    fn text(&self) -> String {
        let parts = [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("momentum", self.optimizer),
            ("average", self.average),
            ("activations", self.arena),
            ("folded weights", self.folded),
            ("workspace", self.workspace),
            ("batches", self.input),
            ("exchange", self.exchange),
        ];
        let parts: Vec<String> = parts
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(name, bytes)| format!("{name} {}", mib(bytes)))
            .collect();
        let fits = match self.fits {
            Some(true) => "fits; ",
            Some(false) => "does not fit; ",
            None => "",
        };
        format!(
            "card        {}: {fits}{}: {}",
            self.device,
            mib(self.peak_bytes),
            parts.join(", ")
        )
    }
}

/// Two batches wait, one is decoded, one is in use.
const BATCHES_IN_FLIGHT: usize = 4;

/// Bytes of the batches that wait, are decoded and in use.
pub(crate) fn batches_in_flight(run: &Run, batch_size: usize) -> usize {
    let is_made_up = matches!(run.data.source, Source::Fake | Source::Zeros);
    let is_rounded = run.data.resize == Resize::Pillow || is_made_up;
    let value = if is_rounded { 1 } else { size_of::<f32>() };
    BATCHES_IN_FLIGHT * batch_size * run.model.resolution.pow(2) * 3 * value
}

/// Mean size of ImageNet's records.
const RECORD_BYTES: usize = 115_000;

impl Report {
    fn new(run: &Run, graph: &Graph, images_per_s: Option<f64>) -> Result<Self, Failure> {
        let train_examples = match (run.mode, run.data.train_examples()) {
            (Mode::Eval, _) => None,
            (_, Some(examples)) => Some(examples),
            (_, None) => Some(train::Input::open(run)?.train_examples),
        };
        let steps = train_examples.map(|examples| {
            let plan =
                Plan::new(run, examples).expect("a checked spec has lengths that become steps");
            Steps {
                total: plan.steps,
                epochs: plan.epoch(plan.steps),
                per_epoch: examples as f64 / plan.batch_size as f64,
                batch_size: plan.batch_size,
                bn_batch: run.train.bn_batch(),
                evaluations: plan.evaluations(),
                checkpoints: plan.checkpoints(),
                peak_lr: plan.peak_lr,
                warmup: plan.warmup,
                resolutions: (plan.phases().iter())
                    .map(|&(until, resolution)| Phase { until, resolution })
                    .collect(),
            }
        });
        let time = Time::new(run, steps.as_ref(), images_per_s);
        let counts = graph.counts();
        let average = match run.ema.half_life {
            Some(_) => counts.params + counts.running_statistics,
            None => 0,
        };
        let values = 2 * counts.params + counts.running_statistics + average;
        let checkpoint = values * size_of::<f32>();
        Ok(Self {
            name: run.name.clone(),
            model: Model {
                depth: run.model.depth,
                resolution: run.model.resolution,
                classes: run.model.classes,
                params: counts.params,
                params_decayed: counts.decayed_params,
                macs_per_image: counts.macs,
            },
            steps,
            memory: MemoryReport::new(run, graph, checkpoint, train_examples),
            card: CardReport::new(run, graph),
            time,
            data: Data {
                train_examples,
                eval_examples: run.data.eval_examples(),
            },
            checkpoint: Checkpoint { bytes: checkpoint },
        })
    }

    fn text(&self, run: &Run, graph: &Graph) -> String {
        let mut out = format!("{}: {}\n\n", self.name, network::title(run));
        let mut line = |text: String| writeln!(out, "{text}").expect("a string can be written to");
        line(format!(
            "  {:<10} {:>16} {:>12} {:>16}",
            "", "output", "parameters", "multiply-adds"
        ));
        for row in graph.summary() {
            let [h, w, c] = row.output;
            let (output, params, macs) = (
                format!("{h} x {w} x {c}"),
                thousands(row.params),
                thousands(row.macs),
            );
            line(format!(
                "  {:<10} {output:>16} {params:>12} {macs:>16}",
                row.name
            ));
        }
        let (params, macs) = (
            thousands(self.model.params),
            thousands(self.model.macs_per_image),
        );
        line(format!(
            "  {:<10} {:>16} {params:>12} {macs:>16}\n",
            "total", ""
        ));
        if let (Some(s), Some(examples)) = (&self.steps, self.data.train_examples) {
            let micro_batches = s.batch_size as usize / s.bn_batch;
            let (total, images, epochs) = (s.total, s.batch_size, s.epochs);
            line(format!(
                "steps       {total} of {images} images, {epochs:.2} epochs of {examples} examples"
            ));
            line(format!(
                "batches     normalised {} images at a time, {micro_batches} to a step",
                s.bn_batch
            ));
            line(format!(
                "rate        to {} in {:.0} steps",
                s.peak_lr, s.warmup
            ));
            if s.resolutions.len() > 1 {
                let phases = s.resolutions.iter();
                let phases = phases.map(|p| format!("{} px to step {}", p.resolution, p.until));
                let phases = phases.collect::<Vec<_>>().join(", ");
                line(format!(
                    "images      {phases}; the table and memory are of the last"
                ));
            }
            let eval = self
                .data
                .eval_examples
                .map_or("the evaluation set".into(), |n| format!("{n} examples"));
            line(format!("evaluated   {} times on {eval}", s.evaluations));
            let (bytes, times, dir) = (mib(self.checkpoint.bytes), s.checkpoints, run.run_dir());
            line(format!(
                "checkpoint  {bytes}, written {times} times to {}",
                dir.display()
            ));
        }
        if let (Some(rate), Some(source), Some(seconds)) =
            (self.time.images_per_s, &self.time.source, self.time.seconds)
        {
            let duration = duration(seconds);
            line(format!(
                "time        {duration} at {rate:.1} images/s ({source}), without evaluations"
            ));
        }
        if let Some(card) = &self.card {
            line(card.text());
            line(format!(
                "host        {} for batches, records and checkpoints",
                mib(self.memory.besides())
            ));
            return out;
        }
        line(self.memory.text());
        if let Some(fit) = self.memory.fit_text() {
            line(fit);
        }
        out
    }
}

impl Time {
    /// A stated rate, or that of the last run in the same directory.
    fn new(run: &Run, steps: Option<&Steps>, stated: Option<f64>) -> Self {
        let dir = run.run_dir();
        let measured = || {
            track::read_summary(&dir)
                .map(|s| s.images_per_s)
                .filter(|rate| *rate > 0.0)
        };
        let (images_per_s, source) = match (stated, steps) {
            (Some(rate), _) => (Some(rate), Some("stated".into())),
            (None, Some(_)) => match measured() {
                Some(rate) => (
                    Some(rate),
                    Some(format!("the last run in {}", dir.display())),
                ),
                None => (None, None),
            },
            (None, None) => (None, None),
        };
        let images = steps.map(|s| s.total as f64 * s.batch_size as f64);
        let seconds = images.zip(images_per_s).map(|(images, rate)| images / rate);
        Self {
            images_per_s,
            source,
            seconds,
        }
    }
}

/// Opens what a run would open: the shards, all their headers, the labels, the run directory.
fn check(run: &Run) -> Result<(), Failure> {
    network::labels(run)?;
    let input = train::Input::open(run)?;
    let dir = run.run_dir();
    let failed = |e| Failure::Run(format!("{}: cannot create: {e}", dir.display()));
    let is_new = !dir.exists();
    std::fs::create_dir_all(&dir).map_err(failed)?;
    drop(store::Lease::take(&dir)?);
    if is_new {
        let _ = std::fs::remove_dir_all(&dir); // as it was
    }
    if input.train.is_some() {
        eprintln!(
            "checked: {} training examples, readable headers, a writable run directory",
            input.train_examples
        );
    } else {
        eprintln!("checked: readable evaluation shards, a writable run directory");
    }
    Ok(())
}

impl MemoryReport {
    fn new(run: &Run, graph: &Graph, checkpoint: usize, train_examples: Option<u64>) -> Self {
        let (is_training, batch_size) = match train_examples {
            Some(_) => (true, run.train.batch_size),
            None => (false, run.train.bn_batch()),
        };
        let held = run.data.lanes.saturating_mul(run.data.shuffle_window);
        let held = held.min(train_examples.unwrap_or(0) as usize);
        let held = match run.data.source {
            Source::Tfrecord | Source::Webdataset | Source::Bigtable => held,
            Source::Folder | Source::Fake | Source::Zeros => 0,
        };
        let held = held + batch_size.min(data::READ_AHEAD);
        let from_shards = !matches!(run.data.source, Source::Fake | Source::Zeros);
        let batches = batches_in_flight(run, batch_size);
        let records = if from_shards {
            let is_remote = run.data.train.as_deref().is_some_and(store::is_url);
            let (blocks, rows) = match run.data.source {
                Source::Bigtable => (0, store::bigtable::held_rows(run.data.lanes)),
                _ if is_remote => (store::held_bytes(run.data.lanes), 0),
                _ => (0, 0),
            };
            (held + rows) * record_bytes(run, train_examples) + blocks
        } else {
            0
        };
        let checkpoint = if is_training {
            3 * checkpoint // what to go back to, what is written, and its file
        } else {
            checkpoint
        };
        let besides = batches + records + checkpoint;
        let engine = Memory::plan(graph, &network::options(run));
        let peak_bytes = engine.total() + besides;
        let available_bytes = doctor::memory_available();
        let fits = |bytes: usize| available_bytes.map(|available| bytes as u64 <= available);
        let largest_bn_batch =
            network::largest_bn_batch(run, graph, |engine| fits(engine + besides) == Some(true));
        Self {
            parameters: engine.parameters,
            gradients: engine.gradients,
            optimizer: engine.optimizer,
            average: engine.average,
            arena: engine.arena,
            folded: engine.folded,
            scratch: engine.scratch,
            batches,
            records,
            checkpoint,
            peak_bytes,
            available_bytes,
            fits: fits(peak_bytes),
            largest_bn_batch,
        }
    }

    /// What the host holds besides an engine.
    fn besides(&self) -> usize {
        self.batches + self.records + self.checkpoint
    }

    fn fit_text(&self) -> Option<String> {
        let available = mib(self.available_bytes? as usize);
        Some(match (self.fits?, self.largest_bn_batch) {
            (true, _) => format!("fits        yes: {available} available"),
            (false, Some(n)) => {
                format!("fits        no: {available} available; train.bn_batch = {n} would fit")
            }
            (false, None) => {
                format!("fits        no: {available} available, and no train.bn_batch would fit")
            }
        })
    }

    fn text(&self) -> String {
        let parts = [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("momentum", self.optimizer),
            ("activations", self.arena),
            ("folded weights", self.folded),
            ("tiles", self.scratch),
            ("batches", self.batches),
            ("records", self.records),
            ("checkpoint", self.checkpoint),
            ("average", self.average),
        ];
        let parts: Vec<_> = parts
            .iter()
            .filter(|(name, bytes)| *name != "average" || *bytes > 0)
            .map(|(name, bytes)| format!("{name} {}", mib(*bytes)))
            .collect();
        format!("memory      {}: {}", mib(self.peak_bytes), parts.join(", "))
    }
}

/// Mean size of a training record: of the shards where they are at hand, else of ImageNet's.
fn record_bytes(run: &Run, examples: Option<u64>) -> usize {
    let shards = run
        .data
        .train
        .as_deref()
        .filter(|glob| !store::is_url(glob)) // nobody is asked over the network
        .and_then(|glob| store::glob(glob).ok());
    let length = |path: &std::path::PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    match (shards, examples) {
        (Some(shards), Some(n)) if n > 0 => (shards.iter().map(length).sum::<u64>() / n) as usize,
        _ => RECORD_BYTES,
    }
}

/// 1h 02m, or 35 s.
pub(crate) fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..172_800 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

pub(crate) fn mib(bytes: usize) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// 25557032 as 25,557,032.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
