use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong between a path and its bytes.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused.
    Io {
        /// The verb that failed: `open`, `read`, `write`, ...
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bytes of a shard are not TFRecord framing, or no tar archive.
    Corrupt {
        /// The shard.
        path: PathBuf,
        /// Where the record starts, in bytes.
        offset: u64,
        /// Its index in the shard, from 0.
        record: u64,
        /// What is wrong.
        what: String,
    },
    /// A pattern that matches no file.
    NoMatch {
        /// The pattern.
        pattern: String,
    },
    /// A malformed pattern.
    Pattern {
        /// The pattern.
        pattern: String,
        /// Index of the offending character, from 0.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// An object store did not answer as it should.
    Bucket {
        /// The verb that failed: `open`, `read`, `list the objects`.
        action: &'static str,
        /// The object or pattern.
        url: String,
        /// What it said.
        what: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A URL of an object store, where only a path will do.
    Unsupported {
        /// The URL.
        url: String,
    },
    /// Another process writes to the directory.
    Held {
        /// The directory.
        dir: PathBuf,
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

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io {
                action,
                path,
                source,
            } => write!(f, "{}: cannot {action}: {source}", path.display()),
            Self::Corrupt {
                path,
                offset,
                record,
                what,
            } => write!(
                f,
                "{}: record {record} at byte {offset}: {what}\n\
                 hint: the file is damaged or of another kind than data.source says; copy or convert it again",
                path.display()
            ),
            Self::NoMatch { pattern } => {
                if crate::bigtable::is_url(pattern) {
                    return write!(
                        f,
                        "{pattern}: no row's key begins so, or none has the column\n\
                         hint: runner data load-bigtable writes tfexample:example; ?column=FAMILY:QUALIFIER names another"
                    );
                }
                if crate::is_url(pattern) {
                    return write!(
                        f,
                        "{pattern}: no object matches\n\
                         hint: a pattern names objects, and * matches no slash: `gs://bucket/dir/train-*`"
                    );
                }
                write!(f, "{pattern}: no file matches")?;
                if Path::new(pattern).is_relative() {
                    write!(
                        f,
                        "\nhint: a relative pattern starts at the working directory"
                    )
                } else {
                    write!(
                        f,
                        "\nhint: a pattern names files, for example `/data/train-*`"
                    )
                }
            }
            Self::Pattern { pattern, at, what } => {
                write!(
                    f,
                    "{pattern}: character {}: {what}\n\
                     hint: * stands for any characters, ? for one, [ab] for a or b, and [[] for a bracket itself",
                    at + 1
                )
            }
            Self::Unsupported { url } => write!(
                f,
                "{url}: object stores are not supported here\n\
                 hint: copy the files to a local directory and name that"
            ),
            Self::Bucket {
                action,
                url,
                what,
                hint,
            } => write!(f, "{url}: cannot {action}: {what}\nhint: {hint}"),
            Self::Held { dir } => write!(
                f,
                "{}: another process is writing to this directory\n\
                 hint: wait for it, stop it, or choose another name for this run",
                dir.display()
            ),
        }
    }
}

// The message of an I/O error already holds its cause, so `source()` stays empty.
impl std::error::Error for Error {}
