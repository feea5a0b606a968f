//! Where the time of one thread goes, from files to pixels.

use std::time::{Duration, Instant};

use crate::decode::{self, Mode};
use crate::jpeg::fast::{Decoder, Level, Seek, Times};
use crate::order::{Content, Cursor, Order};
use crate::{Config, Error, Pixels};

/// What the stages of some images took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stages {
    /// How many images.
    pub images: usize,
    /// Files to records in memory, in their order.
    pub read: Duration,
    /// Checksums, and the walk to the image.
    pub parse: Duration,
    /// JPEG headers, stuffing and Huffman codes.
    pub entropy: Duration,
    /// Coefficients to samples.
    pub idct: Duration,
    /// Samples to pixels at the target's size.
    pub resample: Duration,
    /// Images that the exact decoder took, from header to pixels.
    pub exact: Duration,
}

impl Stages {
    /// All of them.
    pub fn total(&self) -> Duration {
        self.read + self.parse + self.entropy + self.idct + self.resample + self.exact
    }
}

/// Instructions that the fast decoder uses on this CPU; its pixels do not depend on them.
pub fn level() -> &'static str {
    match Level::detect() {
        Level::Portable => "portable",
        Level::Avx2 => "avx2",
        Level::Avx512 => "avx512",
    }
}

/// Makes training images on this thread, one after the other, and says what each stage took. Bad records and made-up
/// examples are passed over.
///
/// # Errors
/// As for [`crate::train`].
pub fn stages(config: &Config, images: usize) -> Result<Stages, Error> {
    let mut order = Order::train(config, Cursor::default())?;
    let mut decoder = Decoder::new(Level::detect());
    let len = 3 * config.resolution * config.resolution;
    let mut pixels = Pixels::new(config, len);
    let mut stages = Stages::default();
    for _ in 0..images {
        let start = Instant::now();
        let Some(sample) = order.next()? else { break };
        stages.read += start.elapsed();
        let Content::Record(found) = &sample.content else {
            continue;
        };
        let start = Instant::now();
        let Ok((example, _)) = decode::parsed(config, &found.record, &found.label) else {
            continue;
        };
        stages.parse += start.elapsed();
        let random = decode::augmentation(config, sample.epoch, found.shard, &found.record);
        let seek = match &found.points {
            Some(points) => Seek::Points(points),
            None => Seek::Start,
        };
        let Some(mut slot) = pixels.slots(len, 0).pop() else {
            break;
        };
        decoder.times = Some(Times::default());
        let start = Instant::now();
        let is_fast = decode::render(
            config,
            Mode::Train,
            (example.encoded, seek),
            &random,
            &mut slot,
            &mut decoder,
        );
        let took = start.elapsed();
        match (is_fast, decoder.times) {
            (Ok(true), Some(times)) => {
                stages.entropy += took.saturating_sub(times.idct + times.resample);
                stages.idct += times.idct;
                stages.resample += times.resample;
            }
            (Ok(_), _) => stages.exact += took,
            (Err(_), _) => continue,
        }
        stages.images += 1;
    }
    Ok(stages)
}
