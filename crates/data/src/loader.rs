//! A thread that makes batches ahead of their use.

use std::panic;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::decode::{Mode, decode};
use crate::order::{Content, Cursor, Order, Sample};
use crate::{Batch, Config, Error, Pixels, Reason, Source};

/// Finished batches that wait for their use; one more may be in the making.
const AHEAD: usize = 2;

/// Batches in order, made ahead by a thread of its own. After an error nothing comes. Dropping it stops the thread
/// and waits for it, at most for as long as one batch takes.
#[derive(Debug)]
pub struct Loader {
    /// Both are present until dropped.
    batches: Option<Receiver<Result<Batch, Error>>>,
    thread: Option<JoinHandle<()>>,
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

fn check(config: &Config) -> Result<(), Error> {
    let mut needed = vec![
        (config.batch_size, "the batch size must be at least 1"),
        (config.resolution, "the resolution must be at least 1"),
        (config.classes, "there must be at least 1 class"),
    ];
    if let Source::TfRecord {
        lanes,
        shuffle_window,
        ..
    } = config.source
    {
        needed.push((lanes, "there must be at least 1 lane"));
        needed.push((shuffle_window, "the shuffle window must be at least 1"));
    }
    match needed.iter().find(|(value, _)| *value == 0) {
        Some((_, what)) => Err(Error::Config(what)),
        None => Ok(()),
    }
}

fn start(config: &Config, mode: Mode, order: Order) -> Result<Loader, Error> {
    let pool = ThreadPoolBuilder::new()
        .num_threads(config.threads)
        .thread_name(|i| format!("decode-{i}"))
        .build()
        .map_err(|e| Error::Threads(e.to_string()))?;
    let (sender, batches) = mpsc::sync_channel(AHEAD);
    let producer = Producer {
        config: config.clone(),
        mode,
        order,
        pool,
        bad: 0,
    };
    let thread = thread::Builder::new()
        .name("loader".into())
        .spawn(move || producer.run(&sender))
        .map_err(|e| Error::Threads(e.to_string()))?;
    Ok(Loader {
        batches: Some(batches),
        thread: Some(thread),
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

struct Producer {
    config: Config,
    mode: Mode,
    order: Order,
    pool: ThreadPool,
    /// Bad records so far.
    bad: u64,
}

impl Producer {
    fn run(mut self, sender: &SyncSender<Result<Batch, Error>>) {
        while let Some(batch) = self.batch().transpose() {
            let is_last = batch.is_err();
            if sender.send(batch).is_err() || is_last {
                return;
            }
        }
    }

    /// Takes as many samples as are missing, decodes them side by side, closes the gaps that bad ones leave, and does
    /// so again until the batch is full. So a bad record is replaced by the next good one, whatever the threads do.
    fn batch(&mut self) -> Result<Option<Batch>, Error> {
        let (config, mode) = (&self.config, self.mode);
        let size = config.batch_size;
        let len = 3 * config.resolution * config.resolution;
        let mut pixels = Pixels::new(config, size * len);
        let mut labels = Vec::with_capacity(size);
        let mut epoch = 0;
        while labels.len() < size {
            let first = labels.len();
            let mut samples = Vec::with_capacity(size - first);
            while samples.len() < size - first
                && let Some(sample) = self.order.next()?
            {
                samples.push(sample);
            }
            let Some(last) = samples.last() else { break };
            epoch = last.epoch;
            let slots = pixels.slots(len, first);
            let decoded: Vec<_> = self.pool.install(|| {
                samples
                    .par_iter()
                    .zip(slots)
                    .map(|(sample, slot)| decode(config, mode, sample, slot))
                    .collect()
            });
            for (i, (sample, label)) in samples.into_iter().zip(decoded).enumerate() {
                match label {
                    Ok(label) => {
                        if labels.len() < first + i {
                            pixels.shift(len, first + i, labels.len());
                        }
                        labels.push(label);
                    }
                    Err(reason) => {
                        self.bad += 1;
                        if self.bad > config.max_bad_records {
                            return Err(bad_record(&self.order, sample, reason, self.bad, config));
                        }
                    }
                }
            }
        }
        if labels.is_empty() {
            return Ok(None);
        }
        pixels.truncate(len, labels.len());
        Ok(Some(Batch {
            pixels,
            labels,
            epoch,
            cursor: self.order.cursor(),
            bad_records: self.bad,
        }))
    }
}

fn bad_record(order: &Order, sample: Sample, reason: Reason, bad: u64, config: &Config) -> Error {
    let Content::Record { shard, record } = sample.content else {
        unreachable!("made-up samples are good");
    };
    Error::Record {
        shard: order.shard(shard),
        record: record.index,
        offset: record.offset,
        reason,
        bad,
        allowed: config.max_bad_records,
    }
}
