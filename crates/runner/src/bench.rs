//! `runner bench`: how fast this machine computes, against what it could.

mod input;

pub(crate) use input::input;

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::KernelTime;
use engine::cpu::{Cpu, Level, Memory, Options, peak};
use engine::{Batch, Decay, Engine, Hyper, Pixels, Rule};
use graph::Graph;
use serde::Serialize;

use crate::cli::{BenchEngineArgs, BenchMode};
use crate::failure::Failure;
use crate::plan::mib;
use crate::{doctor, output};

/// Classes of ImageNet.
pub(crate) const CLASSES: usize = 1000;
/// Steps are not timed until clocks and caches have settled.
const WARM_UP: Duration = Duration::from_millis(300);
/// Steps are timed at least this long.
const TIMED: Duration = Duration::from_secs(3);
/// SGD as configs/ have it; the rate is small enough for any network to stay finite on noise.
pub(crate) const HYPER: Hyper = Hyper {
    rule: Rule::Sgd,
    lr: 1e-3,
    momentum: 0.9,
    nesterov: false,
    weight_decay: 1e-4,
    decay: Decay::All,
    label_smoothing: 0.0,
    clip_norm: None,
    average: None,
    dropout: None,
};

/// `runner bench engine`.
pub(crate) fn engine(args: &BenchEngineArgs) -> Result<ExitCode, Failure> {
    let options = options(args)?;
    let graph = nn::resnet(
        args.depth,
        args.resolution,
        CLASSES,
        nn::Recipe::Torchvision,
    )
    .expect("the arguments name a depth and a resolution that are compiled in");
    let report = Report::new(args, &graph, &options)?;
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&report).expect("a report has string keys") + "\n",
        false => report.text(),
    });
    Ok(ExitCode::SUCCESS)
}

fn options(args: &BenchEngineArgs) -> Result<Options, Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let options = Options {
        precision: args.precision,
        winograd: !args.no_winograd,
        ..Options::new(args.batch, args.threads.unwrap_or_else(cores))
    };
    match args.level {
        None => Ok(options),
        Some(level) if level.is_available() => Ok(Options { level, ..options }),
        Some(level) => Err(Failure::Spec(format!(
            "--level {level}: this CPU lacks the instructions\nhint: its highest level is {}",
            Level::detect()
        ))),
    }
}

/// Made-up images and their classes.
pub(crate) struct Images {
    pub(crate) pixels: Vec<u8>,
    pub(crate) labels: Vec<u32>,
}

impl Images {
    /// From the multiples of the golden ratio modulo 1, which fill every range evenly and look like noise.
    pub(crate) fn new(images: usize, resolution: usize) -> Self {
        let golden = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9);
        let label = |i: usize| ((u64::from(golden(i)) * CLASSES as u64) >> 32) as u32;
        Self {
            pixels: (0..pixels(images, resolution))
                .map(|i| (golden(i) >> 24) as u8)
                .collect(),
            labels: (0..images).map(label).collect(),
        }
    }
}

/// Values of so many images.
fn pixels(images: usize, resolution: usize) -> usize {
    images * resolution * resolution * 3
}

/// What a batch takes: the engine's memory and the pixels.
fn needed(graph: &Graph, options: &Options, resolution: usize) -> u64 {
    let engine = Memory::plan(graph, options).total();
    (engine + pixels(options.micro_batch, resolution)) as u64
}

/// The largest number below `above` that fits, if numbers fit up to some point.
fn largest(above: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut fitting, mut above) = (0, above);
    while above - fitting > 1 {
        let middle = fitting + (above - fitting) / 2;
        match fits(middle) {
            true => fitting = middle,
            false => above = middle,
        }
    }
    (fitting > 0).then_some(fitting)
}

/// That the memory does not suffice, and which batch would fit.
fn too_large(args: &BenchEngineArgs, graph: &Graph, options: &Options, available: u64) -> Failure {
    let of = |micro_batch| {
        let options = Options {
            micro_batch,
            ..*options
        };
        needed(graph, &options, args.resolution)
    };
    let hint = match largest(args.batch, |batch| of(batch) <= available) {
        Some(batch) => format!("--batch {batch} fits"),
        None => "no batch fits; a smaller --depth or --resolution needs less".into(),
    };
    Failure::Run(format!(
        "--batch {}: needs {}, and {} are available\nhint: {hint}",
        args.batch,
        mib(of(args.batch) as usize),
        mib(available as usize)
    ))
}

