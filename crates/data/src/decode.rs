//! One sample becomes one image and its label.

use std::cell::RefCell;

use store::tfrecord::Record;

use crate::augment::augment;
use crate::crop::{self, Rect};
use crate::error::Reason;
use crate::example::{self, Example};
use crate::index::Index;
use crate::jpeg::Like;
use crate::jpeg::fast::{self, Job, Photo, Seek, Target};
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

/// An image file, and what is to become of it.
pub(crate) struct Draw<'a> {
    pub(crate) encoded: &'a [u8],
    /// Where it can be entered, if that is known.
    pub(crate) points: Option<&'a [u8]>,
    /// Of crop and flip.
    pub(crate) random: Random,
    /// Of what comes after them.
    pub(crate) change: Random,
    /// Black.
    pub(crate) slot: Slot<'a>,
}

impl<'a> Draw<'a> {
    /// Of a record, which with its shard says what is drawn.
    pub(crate) fn new(
        config: &Config,
        epoch: u64,
        (shard, record): (usize, &Record),
        encoded: &'a [u8],
        slot: Slot<'a>,
    ) -> Self {
        let record = record.index;
        let random = |purpose| Random::new(config.seed, epoch, purpose);
        Self {
            encoded,
            points: None,
            random: random(Purpose::Augment { shard, record }),
            change: random(Purpose::Change { shard, record }),
            slot,
        }
    }
}

/// Writes images into their slots, which are black.
pub(crate) fn decode(
    config: &Config,
    mode: Mode,
    samples: &[Sample],
    slots: Vec<Slot<'_>>,
) -> Vec<Result<Made, Reason>> {
    let (mut made, mut draws, mut of) = (vec![], vec![], vec![]);
    for (sample, slot) in samples.iter().zip(slots) {
        let drawn = match &sample.content {
            Content::Zeros => Ok((0, None)),
            Content::Fake { index } => Ok((noise(config, mode, *index, slot), None)),
            Content::Record(found) => {
                parsed(config, &found.record, &found.label).map(|(example, label)| {
                    let which = (found.shard, &found.record);
                    let mut draw = Draw::new(config, sample.epoch, which, example.encoded, slot);
                    draw.points = found.points.as_deref();
                    (label, Some(draw))
                })
            }
            Content::File { class, record } => folder::label(*class, config.classes).map(|label| {
                let which = (0, record);
                let draw = Draw::new(config, sample.epoch, which, &record.bytes, slot);
                (label, Some(draw))
            }),
        };
        made.push(drawn.map(|(label, draw)| {
            if let Some(draw) = draw {
                of.push(made.len());
                draws.push(draw);
            }
            Made { label, noted: None }
        }));
    }
    let drawn = FAST.with_borrow_mut(|decoder| render(config, mode, &mut draws, decoder));
    for ((place, draw), drawn) in of.into_iter().zip(&mut draws).zip(drawn) {
        if let (Ok(_), Mode::Train) = (&drawn, mode) {
            let (size, slot) = (config.resolution, &mut draw.slot);
            augment(&config.augment, size, &mut draw.change, slot);
        }
        match (drawn, &mut made[place]) {
            (Ok(drawn), Ok(made)) => made.noted = drawn.noted,
            (Err(reason), made) => *made = Err(reason),
            (Ok(_), Err(_)) => unreachable!("only what has a label was drawn"),
        }
    }
    made
}

/// Fills the slot, and returns the label: the same in every epoch, as a dataset is.
fn noise(config: &Config, mode: Mode, index: u64, slot: Slot<'_>) -> u32 {
    let is_eval = mode == Mode::Eval;
    let mut random = Random::new(config.seed, 0, Purpose::Fake { index, is_eval });
    let label = random.below(config.classes as u64) as u32;
    match slot {
        Slot::U8(pixels) => random.fill(pixels),
        Slot::F32(_) => unreachable!("noise is made in u8"),
    }
    label
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
            let mut draws = [Draw::new(config, 0, (0, &record), file, slot)];
            FAST.with_borrow_mut(|decoder| render(config, mode, &mut draws, decoder));
            let [Draw { change, slot, .. }] = &mut draws;
            augment(&config.augment, config.resolution, change, slot);
        }
    }
}

