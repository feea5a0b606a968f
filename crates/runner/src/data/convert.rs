//! `runner data convert`: images that lie in folders or tars become shards.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use super::{LISTED, in_parallel, make_directory, shard_name, write_shard};
use crate::cli::DataConvertArgs;
use crate::failure::Failure;
use crate::output;

/// An image where it lies.
struct Image {
    /// From the directory or in the tar, with slashes.
    path: String,
    place: Place,
    bytes: u64,
    /// The folder it is in, or the tar in a tar.
    folder: Option<String>,
}

enum Place {
    File(PathBuf),
    /// In the tar, from this byte on.
    Tar(u64),
}

/// What was found, and what is passed over with the reason.
#[derive(Default)]
struct Listing {
    images: Vec<Image>,
    passed_over: Vec<(String, &'static str)>,
}

/// Names in their order, and what they mean in words.
struct Classes(Vec<(String, String)>);

impl Classes {
    /// One a line: a name, and perhaps words.
    fn read(path: &Path) -> Result<Self, Failure> {
        let mut classes = vec![];
        let mut seen = BTreeSet::new();
        for (number, line) in lines(path)? {
            let (name, words) = line
                .split_once(|c: char| c.is_whitespace())
                .map_or((line.as_str(), line.as_str()), |(name, words)| {
                    (name, words.trim())
                });
            if !seen.insert(name.to_string()) {
                return Err(bad_line(path, number, &format!("{name} comes twice")));
            }
            classes.push((name.to_string(), words.to_string()));
        }
        Ok(Self(classes))
    }

    /// These names; whole numbers are their own places, so some between may have no image.
    fn of(names: BTreeSet<&str>, are_listed: bool) -> Self {
        let numbers: Option<Vec<usize>> = names.iter().map(|name| name.parse().ok()).collect();
        let names: Vec<String> = match numbers {
            Some(numbers) if are_listed => (0..=numbers.into_iter().max().unwrap_or(0))
                .map(|number| number.to_string())
                .collect(),
            _ => names.into_iter().map(String::from).collect(),
        };
        Self(names.into_iter().map(|name| (name.clone(), name)).collect())
    }
}

fn unreadable(path: &Path, error: impl std::fmt::Display, hint: &str) -> Failure {
    Failure::Input(format!("{}: {error}\nhint: {hint}", path.display()))
}

fn bad_line(path: &Path, number: usize, what: &str) -> Failure {
    Failure::Input(format!(
        "{}, line {number}: {what}\nhint: runner data convert --help says what the lines must be",
        path.display()
    ))
}

/// Lines that are not empty, with their numbers from 1.
fn lines(path: &Path) -> Result<Vec<(usize, String)>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| unreadable(path, format!("cannot read: {e}"), "name a text file"))?;
    let lines = text.lines().map(|line| line.trim().to_string());
    Ok((1..)
        .zip(lines)
        .filter(|(_, line)| !line.is_empty())
        .collect())
}

