//! Samples become images and their labels.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use store::tfrecord::Record;

use crate::augment::augment;
use crate::crop::{self, Rect};
use crate::error::Reason;
use crate::example::{self, Example};
use crate::index::Index;
use crate::jpeg::Like;
use crate::jpeg::fast::{self, Job, Photo, Photos, Seek, Target};
use crate::order::{Content, Label, Sample};
use crate::random::{Purpose, Random};
use crate::{Config, Crop, Decode, Pixels, Resize, Source};
use crate::{folder, picture, resize};

/// Whether crops and flips are drawn or the middle is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Train,
    Eval,
}

/// The place of one image in a batch.
pub(crate) enum Slot<'a> {
    U8(&'a mut [u8]),
    F32(&'a mut [f32]),
}

impl Slot<'_> {
    fn blacken(&mut self) {
        match self {
            Self::U8(pixels) => pixels.fill(0),
            Self::F32(pixels) => pixels.fill(0.0),
        }
    }
}

impl Pixels {
    /// Black images of this many values in all, of the type that the configuration gives.
    pub(crate) fn new(config: &Config, values: usize) -> Self {
        match (&config.source, config.resize) {
            (Source::Shards { .. } | Source::Folder(_), Resize::Tf | Resize::Tf1) => {
                Self::F32(vec![0.0; values])
            }
            _ => Self::U8(vec![0; values]),
        }
    }

    /// So many values, whatever they are, in the same memory if it is of the configuration's type.
    pub(crate) fn again(self, config: &Config, values: usize) -> Self {
        match (self, Self::new(config, 0)) {
            (Self::U8(mut p), Self::U8(_)) => {
                p.resize(values, 0);
                Self::U8(p)
            }
            (Self::F32(mut p), Self::F32(_)) => {
                p.resize(values, 0.0);
                Self::F32(p)
            }
            _ => Self::new(config, values),
        }
    }

    /// Size of a whole batch.
    pub(crate) fn bytes(config: &Config) -> usize {
        let value = match Self::new(config, 0) {
            Self::U8(_) => size_of::<u8>(),
            Self::F32(_) => size_of::<f32>(),
        };
        config.batch_size * 3 * config.resolution.pow(2) * value
    }

    /// The images from the `first` on, of `len` values each.
    pub(crate) fn slots(&mut self, len: usize, first: usize) -> Vec<Slot<'_>> {
        match self {
            Self::U8(p) => p[first * len..]
                .chunks_exact_mut(len)
                .map(Slot::U8)
                .collect(),
            Self::F32(p) => p[first * len..]
                .chunks_exact_mut(len)
                .map(Slot::F32)
                .collect(),
        }
    }

    /// Moves the image at `from` to `to`.
    pub(crate) fn shift(&mut self, len: usize, from: usize, to: usize) {
        let range = from * len..(from + 1) * len;
        match self {
            Self::U8(p) => p.copy_within(range, to * len),
            Self::F32(p) => p.copy_within(range, to * len),
        }
    }

    /// Keeps the first images.
    pub(crate) fn truncate(&mut self, len: usize, images: usize) {
        match self {
            Self::U8(p) => p.truncate(images * len),
            Self::F32(p) => p.truncate(images * len),
        }
    }
}

/// What came of a sample, apart from its pixels.
pub(crate) struct Made {
    pub(crate) label: u32,
    /// Where its image can be entered, if that was not known before.
    pub(crate) noted: Option<Vec<u8>>,
}

impl From<u32> for Made {
    fn from(label: u32) -> Self {
        Self { label, noted: None }
    }
}

/// An image to be made.
struct Task<'a> {
    label: u32,
    encoded: &'a [u8],
    seek: Seek<'a>,
    /// Draws its crop, and what is changed of its pixels.
    random: [Random; 2],
    slot: Slot<'a>,
}

/// Time that the fast decoder had no part in.
pub(crate) struct Spent {
    /// Checksums, and the walk to the image.
    pub(crate) parse: Duration,
    /// The exact decoder, from header to pixels.
    pub(crate) exact: Duration,
}

