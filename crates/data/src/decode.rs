//! One sample becomes one image and its label.

use std::cell::RefCell;

use store::tfrecord::Record;

use crate::augment::augment;
use crate::crop::{self, Rect};
use crate::error::Reason;
use crate::example::{self, Example};
use crate::index::Index;
use crate::jpeg::Like;
use crate::jpeg::fast::{self, Photo, Seek, Target};
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

/// Writes the image into its slot, which is black.
pub(crate) fn decode(
    config: &Config,
    mode: Mode,
    sample: &Sample,
    slot: Slot<'_>,
) -> Result<Made, Reason> {
    match &sample.content {
        Content::Zeros => Ok(0.into()),
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
            Ok(label.into())
        }
        Content::Record(found) => {
            let (example, label) = parsed(config, &found.record, &found.label)?;
            let mut noted = None;
            let notes =
                || mode == Mode::Train && config.index.as_ref().is_some_and(Index::is_writable);
            let seek = match &found.points {
                Some(points) => Seek::Points(points),
                None if notes() => Seek::Note(&mut noted),
                None => Seek::Start,
            };
            let which = (found.shard, &found.record);
            draw(
                config,
                mode,
                sample.epoch,
                which,
                (example.encoded, seek),
                slot,
            )?;
            Ok(Made { label, noted })
        }
        Content::File { class, record } => {
            let label = folder::label(*class, config.classes)?;
            let image = (&record.bytes[..], Seek::Start);
            draw(config, mode, sample.epoch, (0, record), image, slot)?;
            Ok(label.into())
        }
    }
}

/// Makes the image of a record, which with its shard says what is drawn.
fn draw(
    config: &Config,
    mode: Mode,
    epoch: u64,
    (shard, record): (usize, &Record),
    image: (&[u8], Seek<'_>),
    mut slot: Slot<'_>,
) -> Result<(), Reason> {
    let random = augmentation(config, epoch, shard, record);
    FAST.with_borrow_mut(|decoder| render(config, mode, image, &random, &mut slot, decoder))?;
    if mode == Mode::Train {
        let record = record.index;
        let mut random = Random::new(config.seed, epoch, Purpose::Change { shard, record });
        augment(&config.augment, config.resolution, &mut random, &mut slot);
    }
    Ok(())
}

/// What becomes of an image file in training, as record `number`, and in evaluation.
#[cfg(fuzzing)]
pub fn fuzz(config: &Config, number: u64, file: &[u8]) {
    let record = Record {
        offset: 0,
        index: number,
        bytes: vec![],
        crc: 0,
    };
    let len = 3 * config.resolution.pow(2);
    for mode in [Mode::Train, Mode::Eval] {
        let mut pixels = Pixels::new(config, len);
        for slot in pixels.slots(len, 0) {
            // Whatever the points are.
            let points = &file[..file.len().min(10 * number as usize)];
            let seek = match number {
                0..128 => Seek::Start,
                _ => Seek::Points(points),
            };
            let _ = draw(config, mode, 0, (0, &record), (file, seek), slot);
        }
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
    FAST.with_borrow_mut(|decoder| {
        let image = (file, Seek::Start);
        render(config, Mode::Eval, image, &random, &mut slot, decoder).map(|_| ())
    })
}

/// The draws of a record in an epoch.
pub(crate) fn augmentation(config: &Config, epoch: u64, shard: usize, record: &Record) -> Random {
    let record = record.index;
    Random::new(config.seed, epoch, Purpose::Augment { shard, record })
}

/// What a record holds, and its class.
pub(crate) fn parsed<'a>(
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

/// Decodes, crops, resizes and flips; says whether the fast decoder did it.
pub(crate) fn render(
    config: &Config,
    mode: Mode,
    (encoded, seek): (&[u8], Seek<'_>),
    random: &Random,
    slot: &mut Slot<'_>,
    decoder: &mut fast::Decoder,
) -> Result<bool, Reason> {
    // Whoever decodes, the draws are the same.
    let view = |width, height| {
        let mut random = random.clone();
        let crop = match mode {
            Mode::Train => train_crop(config, width, height, &mut random),
            Mode::Eval => crop::centre(width, height, config.crop_ratio),
        };
        let flip = mode == Mode::Train && config.flip && random.below(2) == 1;
        (crop, flip)
    };
    let size = config.resolution;
    if (mode, config.decode) == (Mode::Train, Decode::Fast)
        && let Some(photo) = Photo::open(encoded)
    {
        let (width, height) = photo.size();
        let (crop, flip) = view(width, height);
        let resize = config.resize;
        let target = Target {
            crop,
            resize,
            size,
            flip,
        };
        let is_done = match slot {
            Slot::U8(out) => decoder.decode(&photo, &target, seek, |y, row| {
                out[y * row.len()..][..row.len()].copy_from_slice(row);
            }),
            Slot::F32(out) => decoder.decode(&photo, &target, seek, |y, row| {
                for (out, &value) in out[y * row.len()..].iter_mut().zip(row) {
                    *out = f32::from(value);
                }
            }),
        };
        if is_done {
            return Ok(true);
        }
    }
    // What is odd or damaged comes here too: this decoder has the last word on errors.
    let like = match config.resize {
        Resize::Pillow => Like::Pillow,
        Resize::Tf | Resize::Tf1 => Like::TensorFlow,
    };
    let image = picture::decode(encoded, like).map_err(Reason::Image)?;
    let (rect, flip) = view(image.width, image.height);
    match (config.resize, slot) {
        (Resize::Pillow, Slot::U8(out)) => resize::pillow(&image, rect, size, flip, out),
        (Resize::Tf, Slot::F32(out)) => resize::tf(&image, rect, size, flip, out),
        (Resize::Tf1, Slot::F32(out)) => resize::tf1(&image, rect, size, flip, out),
        _ => unreachable!("Pixels::new chose the type by the resize mode"),
    }
    Ok(false)
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
