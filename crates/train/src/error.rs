//! Why a run cannot go on.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a run cannot start or go on.
#[derive(Debug)]
pub enum Error {
    /// The input.
    Data(data::Error),
    /// A file of the run.
    Store(store::Error),
    /// The device.
    Engine(engine::Error),
    /// The operating system refused.
    Io {
        /// The verb that failed.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no checkpoint.
    NoCheckpoint {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file that is not a whole checkpoint.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A checkpoint of a later version of this program.
    Format {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The latest that can be read.
        known: u32,
    },
    /// A run directory or checkpoint of a run that computes something else.
    Different {
        /// Which.
        path: PathBuf,
        /// Key, value there and value here.
        keys: Vec<(String, String, String)>,
    },
    /// No image could be scored.
    NothingScored,
    /// The loss or a parameter is not finite, or the loss is too large.
    Diverged {
        /// The update after which.
        step: u64,
        /// What is wrong.
        what: String,
        /// How often the run had gone back to a checkpoint before.
        rewinds: u64,
    },
    /// No shards are found.
    Shards {
        /// The key that names them.
        key: &'static str,
        /// Why.
        source: store::Error,
    },
    /// The shards hold another number of examples than the spec says.
    Examples {
        /// The key of the number.
        key: &'static str,
        /// The spec's number.
        expected: u64,
        /// The shards'.
        found: u64,
        /// The pattern that names them.
        pattern: String,
        /// How many it matches.
        shards: usize,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.into(),
            source,
        }
    }
}

impl Error {
    /// Whether the input data is to blame, and not the run or the machine.
    pub fn is_of_input(&self) -> bool {
        match self {
            Error::Data(
                data::Error::Threads(_)
                | data::Error::Memory { .. }
                | data::Error::IndexHeld { .. },
            ) => false,
            // The network, not the data: the run can go on where it stopped.
            Error::Data(data::Error::Store(store::Error::Bucket { .. }))
            | Error::Shards {
                source: store::Error::Bucket { .. },
                ..
            } => false,
            Error::Data(_)
            | Error::Shards { .. }
            | Error::Examples { .. }
            | Error::NothingScored => true,
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Data(e) => e.fmt(f),
            Error::Store(e) => e.fmt(f),
            Error::Engine(e) => e.fmt(f),
            Error::Io {
                action,
                path,
                source,
            } => write!(f, "{}: cannot {action}: {source}", path.display()),
            Error::NoCheckpoint { path } => write!(
                f,
                "{}: no checkpoint here\n\
                 hint: name a run directory, a .safetensors file, or a run's checkpoints/latest or checkpoints/best",
                path.display()
            ),
            Error::Damaged { path, what } => write!(
                f,
                "{}: not a whole checkpoint: {what}\nhint: started again, its run puts the file aside and goes on from the one before",
                path.display()
            ),
            Error::Format { path, found, known } => write!(
                f,
                "{}: checkpoint of format {found}, this program reads up to {known}\nhint: use a newer runner",
                path.display()
            ),
            Error::Different { path, keys } => {
                write!(
                    f,
                    "{}: holds a run that computes something else",
                    path.display()
                )?;
                for (key, there, here) in keys {
                    write!(f, "\n  {key} is {there} there and {here} here")?;
                }
                write!(
                    f,
                    "\nhint: give this run another name (--set name=...), go on with the values there, \
                     or put the old run aside with --fresh"
                )
            }
            Error::NothingScored => write!(
                f,
                "the evaluation set has no readable image\nhint: see data.eval and data.max_bad_records"
            ),
            Error::Diverged {
                step,
                what,
                rewinds,
            } => {
                write!(f, "{what} after step {step}; ")?;
                match rewinds {
                    0 => write!(f, "the last checkpoint is from before")?,
                    1 => write!(f, "the run had gone back to a checkpoint once before")?,
                    n => write!(f, "the run had gone back to a checkpoint {n} times before")?,
                }
                write!(
                    f,
                    "\nhint: try a lower schedule.base_lr or a longer schedule.warmup, under another name or with --fresh"
                )
            }
            Error::Shards { key, source } => write!(f, "{key}: {source}"),
            Error::Examples {
                key,
                expected,
                found,
                pattern,
                shards,
            } => {
                let files = if *shards == 1 { "file" } else { "files" };
                write!(
                    f,
                    "{key} is {expected}, but {pattern} holds {found}, in {shards} {files}\n\
                     hint: if no file is missing and none is too many, set {key} = {found} or leave it out"
                )
            }
        }
    }
}

impl std::error::Error for Error {}

impl From<data::Error> for Error {
    fn from(e: data::Error) -> Self {
        Error::Data(e)
    }
}

impl From<store::Error> for Error {
    fn from(e: store::Error) -> Self {
        Error::Store(e)
    }
}

impl From<engine::Error> for Error {
    fn from(e: engine::Error) -> Self {
        Error::Engine(e)
    }
}