/// Names of the entries of a directory, sorted.
fn entries(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = || -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(path)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut entries = read().map_err(|e| {
        let hint = "it must hold one folder for each class, or be a tar of them";
        unreadable(path, format!("cannot read the directory: {e}"), hint)
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

/// The last part of a path with slashes.
fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// What lies in a class's folder, one for each; and in `root` itself if its images need no folders.
fn list_directory(root: &Path, is_flat: bool) -> Result<Listing, Failure> {
    let mut listing = Listing::default();
    let file = |path: PathBuf, folder: Option<&str>| {
        let name = name(&path);
        Image {
            path: folder.map_or(name.clone(), |folder| format!("{folder}/{name}")),
            bytes: std::fs::metadata(&path).map_or(0, |m| m.len()),
            place: Place::File(path),
            folder: folder.map(String::from),
        }
    };
    let other = |path: &Path, otherwise: &'static str| match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => "a folder in a class's folder",
        Ok(metadata) if metadata.is_file() => otherwise,
        Ok(_) => "neither a file nor a folder",
        Err(_) => "a link to nothing, or not readable",
    };
    for path in entries(root)? {
        if path.is_dir() {
            let folder = name(&path);
            for path in entries(&path)? {
                if path.is_file() {
                    listing.images.push(file(path, Some(&folder)));
                } else {
                    let what = other(&path, "");
                    listing.passed_over.push((path.display().to_string(), what));
                }
            }
        } else if is_flat && path.is_file() {
            listing.images.push(file(path, None));
        } else {
            let what = other(&path, "a file beside the classes' folders");
            listing.passed_over.push((path.display().to_string(), what));
        }
    }
    Ok(listing)
}

/// A part of a file.
struct Section {
    file: File,
    begin: u64,
    length: u64,
    at: u64,
}

impl Section {
    fn open(path: &Path, begin: u64, length: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(begin))?;
        Ok(Self {
            file,
            begin,
            length,
            at: 0,
        })
    }
}

impl Read for Section {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.length.saturating_sub(self.at);
        let count = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.file.read(&mut out[..count])?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Section {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        let to = to.ok_or_else(|| io::Error::other("a place before the beginning"))?;
        self.file.seek(SeekFrom::Start(self.begin + to))?;
        self.at = to;
        Ok(to)
    }
}

/// The images of a tar. A tar in it is a class's folder, named after it, as in ImageNet's.
fn list_tar(path: &Path) -> Result<Listing, Failure> {
    let mut listing = Listing::default();
    let mut walk = || -> io::Result<()> {
        let length = std::fs::metadata(path)?.len();
        for (member, begin, bytes) in members(Section::open(path, 0, length)?, &mut listing)? {
            let Some(folder) = base(&member).strip_suffix(".tar") else {
                let folder = member.rsplit('/').nth(1).map(String::from);
                listing.images.push(Image {
                    path: member,
                    place: Place::Tar(begin),
                    bytes,
                    folder,
                });
                continue;
            };
            let inner = Section::open(path, begin, bytes)?;
            for (member, at, bytes) in members(inner, &mut listing)? {
                listing.images.push(Image {
                    path: format!("{folder}/{member}"),
                    place: Place::Tar(begin + at),
                    bytes,
                    folder: Some(folder.into()),
                });
            }
        }
        Ok(())
    };
    walk().map_err(|e| unreadable(path, format!("a damaged tar: {e}"), "fetch it again"))?;
    Ok(listing)
}

/// Name, first byte and length of each file of a tar.
fn members(tar: Section, listing: &mut Listing) -> io::Result<Vec<(String, u64, u64)>> {
    let end = tar.length;
    let mut members = vec![];
    for entry in tar::Archive::new(tar).entries_with_seek()? {
        let entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./").to_string();
        match entry.header().entry_type() {
            kind if kind.is_dir() => {}
            kind if kind.is_file() => {
                let (begin, bytes) = (entry.raw_file_position(), entry.size());
                if begin.checked_add(bytes).is_none_or(|at| at > end) {
                    return Err(io::Error::other(format!("{path} is cut off")));
                }
                members.push((path, begin, bytes));
            }
            _ => listing
                .passed_over
                .push((path, "in a tar, neither a file nor a folder")),
        }
    }
    Ok(members)
}

/// The class of each image by name: images that are not in the list are passed over.
fn by_list(path: &Path, listing: &mut Listing) -> Result<Vec<String>, Failure> {
    let lines = lines(path)?;
    if lines.iter().all(|(_, line)| !line.contains(',')) {
        // One class a line, for images in the order of their names: ImageNet's validation images.
        let images = listing.images.len();
        if lines.len() != images {
            let what = format!("{} classes for {images} images", lines.len());
            return Err(unreadable(
                path,
                what,
                "a line for each image, in order of their names, or lines of PATH,CLASS",
            ));
        }
        listing.images.sort_by(|a, b| a.path.cmp(&b.path));
        return Ok(lines.into_iter().map(|(_, line)| line).collect());
    }
    let mut wanted = HashMap::new();
    for (number, line) in lines {
        let (image, class) = line
            .rsplit_once(',')
            .ok_or_else(|| bad_line(path, number, "no comma"))?;
        let (image, class) = (
            image.trim().trim_matches('"'),
            class.trim().trim_matches('"'),
        );
        let image = image.trim_start_matches("./").to_string();
        if wanted
            .insert(image.clone(), (number, class.to_string()))
            .is_some()
        {
            return Err(bad_line(path, number, &format!("{image} comes twice")));
        }
    }
    let mut classes = vec![];
    let images = std::mem::take(&mut listing.images);
    for image in images {
        match wanted.remove(&image.path) {
            Some((_, class)) => {
                classes.push(class);
                listing.images.push(image);
            }
            None => listing.passed_over.push((image.path, "not in --labels")),
        }
    }
    if let Some((image, (number, _))) = wanted.into_iter().min_by_key(|(_, (number, _))| *number) {
        return Err(bad_line(path, number, &format!("{image} is not there")));
    }
    Ok(classes)
}

/// Boxes by an image's name: NAME,XMIN,YMIN,XMAX,YMAX, fractions of width and height.
fn boxes(path: &Path) -> Result<HashMap<String, Vec<[f32; 4]>>, Failure> {
    let mut boxes: HashMap<String, Vec<[f32; 4]>> = HashMap::new();
    for (number, line) in lines(path)? {
        let parts: Vec<&str> = line.split(',').map(str::trim).collect();
        let sides: Option<Vec<f32>> = parts[1..].iter().map(|part| part.parse().ok()).collect();
        let corners = sides.and_then(|sides| <[f32; 4]>::try_from(sides).ok());
        let fits = |&[xmin, ymin, xmax, ymax]: &[f32; 4]| {
            0.0 <= xmin && xmin <= xmax && xmax <= 1.0 && 0.0 <= ymin && ymin <= ymax && ymax <= 1.0
        };
        let corners = corners.filter(fits).ok_or_else(|| {
            let what = "not NAME,XMIN,YMIN,XMAX,YMAX with fractions of width and height";
            bad_line(path, number, what)
        })?;
        boxes
            .entry(base(parts[0]).into())
            .or_default()
            .push(corners);
    }
    Ok(boxes)
}

/// Order by a key that depends on the seed and the image's path alone: FNV-1a, then SplitMix64's finaliser.
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

/// What becomes records.
struct Job<'a> {
    args: &'a DataConvertArgs,
    classes: Classes,
    /// With the class of each, in the order of the shards.
    images: Vec<(Image, usize)>,
    boxes: HashMap<String, Vec<[f32; 4]>>,
}

