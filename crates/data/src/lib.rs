//! Records become batches: parse, decode, crop, resize, flip, order.
//!
//! [`train`] gives endless shuffled batches from a [`Cursor`] on, [`eval`] every image once in file order. The order is
//! a pure function of the seed, the epoch and the shards, and augmentation one of the seed, the epoch and the record;
//! so neither threads nor a resume can change a batch.
//!
//! This crate knows no tensors and does not normalise: pixels leave it in the range 0..255.

mod augment;
mod crop;
mod decode;
mod error;
mod example;
mod folder;
mod index;
mod jpeg;
mod loader;
mod made;
mod mix;
mod order;
mod picture;
mod random;
mod resize;
mod stages;
mod webdataset;

pub use augment::{Augment, Policy};
#[cfg(fuzzing)]
pub use decode::fuzz;
pub use error::{BadRecord, Error, Reason};
pub use folder::Folder;
pub use index::{Filled, Index};
pub use loader::{Loader, READ_AHEAD, eval, prepare, train};
pub use made::{Labelled, photo, rgb_jpeg};
pub use mix::{Mix, Mixed};
pub use order::Cursor;
pub use stages::{Stages, level, stages};

use std::fmt;
use std::panic;
use std::path::PathBuf;
use std::thread;

use store::Cache;

/// What batches are made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where samples come from.
    pub source: Source,
    /// Height and width of the images in a batch, in pixels.
    pub resolution: usize,
    /// Images in a batch.
    pub batch_size: usize,
    /// Decides order, crops, flips and noise.
    pub seed: u64,
    /// Labels are below it.
    pub classes: usize,
    /// How training crops.
    pub crop: Crop,
    /// How crops are brought to the resolution.
    pub resize: Resize,
    /// How training decodes JPEGs; evaluation is always exact.
    pub decode: Decode,
    /// Whether training mirrors every other image, at random.
    pub flip: bool,
    /// Side of the crop in the middle as a part of the shorter side; for evaluation and [`Crop::None`].
    pub crop_ratio: f64,
    /// Bad records that a loader may meet, each time it meets them, before it stops.
    pub max_bad_records: u64,
    /// Threads that decode; 0 for one per core.
    pub threads: usize,
    /// Where parts of shards in buckets are kept.
    pub cache: Option<Cache>,
    /// Where it is kept how images of shards can be entered, for [`Decode::Fast`].
    pub index: Option<Index>,
    /// What is done to training images after crop and flip.
    pub augment: Augment,
}

/// Where samples come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Files of many records, or such objects in buckets.
    Shards {
        /// What they are.
        format: Format,
        /// The files, or URLs of objects in buckets; their order does not matter: they are sorted by file name, those of one name by path.
        shards: Vec<PathBuf>,
        /// Subtracted from the stored label to give the class.
        label_offset: i64,
        /// Shards that training reads side by side, at most.
        lanes: usize,
        /// Consecutive records of a lane that training shuffles; a lane holds as many in memory.
        shuffle_window: usize,
    },
    /// A directory with one folder of image files for each class; the classes are the folders, sorted by name.
    Folder(Folder),
    /// Uniform noise with uniform labels, the same in every epoch, other noise in evaluation; made at the resolution,
    /// neither cropped nor flipped.
    Fake {
        /// Examples in an epoch.
        examples: u64,
    },
    /// Black images of class 0.
    Zeros {
        /// Examples in an epoch.
        examples: u64,
    },
}

/// What shards are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// TFRecord files of `tf.Example` with `image/encoded` (a JPEG, PNG or WebP file) and `image/class/label`.
    TfRecord,
    /// Rows of a table, each a `tf.Example` ([`store::bigtable`]).
    Bigtable,
    /// Tar archives in which `NAME.jpg` (or jpeg, png, webp) and `NAME.cls` (a whole number), next to each other, are a
    /// sample.
    WebDataset,
}

/// How training crops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    /// TensorFlow's sampler as the reference uses it: height and aspect uniform. A crop of the whole image becomes the
    /// crop of evaluation, as in the reference; there grey files are an exception, here they are not.
    Tf {
        /// Least and greatest area as a part of the image's. In effect the least is at least 0.1.
        area: [f64; 2],
        /// Least and greatest width / height.
        aspect: [f64; 2],
    },
    /// torchvision's `RandomResizedCrop`: area uniform, aspect log-uniform.
    Torchvision {
        /// Least and greatest area as a part of the image's.
        area: [f64; 2],
        /// Least and greatest width / height.
        aspect: [f64; 2],
    },
    /// The crop of evaluation.
    None,
}

/// How JPEGs are decoded and crops are brought to the resolution; all filters are bicubic, and they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// Pillow's and torchvision's: antialiased, rounded to 8 bits; JPEGs decode as in Pillow.
    Pillow,
    /// `tf.image.resize` of TensorFlow 2: not antialiased, f32, not clamped; JPEGs decode as in TensorFlow.
    Tf,
    /// `resize_bicubic` of TensorFlow 1, the reference's: as [`Resize::Tf`] with corner origin and a = -0.75.
    Tf1,
}