/// Seconds of each of at least `steps` steps that together take at least `duration`.
fn time(
    cpu: &mut Cpu,
    images: &Images,
    mode: BenchMode,
    (steps, duration): (usize, Duration),
) -> Result<Vec<f64>, Failure> {
    let batch = Batch {
        pixels: Pixels::U8(&images.pixels),
        labels: &images.labels,
        mixed: None,
    };
    let mut seconds = vec![];
    let since = Instant::now();
    while seconds.len() < steps || since.elapsed() < duration {
        let start = Instant::now();
        let is_finite = match mode {
            BenchMode::Train => cpu.train_step(&batch, &HYPER)?.loss().is_finite(),
            BenchMode::Infer => cpu.predict(batch.pixels)?.iter().all(|v| v.is_finite()),
        };
        seconds.push(start.elapsed().as_secs_f64());
        if !is_finite {
            return Err(Failure::Run(
                "the network computes numbers that are not finite: its speed would mean nothing"
                    .into(),
            ));
        }
    }
    Ok(seconds)
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    depth: usize,
    resolution: usize,
    batch: usize,
    precision: String,
    mode: BenchMode,
    threads: usize,
    level: String,
    winograd: bool,
    /// Steps that were timed.
    steps: usize,
    images_per_s: Rate,
    /// Useful FLOP/s at the median: two for each multiply-add of the network, as if each were done.
    flops: f64,
    /// FLOP/s of multiply-adds in registers.
    peak_flops: f64,
    fraction_of_peak: f64,
    planned_bytes: usize,
    /// Null where the system does not say.
    peak_resident_bytes: Option<u64>,
    /// Share of the time of the steps that the kernels take; null without `--by-kernel`, as are they.
    accounted: Option<f64>,
    kernels: Option<Vec<KernelRow>>,
}

/// Of the steps.
#[derive(Serialize)]
struct Rate {
    median: f64,
    min: f64,
    max: f64,
}

/// Kernels of one kind and shape, in one step.
#[derive(Serialize)]
struct KernelRow {
    name: String,
    seconds_per_step: f64,
    /// As if every call were as fast as the fastest.
    fastest_seconds_per_step: f64,
    /// Of the time of a step.
    share: f64,
    calls_per_step: f64,
    flops: f64,
    bytes_per_s: f64,
}

impl KernelRow {
    fn new(kernel: KernelTime, steps: usize, total: f64) -> Self {
        let seconds = kernel.time.as_secs_f64();
        let per_s = |n: usize| n as f64 / seconds.max(1e-9);
        Self {
            name: kernel.name,
            seconds_per_step: seconds / steps as f64,
            fastest_seconds_per_step: kernel.fastest.as_secs_f64() * kernel.calls as f64
                / steps as f64,
            share: seconds / total,
            calls_per_step: kernel.calls as f64 / steps as f64,
            flops: per_s(2 * kernel.macs),
            bytes_per_s: per_s(kernel.bytes),
        }
    }

    fn text(&self) -> String {
        let rate = |v: f64, digits: usize| match v {
            0.0 => "-".into(),
            v => format!("{:.digits$}", v * 1e-9),
        };
        format!(
            "{:>10.2} {:>8.2} {:>6.1} {:>5} {:>8} {:>6}  {}",
            self.seconds_per_step * 1e3,
            self.fastest_seconds_per_step * 1e3,
            self.share * 100.0,
            self.calls_per_step,
            rate(self.flops, 1),
            rate(self.bytes_per_s, 1),
            self.name
        )
    }
}

