//! Which sample comes next: a pure function of seed, epoch and shards, that can stop and go on anywhere.

use std::path::PathBuf;
use std::vec;

use serde::{Deserialize, Serialize};
use store::tfrecord::{self, Record};
use store::{Cache, bigtable};

use crate::folder::FileOrder;
use crate::index::{Index, Known};
use crate::random::{Purpose, Random};
use crate::webdataset::Samples;
use crate::{Config, Error, Format, SampleId, Source};

/// An exact position in the endless stream of training samples; the default is its beginning.
///
/// It is meaningful together with the shards, the seed, `lanes` and `shuffle_window` that it was made with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    epoch: u64,
    /// The lane that is asked next; for made-up data, the example that comes next.
    next: u64,
    /// Empty at the beginning and for made-up data.
    lanes: Vec<LaneCursor>,
}

/// Where a lane's window starts and how much of it has been used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct LaneCursor {
    /// Position in the lane's list of shards.
    shard: usize,
    /// Where the window's first record starts in that shard, in bytes.
    offset: u64,
    /// Its index in that shard.
    record: u64,
    /// Samples taken from the window.
    taken: usize,
}

/// One sample, not decoded yet.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) epoch: u64,
    pub(crate) content: Content,
    /// What taking it changes in a cursor.
    pub(crate) step: Step,
}

impl Step {
    /// Of data without lanes.
    pub(crate) fn single(epoch: u64, next: u64) -> Self {
        Self {
            epoch,
            next,
            begins: false,
            asked: vec![],
        }
    }
}

impl Sample {
    /// Which one it is.
    pub(crate) fn id(&self) -> SampleId {
        let (shard, record) = match &self.content {
            Content::Record(found) => (found.shard, found.record.index),
            Content::File { record, .. } => (0, record.index),
            Content::Fake { index } => (0, *index),
            Content::Zeros => (0, self.step.next.saturating_sub(1)),
        };
        SampleId { shard, record }
    }
}

/// From the position before a sample to the one after it.
#[derive(Debug)]
pub(crate) struct Step {
    epoch: u64,
    next: u64,
    /// Whether an epoch has begun, with which every lane starts anew.
    begins: bool,
    /// Lanes that were asked, and where they stand then.
    asked: Vec<(usize, LaneCursor)>,
}

impl Cursor {
    /// Of data without lanes: so many samples of an epoch have been given.
    pub(crate) fn at(epoch: u64, next: u64) -> Self {
        let lanes = vec![];
        Self { epoch, next, lanes }
    }

    /// The epoch, and how many of its samples have been given, of data without lanes.
    pub(crate) fn single(self, examples: u64) -> Result<(u64, u64), Error> {
        let Self { epoch, next, lanes } = self;
        if next > examples || !lanes.is_empty() {
            return Err(Error::Cursor(format!(
                "it is at {next} of {examples} examples"
            )));
        }
        Ok((epoch, next))
    }

    /// Moves over a sample.
    pub(crate) fn advance(&mut self, step: &Step) {
        (self.epoch, self.next) = (step.epoch, step.next);
        if step.begins {
            self.lanes.fill(LaneCursor::default());
        }
        for &(lane, cursor) in &step.asked {
            self.lanes[lane] = cursor;
        }
    }
}

/// Where a record's label is.
#[derive(Debug)]
pub(crate) enum Label {
    /// In the record, a `tf.Example`.
    Inside,
    /// Beside it, the image; or what is wrong with it or with the image.
    Beside(Result<i64, String>),
}

/// A record of a shard.
#[derive(Debug)]
pub(crate) struct Found {
    /// Index of the shard in the sorted list.
    pub(crate) shard: usize,
    pub(crate) record: Record,
    pub(crate) label: Label,
    /// Where its image can be entered, if that is known.
    pub(crate) points: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(crate) enum Content {
    Record(Found),
    /// A file of a folder. Only the bytes and the index of the record mean anything.
    File {
        class: u32,
        record: Record,
    },
    /// Noise.
    Fake {
        index: u64,
    },
    Zeros,
}

/// The stream of samples.
pub(crate) enum Order {
    Records(Lanes),
    Files(FileOrder),
    MadeUp(MadeUp),
}

impl Order {
    /// Endless, shuffled, from the cursor on.
    pub(crate) fn train(config: &Config, cursor: Cursor) -> Result<Self, Error> {
        match &config.source {
            Source::Shards {
                format,
                shards,
                lanes,
                shuffle_window,
                ..
            } => {
                let shuffle = Some((*shuffle_window, config.seed));
                let mut order = Lanes::new(*format, shards, *lanes, shuffle, config.cache.clone())?;
                order.files.index = config.index.clone();
                order.begin(cursor.epoch);
                order.resume(&cursor)?;
                order.ask_ahead()?;
                Ok(Self::Records(order))
            }
            Source::Folder(folder) => {
                FileOrder::new(folder, Some(config.seed), cursor).map(Self::Files)
            }
            source => MadeUp::new(source, true, cursor).map(Self::MadeUp),
        }
    }

