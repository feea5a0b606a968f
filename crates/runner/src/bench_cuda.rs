//! `runner bench cuda`: how fast a card trains, and where its time goes.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::KernelTime;
use engine::cuda::{self, Cuda, Options, Ranks};
use engine::{Batch, Engine, Pixels};
use serde::Serialize;

use crate::bench::{CLASSES, HYPER, Images};
use crate::cli::{BenchCudaArgs, BenchMode};
use crate::failure::Failure;
use crate::plan::mib;
use crate::{network, output};

/// Steps before the first that is timed: graphs are recorded, clocks rise.
const WARM_UP: usize = 10;
/// Steps are timed at least this long.
const TIMED: Duration = Duration::from_secs(3);
/// Steps of a profile.
const PROFILED: usize = 5;

/// What was measured.
#[derive(Serialize)]
struct Report {
    card: String,
    device: String,
    depth: usize,
    resolution: usize,
    batch: usize,
    mode: BenchMode,
    steps: usize,
    /// From the start to the end of all steps that were timed.
    images_per_s: f64,
    milliseconds: f64,
    /// Useful FLOP/s: two for each multiply-add of the network.
    flops: f64,
    planned_bytes: usize,
    /// Milliseconds of all kernels of a step, launched one by one; null without `--by-kernel`.
    kernel_milliseconds: Option<f64>,
    kernels: Option<Vec<Row>>,
}

/// Calls of one kernel on one shape, in one step.
#[derive(Serialize)]
struct Row {
    name: String,
    calls: f64,
    milliseconds: f64,
    tflops: f64,
    gb_per_s: f64,
}

impl Row {
    fn new(kernel: KernelTime) -> Self {
        let seconds = kernel.time.as_secs_f64().max(1e-9);
        Self {
            name: kernel.name,
            calls: kernel.calls as f64 / PROFILED as f64,
            milliseconds: seconds * 1e3 / PROFILED as f64,
            tflops: 2.0 * kernel.macs as f64 / seconds * 1e-12,
            gb_per_s: kernel.bytes as f64 / seconds * 1e-9,
        }
    }
}

/// `runner bench cuda`.
pub(crate) fn cuda(args: &BenchCudaArgs) -> Result<ExitCode, Failure> {
    let graph = nn::resnet(
        args.depth,
        args.resolution,
        CLASSES,
        nn::Recipe::Torchvision,
    )
    .expect("the arguments name a depth and a resolution that are compiled in");
    let ordinals: Vec<usize> = (args.card..args.card + args.cards).collect();
    let card = cuda::probe_all(Some(&ordinals))?.swap_remove(0);
    let options = Options {
        deterministic: !args.any_bits,
        convolutions: args.convolutions,
        ..Options::new(args.card, args.batch, args.precision)
    };
    let state = engine::initial_state(&graph, 0);
    let mut engine = Bench::new(&graph, &ordinals, &options, &state)?;
    let images = Images::new(args.batch * args.cards, args.resolution);
    let batch = Batch {
        pixels: Pixels::U8(&images.pixels),
        labels: &images.labels,
        mixed: None,
    };
    run(engine.get(), &batch, args.mode, WARM_UP, Duration::ZERO)?;
    let (steps, seconds) = run(engine.get(), &batch, args.mode, args.steps, TIMED)?;
    let kernels = match &mut engine {
        Bench::One(engine) if args.by_kernel => {
            engine.start_profile();
            run(&mut **engine, &batch, args.mode, PROFILED, Duration::ZERO)?;
            Some(
                engine
                    .take_profile()
                    .into_iter()
                    .map(Row::new)
                    .collect::<Vec<_>>(),
            )
        }
        _ => None,
    };
    let counts = graph.counts();
    let macs = match args.mode {
        BenchMode::Train => counts.training_macs,
        BenchMode::Infer => counts.macs,
    };
    let images_per_s = (steps * images.labels.len()) as f64 / seconds;
    let memory = cuda::Memory::plan_rank(&graph, &options, &card, images.labels.len(), args.cards);
    let report = Report {
        card: card.to_string(),
        device: engine.get().describe(),
        depth: args.depth,
        resolution: args.resolution,
        batch: images.labels.len(),
        mode: args.mode,
        steps,
        images_per_s,
        milliseconds: seconds / steps as f64 * 1e3,
        flops: 2.0 * macs as f64 * images_per_s,
        planned_bytes: memory.total(),
        kernel_milliseconds: kernels
            .as_ref()
            .map(|rows| rows.iter().map(|row| row.milliseconds).sum()),
        kernels,
    };
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&report).expect("a report has string keys") + "\n",
        false => report.text(),
    });
    Ok(ExitCode::SUCCESS)
}

