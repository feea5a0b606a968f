//! Batch normalisation between kernels: from the sums that tasks left to scale and shift, and to the constants of the
//! gradient; and the one pass of its own, the sum at the end of a residual block.

use graph::{NORM_EPSILON, STATE_ROWS};

use super::fuse::{Partials, Raw, Read, Source, read_as};
use super::memory::Span;
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};

/// The rows of a normalisation's state, see [`STATE_ROWS`].
#[derive(Clone, Copy)]
pub(crate) struct State<'a> {
    rows: Span<'a, f32>,
    channels: usize,
}

/// Index of a row in the state.
#[derive(Clone, Copy)]
pub(crate) enum Row {
    Mean,
    InvStd,
    Scale,
    Shift,
    A,
    B,
    C,
}

impl<'a> State<'a> {
    pub(crate) fn new(rows: Span<'a, f32>) -> Self {
        let channels = rows.len() / STATE_ROWS;
        Self { rows, channels }
    }

    /// A row, for reading.
    ///
    /// # Safety
    /// Nobody writes to it while the slice lives.
    pub(crate) unsafe fn get(self, row: Row) -> &'a [f32] {
        let at = row as usize * self.channels;
        // SAFETY: the caller's word.
        unsafe { self.rows.part(at..at + self.channels).get() }
    }

    /// Sets a value of a row.
    ///
    /// # Safety
    /// Nobody else uses channel `c` meanwhile.
    unsafe fn set(self, row: Row, c: usize, v: f64) {
        let at = row as usize * self.channels + c;
        // SAFETY: the caller's word.
        unsafe { self.rows.part(at..at + 1).get_mut()[0] = v as f32 };
    }

    /// Sets channel `c` from its statistics.
    ///
    /// # Safety
    /// Nobody else uses channel `c` meanwhile.
    pub(crate) unsafe fn set_statistics(
        self,
        c: usize,
        mean: f64,
        var: f64,
        gamma: f32,
        beta: f32,
    ) {
        let inv_std = 1.0 / (var + f64::from(NORM_EPSILON)).sqrt();
        let scale = f64::from(gamma) * inv_std;
        // SAFETY: the caller's word.
        unsafe {
            self.set(Row::Mean, c, mean);
            self.set(Row::InvStd, c, inv_std);
            self.set(Row::Scale, c, scale);
            self.set(Row::Shift, c, f64::from(beta) - mean * scale);
        }
    }

    /// Sets the constants of channel `c`'s gradient from the sums of g and of g (z - mean) over `count` results. Returns
    /// the gradient of gamma; that of beta is the sum of g.
    ///
    /// # Safety
    /// Nobody else uses channel `c` meanwhile.
    pub(crate) unsafe fn set_gradient(self, c: usize, g: f64, gz: f64, count: usize) -> f64 {
        let m = count as f64;
        // SAFETY: the caller's word.
        unsafe {
            let [inv_std, scale] = [Row::InvStd, Row::Scale].map(|row| f64::from(self.at(row, c)));
            self.set(Row::A, c, scale);
            self.set(Row::B, c, -scale * inv_std * inv_std * gz / m);
            self.set(Row::C, c, -scale * g / m);
            gz * inv_std
        }
    }

    /// A value of a row.
    ///
    /// # Safety
    /// Nobody writes channel `c` meanwhile.
    pub(crate) unsafe fn at(self, row: Row, c: usize) -> f32 {
        let at = row as usize * self.channels + c;
        // SAFETY: the caller's word.
        unsafe { self.rows.part(at..at + 1).get()[0] }
    }
}

/// Channels of one task of the reductions over records.
const CHANNELS: usize = 64;

/// Mean, biased variance and count of each channel from the tasks' means and sums of squared deviations (Chan, Golub,
/// LeVeque 1979, equation 2.1), in the order of the tasks; `done(channel, mean, variance, count)`.
pub(crate) fn statistics(
    pool: &mut Pool,
    partials: Partials<'_>,
    channels: usize,
    done: impl Fn(usize, f64, f64, f64) + Sync,
) {
    let record_len = Partials::record_len(partials.columns);
    pool.run(channels.div_ceil(CHANNELS), |_, task| {
        let range = task * CHANNELS..((task + 1) * CHANNELS).min(channels);
        let (mut mean, mut m2) = ([0.0f64; CHANNELS], [0.0f64; CHANNELS]);
        let mut count = 0.0;
        // SAFETY: nobody writes partials in this region.
        let all = unsafe { partials.all.get() };
        for record in all.chunks_exact(record_len) {
            let rows = f64::from(record[0]);
            if rows == 0.0 {
                continue;
            }
            let total = count + rows;
            let (share, weight) = (rows / total, count * rows / total);
            let means = &record[partials.at(0, range.start)..][..range.len()];
            let squares = &record[partials.at(1, range.start)..][..range.len()];
            for (i, (part_mean, part_m2)) in means.iter().zip(squares).enumerate() {
                let delta = f64::from(*part_mean) - mean[i];
                mean[i] += delta * share;
                m2[i] += f64::from(*part_m2) + delta * delta * weight;
            }
            count = total;
        }
        for (i, c) in range.enumerate() {
            done(c, mean[i], m2[i] / count, count);
        }
    });
}