    /// Every sample once, in file order.
    pub(crate) fn eval(config: &Config) -> Result<Self, Error> {
        match &config.source {
            Source::Shards { format, shards, .. } => {
                let mut order = Lanes::new(*format, shards, 1, None, config.cache.clone())?;
                order.begin(0);
                Ok(Self::Records(order))
            }
            Source::Folder(folder) => {
                FileOrder::new(folder, None, Cursor::default()).map(Self::Files)
            }
            source => MadeUp::new(source, false, Cursor::default()).map(Self::MadeUp),
        }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Sample>, Error> {
        match self {
            Self::Records(lanes) => lanes.next(),
            Self::Files(files) => files.next(),
            Self::MadeUp(made_up) => Ok(made_up.next()),
        }
    }

    /// The position after the last sample given out.
    pub(crate) fn cursor(&self) -> Cursor {
        match self {
            Self::Records(lanes) => lanes.cursor(),
            Self::Files(files) => files.cursor(),
            Self::MadeUp(made_up) => Cursor::at(made_up.epoch, made_up.next),
        }
    }

    /// The shards that samples are from, in order.
    pub(crate) fn shards(&self) -> &[PathBuf] {
        match self {
            Self::Records(lanes) => &lanes.files.shards,
            Self::Files(_) | Self::MadeUp(_) => &[],
        }
    }

    /// The file that a sample came from, and the record.
    pub(crate) fn place(&self, content: Content) -> (PathBuf, Record) {
        match (self, content) {
            (Self::Records(lanes), Content::Record(found)) => {
                (lanes.files.shards[found.shard].clone(), found.record)
            }
            (Self::Files(files), Content::File { record, .. }) => {
                (files.path(record.index), record)
            }
            _ => unreachable!("made-up samples are good, and no source gives those of another"),
        }
    }
}

/// The shards of a dataset, and where parts of those that are far away are kept.
struct Shards {
    format: Format,
    /// Sorted by [`crate::sorted`].
    shards: Vec<PathBuf>,
    cache: Option<Cache>,
    index: Option<Index>,
}

/// A shard that is being read, and what is known of its images.
struct Open {
    reader: Reader,
    known: Option<Known>,
}

/// Reads the records of one shard.
enum Reader {
    TfRecord(tfrecord::Reader),
    Bigtable(bigtable::Reader),
    WebDataset(Samples),
}

impl Shards {
    fn open(&self, shard: usize, at: &LaneCursor) -> Result<Open, Error> {
        let (path, cache) = (&self.shards[shard], self.cache.as_ref());
        let LaneCursor { offset, record, .. } = *at;
        let known = self.index.as_ref().map(|index| index.shard(path));
        let reader = match self.format {
            Format::TfRecord => {
                Reader::TfRecord(tfrecord::Reader::open_at(path, offset, record, cache)?)
            }
            Format::Bigtable => Reader::Bigtable(bigtable::Reader::open_at(path, record)?),
            Format::WebDataset => {
                Reader::WebDataset(Samples::open_at(path, offset, record, cache)?)
            }
        };
        let known = known.transpose()?;
        Ok(Open { reader, known })
    }
}

impl Open {
    fn next(&mut self, shard: usize) -> Result<Option<Found>, Error> {
        let Some((record, label)) = self.reader.next()? else {
            return Ok(None);
        };
        let points = self.known.as_mut().and_then(|known| known.get(&record));
        Ok(Some(Found {
            shard,
            record,
            label,
            points,
        }))
    }
}

impl Reader {
    fn next(&mut self) -> Result<Option<(Record, Label)>, Error> {
        Ok(match self {
            Self::TfRecord(reader) => reader.next()?.map(|record| (record, Label::Inside)),
            Self::Bigtable(rows) => rows.next()?.map(|record| (record, Label::Inside)),
            Self::WebDataset(samples) => samples
                .next()?
                .map(|(record, label)| (record, Label::Beside(label))),
        })
    }

    /// Where the next record starts, and its index.
    fn place(&self) -> (u64, u64) {
        match self {
            Self::TfRecord(reader) => (reader.offset(), reader.record()),
            Self::Bigtable(rows) => (rows.record(), rows.record()),
            Self::WebDataset(samples) => (samples.offset(), samples.index()),
        }
    }