/// How JPEGs are decoded for training (docs/decisions/0009).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decode {
    /// Only what the crop needs, resampled before colours are converted; ordinary files only, the others exactly. For
    /// [`Resize::Tf`] and [`Resize::Tf1`] values are rounded to 8 bits and the inverse DCT is the accurate one.
    Fast,
    /// The whole image, to the bit as the library that [`Resize`] names.
    Exact,
}

/// Images as N H W C, RGB, in the range 0..255.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// From [`Resize::Pillow`], [`Source::Fake`] and [`Source::Zeros`].
    U8(Vec<u8>),
    /// From [`Resize::Tf`] and [`Resize::Tf1`]; fractions, and values a little outside the range, do occur.
    F32(Vec<f32>),
}

/// Images, labels and where the next batch starts. Only the last of an evaluation may hold no image: if nothing but bad
/// records was left.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The images.
    pub pixels: Pixels,
    /// Class of each image.
    pub labels: Vec<u32>,
    /// Position after this batch, for [`train`].
    pub cursor: Cursor,
    /// A line for each bad record that was met while this batch was made: shard, record, offset, reason.
    pub bad_records: Vec<String>,
    /// What went wrong that changes nothing in any batch.
    pub notes: Vec<String>,
    /// Where each image comes from.
    pub samples: Vec<SampleId>,
}

/// Which sample of the data an image is. [`describe`] names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SampleId {
    /// Index of the shard, in the order in which shards are sorted; 0 for made-up data.
    shard: usize,
    /// Number of the record in the shard, from 0; for noise the number of the example.
    record: u64,
}

/// Names samples, a line for each shard: its path and the numbers of the records, in order.
pub fn describe(config: &Config, samples: &[SampleId]) -> Vec<String> {
    let shards = match &config.source {
        Source::Shards { shards, .. } => sorted(shards),
        Source::Folder(folder) => {
            return folder.describe(samples.iter().map(|s| s.record));
        }
        Source::Fake { .. } | Source::Zeros { .. } => vec![],
    };
    let mut samples = samples.to_vec();
    samples.sort_unstable();
    let line = |of_one: &[SampleId]| {
        let records: Vec<String> = of_one.iter().map(|s| s.record.to_string()).collect();
        let place = match shards.get(of_one[0].shard) {
            Some(path) => path.display().to_string(),
            None => "made-up examples".into(),
        };
        format!("{place}: records {}", records.join(", "))
    };
    samples
        .chunk_by(|a, b| a.shard == b.shard)
        .map(line)
        .collect()
}

/// What a record holds: its image file and its label as stored.
///
/// # Errors
/// It is no `tf.Example` with an image and a label.
pub fn parse(record: &[u8]) -> Result<(&[u8], i64), Reason> {
    let example = example::parse(record).map_err(Reason::Example)?;
    Ok((example.encoded, example.label))
}

/// Decodes a whole image file (JPEG, PNG, WebP) as Pillow does and gives its width and height.
///
/// # Errors
/// It cannot be decoded.
pub fn inspect(file: &[u8]) -> Result<(usize, usize), Reason> {
    let image = picture::decode(file, jpeg::Like::Pillow).map_err(Reason::Image)?;
    Ok((image.width, image.height))
}

/// Counts the records of all shards by walking their headers. Objects have to be read for it, unless the cache knows.
///
/// # Errors
/// A shard cannot be read or is damaged.
pub fn count(format: Format, shards: &[PathBuf], cache: Option<&Cache>) -> Result<u64, Error> {
    let count = |shard: &PathBuf| match format {
        Format::TfRecord => store::tfrecord::count(shard, cache).map_err(Error::from),
        Format::Bigtable => store::length(shard).map_err(Error::from),
        Format::WebDataset => webdataset::count(shard, cache),
    };
    // Requests take their time, so they are made side by side.
    let side_by_side = match shards.iter().any(store::is_url) {
        true => 16,
        false => 1,
    };
    let mut total = 0;
    for shards in shards.chunks(side_by_side) {
        if let [only] = shards {
            total += count(only)?;
            continue;
        }
        let counts: Vec<_> = thread::scope(|scope| {
            let counting: Vec<_> = shards
                .iter()
                .map(|shard| scope.spawn(move || count(shard)))
                .collect();
            counting.into_iter().map(|thread| thread.join()).collect()
        });
        for count in counts {
            total += count.unwrap_or_else(|payload| panic::resume_unwind(payload))?;
        }
    }
    Ok(total)
}

/// Sixteen hexadecimal digits that stand for the names and lengths of the shards in the order in which they are read,
/// whatever their directory and the order of the list.
///
/// # Errors
/// A shard's length cannot be read.
pub fn fingerprint(shards: &[PathBuf]) -> Result<String, Error> {
    let mut hash = Fingerprint::default();
    for shard in sorted(shards) {
        let name = shard.file_name().unwrap_or_default().to_string_lossy();
        hash.add(&format!("{name} {}\n", store::length(&shard)?));
    }
    Ok(hash.to_string())
}

/// FNV-1a: it has to notice changes, not to withstand anyone.
struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    fn add(&mut self, text: &str) {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// By file name, so that a directory may be renamed or moved; shards of the same name by path.
fn sorted(shards: &[PathBuf]) -> Vec<PathBuf> {
    let mut sorted = shards.to_vec();
    sorted.sort_by(|a, b| (a.file_name(), a).cmp(&(b.file_name(), b)));
    sorted
}
