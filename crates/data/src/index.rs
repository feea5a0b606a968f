//! A directory that keeps, beside shards, where their images can be entered, so that decoding a crop need not begin at
//! the first bit of the file.
//!
//! One file for each shard, named after the shard's name and length. It is a log: an entry for each record, in the
//! order in which they were first decoded, each with a checksum. An entry says of which payload it is, so what it
//! holds for a shard that has changed is passed over; a tail that a crash has torn is cut off by the next writer. One
//! process writes at a time: others read. A record that is read again before its entry is written, as happens where there are
//! few, has two. Nothing in it decides a pixel (see `jpeg::fast::Seek`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use store::tfrecord::{Reader, Record};
use store::{Lease, crc32c};

use crate::folder::failed;
use crate::jpeg::fast::{Decoder, Level, Photo};
use crate::{Error, Fingerprint, example};

/// First in each file: what it is, and the version of what follows.
const MAGIC: &[u8; 8] = b"seekpts1";
/// An entry's head: record, payload's length, payload's checksum, points' length.
const HEAD: usize = 8 + 8 + 4 + 4;
const CHECKSUM: usize = 4;
/// Records that `data index` holds and whose entries it writes together.
const TOGETHER: usize = 32;
/// No image has as many points.
const MAX_POINTS: usize = 64 << 20;

/// The directory; a handle to share.
#[derive(Clone, Debug)]
pub struct Index(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    writing: Mutex<Writing>,
}

#[derive(Debug)]
enum Writing {
    /// Nothing was to be written yet.
    Untried,
    On(Writer),
    /// Another process writes.
    Held,
    /// Writing has failed, for what was perhaps not told yet.
    Off(Option<Error>),
}

#[derive(Debug)]
struct Writer {
    _lease: Lease,
    /// Files that are known to end with a whole entry.
    whole: HashSet<PathBuf>,
}

/// What is known of one image.
pub(crate) struct Entry {
    record: u64,
    length: u64,
    crc: u32,
    points: Vec<u8>,
}

impl Entry {
    pub(crate) fn new(record: &Record, points: Vec<u8>) -> Self {
        Self {
            record: record.index,
            length: record.bytes.len() as u64,
            crc: record.crc,
            points,
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.points.len() + CHECKSUM);
        bytes.extend(self.record.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.crc.to_le_bytes());
        bytes.extend((self.points.len() as u32).to_le_bytes());
        bytes.extend(&self.points);
        bytes.extend(crc32c(&bytes).to_le_bytes());
        bytes
    }
}

impl Index {
    /// In this directory. It is made once there is something to write.
    pub fn new(dir: &Path) -> Self {
        Self(Arc::new(Inner {
            dir: dir.into(),
            writing: Mutex::new(Writing::Untried),
        }))
    }

    fn path(&self, shard: &Path) -> Result<PathBuf, Error> {
        let name = shard.file_name().unwrap_or_default().to_string_lossy();
        let mut hash = Fingerprint::default();
        hash.add(&format!("{name} {}", store::length(shard)?));
        // A name of a file, whatever the shard's is.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let name: String = name.chars().filter(|&c| plain(c)).take(100).collect();
        Ok(self.0.dir.join(format!("{name}-{hash}.points")))
    }

