//! `runner data`: shards are made, converted and audited.

mod convert;

pub(crate) use convert::convert;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::{DataCheckArgs, DataFakeArgs, DataIndexArgs, DataLoadArgs};
use crate::failure::Failure;
use crate::output;

/// Problems that are listed; the rest are counted.
const LISTED: usize = 100;

fn shard_name(split: &str, shard: usize, shards: usize) -> String {
    format!("{split}-{shard:05}-of-{shards:05}")
}

/// Writes a shard of these records, whole or not at all.
fn write_shard(path: &Path, records: &[Vec<u8>]) -> Result<(), Failure> {
    let mut bytes = Vec::with_capacity(records.iter().map(|r| r.len() + 16).sum());
    for record in records {
        store::tfrecord::write(&mut bytes, record).expect("memory takes every byte");
    }
    Ok(store::write_atomic(path, &[&bytes])?)
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    if store::is_url(path) {
        return Ok(()); // a bucket has none
    }
    std::fs::create_dir_all(path).map_err(|e| {
        Failure::Spec(format!(
            "{}: cannot create the directory: {e}\nhint: name a directory that can be written to",
            path.display()
        ))
    })
}

/// Each item's result, in order, made on as many threads as there are cores.
fn in_parallel<T: Send>(count: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let make = &make;
    let parts: Vec<Vec<T>> = std::thread::scope(|scope| {
        let part = |t| scope.spawn(move || (t..count).step_by(threads).map(make).collect());
        let running: Vec<_> = (0..threads).map(part).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<T>>| match thread.join() {
            Ok(part) => part,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        running.into_iter().map(join).collect()
    });
    let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    (0..count)
        .map(|i| parts[i % threads].next().expect("each part has its share"))
        .collect()
}

/// `runner data fake`.
pub(crate) fn fake(args: &DataFakeArgs) -> Result<ExitCode, Failure> {
    make_directory(&args.out)?;
    let mut bytes = 0;
    for shard in 0..args.shards {
        let indices: Vec<u64> = (shard as u64..args.examples).step_by(args.shards).collect();
        let records = in_parallel(indices.len(), |i| {
            let index = indices[i];
            let encoded = data::photo(args.seed, index);
            let (width, height) = data::inspect(&encoded).expect("our own file can be decoded");
            // The golden ratio's multiples fill the classes evenly.
            let class = ((index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) * args.classes) >> 32;
            data::Labelled {
                encoded: &encoded,
                label: (class + 1) as i64,
                filename: &format!("fake-{index:08}.jpg"),
                synset: &format!("fake{class:05}"),
                text: "made up",
                width,
                height,
                boxes: &[],
            }
            .to_example()
        });
        let path = args.out.join(shard_name(&args.split, shard, args.shards));
        write_shard(&path, &records)?;
        let size: usize = records.iter().map(|r| r.len() + 16).sum();
        bytes += size;
        eprintln!(
            "{}: {} records, {} kB",
            path.display(),
            records.len(),
            size / 1000
        );
    }
    output::print(&format!(
        "{} made-up photographs of {} classes, labels 1 to {}, in {} shards, {:.1} MB\n\
         use: data.train = \"{}\", data.label_offset = 1, model.classes = {}\n",
        args.examples,
        args.classes,
        args.classes,
        args.shards,
        bytes as f64 / 1e6,
        args.out.join(format!("{}-*", args.split)).display(),
        args.classes
    ));
    Ok(ExitCode::SUCCESS)
}

/// `runner data load-bigtable`.
pub(crate) fn load_bigtable(args: &DataLoadArgs) -> Result<ExitCode, Failure> {
    let shards = store::glob(&args.data)?;
    let mut writer = store::bigtable::Writer::new(&args.to)?;
    let mut bytes = 0;
    for shard in &shards {
        let mut reader = store::tfrecord::Reader::open(shard)?;
        let first = writer.next();
        while let Some(record) = reader.next()? {
            if !record.verify() {
                return Err(Failure::Input(format!(
                    "{}: record {} at byte {}: the checksum of the payload is wrong\n\
                     hint: copy or convert the shard again; what was written so far is written again the next time",
                    shard.display(),
                    record.index,
                    record.offset
                )));
            }
            bytes += record.bytes.len();
            writer.write(record.bytes)?;
        }
        writer.flush()?;
        eprintln!("{}: rows {first} to {}", shard.display(), writer.next());
    }
    let rows = writer.next();
    if rows == 0 {
        return Err(Failure::Input(format!("{}: no record", args.data)));
    }
    output::print(&format!(
        "{rows} rows, {:.1} MB\nuse: data.source = \"bigtable\", data.train = \"{}\"\n",
        bytes as f64 / 1e6,
        args.to
    ));
    Ok(ExitCode::SUCCESS)
}

/// What a check found.
#[derive(Default, Serialize)]
struct Audit {
    shards: usize,
    records: u64,
    bytes: u64,
    /// Stands for the shards' names and lengths, as checkpoints have it.
    fingerprint: String,
    /// Records of each stored label.
    labels: BTreeMap<i64, u64>,
    /// Least, mean and greatest.
    encoded_bytes: [f64; 3],
    pixels: [f64; 3],
    /// Records whose image is, byte for byte, that of an earlier one.
    duplicates: u64,
    /// How many there are; `problems` has the first hundred.
    problem_count: u64,
    problems: Vec<String>,
}

/// What is known of a record.
struct Seen {
    shard: usize,
    record: u64,
    offset: u64,
    label: i64,
    bytes: usize,
    pixels: usize,
    hash: u128,
}

/// Two 64-bit FNV-1a hashes of different starts: enough that equal hashes are equal images.
fn hash(bytes: &[u8]) -> u128 {
    let fnv = |start: u64| {
        bytes.iter().fold(start, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    u128::from(fnv(0xcbf2_9ce4_8422_2325)) << 64 | u128::from(fnv(0x9e37_79b9_7f4a_7c15))
}

/// Least, mean and greatest.
fn spread(values: impl Iterator<Item = usize> + Clone) -> [f64; 3] {
    let count = values.clone().count().max(1);
    [
        values.clone().min().unwrap_or(0) as f64,
        values.clone().sum::<usize>() as f64 / count as f64,
        values.max().unwrap_or(0) as f64,
    ]
}

/// Reads a shard to its end or to where it is damaged.
///
/// # Errors
/// An object store that does not answer, which is no problem of the data.
fn audit_shard(
    shard: usize,
    path: &Path,
    args: &DataCheckArgs,
) -> Result<(Vec<Seen>, Vec<String>), store::Error> {
    let (mut seen, mut problems) = (vec![], vec![]);
    let ends = |seen, mut problems: Vec<String>, error| match error {
        store::Error::Bucket { .. } => Err(error),
        damage => {
            problems.push(damage.to_string());
            Ok((seen, problems))
        }
    };
    let mut reader = match store::tfrecord::Reader::open(path) {
        Ok(reader) => reader,
        Err(error) => return ends(seen, problems, error),
    };
    loop {
        let record = match reader.next() {
            Ok(Some(record)) => record,
            Ok(None) => return Ok((seen, problems)),
            Err(error) => return ends(seen, problems, error),
        };
        let place = format!(
            "{}: record {} at byte {}",
            path.display(),
            record.index,
            record.offset
        );
        if !record.verify() {
            problems.push(format!("{place}: the checksum of the payload is wrong"));
            continue;
        }
        let (encoded, label) = match data::parse(&record.bytes) {
            Ok(parsed) => parsed,
            Err(reason) => {
                problems.push(format!("{place}: {reason}"));
                continue;
            }
        };
        let class = label.checked_sub(args.label_offset);
        if let Some(classes) = args.classes
            && !class.is_some_and(|class| (0..classes as i64).contains(&class))
        {
            problems.push(format!(
                "{place}: the stored label {label} less the offset {} is no class from 0 to {}",
                args.label_offset,
                classes - 1
            ));
        }
        match data::inspect(encoded) {
            Ok((width, height)) => seen.push(Seen {
                shard,
                record: record.index,
                offset: record.offset,
                label,
                bytes: encoded.len(),
                pixels: width * height,
                hash: hash(encoded),
            }),
            Err(reason) => problems.push(format!("{place}: {reason}")),
        }
    }
}

/// `runner data check`.
pub(crate) fn check(args: &DataCheckArgs) -> Result<ExitCode, Failure> {
    let shards = store::glob(&args.data)?;
    let audits = in_parallel(shards.len(), |shard| {
        audit_shard(shard, &shards[shard], args)
    });
    let mut audit = Audit {
        shards: shards.len(),
        fingerprint: data::fingerprint(&shards).map_err(train::Error::from)?,
        ..Audit::default()
    };
    for shard in &shards {
        audit.bytes += store::length(shard)?;
    }
    let mut problems = vec![];
    let mut seen: Vec<Seen> = vec![];
    for audit in audits {
        let (of_shard, found) = audit?;
        seen.extend(of_shard);
        problems.extend(found);
    }
    let mut first: HashMap<u128, &Seen> = HashMap::new();
    for record in &seen {
        *audit.labels.entry(record.label).or_default() += 1;
        if let Some(earlier) = first.get(&record.hash) {
            audit.duplicates += 1;
            if args.no_duplicates {
                let place = |seen: &Seen| {
                    format!(
                        "{}: record {} at byte {}",
                        shards[seen.shard].display(),
                        seen.record,
                        seen.offset
                    )
                };
                problems.push(format!(
                    "{}: the same image as {}",
                    place(record),
                    place(earlier)
                ));
            }
        } else {
            first.insert(record.hash, record);
        }
    }
    audit.records = seen.len() as u64;
    audit.encoded_bytes = spread(seen.iter().map(|s| s.bytes));
    audit.pixels = spread(seen.iter().map(|s| s.pixels));
    audit.problem_count = problems.len() as u64;
    problems.truncate(LISTED);
    audit.problems = problems;
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&audit).expect("an audit has string keys") + "\n",
        false => audit.text(),
    });
    match audit.problem_count {
        0 => Ok(ExitCode::SUCCESS),
        count => Err(Failure::Input(format!(
            "{}: {count} problems\nhint: copy or convert the shards again, or let a run pass bad records with data.max_bad_records",
            args.data
        ))),
    }
}

