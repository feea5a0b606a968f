//! A directory that keeps parts of remote objects, so that a second epoch need not fetch them again.
//!
//! It holds at most so many bytes: what was used least recently goes first. Each part is a file that ends with a
//! checksum over its bytes and over what they are part of, so whatever a crash, another process or a damaged disk has
//! left is noticed and fetched again. Several processes may share a directory; each keeps its own count of it.

use std::collections::{BTreeMap, HashMap};
use std::fs::DirEntry;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::Error;

const SUFFIX: &str = "part";
const CHECKSUM: usize = 4;

/// Parts of remote objects on this machine's disk; a handle to share.
#[derive(Clone, Debug)]
pub struct Cache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    limit: u64,
    held: Mutex<Held>,
}

/// What the directory holds, as far as this process knows.
#[derive(Debug, Default)]
struct Held {
    bytes: u64,
    /// When a part was used last, as a count of uses.
    clock: u64,
    /// Length and last use by file name.
    parts: HashMap<String, (u64, u64)>,
    by_use: BTreeMap<u64, String>,
}

impl Held {
    fn touch(&mut self, name: &str, length: u64) {
        self.forget(name);
        self.clock += 1;
        self.bytes += length;
        self.parts.insert(name.into(), (length, self.clock));
        self.by_use.insert(self.clock, name.into());
    }

    fn forget(&mut self, name: &str) {
        if let Some((length, used)) = self.parts.remove(name) {
            self.bytes -= length;
            self.by_use.remove(&used);
        }
    }

    fn oldest(&self) -> Option<String> {
        self.by_use.values().next().cloned()
    }
}

