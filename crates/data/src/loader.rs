//! A thread that makes batches ahead of their use.

use std::collections::VecDeque;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::decode::{self, Made, Mode, decode};
use crate::index::Entry;
use crate::order::{Content, Cursor, Order, Sample};
use crate::{BadRecord, Batch, Config, Crop, Error, Pixels, Reason, Source};

/// Finished batches that wait for their use; one more may be in the making.
const AHEAD: usize = 2;
/// Records that are read while others are decoded, at most.
pub const READ_AHEAD: usize = 256;
/// Far above any network's input; a row of it is still small.
const MAX_RESOLUTION: usize = 4096;
/// Some hundred gigabytes: more is a slip of the pen.
const MAX_VALUES: usize = 1 << 36;

/// Batches in order, made ahead by a thread of its own. After an error nothing comes. Dropping it stops the thread
/// and waits for it, at most for as long as one batch takes.
#[derive(Debug)]
pub struct Loader {
    /// This and the thread are present until dropped.
    batches: Option<Receiver<Result<Batch, Error>>>,
    thread: Option<JoinHandle<()>>,
    used: Sender<Pixels>,
    making: Arc<Making>,
}

/// What the thread has done so far, in nanoseconds.
#[derive(Debug, Default)]
struct Making {
    all: AtomicU64,
    reading: AtomicU64,
}

/// What a lock guards; a panic while it was held ends the batch anyway.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(total: &AtomicU64, time: Duration) {
    total.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
}

impl Loader {
    /// Takes back the memory of a batch that has been used, for one to come: that spares the system the work of making
    /// pages for each.
    pub fn reuse(&self, pixels: Pixels) {
        // If the thread has ended, nothing comes.
        let _ = self.used.send(pixels);
    }

    /// Of the time that it took to make batches so far, the share in which nothing could be decoded because records
    /// were still being read, from 0 to 1; 0 before the first batch.
    pub fn reading_share(&self) -> f64 {
        let of = |total: &AtomicU64| total.load(Ordering::Relaxed) as f64;
        let (reading, all) = (of(&self.making.reading), of(&self.making.all));
        if all > 0.0 {
            (reading / all).min(1.0)
        } else {
            0.0
        }
    }
}

/// Endless batches for training, from the cursor on; each is full and may straddle epochs.
///
/// # Errors
/// A configuration or a cursor that cannot work, or shards that cannot be read. Later errors come as items.
pub fn train(config: &Config, cursor: Cursor) -> Result<Loader, Error> {
    check(config)?;
    start(config, Mode::Train, Order::train(config, cursor)?)
}

/// Batches for evaluation: file order, every image once, the last batch as small as need be.
///
/// # Errors
/// As for [`train`].
pub fn eval(config: &Config) -> Result<Loader, Error> {
    check(config)?;
    start(config, Mode::Eval, Order::eval(config)?)
}

/// Prepares image files as an evaluation does, side by side: a batch of as many images as there are files, black ones
/// where a file cannot be decoded, and what is wrong with each of those. The source must be [`Source::Shards`]; of what
/// it names nothing is read.
///
/// # Errors
/// A configuration that cannot work.
pub fn prepare(
    config: &Config,
    files: &[impl AsRef<[u8]> + Sync],
) -> Result<(Pixels, Vec<Result<(), Reason>>), Error> {
    check(config)?;
    let pool = ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .build()
        .map_err(|e| Error::Threads(e.to_string()))?;
    let len = 3 * config.resolution * config.resolution;
    let mut pixels = Pixels::new(config, files.len() * len);
    let slots = pixels.slots(len, 0);
    let outcomes = pool.install(|| {
        let pairs = files.par_iter().zip(slots);
        let outcomes = pairs.map(|(file, slot)| decode::image(config, file.as_ref(), slot));
        outcomes.collect()
    });
    Ok((pixels, outcomes))
}

