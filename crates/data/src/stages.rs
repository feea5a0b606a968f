//! Where the time of one thread goes, from files to pixels.

use std::time::{Duration, Instant};

use crate::decode::{Mode, decode_with};
use crate::jpeg::fast::{Decoder, Level, Times};
use crate::order::{Cursor, Order};
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

/// Makes training images on this thread and says what each stage took. Bad records count as images; made-up examples take
/// no time.
///
/// # Errors
/// As for [`crate::train`].
pub fn stages(config: &Config, images: usize) -> Result<Stages, Error> {
    let mut order = Order::train(config, Cursor::default())?;
    let mut decoder = Decoder::new(Level::detect());
    let len = 3 * config.resolution * config.resolution;
    let mut stages = Stages::default();
    let mut pixels = Pixels::new(config, config.batch_size * len);
    while stages.images < images {
        let start = Instant::now();
        let mut samples = Vec::with_capacity(config.batch_size);
        while samples.len() < config.batch_size.min(images - stages.images)
            && let Some(sample) = order.next()?
        {
            samples.push(sample);
        }
        stages.read += start.elapsed();
        if samples.is_empty() {
            break;
        }
        let mut jobs = samples.iter().zip(pixels.slots(len, 0)).enumerate();
        let next = || jobs.next().map(|(i, (sample, slot))| (i, sample, slot));
        decoder.times = Some(Times::default());
        let start = Instant::now();
        let spent = decode_with(&mut decoder, config, Mode::Train, next, |_, _| ());
        let took = start.elapsed();
        let Times { idct, resample } = decoder.times.unwrap_or_default();
        stages.parse += spent.parse;
        stages.exact += spent.exact;
        stages.idct += idct;
        stages.resample += resample;
        stages.entropy += took.saturating_sub(spent.parse + spent.exact + idct + resample);
        stages.images += samples.len();
    }
    Ok(stages)
}
