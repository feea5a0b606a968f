//! `runner data convert`: images that lie in folders or tars become shards.

use std::collections::hash_map::Entry;
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
    /// Of classes that may be without an image.
    folders: BTreeSet<String>,
    passed_over: Vec<(String, &'static str)>,
}

/// Numbers of classes beyond this are no numbers of classes.
const MOST_CLASSES: usize = 1_000_000;
/// A shard is put together in memory.
const MOST_BYTES: u64 = 2 << 30;
const HIDDEN: &str = "its name begins with a dot";

/// Names in their order, and what they mean in words.
struct Classes(Vec<(String, String)>);

impl Classes {
    /// One a line: a name, and perhaps words; or a name of several words, if all that are wanted are whole lines.
    fn read(path: &Path, wanted: &BTreeSet<&str>) -> Result<Self, Failure> {
        let lines = lines(path)?;
        let whole: BTreeSet<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
        let are_whole = wanted.is_subset(&whole);
        let mut classes = vec![];
        let mut seen = BTreeSet::new();
        for (number, line) in &lines {
            let parts = line.split_once(char::is_whitespace).filter(|_| !are_whole);
            let (name, words) = parts.map_or((line.as_str(), line.as_str()), |(name, words)| {
                (name, words.trim())
            });
            if !seen.insert(name) {
                return Err(bad_line(path, *number, &format!("{name} comes twice")));
            }
            classes.push((name.to_string(), words.to_string()));
        }
        if let Some(missing) = wanted.iter().find(|name| !seen.contains(*name)) {
            return Err(unreadable(
                path,
                format!("no line for the class {missing}"),
                "list all classes in their order, one a line: name, and words",
            ));
        }
        Ok(Self(classes))
    }

    /// In the order of their names.
    fn by_name(names: &BTreeSet<&str>) -> Self {
        Self(
            names
                .iter()
                .map(|name| (name.to_string(), name.to_string()))
                .collect(),
        )
    }