/// What `runner data index` did.
#[derive(Serialize)]
struct Indexed {
    shards: usize,
    /// Images that can be entered.
    images: u64,
    /// Those of them that were known before.
    known: u64,
    /// Progressive and other unusual files, which are decoded whole, and damaged records.
    others: u64,
}

/// `runner data index`.
pub(crate) fn index(args: &DataIndexArgs) -> Result<ExitCode, Failure> {
    store::check_local(&args.out.to_string_lossy())?;
    let shards = store::glob(&args.data)?;
    let index = data::Index::new(&args.out);
    let filled = in_parallel(shards.len(), |shard| index.fill(&shards[shard]));
    let mut total = Indexed {
        shards: shards.len(),
        images: 0,
        known: 0,
        others: 0,
    };
    for filled in filled {
        let filled = filled.map_err(train::Error::from)?;
        total.images += filled.images;
        total.known += filled.known;
        total.others += filled.others;
    }
    output::print(&match args.json {
        true => serde_json::to_string_pretty(&total).expect("it has string keys") + "\n",
        false => format!(
            "{}: {} images of {} shards can be entered ({} were known); {} others\n\
             Use it with --set data.index={}\n",
            args.out.display(),
            total.images,
            total.shards,
            total.known,
            total.others,
            args.out.display()
        ),
    });
    Ok(ExitCode::SUCCESS)
}