/// Writes an image file into its slot as an evaluation does.
pub(crate) fn image(config: &Config, file: &[u8], slot: Slot<'_>) -> Result<(), Reason> {
    // An evaluation draws nothing.
    let purpose = Purpose::Fake {
        index: 0,
        is_eval: true,
    };
    let random = Random::new(config.seed, 0, purpose);
    let draw = Draw {
        encoded: file,
        points: None,
        random: random.clone(),
        change: random,
        slot,
    };
    let drawn =
        FAST.with_borrow_mut(|decoder| render(config, Mode::Eval, &mut [draw], decoder).pop());
    drawn.expect("one draw gives one").map(|_| ())
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

/// What came of a [`Draw`].
pub(crate) struct Drawn {
    /// Whether the fast decoder did it.
    pub(crate) is_fast: bool,
    /// Where the image can be entered, if that was not known before and is wanted.
    noted: Option<Vec<u8>>,
}

/// Decodes, crops, resizes and flips.
pub(crate) fn render(
    config: &Config,
    mode: Mode,
    draws: &mut [Draw<'_>],
    decoder: &mut fast::Decoder,
) -> Vec<Result<Drawn, Reason>> {
    // Whoever decodes, the draws are the same.
    let view = |mut random: Random, width, height| {
        let crop = match mode {
            Mode::Train => train_crop(config, width, height, &mut random),
            Mode::Eval => crop::centre(width, height, config.crop_ratio),
        };
        let flip = mode == Mode::Train && config.flip && random.below(2) == 1;
        (crop, flip)
    };
    let size = config.resolution;
    let is_fast = (mode, config.decode) == (Mode::Train, Decode::Fast);
    let notes = is_fast && config.index.as_ref().is_some_and(Index::is_writable);
    let mut noted: Vec<Option<Vec<u8>>> = draws.iter().map(|_| None).collect();
    let (mut jobs, mut of) = (vec![], vec![]);
    for (number, (draw, noted)) in draws.iter_mut().zip(&mut noted).enumerate() {
        let Some(photo) = is_fast.then(|| Photo::open(draw.encoded)).flatten() else {
            continue;
        };
        let (width, height) = photo.size();
        let (crop, flip) = view(draw.random.clone(), width, height);
        let resize = config.resize;
        of.push(number);
        jobs.push(Job {
            photo,
            target: Target {
                crop,
                resize,
                size,
                flip,
            },
            seek: match draw.points {
                Some(points) => Seek::Points(points),
                None if notes => Seek::Note(noted),
                None => Seek::Start,
            },
            row: match &mut draw.slot {
                Slot::U8(out) => Box::new(|y, row| {
                    out[y * row.len()..][..row.len()].copy_from_slice(row);
                }),
                Slot::F32(out) => Box::new(|y, row| {
                    for (out, &value) in out[y * row.len()..].iter_mut().zip(row) {
                        *out = f32::from(value);
                    }
                }),
            },
        });
    }
    let found = decoder.decode(jobs);
    let mut done = vec![false; noted.len()];
    for (number, is_done) in of.into_iter().zip(found) {
        done[number] = is_done;
    }
    // What is odd or damaged comes here: this decoder has the last word on errors.
    let like = match config.resize {
        Resize::Pillow => Like::Pillow,
        Resize::Tf | Resize::Tf1 => Like::TensorFlow,
    };
    let exactly = |draw: &mut Draw<'_>| {
        let image = picture::decode(draw.encoded, like).map_err(Reason::Image)?;
        let (rect, flip) = view(draw.random.clone(), image.width, image.height);
        match (config.resize, &mut draw.slot) {
            (Resize::Pillow, Slot::U8(out)) => resize::pillow(&image, rect, size, flip, out),
            (Resize::Tf, Slot::F32(out)) => resize::tf(&image, rect, size, flip, out),
            (Resize::Tf1, Slot::F32(out)) => resize::tf1(&image, rect, size, flip, out),
            _ => unreachable!("Pixels::new chose the type by the resize mode"),
        }
        Ok(())
    };
    let drawn = draws.iter_mut().zip(done).zip(noted);
    drawn
        .map(|((draw, is_fast), noted)| {
            if !is_fast {
                exactly(draw)?;
            }
            Ok(Drawn { is_fast, noted })
        })
        .collect()
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