impl Report {
    fn new(args: &BenchEngineArgs, graph: &Graph, options: &Options) -> Result<Self, Failure> {
        let available = doctor::memory_available();
        if let Some(available) = available
            && needed(graph, options, args.resolution) > available
        {
            return Err(too_large(args, graph, options, available));
        }
        let peak_before = peak(options);
        let cpu = Cpu::new(graph, options, &engine::initial_state(graph, 0));
        let mut cpu = cpu.map_err(|e| match e {
            // The system promised more than it gives, or the process has a limit.
            engine::Error::OutOfMemory { bytes } => Failure::Run(format!(
                "--batch {}: no memory for {} more\nhint: a smaller --batch needs less",
                args.batch,
                mib(bytes)
            )),
            e => e.into(),
        })?;
        let images = Images::new(args.batch, args.resolution);
        time(&mut cpu, &images, args.mode, (1, WARM_UP))?;
        if args.by_kernel {
            cpu.start_profile();
        }
        let mut seconds = time(&mut cpu, &images, args.mode, (args.steps, TIMED))?;
        let kernels = args.by_kernel.then(|| cpu.take_profile());
        drop(cpu);
        let peak_flops = peak(options).max(peak_before);

        seconds.sort_by(f64::total_cmp);
        let (steps, total) = (seconds.len(), seconds.iter().sum::<f64>());
        let rate = |seconds: f64| args.batch as f64 / seconds;
        let images_per_s = Rate {
            median: rate((seconds[(steps - 1) / 2] + seconds[steps / 2]) / 2.0),
            min: rate(seconds[steps - 1]),
            max: rate(seconds[0]),
        };
        let counts = graph.counts();
        let macs = match args.mode {
            BenchMode::Train => counts.training_macs,
            BenchMode::Infer => counts.macs,
        };
        let flops = 2.0 * macs as f64 * images_per_s.median;
        let kernels = kernels.map(|kernels| {
            let row = |kernel| KernelRow::new(kernel, steps, total);
            kernels.into_iter().map(row).collect::<Vec<_>>()
        });
        Ok(Self {
            depth: args.depth,
            resolution: args.resolution,
            batch: args.batch,
            precision: options.precision.to_string(),
            mode: args.mode,
            threads: options.threads,
            level: options.level.to_string(),
            winograd: options.winograd,
            steps,
            images_per_s,
            flops,
            peak_flops,
            fraction_of_peak: flops / peak_flops,
            planned_bytes: Memory::plan(graph, options).total(),
            peak_resident_bytes: doctor::peak_resident(),
            accounted: kernels
                .as_ref()
                .map(|rows| rows.iter().map(|row| row.share).sum()),
            kernels,
        })
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string can be written to");
        line(format!(
            "resnet{} (torchvision), {} px, {CLASSES} classes",
            self.depth, self.resolution
        ));
        let winograd = match self.winograd {
            true => "Winograd",
            false => "no Winograd",
        };
        line(format!(
            "cpu: {}, {}, {} threads, {winograd}\n",
            self.precision, self.level, self.threads
        ));
        let mode = match self.mode {
            BenchMode::Train => "training",
            BenchMode::Infer => "inference",
        };
        let Rate { median, min, max } = self.images_per_s;
        line(format!(
            "steps       {} of {mode} timed, {} images each",
            self.steps, self.batch
        ));
        line(format!(
            "images/s    {median:.2} (median), {min:.2} to {max:.2}"
        ));
        line(format!(
            "speed       {:.1} GFLOP/s with every multiply-add counted: {:.0} % of the peak of {:.1}",
            self.flops * 1e-9,
            self.fraction_of_peak * 100.0,
            self.peak_flops * 1e-9
        ));
        let resident = match self.peak_resident_bytes {
            Some(bytes) => format!("{} resident at most", mib(bytes as usize)),
            None => "this system does not say what was resident".into(),
        };
        line(format!(
            "memory      {} planned for training, {resident}",
            mib(self.planned_bytes)
        ));
        if let (Some(rows), Some(accounted)) = (&self.kernels, self.accounted) {
            line(format!(
                "accounted   {:.1} % of the time of the steps, in the kernels below\n",
                accounted * 100.0
            ));
            line(format!(
                "{:>10} {:>8} {:>6} {:>5} {:>8} {:>6}  kernel, in one step",
                "ms", "best", "%", "calls", "GFLOP/s", "GB/s"
            ));
            rows.iter().for_each(|row| line(row.text()));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for above in [1, 2, 3, 16, 100] {
            for fitting in 0..above {
                let found = largest(above, |n| n <= fitting);
                assert_eq!(found, (fitting > 0).then_some(fitting), "below {above}");
            }
        }
    }

    #[test]
    fn images_are_the_same_each_time_and_fill_their_ranges() {
        let images = Images::new(64, 32);
        assert_eq!(images.pixels.len(), 64 * 32 * 32 * 3);
        let mean = images.pixels.iter().map(|&p| f64::from(p)).sum::<f64>();
        let mean = mean / images.pixels.len() as f64;
        assert!((mean - 127.5).abs() < 1.0, "{mean}");
        assert!(images.labels.iter().all(|&l| l < CLASSES as u32));
        assert_eq!(images.pixels, Images::new(64, 32).pixels);
    }
}