/// What is timed.
enum Bench {
    One(Box<Cuda>),
    Several(Ranks),
}

impl Bench {
    fn new(
        graph: &graph::Graph,
        ordinals: &[usize],
        options: &Options,
        state: &engine::State,
    ) -> Result<Self, Failure> {
        let cache = network::cache();
        Ok(match ordinals.len() {
            1 => Self::One(Box::new(Cuda::new(graph, options, state, cache)?)),
            _ => Self::Several(Ranks::new(graph, ordinals, options, state, cache)?),
        })
    }

    fn get(&mut self) -> &mut dyn Engine {
        match self {
            Self::One(engine) => &mut **engine,
            Self::Several(engine) => engine,
        }
    }
}

/// Runs at least `steps` steps for at least `duration`; how many, in how many seconds. Training goes as in a run: a
/// step is started before the one before has ended.
fn run(
    engine: &mut dyn Engine,
    batch: &Batch<'_>,
    mode: BenchMode,
    steps: usize,
    duration: Duration,
) -> Result<(usize, f64), Failure> {
    let start = Instant::now();
    let mut done = 0;
    let mut under_way = None;
    while done < steps || start.elapsed() < duration {
        match mode {
            BenchMode::Infer => {
                engine.eval_step(batch)?;
            }
            BenchMode::Train => {
                let step = engine.start_step(batch, &HYPER)?;
                if let Some(before) = under_way.replace(step) {
                    let loss = engine.finish_step(before)?.loss();
                    if !loss.is_finite() {
                        return Err(Failure::Run(
                            "the loss is not finite: its speed would mean nothing".into(),
                        ));
                    }
                }
            }
        }
        done += 1;
    }
    if let Some(last) = under_way {
        engine.finish_step(last)?;
    }
    Ok((done, start.elapsed().as_secs_f64()))
}

impl Report {
    fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string can be written to");
        line(format!(
            "resnet{} (torchvision), {} px, {CLASSES} classes",
            self.depth, self.resolution
        ));
        line(format!("{}\n", self.device));
        let mode = match self.mode {
            BenchMode::Train => "training",
            BenchMode::Infer => "evaluation",
        };
        line(format!(
            "steps       {} of {mode} timed, {} images each, {:.2} ms",
            self.steps, self.batch, self.milliseconds
        ));
        line(format!("images/s    {:.0}", self.images_per_s));
        line(format!(
            "speed       {:.1} TFLOP/s with every multiply-add counted",
            self.flops * 1e-12
        ));
        line(format!(
            "memory      {} planned for each card",
            mib(self.planned_bytes)
        ));
        if let (Some(rows), Some(sum)) = (&self.kernels, self.kernel_milliseconds) {
            line(format!(
                "kernels     {sum:.2} ms in one step, launched one by one\n"
            ));
            line(format!(
                "{:>9} {:>6} {:>8} {:>8}  kernel",
                "ms", "calls", "TFLOP/s", "GB/s"
            ));
            for row in rows {
                line(format!(
                    "{:>9.3} {:>6} {:>8.1} {:>8.0}  {}",
                    row.milliseconds, row.calls, row.tflops, row.gb_per_s, row.name
                ));
            }
        }
        out
    }
}