/// What a sample comes to.
enum Opened<'a> {
    Made(Made),
    Task(Task<'a>),
}

/// Writes the images of samples into their slots as they come; says of each number what came of it. The slot of a sample
/// that is bad holds nothing that means anything.
pub(crate) fn decode<'a>(
    config: &Config,
    mode: Mode,
    samples: impl FnMut() -> Option<(usize, &'a Sample, Slot<'a>)>,
    done: impl FnMut(usize, Result<Made, Reason>),
) {
    FAST.with_borrow_mut(|decoder| decode_with(decoder, config, mode, samples, done));
}

/// The same with this decoder; says what was spent beside it.
pub(crate) fn decode_with<'a>(
    decoder: &mut fast::Decoder,
    config: &Config,
    mode: Mode,
    mut samples: impl FnMut() -> Option<(usize, &'a Sample, Slot<'a>)>,
    done: impl FnMut(usize, Result<Made, Reason>),
) -> Spent {
    let mut parse = Duration::ZERO;
    let next = || {
        let (number, sample, slot) = samples()?;
        let start = Instant::now();
        let opened = open(config, mode, sample, slot);
        parse += start.elapsed();
        Some((number, opened))
    };
    let mut images = Images {
        config,
        mode,
        next,
        done,
        exact: Duration::ZERO,
    };
    decoder.decode(&mut images);
    let exact = images.exact;
    Spent { parse, exact }
}

fn open<'a>(
    config: &Config,
    mode: Mode,
    sample: &'a Sample,
    mut slot: Slot<'a>,
) -> Result<Opened<'a>, Reason> {
    let task = |label, encoded, seek, (shard, record): (_, &Record), slot| {
        let random = draws(config, sample.epoch, shard, record);
        Ok(Opened::Task(Task {
            label,
            encoded,
            seek,
            random,
            slot,
        }))
    };
    match &sample.content {
        Content::Zeros => {
            slot.blacken();
            Ok(Opened::Made(0.into()))
        }
        Content::Fake { index } => {
            let purpose = Purpose::Fake {
                index: *index,
                is_eval: mode == Mode::Eval,
            };
            // The same in every epoch, as a dataset is.
            let mut random = Random::new(config.seed, 0, purpose);
            let label = random.below(config.classes as u64) as u32;
            match slot {
                Slot::U8(pixels) => random.fill(pixels),
                Slot::F32(_) => unreachable!("noise is made in u8"),
            }
            Ok(Opened::Made(label.into()))
        }
        Content::Record(found) => {
            let (example, label) = parsed(config, &found.record, &found.label)?;
            let notes =
                || mode == Mode::Train && config.index.as_ref().is_some_and(Index::is_writable);
            let seek = match &found.points {
                Some(points) => Seek::Points(points),
                None if notes() => Seek::Note,
                None => Seek::Start,
            };
            let which = (found.shard, &found.record);
            task(label, example.encoded, seek, which, slot)
        }
        Content::File { class, record } => {
            let label = folder::label(*class, config.classes)?;
            task(label, &record.bytes, Seek::Start, (0, record), slot)
        }
    }
}

/// Images as they come, and what came of them.
struct Images<'c, N, D> {
    config: &'c Config,
    mode: Mode,
    next: N,
    done: D,
    /// What the exact decoder took.
    exact: Duration,
}