    fn is_ending(&self) -> bool {
        match self {
            Self::TfRecord(reader) => reader.is_ending(),
            Self::Bigtable(rows) => rows.is_ending(),
            Self::WebDataset(samples) => samples.is_ending(),
        }
    }
}

/// The order of records: the epoch's permuted shards are dealt to lanes, and lanes give a sample each in turn. A lane
/// whose shards are used up is passed over; when all are, the next epoch begins.
pub(crate) struct Lanes {
    files: Shards,
    window: usize,
    /// None for evaluation: one epoch, nothing shuffled.
    seed: Option<u64>,
    epoch: u64,
    next: usize,
    lanes: Vec<Lane>,
    /// Whether this epoch was begun here and has given no sample yet.
    barren: bool,
}

impl Lanes {
    /// `shuffle` is the window and the seed; none for evaluation.
    fn new(
        format: Format,
        shards: &[PathBuf],
        lanes: usize,
        shuffle: Option<(usize, u64)>,
        cache: Option<Cache>,
    ) -> Result<Self, Error> {
        if shards.is_empty() {
            return Err(Error::NoRecords { shards: vec![] });
        }
        let shards = crate::sorted(shards);
        let lanes = (0..lanes.min(shards.len()))
            .map(|_| Lane::default())
            .collect();
        Ok(Self {
            files: Shards {
                format,
                shards,
                cache,
                index: None,
            },
            window: shuffle.map_or(1, |(window, _)| window),
            seed: shuffle.map(|(_, seed)| seed),
            epoch: 0,
            next: 0,
            lanes,
            barren: false,
        })
    }

    fn begin(&mut self, epoch: u64) {
        let mut order: Vec<usize> = (0..self.files.shards.len()).collect();
        if let Some(seed) = self.seed {
            Random::new(seed, epoch, Purpose::Shards).shuffle(&mut order);
        }
        let count = self.lanes.len();
        for (i, lane) in self.lanes.iter_mut().enumerate() {
            *lane = Lane {
                shards: order.iter().skip(i).step_by(count).copied().collect(),
                ..Lane::default()
            };
        }
        self.epoch = epoch;
        self.next = 0;
        self.barren = true;
    }

    fn resume(&mut self, cursor: &Cursor) -> Result<(), Error> {
        if cursor.lanes.is_empty() {
            return Ok(());
        }
        let (ours, saved) = (self.lanes.len(), cursor.lanes.len());
        if ours != saved {
            return Err(Error::Cursor(format!(
                "it has {saved} lanes, the data {ours}"
            )));
        }
        if cursor.next >= ours as u64 {
            return Err(Error::Cursor(format!(
                "lane {} of {ours} is next",
                cursor.next
            )));
        }
        self.next = cursor.next as usize;
        self.barren = false;
        for (lane, &saved) in self.lanes.iter_mut().zip(&cursor.lanes) {
            let LaneCursor { shard, .. } = saved;
            if shard > lane.shards.len() {
                let count = lane.shards.len();
                return Err(Error::Cursor(format!("shard {shard} of a lane of {count}")));
            }
            lane.at = LaneCursor { taken: 0, ..saved };
        }
        self.ask_ahead()?;
        for (lane, &LaneCursor { taken, .. }) in self.lanes.iter_mut().zip(&cursor.lanes) {
            if taken > 0 {
                lane.load(&self.files, self.window, self.seed, self.epoch)?;
                let held = lane.window.len();
                if taken > held {
                    let what = format!("{taken} samples taken from a window of {held}");
                    return Err(Error::Cursor(what));
                }
                lane.start.taken = taken;
                lane.window.by_ref().take(taken).for_each(drop);
            }
        }
        Ok(())
    }