    /// Whether this process may add to it: one may at a time.
    pub(crate) fn is_writable(&self) -> bool {
        let mut writing = self.writing();
        if let Writing::Untried = *writing {
            *writing = match Writer::new(&self.0.dir) {
                Ok(writer) => Writing::On(writer),
                Err(Error::Store(store::Error::Held { .. })) => Writing::Held,
                Err(error) => Writing::Off(Some(error)),
            };
        }
        matches!(*writing, Writing::On(_))
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        // After a panic a file may end within an entry, which its next reader passes over.
        (self.0.writing.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a shard so far.
    pub(crate) fn shard(&self, shard: &Path) -> Result<Known, Error> {
        let path = self.path(shard)?;
        Ok(Known::open(&path).unwrap_or_default())
    }

    /// Keeps what was found out about images, each with the index of its shard. If that fails nothing more is kept by this process,
    /// and why is returned.
    pub(crate) fn add(&self, shards: &[PathBuf], found: Vec<(usize, Entry)>) -> Result<(), Error> {
        let mut by_shard: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        for (shard, entry) in found {
            by_shard.entry(shard).or_default().extend(entry.to_bytes());
        }
        let mut writing = self.writing();
        match &mut *writing {
            Writing::Off(error) => error.take().map_or(Ok(()), Err),
            Writing::Untried | Writing::Held => Ok(()),
            Writing::On(writer) => {
                let add = |(shard, entries): (usize, Vec<u8>)| {
                    let path = self.path(&shards[shard])?;
                    (writer.append(&path, &entries)).map_err(|e| failed("write", &path, e))
                };
                let added = by_shard.into_iter().try_for_each(add);
                if added.is_err() {
                    *writing = Writing::Off(None);
                }
                added
            }
        }
    }
}

/// What was found out about a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Images that can be entered.
    pub images: u64,
    /// Those of them that were known before.
    pub known: u64,
    /// Records that only the exact decoder takes, and damaged ones.
    pub others: u64,
}

impl Index {
    /// Finds out about every record of a shard of TFRecords what is not known yet.
    ///
    /// # Errors
    /// The shard cannot be read, or what is found out cannot be kept; of that, several shards at a time hear once.
    pub fn fill(&self, shard: &Path) -> Result<Filled, Error> {
        if !self.is_writable() {
            self.add(&[], vec![])?;
            return match *self.writing() {
                Writing::Held => Err(Error::IndexHeld {
                    dir: self.0.dir.clone(),
                }),
                // Why nothing is written was told of another shard.
                _ => Ok(Filled::default()),
            };
        }
        let mut decoder = Decoder::new(Level::detect());
        let mut known = self.shard(shard)?;
        let mut filled = Filled::default();
        let shards = [shard.to_path_buf()];
        let mut reader = Reader::open(shard)?;
        loop {
            let mut records = vec![];
            while records.len() < TOGETHER
                && let Some(record) = reader.next()?
            {
                if known.get(&record).is_some() {
                    filled.known += 1;
                    filled.images += 1;
                } else {
                    records.push(record);
                }
            }
            if records.is_empty() {
                return Ok(filled);
            }
            let points = decoder.note(records.iter().map(photo));
            let entries = records.iter().zip(points).filter_map(|(record, points)| {
                let points = points?;
                Some((0, Entry::new(record, points)))
            });
            let entries: Vec<_> = entries.collect();
            filled.images += entries.len() as u64;
            filled.others += (records.len() - entries.len()) as u64;
            self.add(&shards, entries)?;
        }
    }
}

/// Of a `tf.Example`.
fn photo(record: &Record) -> Option<Photo<'_>> {
    if !record.verify() {
        return None;
    }
    let example = example::parse(&record.bytes).ok()?;
    Photo::open(example.encoded)
}

impl Writer {
    fn new(dir: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(|e| failed("make", dir, e))?;
        Ok(Self {
            _lease: Lease::take(dir)?,
            whole: HashSet::new(),
        })
    }

    fn append(&mut self, path: &Path, entries: &[u8]) -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)?;
        if !self.whole.contains(path) {
            // What cannot be read is an error here, not an empty file: it is not cut off.
            let (_, end) = scan(&file)?.unwrap_or_default();
            file.set_len(end)?;
            if end == 0 {
                file.rewind()?;
                file.write_all(MAGIC)?;
            }
            self.whole.insert(path.into());
        }
        file.seek(SeekFrom::End(0))?;
        file.write_all(entries)
    }
}

/// Where the entry of a payload starts, by its record, length and checksum.
type Entries = HashMap<(u64, u64, u32), u64>;

/// The whole entries of a file, and where they end. None if it is not a file of points.
fn scan(file: &File) -> std::io::Result<Option<(Entries, u64)>> {
    let length = file.metadata()?.len();
    let mut reader = BufReader::new(file);
    let mut magic = [0; MAGIC.len()];
    if length < magic.len() as u64 {
        return Ok(None);
    }
    reader.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Ok(None);
    }
    let (mut entries, mut end) = (Entries::new(), MAGIC.len() as u64);
    let mut head = [0; HEAD];
    while end + HEAD as u64 <= length {
        reader.read_exact(&mut head)?;
        let (key, points) = parse(&head);
        let whole = (HEAD + points + CHECKSUM) as u64;
        if points > MAX_POINTS || end + whole > length {
            break;
        }
        entries.insert(key, end);
        end += whole;
        reader.seek_relative((points + CHECKSUM) as i64)?;
    }
    Ok(Some((entries, end)))
}

/// What is known of the images of a shard.
#[derive(Default)]
pub(crate) struct Known {
    file: Option<File>,
    entries: Entries,
}

impl Known {
    /// None if there is no such file, or it cannot be read: then nothing is known.
    fn open(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let (entries, _) = scan(&file).ok()??;
        Some(Self {
            file: Some(file),
            entries,
        })
    }

