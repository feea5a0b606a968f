use std::fmt;
use std::path::PathBuf;

/// Why no more batches come.
#[derive(Debug)]
pub enum Error {
    /// A value of [`Config`](crate::Config) that cannot work.
    Config(&'static str),
    /// A shard cannot be read, or is damaged in a way that hides where its next record starts.
    Store(store::Error),
    /// A record that cannot be used, beyond those that `max_bad_records` lets pass.
    Record(BadRecord),
    /// The dataset is empty.
    NoRecords {
        /// The shards that hold no records; none for a made-up dataset.
        shards: Vec<PathBuf>,
    },
    /// Something in a directory of classes that is no image of a class.
    Misplaced {
        /// The file or directory.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A cursor that belongs to other shards or another configuration.
    Cursor(String),
    /// Another process adds to the index in this directory.
    IndexHeld {
        /// The directory.
        dir: PathBuf,
    },
    /// The operating system gives no more threads.
    Threads(String),
    /// The operating system gives no memory for a batch.
    Memory {
        /// Size of the batch.
        bytes: usize,
    },
}

/// A record that cannot be used.
#[derive(Debug)]
pub struct BadRecord {
    /// The shard.
    pub shard: PathBuf,
    /// Index of the record in the shard, from 0.
    pub record: u64,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// What is wrong with it.
    pub reason: Reason,
    /// Bad records that the loader has met so far, this one included.
    pub bad: u64,
    /// `max_bad_records`.
    pub allowed: u64,
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The payload's checksum does not match.
    Checksum,
    /// The payload is no `tf.Example` with an image and a label.
    Example(String),
    /// The files of a name are no image and its label.
    Sample(String),
    /// The label is outside 0..classes.
    Label {
        /// As stored.
        stored: i64,
        /// What is subtracted from it.
        offset: i64,
        /// Number of classes.
        classes: usize,
    },
    /// The image cannot be decoded.
    Image(String),
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        Self::Store(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(what) => f.write_str(what),
            Self::Store(error) => error.fmt(f),
            Self::Record(record) => {
                let mend = match record.reason {
                    Reason::Checksum => "the shard is damaged: copy or convert it again",
                    Reason::Example(_) => {
                        "every record needs an image in image/encoded and a whole number in image/class/label"
                    }
                    Reason::Sample(_) => {
                        "every sample needs NAME.jpg (or jpeg, png, webp) and NAME.cls, next to each other"
                    }
                    Reason::Label { .. } => "check model.classes and data.label_offset",
                    Reason::Image(_) => "only whole JPEG, PNG and WebP files can be read",
                };
                write!(
                    f,
                    "{record}\nhint: {mend}; or let such records pass with a larger data.max_bad_records"
                )
            }
            Self::IndexHeld { dir } => write!(
                f,
                "{}: another process adds to this index\nhint: wait for it, or name another directory",
                dir.display()
            ),
            Self::NoRecords { shards } => {
                match &shards[..] {
                    [] => return f.write_str("the dataset holds no examples"),
                    [only] => write!(f, "{}: the shard holds no records", only.display())?,
                    [first, rest @ ..] => write!(
                        f,
                        "{} and {} more: the shards hold no records",
                        first.display(),
                        rest.len()
                    )?,
                }
                f.write_str("\nhint: copy or convert again, or name other shards in data.train or data.eval")
            }
            Self::Misplaced { path, what } => write!(
                f,
                "{}: {what}\n\
                 hint: a folder source holds DIR/CLASS/FILE and nothing else; names that begin with a dot are ignored",
                path.display()
            ),
            Self::Cursor(what) => write!(
                f,
                "the saved position does not fit the data: {what}\n\
                 hint: the shards, data.lanes or data.shuffle_window have changed; start another run"
            ),
            Self::Threads(what) => {
                write!(
                    f,
                    "cannot start threads: {what}\nhint: train.threads says how many decode"
                )
            }
            Self::Memory { bytes } => write!(
                f,
                "no memory for a batch of {} MiB\n\
                 hint: a smaller train.batch_size or model.resolution needs less; runner plan says how much",
                bytes >> 20
            ),
        }
    }
}

impl fmt::Display for BadRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            shard,
            record,
            offset,
            reason,
            bad,
            allowed,
        } = self;
        let shard = shard.display();
        write!(f, "{shard}: record {record} at byte {offset}: {reason}")?;
        if *allowed > 0 {
            write!(f, " (bad record {bad}, of {allowed} allowed)")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checksum => f.write_str("the checksum of the payload is wrong"),
            Self::Example(what) => write!(f, "not a usable tf.Example: {what}"),
            Self::Sample(what) => write!(f, "not a usable sample: {what}"),
            Self::Label {
                stored,
                offset,
                classes,
            } => write!(
                f,
                "the stored label {stored} less the offset {offset} is no class from 0 to {}",
                classes - 1
            ),
            Self::Image(what) => write!(f, "the image cannot be decoded: {what}"),
        }
    }
}

// Messages already hold their causes, so `source()` stays empty.
impl std::error::Error for Error {}