impl<'a, N, D> Images<'_, N, D>
where
    N: FnMut() -> Option<(usize, Result<Opened<'a>, Reason>)>,
    D: FnMut(usize, Result<Made, Reason>),
{
    /// Where the image cannot be made from a photo, the exact decoder makes it, which has the last word on errors.
    fn finish(
        &mut self,
        (number, mut task): (usize, Task<'a>),
        is_made: bool,
        noted: Option<Vec<u8>>,
    ) {
        let (config, mode) = (self.config, self.mode);
        let mut made = Ok(());
        if !is_made {
            let start = Instant::now();
            made = exact(config, mode, task.encoded, &task.random[0], &mut task.slot);
            self.exact += start.elapsed();
        }
        if made.is_ok() && mode == Mode::Train {
            let [_, random] = &mut task.random;
            augment(&config.augment, config.resolution, random, &mut task.slot);
        }
        let label = task.label;
        (self.done)(number, made.map(|()| Made { label, noted }));
    }
}

impl<'a, N, D> Photos<'a> for Images<'_, N, D>
where
    N: FnMut() -> Option<(usize, Result<Opened<'a>, Reason>)>,
    D: FnMut(usize, Result<Made, Reason>),
{
    type Of = (usize, Task<'a>);

    fn next(&mut self) -> Option<Job<'a, Self::Of>> {
        loop {
            let (number, opened) = (self.next)()?;
            match opened {
                Ok(Opened::Task(mut task)) => match photo(self.config, self.mode, &task) {
                    Some((photo, target)) => {
                        return Some(Job {
                            photo,
                            target: Some(target),
                            seek: std::mem::replace(&mut task.seek, Seek::Start),
                            of: (number, task),
                        });
                    }
                    None => self.finish((number, task), false, None),
                },
                Ok(Opened::Made(made)) => (self.done)(number, Ok(made)),
                Err(reason) => (self.done)(number, Err(reason)),
            }
        }
    }

    fn row(&mut self, (_, task): &mut Self::Of, y: usize, row: &[u8]) {
        match &mut task.slot {
            Slot::U8(out) => out[y * row.len()..][..row.len()].copy_from_slice(row),
            Slot::F32(out) => {
                for (out, &value) in out[y * row.len()..].iter_mut().zip(row) {
                    *out = f32::from(value);
                }
            }
        }
    }

    fn done(&mut self, of: Self::Of, is_whole: bool, noted: Option<Vec<u8>>) {
        self.finish(of, is_whole, noted);
    }
}

/// What becomes of an image file in training, twice side by side, as record `number`, and in evaluation.
#[cfg(fuzzing)]
pub fn fuzz(config: &Config, number: u64, file: &[u8]) {
    let record = |index| Record {
        offset: 0,
        index,
        bytes: vec![],
        crc: 0,
    };
    let len = 3 * config.resolution.pow(2);
    for mode in [Mode::Train, Mode::Eval] {
        let mut pixels = Pixels::new(config, 2 * len);
        let mut slots = pixels.slots(len, 0).into_iter().enumerate();
        let next = || {
            let (i, slot) = slots.next()?;
            let number = number.wrapping_add(i as u64);
            // Whatever the points are.
            let points = &file[..file.len().min(10 * (number & 255) as usize)];
            let seek = match number & 255 {
                0..64 => Seek::Start,
                64..128 => Seek::Note,
                _ => Seek::Points(points),
            };
            let task = Task {
                label: 0,
                encoded: file,
                seek,
                random: draws(config, 0, 0, &record(number)),
                slot,
            };
            Some((i, Ok(Opened::Task(task))))
        };
        let mut images = Images {
            config,
            mode,
            next,
            done: |_, _| (),
            exact: Duration::ZERO,
        };
        FAST.with_borrow_mut(|decoder| decoder.decode(&mut images));
    }
}

/// Writes an image file into its slot as an evaluation does.
pub(crate) fn image(config: &Config, file: &[u8], mut slot: Slot<'_>) -> Result<(), Reason> {
    // An evaluation draws nothing.
    let purpose = Purpose::Fake {
        index: 0,
        is_eval: true,
    };
    let random = Random::new(config.seed, 0, purpose);
    exact(config, Mode::Eval, file, &random, &mut slot)
}

/// The draws of a record in an epoch: for its crop, and for what is changed of its pixels.
fn draws(config: &Config, epoch: u64, shard: usize, record: &Record) -> [Random; 2] {
    let record = record.index;
    [
        Purpose::Augment { shard, record },
        Purpose::Change { shard, record },
    ]
    .map(|purpose| Random::new(config.seed, epoch, purpose))
}

/// What a record holds, and its class.
fn parsed<'a>(
    config: &Config,
    record: &'a Record,
    label: &Label,
) -> Result<(Example<'a>, u32), Reason> {
    let example = match label {
        Label::Inside if !record.verify() => return Err(Reason::Checksum),
        Label::Inside => example::parse(&record.bytes).map_err(Reason::Example)?,
        Label::Beside(label) => Example {
            encoded: &record.bytes,
            label: label.clone().map_err(Reason::Sample)?,
        },
    };
    let class = class(config, example.label)?;
    Ok((example, class))
}

/// What is seen of an image of this size, and whether left becomes right. Whoever decodes, the draws are the same.
fn view(config: &Config, mode: Mode, width: usize, height: usize, random: &Random) -> (Rect, bool) {
    let mut random = random.clone();
    let crop = match mode {
        Mode::Train => train_crop(config, width, height, &mut random),
        Mode::Eval => crop::centre(width, height, config.crop_ratio),
    };
    let flip = mode == Mode::Train && config.flip && random.below(2) == 1;
    (crop, flip)
}

/// What the fast decoder is to make of an image. None if that is not for it.
fn photo<'a>(config: &Config, mode: Mode, task: &Task<'a>) -> Option<(Photo<'a>, Target)> {
    if (mode, config.decode) != (Mode::Train, Decode::Fast) {
        return None;
    }
    let photo = Photo::open(task.encoded)?;
    let (width, height) = photo.size();
    let (crop, flip) = view(config, mode, width, height, &task.random[0]);
    let target = Target {
        crop,
        resize: config.resize,
        size: config.resolution,
        flip,
    };
    Some((photo, target))
}

/// Decodes, crops, resizes and flips exactly.
fn exact(
    config: &Config,
    mode: Mode,
    encoded: &[u8],
    random: &Random,
    slot: &mut Slot<'_>,
) -> Result<(), Reason> {
    let size = config.resolution;
    let like = match config.resize {
        Resize::Pillow => Like::Pillow,
        Resize::Tf | Resize::Tf1 => Like::TensorFlow,
    };
    let image = picture::decode(encoded, like).map_err(Reason::Image)?;
    let (rect, flip) = view(config, mode, image.width, image.height, random);
    match (config.resize, slot) {
        (Resize::Pillow, Slot::U8(out)) => resize::pillow(&image, rect, size, flip, out),
        (Resize::Tf, Slot::F32(out)) => resize::tf(&image, rect, size, flip, out),
        (Resize::Tf1, Slot::F32(out)) => resize::tf1(&image, rect, size, flip, out),
        _ => unreachable!("Pixels::new chose the type by the resize mode"),
    }
    Ok(())
}

thread_local! {
    /// Every thread that decodes has its own.
    static FAST: RefCell<fast::Decoder> = RefCell::new(fast::Decoder::new(fast::Level::detect()));
}

fn class(config: &Config, stored: i64) -> Result<u32, Reason> {
    let offset = match config.source {
        Source::Shards { label_offset, .. } => label_offset,
        Source::Folder(_) | Source::Fake { .. } | Source::Zeros { .. } => 0,
    };
    stored
        .checked_sub(offset)
        .and_then(|label| u32::try_from(label).ok())
        .filter(|&label| (label as usize) < config.classes)
        .ok_or(Reason::Label {
            stored,
            offset,
            classes: config.classes,
        })
}

fn train_crop(config: &Config, width: usize, height: usize, random: &mut Random) -> Rect {
    match config.crop {
        Crop::None => crop::centre(width, height, config.crop_ratio),
        Crop::Torchvision { area, aspect } => {
            crop::torchvision(width, height, area, aspect, random)
        }
        // The reference takes a crop of the whole image for a failed one, and the middle in its stead. (It fails to
        // notice with grey files and squashes them; we treat them as any other.)
        Crop::Tf { area, aspect } => match crop::tf(width, height, area, aspect, random) {
            rect if rect == Rect::whole(width, height) => {
                crop::centre(width, height, config.crop_ratio)
            }
            rect => rect,
        },
    }
}