    /// Opens the objects that the lanes stand in, all before any is waited for. Files are opened when they are read.
    fn ask_ahead(&mut self) -> Result<(), Error> {
        for lane in &mut self.lanes {
            if let (Some(&shard), None) = (lane.shards.get(lane.at.shard), &lane.reader)
                && store::is_url(&self.files.shards[shard])
            {
                lane.reader = Some(self.files.open(shard, &lane.at)?);
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Sample>, Error> {
        let (mut begins, mut asked) = (false, vec![]);
        loop {
            for _ in 0..self.lanes.len() {
                let count = self.lanes.len();
                let index = self.next;
                let lane = &mut self.lanes[index];
                self.next = (self.next + 1) % count;
                if lane.window.len() == 0 {
                    lane.load(&self.files, self.window, self.seed, self.epoch)?;
                }
                if let Some(found) = lane.window.next() {
                    lane.start.taken += 1;
                    self.barren = false;
                    asked.push((index, lane.cursor()));
                    return Ok(Some(Sample {
                        epoch: self.epoch,
                        content: Content::Record(found),
                        step: Step {
                            epoch: self.epoch,
                            next: self.next as u64,
                            begins,
                            asked,
                        },
                    }));
                }
                asked.push((index, lane.cursor()));
            }
            if self.barren {
                return Err(Error::NoRecords {
                    shards: self.files.shards.clone(),
                });
            }
            if self.seed.is_none() {
                return Ok(None);
            }
            // A damaged cursor may say the last epoch of all.
            self.begin(self.epoch.wrapping_add(1));
            self.ask_ahead()?;
            begins = true;
            asked.clear();
        }
    }

    fn cursor(&self) -> Cursor {
        Cursor {
            epoch: self.epoch,
            next: self.next as u64,
            lanes: self.lanes.iter().map(Lane::cursor).collect(),
        }
    }
}

/// A lane reads its shards in sequence and shuffles inside windows of consecutive records, which may straddle shards.
#[derive(Default)]
struct Lane {
    /// Indices into the sorted list.
    shards: Vec<usize>,
    /// Where the reader stands; `taken` is 0.
    at: LaneCursor,
    reader: Option<Open>,
    /// The shard after it, where that is far away and has been asked for.
    upcoming: Option<Open>,
    /// Where the window started and how much of it is used.
    start: LaneCursor,
    /// What is left of the window, shuffled. Bytes are freed as they are used.
    window: vec::IntoIter<Found>,
}

impl Lane {
    /// Reads and shuffles the next window; it stays empty if there are no more records.
    fn load(
        &mut self,
        files: &Shards,
        size: usize,
        seed: Option<u64>,
        epoch: u64,
    ) -> Result<(), Error> {
        self.start = self.at;
        let mut records = Vec::new();
        while records.len() < size {
            match self.read(files)? {
                Some(record) => records.push(record),
                None => break,
            }
        }
        // The first record names the window: it is the same whether the lane came here by reading or by resuming.
        if let (Some(seed), Some(first)) = (seed, records.first()) {
            let purpose = Purpose::Window {
                shard: first.shard,
                record: first.record.index,
            };
            Random::new(seed, epoch, purpose).shuffle(&mut records);
        }
        self.window = records.into_iter();
        Ok(())
    }

    fn read(&mut self, files: &Shards) -> Result<Option<Found>, Error> {
        while let Some(&shard) = self.shards.get(self.at.shard) {
            let open = match &mut self.reader {
                Some(open) => open,
                none => none.insert(files.open(shard, &self.at)?),
            };
            if self.upcoming.is_none()
                && open.reader.is_ending()
                && let Some(&next) = self.shards.get(self.at.shard + 1)
            {
                self.upcoming = Some(files.open(next, &LaneCursor::default())?);
            }
            if let Some(found) = open.next(shard)? {
                (self.at.offset, self.at.record) = open.reader.place();
                return Ok(Some(found));
            }
            self.reader = self.upcoming.take();
            self.at = LaneCursor {
                shard: self.at.shard + 1,
                ..LaneCursor::default()
            };
        }
        Ok(None)
    }

    fn cursor(&self) -> LaneCursor {
        if self.window.len() == 0 {
            self.at
        } else {
            self.start
        }
    }
}

/// Examples that no file holds.
pub(crate) struct MadeUp {
    noise: bool,
    examples: u64,
    endless: bool,
    epoch: u64,
    next: u64,
}

impl MadeUp {
    fn new(source: &Source, endless: bool, cursor: Cursor) -> Result<Self, Error> {
        let (noise, examples) = match *source {
            Source::Fake { examples } => (true, examples),
            Source::Zeros { examples } => (false, examples),
            Source::Shards { .. } | Source::Folder(_) => unreachable!("records are not made up"),
        };
        if examples == 0 {
            return Err(Error::NoRecords { shards: vec![] });
        }
        let (epoch, next) = cursor.single(examples)?;
        Ok(Self {
            noise,
            examples,
            endless,
            epoch,
            next,
        })
    }

    fn next(&mut self) -> Option<Sample> {
        if self.next == self.examples {
            if !self.endless {
                return None;
            }
            self.epoch = self.epoch.wrapping_add(1);
            self.next = 0;
        }
        let index = self.next;
        self.next += 1;
        Some(Sample {
            epoch: self.epoch,
            content: if self.noise {
                Content::Fake { index }
            } else {
                Content::Zeros
            },
            step: Step::single(self.epoch, self.next),
        })
    }
}
