//! Which sample comes next: a pure function of seed, epoch and shards, that can stop and go on anywhere.

use std::path::PathBuf;
use std::vec;

use serde::{Deserialize, Serialize};
use store::tfrecord::{Reader, Record};

use crate::random::{Purpose, Random};
use crate::{Config, Error, SampleId, Source};

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

impl Sample {
    /// Which one it is.
    pub(crate) fn id(&self) -> SampleId {
        let (shard, record) = match &self.content {
            Content::Record { shard, record } => (*shard, record.index),
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

#[derive(Debug)]
pub(crate) enum Content {
    /// A record and the index of its shard in the sorted list.
    Record {
        shard: usize,
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
    MadeUp(MadeUp),
}

impl Order {
    /// Endless, shuffled, from the cursor on.
    pub(crate) fn train(config: &Config, cursor: Cursor) -> Result<Self, Error> {
        match &config.source {
            Source::TfRecord {
                shards,
                lanes,
                shuffle_window,
                ..
            } => Lanes::train(shards, *lanes, *shuffle_window, config.seed, cursor)
                .map(Self::Records),
            source => MadeUp::new(source, true, cursor).map(Self::MadeUp),
        }
    }

    /// Every sample once, in file order.
    pub(crate) fn eval(config: &Config) -> Result<Self, Error> {
        match &config.source {
            Source::TfRecord { shards, .. } => Lanes::eval(shards).map(Self::Records),
            source => MadeUp::new(source, false, Cursor::default()).map(Self::MadeUp),
        }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Sample>, Error> {
        match self {
            Self::Records(lanes) => lanes.next(),
            Self::MadeUp(made_up) => Ok(made_up.next()),
        }
    }

    /// The position after the last sample given out.
    pub(crate) fn cursor(&self) -> Cursor {
        match self {
            Self::Records(lanes) => lanes.cursor(),
            Self::MadeUp(made_up) => Cursor {
                epoch: made_up.epoch,
                next: made_up.next,
                lanes: vec![],
            },
        }
    }

    /// The file of a sample's shard.
    pub(crate) fn shard(&self, index: usize) -> PathBuf {
        match self {
            Self::Records(lanes) => lanes.shards[index].clone(),
            Self::MadeUp(_) => unreachable!("made-up samples have no shards"),
        }
    }
}

/// The order of records: the epoch's permuted shards are dealt to lanes, and lanes give a sample each in turn. A lane
/// whose shards are used up is passed over; when all are, the next epoch begins.
pub(crate) struct Lanes {
    /// Sorted by [`crate::sorted`].
    shards: Vec<PathBuf>,
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
    fn train(
        shards: &[PathBuf],
        lanes: usize,
        window: usize,
        seed: u64,
        cursor: Cursor,
    ) -> Result<Self, Error> {
        let mut order = Self::new(shards, lanes, window, Some(seed))?;
        order.begin(cursor.epoch);
        order.resume(&cursor)?;
        Ok(order)
    }

    fn eval(shards: &[PathBuf]) -> Result<Self, Error> {
        let mut order = Self::new(shards, 1, 1, None)?;
        order.begin(0);
        Ok(order)
    }

    fn new(
        shards: &[PathBuf],
        lanes: usize,
        window: usize,
        seed: Option<u64>,
    ) -> Result<Self, Error> {
        if shards.is_empty() {
            return Err(Error::NoRecords { shards: vec![] });
        }
        let shards = crate::sorted(shards);
        let lanes = (0..lanes.min(shards.len()))
            .map(|_| Lane::default())
            .collect();
        Ok(Self {
            shards,
            window,
            seed,
            epoch: 0,
            next: 0,
            lanes,
            barren: false,
        })
    }

    fn begin(&mut self, epoch: u64) {
        let mut order: Vec<usize> = (0..self.shards.len()).collect();
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
            let LaneCursor { shard, taken, .. } = saved;
            if shard > lane.shards.len() {
                let count = lane.shards.len();
                return Err(Error::Cursor(format!("shard {shard} of a lane of {count}")));
            }
            lane.at = LaneCursor { taken: 0, ..saved };
            if taken > 0 {
                lane.load(&self.shards, self.window, self.seed, self.epoch)?;
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

    fn next(&mut self) -> Result<Option<Sample>, Error> {
        let (mut begins, mut asked) = (false, vec![]);
        loop {
            for _ in 0..self.lanes.len() {
                let count = self.lanes.len();
                let index = self.next;
                let lane = &mut self.lanes[index];
                self.next = (self.next + 1) % count;
                if lane.window.len() == 0 {
                    lane.load(&self.shards, self.window, self.seed, self.epoch)?;
                }
                if let Some((shard, record)) = lane.window.next() {
                    lane.start.taken += 1;
                    self.barren = false;
                    asked.push((index, lane.cursor()));
                    return Ok(Some(Sample {
                        epoch: self.epoch,
                        content: Content::Record { shard, record },
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
                    shards: self.shards.clone(),
                });
            }
            if self.seed.is_none() {
                return Ok(None);
            }
            // A damaged cursor may say the last epoch of all.
            self.begin(self.epoch.wrapping_add(1));
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
    reader: Option<Reader>,
    /// Where the window started and how much of it is used.
    start: LaneCursor,
    /// What is left of the window, shuffled, each with its shard. Bytes are freed as they are used.
    window: vec::IntoIter<(usize, Record)>,
}

impl Lane {
    /// Reads and shuffles the next window; it stays empty if there are no more records.
    fn load(
        &mut self,
        shards: &[PathBuf],
        size: usize,
        seed: Option<u64>,
        epoch: u64,
    ) -> Result<(), Error> {
        self.start = self.at;
        let mut records = Vec::new();
        while records.len() < size {
            match self.read(shards)? {
                Some(record) => records.push(record),
                None => break,
            }
        }
        // The first record names the window: it is the same whether the lane came here by reading or by resuming.
        if let (Some(seed), Some((shard, first))) = (seed, records.first()) {
            let purpose = Purpose::Window {
                shard: *shard,
                record: first.index,
            };
            Random::new(seed, epoch, purpose).shuffle(&mut records);
        }
        self.window = records.into_iter();
        Ok(())
    }

    fn read(&mut self, shards: &[PathBuf]) -> Result<Option<(usize, Record)>, Error> {
        while let Some(&shard) = self.shards.get(self.at.shard) {
            let reader = match &mut self.reader {
                Some(reader) => reader,
                none => none.insert(Reader::open_at(
                    &shards[shard],
                    self.at.offset,
                    self.at.record,
                )?),
            };
            if let Some(record) = reader.next()? {
                self.at.offset = reader.offset();
                self.at.record = reader.record();
                return Ok(Some((shard, record)));
            }
            self.reader = None;
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
            Source::TfRecord { .. } => unreachable!("records are not made up"),
        };
        if examples == 0 {
            return Err(Error::NoRecords { shards: vec![] });
        }
        let Cursor { epoch, next, lanes } = cursor;
        if next > examples || !lanes.is_empty() {
            return Err(Error::Cursor(format!(
                "it is at {next} of {examples} examples"
            )));
        }
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
            step: Step {
                epoch: self.epoch,
                next: self.next,
                begins: false,
                asked: vec![],
            },
        })
    }
}