impl Cache {
    /// Opens the directory, makes it if need be, and removes what is over `limit` bytes.
    ///
    /// # Errors
    /// The directory cannot be made, read or written.
    pub fn open(dir: &Path, limit: u64) -> Result<Self, Error> {
        let failed = |action, e| Error::io(action, dir, e);
        std::fs::create_dir_all(dir).map_err(|e| failed("make", e))?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|e| failed("read", e))? {
            let entry = entry.map_err(|e| failed("read", e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".tmp") {
                remove_stale(&entry);
            }
            if !name.ends_with(&format!(".{SUFFIX}")) {
                continue;
            }
            // Another process may remove it meanwhile.
            if let Ok(metadata) = entry.metadata() {
                let written = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push((written, name, metadata.len()));
            }
        }
        found.sort();
        let mut held = Held::default();
        for (_, name, length) in found {
            held.touch(&name, length);
        }
        let cache = Self(Arc::new(Inner {
            dir: dir.into(),
            limit,
            held: Mutex::new(held),
        }));
        cache.put("probe", 0, &[]).map_err(|e| failed("write", e))?;
        cache.make_room(0);
        Ok(cache)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // The counts may be off after a panic, which costs a fetch at worst.
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This part of this object, if it is here and whole.
    pub(crate) fn get(&self, identity: &str, part: u64) -> Option<Vec<u8>> {
        let name = name(identity, part);
        let path = self.0.dir.join(&name);
        let mut bytes = std::fs::read(&path).ok()?;
        let length = bytes.len() as u64;
        let is_whole = bytes
            .split_last_chunk::<CHECKSUM>()
            .is_some_and(|(b, c)| u32::from_le_bytes(*c) == checksum(identity, part, b));
        if !is_whole {
            self.held().forget(&name);
            return None;
        }
        self.held().touch(&name, length);
        bytes.truncate(bytes.len() - CHECKSUM);
        Some(bytes)
    }

    /// Keeps this part, and removes others until the directory is within its limit.
    pub(crate) fn put(&self, identity: &str, part: u64, bytes: &[u8]) -> io::Result<()> {
        let length = (bytes.len() + CHECKSUM) as u64;
        if length > self.0.limit {
            return Ok(());
        }
        self.make_room(length);
        let name = name(identity, part);
        let path = self.0.dir.join(&name);
        // Nothing is synced: a part that a power cut leaves in pieces fails its checksum.
        let crc = checksum(identity, part, bytes).to_le_bytes();
        crate::write::write_beside(&path, &[bytes, &crc])?;
        self.held().touch(&name, length);
        Ok(())
    }

    fn make_room(&self, length: u64) {
        loop {
            let mut held = self.held();
            if held.bytes + length <= self.0.limit {
                return;
            }
            let Some(oldest) = held.oldest() else { return };
            held.forget(&oldest);
            drop(held);
            // Another process may have been faster.
            let _ = std::fs::remove_file(self.0.dir.join(oldest));
        }
    }
}

/// Removes what a process has left that died while it wrote; no write takes a day.
fn remove_stale(entry: &DirEntry) {
    let written = entry.metadata().and_then(|metadata| metadata.modified());
    if let Ok(age) = written.map(|written| written.elapsed().unwrap_or_default())
        && age > Duration::from_secs(24 * 3600)
    {
        let _ = std::fs::remove_file(entry.path());
    }
}

fn checksum(identity: &str, part: u64, bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(identity.as_bytes());
    let crc = crc32c::crc32c_append(crc, &part.to_le_bytes());
    crc32c::crc32c_append(crc, bytes)
}

/// A file name; should two identities share one, the checksum tells them apart.
fn name(identity: &str, part: u64) -> String {
    // FNV-1a.
    let hash = identity
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    format!("{hash:016x}-{part:x}.{SUFFIX}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn parts_come_back_and_objects_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("new"), 1 << 20).unwrap();
        cache.put("a", 0, b"zero").unwrap();
        cache.put("a", 1, b"one").unwrap();
        cache.put("b", 0, b"other").unwrap();
        let again = Cache::open(cache.dir(), 1 << 20).unwrap();
        for cache in [&cache, &again] {
            assert_eq!(cache.get("a", 0).unwrap(), b"zero");
            assert_eq!(cache.get("a", 1).unwrap(), b"one");
            assert_eq!(cache.get("b", 0).unwrap(), b"other");
            assert_eq!(cache.get("b", 1), None);
        }
    }

    #[test]
    fn a_damaged_part_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 1 << 20).unwrap();
        cache.put("a", 0, &[7; 100]).unwrap();
        let path = dir.path().join(name("a", 0));
        let whole = std::fs::read(&path).unwrap();
        for (at, length) in [(0, 104), (99, 104), (103, 104), (0, 50), (0, 3), (0, 0)] {
            let mut bytes = whole[..length].to_vec();
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1;
            }
            crate::write_atomic(&path, &[&bytes]).unwrap();
            assert_eq!(cache.get("a", 0), None, "{at} {length}");
        }
        // The part of another object under this name is no part of this one.
        cache.put("b", 0, &[7; 100]).unwrap();
        std::fs::copy(dir.path().join(name("b", 0)), &path).unwrap();
        assert_eq!(cache.get("a", 0), None);
    }

    #[test]
    fn what_was_used_least_recently_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 400).unwrap();
        for part in 0..3 {
            cache.put("a", part, &[0; 96]).unwrap();
        }
        assert!(cache.get("a", 0).is_some());
        cache.put("a", 3, &[0; 96]).unwrap();
        cache.put("a", 4, &[0; 96]).unwrap();
        let held = |cache: &Cache| {
            (0..5)
                .map(|p| cache.get("a", p).is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(held(&cache), [true, false, true, true, true]);
        assert_eq!(names(dir.path()), 4);
        // A smaller limit takes effect when the directory is opened.
        let smaller = Cache::open(dir.path(), 150).unwrap();
        assert_eq!(held(&smaller).iter().filter(|held| **held).count(), 1);
        assert!(names(dir.path()) <= 2);
        // What is larger than the whole cache is not kept, and pushes nothing out.
        smaller.put("b", 0, &[0; 200]).unwrap();
        assert_eq!(smaller.get("b", 0), None);
        assert_eq!(held(&smaller).iter().filter(|held| **held).count(), 1);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        crate::write_atomic(&file, &[]).unwrap();
        let error = Cache::open(&file, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("file: cannot make: "), "{error}");
    }
}
