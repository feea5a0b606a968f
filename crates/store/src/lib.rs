//! Bytes: where they live and how they are framed.
//!
//! Shards are found by [`glob()`] and read by [`tfrecord`] and [`tar`]; files are written whole or not at all by [`write_atomic`];
//! a run directory has one writer, who holds its [`Lease`]. Shards may also be objects of a bucket, named by a URL in place of
//! a path, and a [`Cache`] keeps parts of them. Of what is written, shards may be there too.
//!
//! This crate does not know what the bytes mean: no serde, no protocol buffers, no images.

pub mod bigtable;
mod bucket;
mod cache;
mod error;
mod inflate;
mod lease;
mod stream;
pub mod tar;
pub mod tfrecord;
mod write;

pub use bucket::held_bytes;
pub use cache::Cache;
pub use error::Error;
pub use lease::Lease;
pub use write::{rename, write_atomic};

use std::path::{Path, PathBuf};

/// Whether this names something far away and no file: an object in a bucket (gs://, s3://, az://), or rows of a table
/// (bigtable://).
pub fn is_url(path: impl AsRef<Path>) -> bool {
    let text = path.as_ref().to_string_lossy();
    bucket::is_object(&text) || bigtable::is_url(&text)
}

/// Finds the files that match a shell pattern such as `imagenet/train-*`, or the objects that match one such as
/// `gs://bucket/imagenet/train-*`, sorted by path; or the shards of the rows of a table ([`bigtable`]).
///
/// # Errors
/// A malformed pattern, a directory or bucket that cannot be read, or no match at all.
pub fn glob(pattern: &str) -> Result<Vec<PathBuf>, Error> {
    if bigtable::is_url(pattern) {
        return bigtable::shards(pattern);
    }
    if is_url(pattern) {
        return bucket::glob(pattern);
    }
    let matches = ::glob::glob(pattern).map_err(|e| Error::Pattern {
        pattern: pattern.into(),
        at: e.pos,
        what: e.msg,
    })?;
    let mut files = Vec::new();
    for path in matches {
        let path = path.map_err(|e| Error::Io {
            action: "read",
            path: e.path().into(),
            source: e.into(),
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::NoMatch {
            pattern: pattern.into(),
        });
    }
    files.sort();
    Ok(files)
}

/// The length of a file or object in bytes; of a shard of a table, in rows.
///
/// # Errors
/// It cannot be asked for.
pub fn length(path: &Path) -> Result<u64, Error> {
    if bigtable::is_url(&path.to_string_lossy()) {
        return bigtable::count(path);
    }
    if is_url(path) {
        return bucket::object(path).map(|object| object.size());
    }
    let metadata = std::fs::metadata(path).map_err(|e| Error::io("read the length", path, e))?;
    Ok(metadata.len())
}

/// All bytes of a file or object; none if it is not there.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    if is_url(path) {
        return bucket::read(path);
    }
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// Removes a file or object; it may be gone already.
///
/// # Errors
/// It stays.
pub fn remove(path: &Path) -> Result<(), Error> {
    if is_url(path) {
        return bucket::remove(path);
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Whether there is such a file, directory or object.
///
/// # Errors
/// It cannot be asked for.
pub fn exists(path: &Path) -> Result<bool, Error> {
    match is_url(path) {
        true => bucket::exists(path),
        false => path.try_exists().map_err(|e| Error::io("open", path, e)),
    }
}

/// CRC-32C (Castagnoli) of some bytes: finds what a disk has damaged, and withstands nobody.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// Refuses the URL of an object store.
///
/// # Errors
/// If it is one.
pub fn check_local(path: &str) -> Result<(), Error> {
    match is_url(path) {
        true => Err(Error::Unsupported { url: path.into() }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        write_atomic(&path, &[]).unwrap();
        path
    }

    #[test]
    fn glob_sorts_and_leaves_out_directories_and_other_names() {
        let dir = tempfile::tempdir().unwrap();
        let (b, a) = (touch(&dir, "train-1"), touch(&dir, "train-0"));
        touch(&dir, "validation-0");
        std::fs::create_dir(dir.path().join("train-2")).unwrap();
        let pattern = dir.path().join("train-*");
        assert_eq!(glob(pattern.to_str().unwrap()).unwrap(), [a, b]);
    }

    #[test]
    fn glob_without_a_match_says_which_pattern_and_gives_a_hint() {
        let error = glob("no/such/dir/train-*").unwrap_err().to_string();
        assert_eq!(
            error,
            "no/such/dir/train-*: no file matches\n\
             hint: a relative pattern starts at the working directory"
        );
    }

    #[test]
    fn only_urls_of_buckets_are_urls() {
        for url in ["gs://b/train-*", "s3://b/k", "az://b", "bigtable://p/i/t/k"] {
            assert!(is_url(url) && check_local(url).is_err(), "{url}");
        }
        for path in [
            "gs:/b",
            "http://b/k",
            "/data/gs://b",
            "file://x",
            "s3",
            "train-*",
        ] {
            assert!(!is_url(path) && check_local(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn a_malformed_pattern_of_objects_is_reported_before_anybody_is_asked() {
        let error = glob("gs://b/train-[0").unwrap_err().to_string();
        assert!(
            error.starts_with("gs://b/train-[0: character 14: "),
            "{error}"
        );
    }

    #[test]
    fn glob_reports_a_malformed_pattern() {
        let error = glob("train-[0").unwrap_err().to_string();
        assert!(error.starts_with("train-[0: character 7: "), "{error}");
    }
}