/// Sets the constants of a normalisation's gradient from row 0 (sums of g) and row `row` (sums of g (z - mean)) of the
/// records; `count` results in all. `done(channel, dgamma, dbeta)`.
pub(crate) fn gradient(
    pool: &mut Pool,
    partials: Partials<'_>,
    row: usize,
    count: usize,
    state: State<'_>,
    done: impl Fn(usize, f64, f64) + Sync,
) {
    let channels = state.channels;
    let record_len = Partials::record_len(partials.columns);
    pool.run(channels.div_ceil(CHANNELS), |_, task| {
        let range = task * CHANNELS..((task + 1) * CHANNELS).min(channels);
        let (mut sum_g, mut sum_gz) = ([0.0f64; CHANNELS], [0.0f64; CHANNELS]);
        // SAFETY: nobody writes partials in this region, and a task owns its channels of the state.
        unsafe {
            for record in partials.all.get().chunks_exact(record_len) {
                let g = &record[partials.at(0, range.start)..][..range.len()];
                let gz = &record[partials.at(row, range.start)..][..range.len()];
                for (i, (g, gz)) in g.iter().zip(gz).enumerate() {
                    sum_g[i] += f64::from(*g);
                    sum_gz[i] += f64::from(*gz);
                }
            }
            for (i, c) in range.enumerate() {
                let dgamma = state.set_gradient(c, sum_g[i], sum_gz[i], count);
                done(c, dgamma, sum_g[i]);
            }
        }
    });
}

/// Values of one elementwise task.
const TASK: usize = 65_536;

/// y = max(floor, main * gate + side), vector by vector.
struct SumRows<'a, T: Element, M: Read, S: Read> {
    main: M,
    /// Factors, images x channels, and the pixels of an image.
    gate: Option<(Span<'a, f32>, usize)>,
    side: Option<S>,
    y: Span<'a, T>,
    channels: usize,
    pixels: std::ops::Range<usize>,
    floor: f32,
    stream: bool,
}

impl<T: Element, M: Read, S: Read> Job for SumRows<'_, T, M, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: pixels are inside of the tensors; if `stream`, rows are whole aligned vectors.
        unsafe {
            let floor = I::splat(self.floor);
            for pixel in self.pixels.clone() {
                let at = pixel * self.channels;
                let gate = self
                    .gate
                    .map(|(gate, pixels)| gate.ptr().add(pixel / pixels * self.channels));
                let mut c = 0;
                while c + I::LANES <= self.channels {
                    let mut v = self.main.full::<I>(at, c);
                    if let Some(gate) = gate {
                        v = I::mul(v, I::load(gate.add(c)));
                    }
                    if let Some(side) = &self.side {
                        v = I::add(v, side.full::<I>(at, c));
                    }
                    let (v, to) = (I::max(floor, v), self.y.ptr().add(at + c));
                    if self.stream {
                        T::stream::<I>(to, v);
                    } else {
                        T::store::<I>(to, v);
                    }
                    c += I::LANES;
                }
                if c < self.channels {
                    let n = self.channels - c;
                    let mut v = self.main.part::<I>(at, c, n);
                    if let Some(gate) = gate {
                        v = I::mul(v, I::load_part(gate.add(c), n));
                    }
                    if let Some(side) = &self.side {
                        v = I::add(v, side.part::<I>(at, c, n));
                    }
                    T::store_part::<I>(self.y.ptr().add(at + c), I::max(floor, v), n);
                }
            }
        }
    }
}

/// y = relu?(main * gate + side), pixels x channels; `main` is stored, or a normalisation with no floor of its own, `gate`
/// factors for each image with the pixels of one.
pub(crate) fn sum<T: Element>(
    pool: &mut Pool,
    level: Level,
    (pixels, channels): (usize, usize),
    main: Source<'_, T>,
    gate: Option<(Span<'_, f32>, usize)>,
    side: Option<Source<'_, T>>,
    relu: bool,
    y: Span<'_, T>,
    stream: bool,
) {
    let len = pixels * channels;
    assert!(
        main.len() >= len && y.len() >= len && side.is_none_or(|s| s.len() >= len),
        "the tensors hold all pixels"
    );
    assert!(
        gate.is_none_or(|(gate, of_image)| gate.len() * of_image >= len),
        "every image has its factors"
    );
    match main {
        Source::Raw(main) => sum_rows(
            pool,
            level,
            (pixels, channels),
            main,
            gate,
            side,
            relu,
            y,
            stream,
        ),
        Source::Norm(main) => sum_rows(
            pool,
            level,
            (pixels, channels),
            main,
            gate,
            side,
            relu,
            y,
            stream,
        ),
        Source::Grad(_) => unreachable!("a summand is a value"),
    }
}

fn sum_rows<T: Element>(
    pool: &mut Pool,
    level: Level,
    (pixels, channels): (usize, usize),
    main: impl Read,
    gate: Option<(Span<'_, f32>, usize)>,
    side: Option<Source<'_, T>>,
    relu: bool,
    y: Span<'_, T>,
    stream: bool,
) {
    let per_task = (TASK / channels).max(1);
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    pool.run(pixels.div_ceil(per_task), |_, task| {
        let pixels = task * per_task..((task + 1) * per_task).min(pixels);
        // SAFETY: nobody writes what is read in this region; tasks write disjoint pixels of y.
        unsafe {
            match side {
                None => level.call(SumRows {
                    main,
                    gate,
                    side: None::<Raw<'_, T>>,
                    y,
                    channels,
                    pixels,
                    floor,
                    stream,
                }),
                Some(side) => read_as!(side, side => level.call(SumRows {
                    main,
                    gate,
                    side: Some(side),
                    y,
                    channels,
                    pixels,
                    floor,
                    stream,
                })),
            }
        }
    });
}