impl<'a> Job<'a> {
    /// Everything is looked at before anything is written.
    fn new(args: &'a DataConvertArgs) -> Result<Self, Failure> {
        let mut listing = match args.from.is_file() {
            true => list_tar(&args.from)?,
            false => list_directory(&args.from, args.labels.is_some())?,
        };
        let named = match &args.labels {
            Some(list) => by_list(list, &mut listing)?,
            None => {
                let (images, flat): (Vec<_>, _) = std::mem::take(&mut listing.images)
                    .into_iter()
                    .partition(|image| image.folder.is_some());
                let flat = flat.into_iter().map(|image: Image| image.path);
                let flat = flat.map(|path| (path, "a file beside the classes' folders"));
                listing.passed_over.extend(flat);
                listing.images = images;
                let folders = listing
                    .images
                    .iter()
                    .filter_map(|image| image.folder.clone());
                folders.collect()
            }
        };
        report_passed_over(&listing.passed_over);
        if listing.images.is_empty() {
            return Err(Failure::Input(format!(
                "{}: no image in any folder\n\
                 hint: it must hold one folder for each class, with images in it; or say with --labels what each is",
                args.from.display()
            )));
        }
        let classes = match &args.classes {
            Some(file) => Classes::read(file)?,
            None => Classes::of(
                named.iter().map(String::as_str).collect(),
                args.labels.is_some(),
            ),
        };
        let places = classes.0.iter().map(|(name, _)| name.as_str()).zip(0..);
        let places: BTreeMap<&str, usize> = places.collect();
        let mut images = vec![];
        for (image, class) in listing.images.into_iter().zip(named) {
            let class = *places.get(class.as_str()).ok_or_else(|| {
                Failure::Input(format!(
                    "{}: its class, {class}, is not in --classes\nhint: add a line for it",
                    image.path
                ))
            })?;
            images.push((image, class));
        }
        let key = |path: &str| (shuffle_key(args.seed, path), path.to_string());
        images.sort_by_cached_key(|(image, _)| key(&image.path));
        let boxes = args.boxes.as_deref().map_or(Ok(HashMap::new()), boxes)?;
        Ok(Self {
            args,
            classes,
            images,
            boxes,
        })
    }

