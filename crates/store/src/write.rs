use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use crate::Error;

/// Writes the parts one after another as one file, or leaves what was there.
///
/// The bytes go to `.NAME.tmp` in the same directory, which is fsynced and renamed; then the directory is fsynced.
/// A reader sees the old file or the new one, after a power cut too. A leftover `.NAME.tmp` is overwritten. An object in a
/// bucket, which a URL names in place of a path, is replaced as a whole by its store.
///
/// # Errors
/// The file cannot be written, for example because the directory does not exist or the disk is full.
pub fn write_atomic(path: &Path, parts: &[&[u8]]) -> Result<(), Error> {
    if crate::is_url(path) {
        return crate::bucket::put(path, parts);
    }
    let name = path
        .file_name()
        .ok_or_else(|| Error::io("write", path, io::ErrorKind::InvalidFilename.into()))?;
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".tmp");
    let temporary = dir.join(hidden);
    replace(&temporary, path, parts).map_err(|e| {
        // On a full disk half a file would take what others need; if it cannot go, the next write is over it.
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path, e)
    })?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io("sync", dir, e))
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the one place where files are made and renamed"
)]
fn replace(temporary: &Path, path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    for part in parts {
        file.write_all(part)?;
    }
    file.sync_all()?;
    std::fs::rename(temporary, path)
}

/// Writes the parts as one file that no reader sees half of; after a power cut it may be damaged.
#[expect(clippy::disallowed_methods, reason = "as above")]
pub(crate) fn write_beside(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    // Processes that write the same file at a time do not meet in the temporary one.
    let temporary = path.with_added_extension(format!("{}.tmp", std::process::id()));
    let mut file = File::create(&temporary)?;
    for part in parts {
        file.write_all(part)?;
    }
    std::fs::rename(temporary, path)
}

/// Gives a file or directory another name.
///
/// # Errors
/// The operating system refuses.
#[expect(clippy::disallowed_methods, reason = "as above")]
pub fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    std::fs::rename(from, to).map_err(|e| Error::io("rename", from, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn parts_are_joined_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, &[b"one", b"", b"two"]).unwrap();
        write_atomic(&path, &[b"three"]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_leftover_temporary_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&dir.path().join(".a.tmp"), &[b"half of a long file"]).unwrap();
        write_atomic(&path, &[b"whole"]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, &[b"old"]).unwrap();
        std::fs::create_dir(dir.path().join(".a.tmp")).unwrap();
        let error = write_atomic(&path, &[b"new"]).unwrap_err();
        assert!(matches!(
            error,
            Error::Io {
                action: "write",
                ..
            }
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    /// A reader that opens the file again and again while it is replaced sees only whole files.
    #[test]
    fn no_half_file_is_ever_visible() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let whole = |byte: u8| vec![byte; 1 << 18];
        write_atomic(&path, &[&whole(0)]).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for byte in 1..20 {
                    let bytes = whole(byte);
                    let (head, tail) = bytes.split_at(1000);
                    write_atomic(&path, &[head, tail]).unwrap();
                }
            });
            while !writer.is_finished() {
                let seen = std::fs::read(&path).unwrap();
                assert_eq!(seen, whole(seen[0]));
            }
        });
    }

    #[test]
    fn a_path_without_a_name_is_an_error() {
        assert!(write_atomic(Path::new("/"), &[]).is_err());
    }
}