    /// Whole numbers are their own places, so some between may have no image; other names are in order.
    fn of_list(path: &Path, names: &BTreeSet<&str>) -> Result<Self, Failure> {
        let number = |name: &&str| {
            name.parse::<usize>()
                .ok()
                .filter(|n| n.to_string() == **name)
        };
        let numbers: Vec<usize> = names.iter().filter_map(number).collect();
        if numbers.is_empty() {
            return Ok(Self::by_name(names));
        }
        if numbers.len() < names.len() {
            let other = names.iter().find(|name| number(name).is_none());
            return Err(unreadable(
                path,
                format!(
                    "some classes are whole numbers, and {:?} is not",
                    other.unwrap_or(&"")
                ),
                "mend it, or list all classes in their order with --classes",
            ));
        }
        let most = numbers.into_iter().max().unwrap_or(0);
        if most >= MOST_CLASSES {
            return Err(unreadable(
                path,
                format!("class {most} is beyond {MOST_CLASSES} classes"),
                "number classes from 0, or list them in their order with --classes",
            ));
        }
        let names = (0..=most).map(|number| number.to_string());
        Ok(Self(names.map(|name| (name.clone(), name)).collect()))
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
    // Some editors begin a file with a mark of its byte order.
    let text = text.trim_start_matches('\u{feff}');
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

fn name(path: &Path) -> Result<String, Failure> {
    let name = path.file_name().unwrap_or_default().to_str();
    let name = name.ok_or_else(|| unreadable(path, "its name is no UTF-8", "rename it"))?;
    Ok(name.to_string())
}

/// The last part of a path with slashes.
fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// What lies in the classes' folders; or, where a list says what images are, anywhere.
fn list_directory(root: &Path, is_listed: bool) -> Result<Listing, Failure> {
    let mut listing = Listing::default();
    // Directories and their paths from the root, which is empty for the root itself.
    let mut left = vec![(root.to_path_buf(), String::new())];
    while let Some((directory, from)) = left.pop() {
        for path in entries(&directory)? {
            let name = name(&path)?;
            let relative = match from.as_str() {
                "" => name.clone(),
                from => format!("{from}/{name}"),
            };
            let metadata = std::fs::metadata(&path);
            let what = match &metadata {
                _ if name.starts_with('.') => HIDDEN,
                Ok(metadata) if metadata.is_dir() => {
                    if is_listed || from.is_empty() {
                        if !is_listed {
                            listing.folders.insert(name);
                        }
                        left.push((path, relative));
                        continue;
                    }
                    "a folder in a class's folder"
                }
                Ok(metadata) if metadata.is_file() => {
                    if is_listed || !from.is_empty() {
                        listing.images.push(Image {
                            path: relative,
                            place: Place::File(path),
                            bytes: metadata.len(),
                            folder: (!from.is_empty()).then(|| from.clone()),
                        });
                        continue;
                    }
                    "a file beside the classes' folders"
                }
                Ok(_) => "neither a file nor a folder",
                Err(_) => "a link to nothing, or not readable",
            };
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
        for (member, begin, bytes) in members(path, 0, length, &mut listing)? {
            let Some(folder) = member.strip_suffix(".tar") else {
                let folder = member.rsplit('/').nth(1).map(String::from);
                listing.images.push(Image {
                    path: member,
                    place: Place::Tar(begin),
                    bytes,
                    folder,
                });
                continue;
            };
            let inner = members(path, begin, bytes, &mut listing)
                .map_err(|e| io::Error::other(format!("{member} in it: {e}")))?;
            let name = base(folder).to_string();
            listing.folders.insert(name.clone());
            for (member, at, bytes) in inner {
                listing.images.push(Image {
                    path: format!("{folder}/{member}"),
                    place: Place::Tar(begin + at),
                    bytes,
                    folder: Some(name.clone()),
                });
            }
        }
        Ok(())
    };
    walk().map_err(|e| {
        let hint = "unpack .gz and .zip first; fetch a tar that is cut off again";
        unreadable(path, format!("not a whole tar: {e}"), hint)
    })?;
    Ok(listing)
}

/// Name, first byte and length of each file of the tar that is this part of a file. Of members with the same name the last
/// counts, as for those who unpack it.
fn members(
    file: &Path,
    begin: u64,
    length: u64,
    listing: &mut Listing,
) -> io::Result<Vec<(String, u64, u64)>> {
    const BLOCK: u64 = 512;
    let name = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(path) => Ok(path.trim_start_matches("./").to_string()),
        Err(_) => Err(io::Error::other("a name in it is no UTF-8")),
    };
    let mut members: Vec<(String, u64, u64)> = vec![];
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut end = 0;
    let mut archive = tar::Archive::new(Section::open(file, begin, length)?);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let path = name(&entry.path_bytes())?;
        let (mut at, mut bytes) = (entry.raw_file_position(), entry.size());
        let kind = entry.header().entry_type();
        end = at.saturating_add(bytes).max(end);
        if end > length {
            return Err(io::Error::other(format!("{path} is cut off")));
        }
        if base(&path).starts_with('.') && !kind.is_dir() {
            listing.passed_over.push((path, HIDDEN));
            continue;
        }
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        } else if kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default();
            let target = name(&target)?;
            let Some(&place) = places.get(&target) else {
                let what = format!("{path} is a link to {target}, which is not before it");
                return Err(io::Error::other(what));
            };
            (at, bytes) = (members[place].1, members[place].2);
        } else if kind.is_gnu_sparse() {
            return Err(io::Error::other(format!("{path} is stored with holes")));
        } else if !kind.is_file() {
            let what = "in a tar, neither a file nor a folder";
            listing.passed_over.push((path, what));
            continue;
        }
        match places.entry(path) {
            Entry::Occupied(place) => {
                let earlier = &mut members[*place.get()];
                (earlier.1, earlier.2) = (at, bytes);
            }
            Entry::Vacant(place) => {
                members.push((place.key().clone(), at, bytes));
                place.insert(members.len() - 1);
            }
        }
    }
    // A tar ends with zeros; one that just ends may have had more.
    let end = end.next_multiple_of(BLOCK);
    let mut last = vec![];
    let behind = length.saturating_sub(end).min(BLOCK);
    Section::open(file, begin + end.min(length), behind)?.read_to_end(&mut last)?;
    if last.len() as u64 != BLOCK || last.iter().any(|&byte| byte != 0) {
        return Err(io::Error::other("its end is missing"));
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
        if class.is_empty() {
            return Err(bad_line(path, number, "no class"));
        }
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

/// Boxes by an image's name or path: NAME,XMIN,YMIN,XMAX,YMAX, fractions of width and height.
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
        let name = parts[0].trim_start_matches("./").to_string();
        boxes.entry(name).or_default().push(corners);
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

/// The class of each image by the folder that it is in; what is in none is passed over.
fn by_folder(from: &Path, listing: &mut Listing) -> Result<Vec<String>, Failure> {
    let images = std::mem::take(&mut listing.images);
    let mut classes = vec![];
    // Where the folders are: all in one place, or a split could be taken for another's.
    let mut place: Option<String> = None;
    for mut image in images {
        let Some(folder) = image.folder.take() else {
            let what = "a file beside the classes' folders";
            listing.passed_over.push((image.path, what));
            continue;
        };
        let parent = image.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        let here = parent.strip_suffix(&folder).unwrap_or(parent).to_string();
        if let Some(place) = place.as_ref().filter(|place| **place != here) {
            return Err(unreadable(
                from,
                format!(
                    "classes' folders lie in two places, {place:?} and {here:?} (of {})",
                    image.path
                ),
                "convert one of them alone, or say with --labels what images are",
            ));
        }
        place = Some(here);
        classes.push(folder);
        listing.images.push(image);
    }
    Ok(classes)
}

/// Boxes by the paths of images, of names that say which image they mean.
fn by_path(
    file: &Path,
    boxes: HashMap<String, Vec<[f32; 4]>>,
    images: &[(Image, usize)],
) -> Result<HashMap<String, Vec<[f32; 4]>>, Failure> {
    let mut found = HashMap::new();
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    for (Image { path, .. }, _) in images {
        let key = [path.as_str(), base(path)]
            .into_iter()
            .find(|key| boxes.contains_key(*key));
        let Some(key) = key else { continue };
        if let Some(other) = names.insert(key, path) {
            return Err(unreadable(
                file,
                format!("{key} may be {other} or {path}"),
                "give paths from --from in place of names",
            ));
        }
        found.insert(path.clone(), boxes[key].clone());
    }
    if found.is_empty() {
        let example = images.first().map_or("", |(image, _)| base(&image.path));
        return Err(unreadable(
            file,
            "no image has any of these names",
            &format!("names must be as those of the images: {example}"),
        ));
    }
    eprintln!("{} of {} images have boxes", found.len(), images.len());
    Ok(found)
}

/// What becomes records.
struct Job<'a> {
    args: &'a DataConvertArgs,
    classes: Classes,
    /// With the class of each, in the order of the shards.
    images: Vec<(Image, usize)>,
    /// By path.
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
            None => by_folder(&args.from, &mut listing)?,
        };
        report_passed_over(&listing.passed_over);
        if listing.images.is_empty() {
            return Err(unreadable(
                &args.from,
                "no image in any folder",
                "it must hold one folder for each class, with images in it; or say with --labels what each is",
            ));
        }
        let mut names: BTreeSet<&str> = named.iter().map(String::as_str).collect();
        if args.labels.is_none() {
            names.extend(listing.folders.iter().map(String::as_str));
        }
        let classes = match (&args.classes, &args.labels) {
            (Some(file), _) => Classes::read(file, &names)?,
            (None, Some(list)) => Classes::of_list(list, &names)?,
            (None, None) => Classes::by_name(&names),
        };
        let places = classes.0.iter().map(|(name, _)| name.as_str()).zip(0..);
        let places: HashMap<&str, usize> = places.collect();
        let places = named.iter().map(|class| places[class.as_str()]);
        let mut images: Vec<(Image, usize)> = listing.images.into_iter().zip(places).collect();
        let bytes = images.iter().map(|(image, _)| image.bytes).sum::<u64>();
        if bytes / args.shards as u64 > MOST_BYTES {
            return Err(Failure::Spec(format!(
                "{} shards of {} images would be {} MB each, and a shard is put together in memory\n\
                 hint: --shards {}, for 150 MB each",
                args.shards,
                images.len(),
                bytes / args.shards as u64 / 1_000_000,
                bytes.div_ceil(150_000_000)
            )));
        }
        let seen: BTreeSet<usize> = images.iter().map(|(_, class)| *class).collect();
        if seen.len() < classes.0.len() {
            let empty = classes.0.len() - seen.len();
            eprintln!("{empty} of {} classes have no image", classes.0.len());
        }
        images.sort_by_cached_key(|(Image { path, .. }, _)| {
            (shuffle_key(args.seed, path), path.clone())
        });
        let boxes = match &args.boxes {
            Some(file) => by_path(file, boxes(file)?, &images)?,
            None => HashMap::new(),
        };
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
        if args.classes.is_some() || args.labels.is_some() {
            let classes = self.classes.0.iter();
            classes.for_each(|(name, words)| line(format!("class {name} {words}")));
        }
        let boxes: BTreeMap<_, _> = self.boxes.iter().collect();
        boxes
            .iter()
            .for_each(|(path, boxes)| line(format!("boxes {path} {boxes:?}")));
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
            boxes: self.boxes.get(&image.path).map_or(&[], Vec::as_slice),
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
    let labels = args.out.join("labels.txt");
    let names = job.classes.0.iter().map(|(name, _)| format!("{name}\n"));
    let names: String = names.collect();
    if let Some(others) = store::read(&labels)?
        && others != names.as_bytes()
    {
        return Err(Failure::Spec(format!(
            "{}: another split has other classes, or another order, so its labels would mean others\n\
             hint: --classes {} gives this one the same; or name another --out",
            labels.display(),
            labels.display()
        )));
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
    store::write_atomic(&labels, &[names.as_bytes()])?;

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
         use: data.{} = \"{}\", data.label_offset = {}, model.classes = {}\n",
        job.images.len(),
        job.classes.0.len(),
        args.shards,
        labels.display(),
        if args.split == "train" {
            "train"
        } else {
            "eval"
        },
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