/// Everything that would make a later division, allocation or range fail.
fn check(config: &Config) -> Result<(), Error> {
    let image = 3 * config.resolution.min(MAX_RESOLUTION).pow(2);
    let mut rules = vec![
        (config.batch_size > 0, "the batch size must be at least 1"),
        (config.resolution > 0, "the resolution must be at least 1"),
        (
            config.resolution <= MAX_RESOLUTION,
            "the resolution must be at most 4096",
        ),
        (
            config.batch_size <= MAX_VALUES / image.max(1),
            "a batch must hold at most 2^36 values",
        ),
        (config.classes > 0, "there must be at least 1 class"),
        (
            config.classes <= 1 << 31,
            "there must be at most 2^31 classes",
        ),
        (
            config.crop_ratio > 0.0 && config.crop_ratio <= 1.0,
            "the crop ratio must be above 0 and at most 1",
        ),
        (config.threads <= 1024, "there must be at most 1024 threads"),
    ];
    if let Source::Shards {
        lanes,
        shuffle_window,
        ..
    } = config.source
    {
        rules.push((lanes > 0, "there must be at least 1 lane"));
        rules.push((shuffle_window > 0, "the shuffle window must be at least 1"));
    }
    if let Crop::Tf { area, aspect } | Crop::Torchvision { area, aspect } = config.crop {
        let is_range = |[low, high]: [f64; 2], end: f64| 0.0 < low && low <= high && high <= end;
        rules.push((
            is_range(area, 1.0),
            "the crop's area must be a range within 0..1",
        ));
        rules.push((
            is_range(aspect, 1e6),
            "the crop's aspect must be a range of positive numbers, at most 10^6",
        ));
    }
    if let Some((_, what)) = rules.into_iter().find(|(holds, _)| !holds) {
        return Err(Error::Config(what));
    }
    // Memory that is refused to a batch would end the process; asked for once and given back, it is an error.
    let bytes = Pixels::bytes(config);
    let mut room: Vec<u8> = Vec::new();
    room.try_reserve_exact(bytes)
        .map_err(|_| Error::Memory { bytes })?;
    std::hint::black_box(&mut room); // or the compiler leaves the request out
    Ok(())
}

fn start(config: &Config, mode: Mode, order: Order) -> Result<Loader, Error> {
    let pool = ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .thread_name(|i| format!("decode-{i}"))
        .build()
        .map_err(|e| Error::Threads(e.to_string()))?;
    let (sender, batches) = mpsc::sync_channel(AHEAD);
    let (used, reusable) = mpsc::channel();
    let making = Arc::new(Making::default());
    let producer = Producer {
        making: Arc::clone(&making),
        config: config.clone(),
        mode,
        cursor: order.cursor(),
        reader: Reader {
            order,
            ahead: VecDeque::new(),
            end: None,
        },
        pool,
        reusable,
        bad: 0,
    };
    let thread = thread::Builder::new()
        .name("loader".into())
        .spawn(move || producer.run(&sender))
        .map_err(|e| Error::Threads(e.to_string()))?;
    Ok(Loader {
        batches: Some(batches),
        used,
        thread: Some(thread),
        making,
    })
}

impl Iterator for Loader {
    type Item = Result<Batch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self
            .batches
            .as_ref()
            .and_then(|batches| batches.recv().ok());
        if batch.is_none()
            && let Some(thread) = self.thread.take()
            && let Err(payload) = thread.join()
        {
            // Without this, a bug in the thread would look like the end of the data.
            panic::resume_unwind(payload);
        }
        batch
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Closes the channel, so that the thread's next send fails.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; a second one from here would abort.
            let _ = thread.join();
        }
    }
}

/// Reads samples before they are asked for.
struct Reader {
    order: Order,
    ahead: VecDeque<Sample>,
    /// What came after the last of them: the end, or an error.
    end: Option<Result<(), Error>>,
}

impl Reader {
    fn next(&mut self) -> Result<Option<Sample>, Error> {
        if self.ahead.is_empty() {
            self.read_ahead(1);
        }
        match (self.ahead.pop_front(), self.end.take()) {
            (Some(sample), end) => {
                self.end = end;
                Ok(Some(sample))
            }
            (None, Some(Err(error))) => Err(error),
            (None, end) => {
                self.end = end;
                Ok(None)
            }
        }
    }

    /// Reads until so many samples wait.
    fn read_ahead(&mut self, count: usize) {
        while self.ahead.len() < count && self.end.is_none() {
            match self.order.next() {
                Ok(Some(sample)) => self.ahead.push_back(sample),
                Ok(None) => self.end = Some(Ok(())),
                Err(error) => self.end = Some(Err(error)),
            }
        }
    }
}

struct Producer {
    config: Config,
    mode: Mode,
    reader: Reader,
    /// After the last sample that went into a batch.
    cursor: Cursor,
    pool: ThreadPool,
    /// Memory of batches that have been used.
    reusable: Receiver<Pixels>,
    /// Bad records so far.
    bad: u64,
    making: Arc<Making>,
}