impl Audit {
    fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string can be written to");
        line(format!(
            "shards       {}, {:.1} MB",
            self.shards,
            self.bytes as f64 / 1e6
        ));
        line(format!("records      {} good", self.records));
        line(format!("fingerprint  {}", self.fingerprint));
        if let (Some(low), Some(high)) = (self.labels.keys().next(), self.labels.keys().next_back())
        {
            let counts = spread(self.labels.values().map(|&n| n as usize));
            line(format!(
                "labels       {} different, {low} to {high}; {} to {} records each",
                self.labels.len(),
                counts[0],
                counts[2]
            ));
        }
        let [least, mean, most] = self.encoded_bytes;
        line(format!(
            "file sizes   {least:.0} to {most:.0} bytes, {mean:.0} on average"
        ));
        let [least, mean, most] = self.pixels;
        line(format!(
            "image sizes  {least:.0} to {most:.0} pixels, {mean:.0} on average"
        ));
        line(format!("duplicates   {}", self.duplicates));
        line(format!("problems     {}", self.problem_count));
        for problem in &self.problems {
            line(format!("  {}", problem.lines().next().unwrap_or_default()));
        }
        if self.problem_count > self.problems.len() as u64 {
            line(format!(
                "  and {} more",
                self.problem_count - self.problems.len() as u64
            ));
        }
        out
    }
}