    /// What the shards are made from: a later start goes on only with the same.
    fn made_from(&self) -> String {
        let args = self.args;
        let mut lines = format!(
            "seed {} shards {} label_offset {}\n",
            args.seed, args.shards, args.label_offset
        );
        let mut line =
            |text: String| writeln!(lines, "{text}").expect("a string can be written to");
        if args.rgb_jpeg {
            line("rgb_jpeg".into());
        }
        if let Some(file) = &args.classes {
            line(format!("classes {}", file.display()));
        }
        if !self.boxes.is_empty() {
            let count: usize = self.boxes.values().map(Vec::len).sum();
            line(format!("boxes {count}"));
        }
        for (image, class) in &self.images {
            line(format!("{class} {} {}", image.path, image.bytes));
        }
        lines
    }

    /// An image's record, or what is wrong with it.
    fn record(&self, (image, class): &(Image, usize)) -> Result<Vec<u8>, String> {
        let problem = |what: String| format!("{}: {what}", image.path);
        let read = || match &image.place {
            Place::File(path) => std::fs::read(path),
            Place::Tar(begin) => {
                let mut bytes = vec![];
                let mut section = Section::open(&self.args.from, *begin, image.bytes)?;
                section.read_to_end(&mut bytes)?;
                Ok(bytes)
            }
        };
        let mut encoded = read().map_err(|e| problem(format!("cannot read: {e}")))?;
        let (width, height) =
            data::inspect(&encoded).map_err(|reason| problem(reason.to_string()))?;
        if self.args.rgb_jpeg
            && let Some(jpeg) =
                data::rgb_jpeg(&encoded).map_err(|reason| problem(reason.to_string()))?
        {
            encoded = jpeg;
        }
        let name = base(&image.path);
        let (synset, text) = &self.classes.0[*class];
        Ok(data::Labelled {
            encoded: &encoded,
            label: *class as i64 + self.args.label_offset,
            filename: name,
            synset,
            text,
            width,
            height,
            boxes: self.boxes.get(name).map_or(&[], Vec::as_slice),
        }
        .to_example())
    }
}

pub(crate) fn convert(args: &DataConvertArgs) -> Result<ExitCode, Failure> {
    let job = Job::new(args)?;
    make_directory(&args.out)?;
    // Two that write here at a time would each take the other's shards for its own. A bucket has no locks: there the
    // same shards would be written twice.
    let _lease = match store::is_url(&args.out) {
        true => None,
        false => Some(store::Lease::take(&args.out)?),
    };
    let lines = job.made_from();
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
    let names = job.classes.0.iter().map(|(name, _)| format!("{name}\n"));
    let names: String = names.collect();
    store::write_atomic(&args.out.join("labels.txt"), &[names.as_bytes()])?;

    let (mut kept, mut done) = (0, 0);
    let began = Instant::now();
    for (shard, path) in shards().enumerate() {
        let of_shard: Vec<_> = job.images.iter().skip(shard).step_by(args.shards).collect();
        // Shards are written whole or not at all, so one that is there is done.
        if store::exists(&path)? {
            kept += 1;
            continue;
        }
        let records = in_parallel(of_shard.len(), |i| job.record(of_shard[i]));
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
        done += 1;
        let each = began.elapsed().as_secs_f64() / f64::from(done);
        let left = each * (args.shards - shard - 1) as f64;
        eprintln!(
            "{}: {} records ({} of {} shards, {} left)",
            path.display(),
            good.len(),
            shard + 1,
            args.shards,
            crate::plan::duration(left)
        );
    }
    let kept = match kept {
        0 => String::new(),
        kept => format!(", {kept} of them from before"),
    };
    output::print(&format!(
        "{} images of {} classes in {} shards{kept}; class names in {}\n\
         use: data.train = \"{}\", data.label_offset = {}, model.classes = {}\n",
        job.images.len(),
        job.classes.0.len(),
        args.shards,
        args.out.join("labels.txt").display(),
        args.out.join(format!("{}-*-of-*", args.split)).display(),
        args.label_offset,
        job.classes.0.len()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Says what lies where images are looked for and is none: folders in folders, files beside the folders, links to
/// nothing.
fn report_passed_over(paths: &[(String, &'static str)]) {
    const SHOWN: usize = 10;
    if paths.is_empty() {
        return;
    }
    for (path, what) in paths.iter().take(SHOWN) {
        eprintln!("{path}: passed over: {what}");
    }
    eprintln!(
        "{} passed over: only files in DIR/CLASS/ are converted, or those that --labels names",
        paths.len()
    );
}
