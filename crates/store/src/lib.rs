//! Bytes: where they live and how they are framed.
//!
//! Shards are found by [`glob()`] and read by [`tfrecord`]; files are written whole or not at all by [`write_atomic`];
//! a run directory has one writer, who holds its [`Lease`]. Paths are local for now: bucket URLs are refused.
//!
//! This crate does not know what the bytes mean: no serde, no protocol buffers, no images.

mod error;
mod lease;
pub mod tfrecord;
mod write;

pub use error::Error;
pub use lease::Lease;
pub use write::{rename, write_atomic};

use std::path::PathBuf;

/// Finds the files that match a shell pattern such as `imagenet/train-*`, sorted by path.
///
/// # Errors
/// A bucket URL, a malformed pattern, a directory that cannot be read, or no match at all.
pub fn glob(pattern: &str) -> Result<Vec<PathBuf>, Error> {
    check_local(pattern)?;
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

/// CRC-32C (Castagnoli) of some bytes: finds what a disk has damaged, and withstands nobody.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// Refuses the URL of an object store.
///
/// # Errors
/// If it is one.
pub fn check_local(path: &str) -> Result<(), Error> {
    let schemes = ["gs://", "s3://", "az://"];
    match schemes.iter().any(|scheme| path.starts_with(scheme)) {
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
    fn glob_refuses_buckets_for_now() {
        for url in ["gs://b/train-*", "s3://b/train-*", "az://b/train-*"] {
            let error = glob(url).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }));
            assert!(error.to_string().starts_with(url), "{error}");
        }
    }

    #[test]
    fn glob_reports_a_malformed_pattern() {
        let error = glob("train-[0").unwrap_err().to_string();
        assert!(error.starts_with("train-[0: character 7: "), "{error}");
    }
}
