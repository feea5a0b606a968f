use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::{Flock, FlockOffsetType, FlockType, fcntl_getlk};

use crate::Error;

/// The right to write to a directory, held until dropped.
///
/// It is an advisory lock of the operating system on the file `.lock`, so a process that dies gives it back,
/// whatever it died of; the file itself stays and means nothing.
///
/// There are two locks on the file. `flock` is the lease. The other, of `fcntl`, only shows that it is held, because
/// one of its kind can be asked about without being taken.
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

impl Lease {
    /// Takes the lease of an existing directory without waiting.
    ///
    /// # Errors
    /// [`Error::Held`] if anyone else has it; otherwise the lock file cannot be made.
    pub fn take(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => {
                // Where a file system has no such locks, a run that is alive is not seen to be.
                let _ = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
                Ok(Self { _file: file })
            }
            Err(TryLockError::WouldBlock) => Err(Error::Held { dir: dir.into() }),
            Err(TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
        }
    }

    /// Whether another process has the lease of a directory. Nothing is taken, not even for a moment, and nothing
    /// written: who wants the lease is never in the way of who looks.
    pub fn is_held(dir: &Path) -> bool {
        let Ok(file) = File::open(dir.join(".lock")) else {
            return false;
        };
        let whole = Flock {
            start: 0,
            length: 0,
            pid: None,
            typ: FlockType::WriteLock,
            offset_type: FlockOffsetType::Set,
        };
        matches!(fcntl_getlk(&file, &whole), Ok(Some(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lease_names_the_directory_and_a_dropped_one_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let lease = Lease::take(dir.path()).unwrap();
        let error = Lease::take(dir.path()).unwrap_err();
        assert!(matches!(&error, Error::Held { dir: held } if held == dir.path()));
        assert!(error.to_string().contains("\nhint: "));
        drop(lease);
        Lease::take(dir.path()).unwrap();
    }

    #[test]
    fn the_directory_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        let error = Lease::take(&dir.path().join("absent")).unwrap_err();
        assert!(matches!(error, Error::Io { action: "open", .. }));
    }
}