impl Producer {
    fn run(mut self, sender: &SyncSender<Result<Batch, Error>>) {
        loop {
            let began = Instant::now();
            let batch = self.batch().transpose();
            add(&self.making.all, began.elapsed());
            let Some(batch) = batch else { return };
            let is_last = batch.is_err();
            if sender.send(batch).is_err() || is_last {
                return;
            }
        }
    }

    /// Takes as many samples as are missing, decodes them side by side, closes the gaps that bad ones leave, and does
    /// so again until the batch is full. So a bad record is replaced by the next good one, whatever the threads do.
    fn batch(&mut self) -> Result<Option<Batch>, Error> {
        let (config, mode, reader) = (&self.config, self.mode, &mut self.reader);
        let size = config.batch_size;
        let len = 3 * config.resolution * config.resolution;
        let mut pixels = match self.reusable.try_recv() {
            Ok(used) => used.again(config, size * len),
            Err(_) => Pixels::new(config, size * len),
        };
        let mut labels = Vec::with_capacity(size);
        let mut ids = Vec::with_capacity(size);
        let mut bad_records = Vec::new();
        let mut noted = Vec::new();
        while labels.len() < size {
            let first = labels.len();
            let mut samples = Vec::with_capacity(size - first);
            let began = Instant::now();
            while samples.len() < size - first
                && let Some(sample) = reader.next()?
            {
                samples.push(sample);
            }
            add(&self.making.reading, began.elapsed());
            if samples.is_empty() {
                break;
            }
            let slots = pixels.slots(len, first);
            let jobs = Mutex::new(samples.iter().zip(slots).enumerate());
            let decoded = Mutex::new(Vec::with_capacity(samples.len()));
            let decoded_at = Mutex::new(began);
            // Each thread takes the next sample when it has room for one: it decodes two at a time.
            let work = || {
                let next = || {
                    held(&jobs)
                        .next()
                        .map(|(i, (sample, slot))| (i, sample, slot))
                };
                decode(config, mode, next, |i, made| held(&decoded).push((i, made)));
                *held(&decoded_at) = Instant::now();
            };
            // This thread, which is not of the pool, reads meanwhile.
            let read_at = self.pool.in_place_scope(|scope| {
                for _ in 0..self.pool.current_num_threads() {
                    scope.spawn(|_| work());
                }
                reader.read_ahead(size.min(READ_AHEAD));
                Instant::now()
            });
            let decoded_at = *held(&decoded_at);
            add(
                &self.making.reading,
                read_at.saturating_duration_since(decoded_at),
            );
            let mut decoded = std::mem::take(&mut *held(&decoded));
            decoded.sort_unstable_by_key(|&(i, _)| i);
            drop(jobs);
            for (sample, (i, made)) in samples.into_iter().zip(decoded) {
                self.cursor.advance(&sample.step);
                match made {
                    Ok(Made { label, noted: new }) => {
                        if let (Some(points), Content::Record(found)) = (new, &sample.content) {
                            noted.push((found.shard, Entry::new(&found.record, points)));
                        }
                        if labels.len() < first + i {
                            pixels.shift(len, first + i, labels.len());
                        }
                        labels.push(label);
                        ids.push(sample.id());
                    }
                    Err(reason) => {
                        self.bad += 1;
                        let bad = bad_record(&reader.order, sample, reason, self.bad, config);
                        if bad.bad > bad.allowed {
                            return Err(Error::Record(bad));
                        }
                        bad_records.push(bad.to_string());
                    }
                }
            }
        }
        if labels.is_empty() && bad_records.is_empty() {
            return Ok(None);
        }
        pixels.truncate(len, labels.len());
        let mut notes = Vec::new();
        if let Some(index) = &config.index
            && let Err(error) = index.add(reader.order.shards(), noted)
        {
            notes.push(format!("data.index is not added to any more: {error}"));
        }
        Ok(Some(Batch {
            notes,
            pixels,
            labels,
            cursor: self.cursor.clone(),
            bad_records,
            samples: ids,
        }))
    }
}

fn bad_record(
    order: &Order,
    sample: Sample,
    reason: Reason,
    bad: u64,
    config: &Config,
) -> BadRecord {
    let (shard, record) = order.place(sample.content);
    BadRecord {
        shard,
        record: record.index,
        offset: record.offset,
        reason,
        bad,
        allowed: config.max_bad_records,
    }
}
