//! `runner bench input`: how fast records become batches, from files to pixels, order and checksums included.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::{BenchInputArgs, DecodeArg, ResizeArg};
use crate::failure::Failure;
use crate::output;

/// Batches are not counted until caches and threads have settled.
const WARM_UP: usize = 2;
/// Every label is one.
const CLASSES: usize = 1 << 31;
/// Images of which the stages are timed, one after the other on one thread.
const STAGED: usize = 500;

/// `runner bench input`.
pub(crate) fn input(args: &BenchInputArgs) -> Result<ExitCode, Failure> {
    let report = Report::new(args)?;
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&report).expect("a report has string keys") + "\n",
        false => report.text(),
    });
    Ok(ExitCode::SUCCESS)
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    data: String,
    shards: usize,
    records: u64,
    /// Of a record, framing and all.
    mean_bytes: f64,
    resolution: usize,
    batch: usize,
    threads: usize,
    resize: ResizeArg,
    decode: DecodeArg,
    /// Instructions of the fast decoder.
    level: &'static str,
    /// Batches that were counted.
    batches: usize,
    images_per_s: f64,
    /// Per second of the process's CPU time, all threads together; null where the system does not say.
    images_per_cpu_s: Option<f64>,
    /// Of the shards.
    bytes_per_s: f64,
    /// Shares of the time of one thread.
    stages: Stages,
}

#[derive(Serialize)]
struct Stages {
    /// Files to records in memory.
    read: f64,
    /// Checksums and the walk to the image.
    parse: f64,
    /// Headers, stuffing, Huffman codes.
    entropy: f64,
    /// Coefficients to samples.
    idct: f64,
    /// Samples to the image at its size.
    resample: f64,
    /// Whole images that the exact decoder took, its own resampling included.
    exact: f64,
    us_per_image: f64,
}

/// Seconds of CPU that the process has used.
fn cpu_seconds() -> Option<f64> {
    // Fields 14 and 15 of all, 12 and 13 after the name, which may hold anything; in hundredths of a second on every
    // Linux.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |i: usize| fields.get(i)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

impl Report {
    fn new(args: &BenchInputArgs) -> Result<Self, Failure> {
        let shards = store::glob(&args.data)?;
        let mut bytes = 0;
        for shard in &shards {
            bytes += store::length(shard)?;
        }
        let records =
            data::count(data::Format::TfRecord, &shards, None).map_err(train::Error::from)?;
        let threads = args
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let config = data::Config {
            source: data::Source::Shards {
                format: data::Format::TfRecord,
                shards: shards.clone(),
                label_offset: 0,
                lanes: 64,
                shuffle_window: 64,
            },
            resolution: args.resolution,
            batch_size: args.batch,
            seed: 0,
            classes: CLASSES,
            crop: data::Crop::Torchvision {
                area: [0.08, 1.0],
                aspect: [0.75, 4.0 / 3.0],
            },
            resize: match args.resize {
                ResizeArg::Pillow => data::Resize::Pillow,
                ResizeArg::Tf => data::Resize::Tf,
                ResizeArg::Tf1 => data::Resize::Tf1,
            },
            decode: match args.decode {
                DecodeArg::Fast => data::Decode::Fast,
                DecodeArg::Exact => data::Decode::Exact,
            },
            flip: true,
            crop_ratio: 0.875,
            max_bad_records: 0,
            threads,
            cache: None,
            index: (args.index.as_deref())
                .filter(|_| args.decode == DecodeArg::Fast)
                .map(data::Index::new),
            augment: data::Augment::default(),
        };
        let mut loader =
            data::train(&config, data::Cursor::default()).map_err(train::Error::from)?;
        let mut next = || -> Result<usize, Failure> {
            let batch = loader.next().expect("training never ends");
            let batch = batch.map_err(train::Error::from)?;
            loader.reuse(batch.pixels);
            Ok(batch.labels.len())
        };
        for _ in 0..WARM_UP {
            next()?;
        }
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let (mut batches, mut images) = (0, 0);
        while batches == 0 || start.elapsed() < Duration::from_secs(args.seconds) {
            images += next()?;
            batches += 1;
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu = cpu.zip(cpu_seconds()).map(|(before, after)| after - before);
        drop(loader);
        let stages =
            data::stages(&config, STAGED.min(records as usize)).map_err(train::Error::from)?;
        let total = stages.total().as_secs_f64().max(1e-9);
        let share = |d: Duration| d.as_secs_f64() / total;
        let mean_bytes = bytes as f64 / records.max(1) as f64;
        Ok(Self {
            data: args.data.clone(),
            shards: shards.len(),
            records,
            mean_bytes,
            resolution: args.resolution,
            batch: args.batch,
            threads,
            resize: args.resize,
            decode: args.decode,
            level: data::level(),
            batches,
            images_per_s: images as f64 / seconds,
            images_per_cpu_s: cpu.filter(|&cpu| cpu > 0.0).map(|cpu| images as f64 / cpu),
            bytes_per_s: images as f64 * mean_bytes / seconds,
            stages: Stages {
                read: share(stages.read),
                parse: share(stages.parse),
                entropy: share(stages.entropy),
                idct: share(stages.idct),
                resample: share(stages.resample),
                exact: share(stages.exact),
                us_per_image: total * 1e6 / stages.images.max(1) as f64,
            },
        })
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string can be written to");
        line(format!(
            "{}: {} records in {} shards, {:.1} kB each",
            self.data,
            self.records,
            self.shards,
            self.mean_bytes / 1e3
        ));
        line(format!(
            "to {} px, batches of {}, {} threads, decoder {}\n",
            self.resolution, self.batch, self.threads, self.level
        ));
        line(format!("batches     {} counted", self.batches));
        let cpu = match self.images_per_cpu_s {
            Some(rate) => format!("{rate:.0} per CPU-second"),
            None => "this system does not say what CPU time was used".into(),
        };
        line(format!("images/s    {:.0}; {cpu}", self.images_per_s));
        line(format!("read        {:.1} MB/s", self.bytes_per_s / 1e6));
        let Stages {
            read,
            parse,
            entropy,
            idct,
            resample,
            exact,
            us_per_image,
        } = self.stages;
        line(format!(
            "one thread  {us_per_image:.0} us an image: read {:.0} %, checksum and parse {:.0} %, entropy {:.0} %, \
             inverse DCT {:.0} %, resample {:.0} %, exact decoder {:.0} %",
            read * 100.0,
            parse * 100.0,
            entropy * 100.0,
            idct * 100.0,
            resample * 100.0,
            exact * 100.0
        ));
        out
    }
}
