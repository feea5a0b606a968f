//! `runner data`: shards are made, converted and audited.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::{DataCheckArgs, DataConvertArgs, DataFakeArgs, DataIndexArgs, DataLoadArgs};
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

/// An image of a folder.
struct Found {
    path: PathBuf,
    class: usize,
}

/// Names of the entries of a directory, sorted.
fn entries(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(path)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut entries = read().map_err(|e| {
        Failure::Input(format!(
            "{}: cannot read the directory: {e}\nhint: it must hold one folder for each class",
            path.display()
        ))
    })?;
    entries.sort();
    Ok(entries)
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Order by a key that depends on the seed and the file alone: FNV-1a, then SplitMix64's finaliser.
fn shuffle_key(seed: u64, path: &str) -> u64 {
    let mut key = path
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    for (shift, factor) in [(30, 0xbf58_476d_1ce4_e5b9), (27, 0x94d0_49bb_1331_11eb)] {
        key = (key ^ (key >> shift)).wrapping_mul(factor);
    }
    key ^ (key >> 31)
}

/// `runner data convert`.
pub(crate) fn convert(args: &DataConvertArgs) -> Result<ExitCode, Failure> {
    let (folders, mut passed_over): (Vec<_>, Vec<_>) =
        entries(&args.from)?.into_iter().partition(|p| p.is_dir());
    let mut images = vec![];
    for (class, folder) in folders.iter().enumerate() {
        for path in entries(folder)? {
            match path.is_file() {
                true => images.push(Found { path, class }),
                false => passed_over.push(path),
            }
        }
    }
    if images.is_empty() {
        return Err(Failure::Input(format!(
            "{}: no image in any folder\nhint: it must hold one folder for each class, with JPEG files in it",
            args.from.display()
        )));
    }
    report_passed_over(&passed_over);
    let relative = |found: &Found| format!("{}/{}", name(&folders[found.class]), name(&found.path));
    images.sort_by_cached_key(|found| (shuffle_key(args.seed, &relative(found)), relative(found)));
    make_directory(&args.out)?;
    // Two that write here at a time would each take the other's shards for its own. A bucket has no locks: there the
    // same shards would be written twice.
    let _lease = match store::is_url(&args.out) {
        true => None,
        false => Some(store::Lease::take(&args.out)?),
    };

    // What the shards are made from: a later start goes on only with the same.
    let mut lines = format!(
        "seed {} shards {} label_offset {}\n",
        args.seed, args.shards, args.label_offset
    );
    for found in &images {
        let size = std::fs::metadata(&found.path).map_or(0, |m| m.len());
        writeln!(lines, "{} {} {size}", found.class, relative(found))
            .expect("a string can be written to");
    }
    let made_from = args.out.join(format!("{}.made-from", args.split));
    let shards =
        || (0..args.shards).map(|i| args.out.join(shard_name(&args.split, i, args.shards)));
    match store::read(&made_from)? {
        Some(earlier) if earlier != lines.as_bytes() => {
            return Err(Failure::Spec(format!(
                "{}: shards of other files or other arguments are there\n\
                 hint: name another --out or --split, or remove them",
                args.out.display()
            )));
        }
        Some(_) => {}
        None => {
            for shard in shards() {
                if store::exists(&shard)? {
                    return Err(Failure::Spec(format!(
                        "{}: it is there, and no {} says what it was made from\n\
                         hint: name another --out or --split, or remove the shards",
                        shard.display(),
                        made_from.display()
                    )));
                }
            }
            store::write_atomic(&made_from, &[lines.as_bytes()])?;
        }
    }
    let mut labels = String::new();
    for folder in &folders {
        writeln!(labels, "{}", name(folder)).expect("a string can be written to");
    }
    store::write_atomic(&args.out.join("labels.txt"), &[labels.as_bytes()])?;

    let mut kept = 0;
    for shard in 0..args.shards {
        let path = args.out.join(shard_name(&args.split, shard, args.shards));
        // Shards are written whole or not at all, so one that is there is done.
        if store::exists(&path)? {
            kept += 1;
            continue;
        }
        let of_shard: Vec<&Found> = images.iter().skip(shard).step_by(args.shards).collect();
        let records = in_parallel(of_shard.len(), |i| {
            record(of_shard[i], &folders, args.label_offset)
        });
        let mut good = vec![];
        let mut bad = vec![];
        for record in records {
            match record {
                Ok(record) => good.push(record),
                Err(problem) => bad.push(problem),
            }
        }
        if !bad.is_empty() {
            let count = bad.len();
            bad.truncate(LISTED);
            return Err(Failure::Input(format!(
                "{}\n{count} files of shard {shard} cannot be converted\n\
                 hint: mend or remove them, and start again with another --out: nothing is left out silently",
                bad.join("\n")
            )));
        }
        write_shard(&path, &good)?;
        eprintln!(
            "{}: {} records ({} of {} shards)",
            path.display(),
            good.len(),
            shard + 1,
            args.shards
        );
    }
    output::print(&format!(
        "{} images of {} classes in {} shards{}; class names in {}\n\
         use: data.train = \"{}\", data.label_offset = {}, model.classes = {}\n",
        images.len(),
        folders.len(),
        args.shards,
        if kept > 0 {
            format!(", {kept} of them from before")
        } else {
            String::new()
        },
        args.out.join("labels.txt").display(),
        args.out.join(format!("{}-*-of-*", args.split)).display(),
        args.label_offset,
        folders.len()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Says what lies where images are looked for and is neither a file nor a class's folder: folders in folders, files
/// beside the folders, links to nothing.
fn report_passed_over(paths: &[PathBuf]) {
    const SHOWN: usize = 10;
    if paths.is_empty() {
        return;
    }
    for path in paths.iter().take(SHOWN) {
        let what = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => "a folder in a class's folder",
            Ok(metadata) if metadata.is_file() => "a file beside the classes' folders",
            Ok(_) => "neither a file nor a folder",
            Err(_) => "a link to nothing, or not readable",
        };
        eprintln!("{}: passed over: {what}", path.display());
    }
    eprintln!(
        "{} passed over: only files in DIR/CLASS/ are converted",
        paths.len()
    );
}

/// An image's record, or what is wrong with it.
fn record(found: &Found, folders: &[PathBuf], label_offset: i64) -> Result<Vec<u8>, String> {
    let problem = |what: String| format!("{}: {what}", found.path.display());
    let encoded = std::fs::read(&found.path).map_err(|e| problem(format!("cannot read: {e}")))?;
    let (width, height) = data::inspect(&encoded).map_err(|reason| problem(reason.to_string()))?;
    let class = name(&folders[found.class]);
    Ok(data::Labelled {
        encoded: &encoded,
        label: found.class as i64 + label_offset,
        filename: &name(&found.path),
        synset: &class,
        text: &class,
        width,
        height,
    }
    .to_example())
}
