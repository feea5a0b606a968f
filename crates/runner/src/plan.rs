//! `runner plan`: what a run is and costs, from the spec alone.

use std::process::ExitCode;

use engine::cpu::Memory;
use graph::Graph;
use serde::Serialize;
use spec::{Resize, Run, Source};
use train::Plan;

use crate::cli::PlanArgs;
use crate::config;
use crate::failure::Failure;
use crate::network;

/// `runner plan`.
pub(crate) fn plan(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let run = config::load(&args.spec)?;
    let graph = network::network(&run);
    let report = Report::new(&run, &graph)?;
    if args.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&report).expect("a report has string keys")
        );
    } else {
        report.print(&run, &graph);
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything that `runner plan` knows.
#[derive(Serialize)]
struct Report {
    name: String,
    model: Model,
    steps: Steps,
    memory: MemoryReport,
    data: Data,
    checkpoint: Checkpoint,
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
    peak_lr: f64,
    warmup: f64,
}

/// Bytes.
#[derive(Serialize)]
struct MemoryReport {
    parameters: usize,
    gradients: usize,
    optimizer: usize,
    arena: usize,
    scratch: usize,
    /// Batches that wait between decoding and the engine.
    input: usize,
    /// Tensors and file of a checkpoint while it is written.
    checkpoint: usize,
    peak_bytes: usize,
}

#[derive(Serialize)]
struct Data {
    train_examples: u64,
    eval_examples: Option<u64>,
}

#[derive(Serialize)]
struct Checkpoint {
    bytes: usize,
    every_steps: u64,
    written: u64,
}

/// Two batches wait, one is decoded, one is in use.
const BATCHES_IN_FLIGHT: usize = 4;

impl Report {
    fn new(run: &Run, graph: &Graph) -> Result<Self, Failure> {
        let examples = match run.data.train_examples() {
            Some(examples) => examples,
            None => train::Input::open(run)?.train_examples,
        };
        let plan = Plan::new(run, examples).expect("a checked spec has lengths that become steps");
        let counts = graph.counts();
        let engine = Memory::plan(graph, run.train.bn_batch(), network::threads(run));
        let is_rounded = run.data.resize == Resize::Pillow || run.data.source != Source::Tfrecord;
        let value = if is_rounded { 1 } else { size_of::<f32>() };
        let pixels = run.model.resolution.pow(2) * 3;
        let checkpoint = (2 * counts.params + counts.running_statistics) * size_of::<f32>();
        let mut memory = MemoryReport {
            parameters: engine.parameters,
            gradients: engine.gradients,
            optimizer: engine.optimizer,
            arena: engine.arena,
            scratch: engine.scratch,
            input: BATCHES_IN_FLIGHT * run.train.batch_size * pixels * value,
            checkpoint: 2 * checkpoint,
            peak_bytes: 0,
        };
        memory.peak_bytes = engine.total() + memory.input + memory.checkpoint;
        let due = |f: &dyn Fn(u64) -> bool| (1..=plan.steps).filter(|&s| f(s)).count() as u64;
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
            steps: Steps {
                total: plan.steps,
                epochs: plan.epoch(plan.steps),
                per_epoch: examples as f64 / plan.batch_size as f64,
                batch_size: plan.batch_size,
                bn_batch: run.train.bn_batch(),
                evaluations: due(&|s| plan.is_eval_due(s)),
                peak_lr: plan.peak_lr,
                warmup: plan.warmup,
            },
            memory,
            data: Data {
                train_examples: examples,
                eval_examples: run.data.eval_examples(),
            },
            checkpoint: Checkpoint {
                bytes: checkpoint,
                every_steps: plan.checkpoint_every,
                written: due(&|s| plan.is_checkpoint_due(s)),
            },
        })
    }

    fn print(&self, run: &Run, graph: &Graph) {
        let mib = |bytes: usize| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
        println!("{}: {}\n", self.name, network::title(run));
        println!(
            "  {:<10} {:>16} {:>12} {:>16}",
            "", "output", "parameters", "multiply-adds"
        );
        for row in graph.summary() {
            let [h, w, c] = row.output;
            let output = format!("{h} x {w} x {c}");
            println!(
                "  {:<10} {output:>16} {:>12} {:>16}",
                row.name,
                thousands(row.params),
                thousands(row.macs)
            );
        }
        let (params, macs) = (
            thousands(self.model.params),
            thousands(self.model.macs_per_image),
        );
        println!("  {:<10} {:>16} {params:>12} {macs:>16}\n", "total", "");
        let s = &self.steps;
        println!(
            "steps       {} of {} images, {:.2} epochs of {} examples",
            s.total, s.batch_size, s.epochs, self.data.train_examples
        );
        println!(
            "batches     normalised {} images at a time, {} to a step",
            s.bn_batch,
            s.batch_size as usize / s.bn_batch
        );
        println!("rate        to {} in {:.0} steps", s.peak_lr, s.warmup);
        let eval = self
            .data
            .eval_examples
            .map_or("the evaluation set".into(), |n| format!("{n} examples"));
        println!("evaluated   {} times on {eval}", s.evaluations);
        println!(
            "checkpoint  {}, written {} times to {}",
            mib(self.checkpoint.bytes),
            self.checkpoint.written,
            run.run_dir().display()
        );
        let m = &self.memory;
        println!(
            "memory      {}: parameters {}, gradients {}, momentum {}, activations {}, tiles {}, input {}, checkpoint {}",
            mib(m.peak_bytes),
            mib(m.parameters),
            mib(m.gradients),
            mib(m.optimizer),
            mib(m.arena),
            mib(m.scratch),
            mib(m.input),
            mib(m.checkpoint),
        );
    }
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
