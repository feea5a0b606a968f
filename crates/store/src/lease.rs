use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use crate::Error;

/// The right to write to a directory, held until dropped.
///
/// It is an advisory lock of the operating system on the file `.lock`, so a process that dies gives it back,
/// whatever it died of; the file itself stays and means nothing.
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
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Held { dir: dir.into() }),
            Err(TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
        }
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