    /// The points of a record, if they are known and the record is the same.
    pub(crate) fn get(&mut self, record: &Record) -> Option<Vec<u8>> {
        let key = (record.index, record.bytes.len() as u64, record.crc);
        let &start = self.entries.get(&key)?;
        let file = self.file.as_mut()?;
        file.seek(SeekFrom::Start(start)).ok()?;
        let mut bytes = vec![0; HEAD];
        file.read_exact(&mut bytes).ok()?;
        let (_, points) = parse(bytes.first_chunk()?);
        bytes.resize(HEAD + points.min(MAX_POINTS) + CHECKSUM, 0);
        file.read_exact(&mut bytes[HEAD..]).ok()?;
        let (bytes, crc) = bytes.split_last_chunk::<CHECKSUM>()?;
        (crc32c(bytes) == u32::from_le_bytes(*crc)).then(|| bytes[HEAD..].to_vec())
    }
}

/// An entry's head: which payload it is of, and how many bytes its points have.
fn parse(head: &[u8; HEAD]) -> ((u64, u64, u32), usize) {
    let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    ((long(0), long(8), short(16)), short(20) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(index: u64, bytes: &[u8]) -> Record {
        Record {
            offset: 0,
            index,
            bytes: bytes.to_vec(),
            crc: crc32c(bytes),
        }
    }

    fn put(path: &Path, bytes: &[u8]) {
        store::write_atomic(path, &[bytes]).unwrap();
    }

    fn shard() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let shard = dir.path().join("train-0");
        put(&shard, b"something");
        (dir, shard)
    }

    #[test]
    fn what_is_added_is_found_again_and_only_for_the_same_payload() {
        let (dir, shard) = shard();
        let at = dir.path().join("index");
        let records = [record(0, b"first"), record(7, b"second")];
        let entries = |points: &[u8]| {
            let entry = |record| (0, Entry::new(record, points.to_vec()));
            records.iter().map(entry).collect()
        };
        let index = Index::new(&at);
        assert!(index.is_writable());
        assert!(index.shard(&shard).unwrap().get(&records[0]).is_none());
        let shards = std::slice::from_ref(&shard);
        index.add(shards, entries(b"points")).unwrap();
        index.add(shards, entries(b"newer")).unwrap();
        // Another handle, as another process would have, reads and does not write.
        let reader = Index::new(&at);
        assert!(index.is_writable() && !reader.is_writable());
        reader.add(shards, entries(b"never")).unwrap();
        let mut known = reader.shard(&shard).unwrap();
        for record in &records {
            assert_eq!(known.get(record).unwrap(), b"newer");
        }
        assert!(known.get(&record(7, b"another")).is_none());
        assert!(known.get(&record(1, b"first")).is_none());
        // A shard of the same name and another length has a file of its own.
        put(&shard, b"something else");
        assert!(index.shard(&shard).unwrap().get(&records[0]).is_none());
    }

    #[test]
    fn what_cannot_be_written_is_told_once() {
        let (dir, shard) = shard();
        let index = Index::new(&shard.join("no directory"));
        assert!(!index.is_writable());
        let shards = [shard];
        let error = index.add(&shards, vec![]).unwrap_err();
        assert!(error.to_string().contains("no directory"), "{error}");
        assert!(index.add(&shards, vec![]).is_ok());
        drop(dir);
    }

    /// Wherever a crash has cut the file, what is whole is found, and what is added afterwards too.
    #[test]
    fn a_torn_tail_loses_no_more_than_itself() {
        let (dir, shard) = shard();
        let at = dir.path().join("index");
        let records = [
            record(0, b"first"),
            record(1, b"second"),
            record(2, b"third"),
        ];
        let add = |index: &Index, i: usize| {
            let entry = Entry::new(&records[i], vec![i as u8; 10]);
            let shards = std::slice::from_ref(&shard);
            index.add(shards, vec![(0, entry)]).unwrap();
        };
        let index = Index::new(&at);
        assert!(index.is_writable());
        add(&index, 0);
        add(&index, 1);
        let path = index.path(&shard).unwrap();
        drop(index);
        let whole = std::fs::read(&path).unwrap();
        let entry = (whole.len() - MAGIC.len()) / 2;
        for end in 0..whole.len() {
            put(&path, &whole[..end]);
            let index = Index::new(&at);
            assert!(index.is_writable());
            add(&index, 2);
            let mut known = index.shard(&shard).unwrap();
            let is_there = |record: &Record| known.get(record).is_some();
            let found = records.each_ref().map(is_there);
            assert_eq!(found, [end >= MAGIC.len() + entry, false, true], "{end}");
        }
        // A flipped bit costs the entry that it is in, or what follows it; nothing wrong comes out.
        for at_byte in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at_byte] ^= 4;
            put(&path, &bytes);
            let mut known = Index::new(&at).shard(&shard).unwrap();
            for (i, record) in records.iter().enumerate() {
                let points = known.get(record);
                assert!(
                    points.is_none_or(|points| points == [i as u8; 10]),
                    "{at_byte}"
                );
            }
        }
    }
}
