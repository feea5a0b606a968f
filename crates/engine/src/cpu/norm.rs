//! Batch normalisation: statistics from tiles, normalise + residual + ReLU, and the backward pass of all three.

use graph::{NORM_EPSILON, Tiling};

use super::memory::Span;
use super::pool::Pool;

/// The four rows of a normalisation's state.
pub(crate) struct NormState<'a> {
    pub(crate) mean: &'a mut [f32],
    pub(crate) inv_std: &'a mut [f32],
    pub(crate) scale: &'a mut [f32],
    pub(crate) shift: &'a mut [f32],
}

impl<'a> NormState<'a> {
    /// # Safety
    /// Nobody else uses the buffer meanwhile.
    pub(crate) unsafe fn new(state: Span<'a, f32>) -> Self {
        // SAFETY: the caller's word.
        let rows = unsafe { state.get_mut() };
        let channels = rows.len() / 4;
        let (mean, rows) = rows.split_at_mut(channels);
        let (inv_std, rows) = rows.split_at_mut(channels);
        let (scale, shift) = rows.split_at_mut(channels);
        Self {
            mean,
            inv_std,
            scale,
            shift,
        }
    }

    /// Sets channel `c` from its statistics.
    pub(crate) fn set(&mut self, c: usize, mean: f64, var: f64, gamma: f32, beta: f32) {
        let inv_std = 1.0 / (var + f64::from(NORM_EPSILON)).sqrt();
        let scale = f64::from(gamma) * inv_std;
        self.mean[c] = mean as f32;
        self.inv_std[c] = inv_std as f32;
        self.scale[c] = scale as f32;
        self.shift[c] = (f64::from(beta) - mean * scale) as f32;
    }
}

/// Mean and biased variance of channel `c` from the tiles' means and sums of squared deviations
/// (Chan, Golub, LeVeque 1979, equation 2.1), in the order of the tiles.
pub(crate) fn combine(partials: &[f32], tiling: &Tiling, c: usize) -> (f64, f64) {
    let (mut count, mut mean, mut m2) = (0.0, 0.0, 0.0);
    for (tile, part) in partials.chunks_exact(2 * tiling.cols).enumerate() {
        let rows = (tiling.rows - tile * tiling.tile_rows).min(tiling.tile_rows) as f64;
        let delta = f64::from(part[c]) - mean;
        let total = count + rows;
        mean += delta * rows / total;
        m2 += f64::from(part[tiling.cols + c]) + delta * delta * count * rows / total;
        count = total;
    }
    (mean, m2 / count)
}

/// The larger of the two; NaN stays NaN (`f32::max` would hide it, and with it a run that has diverged).
fn at_least(floor: f32, v: f32) -> f32 {
    if v < floor { floor } else { v }
}

/// Values of one elementwise task.
const TASK: usize = 65_536;

/// y = relu?(z * scale + shift + residual?), `rows` x `channels`.
pub(crate) fn normalize(
    pool: &mut Pool,
    (rows, channels): (usize, usize),
    scale: &[f32],
    shift: &[f32],
    z: Span<'_, f32>,
    residual: Option<Span<'_, f32>>,
    relu: bool,
    y: Span<'_, f32>,
) {
    let per_task = (TASK / channels).max(1);
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    pool.run(rows.div_ceil(per_task), |_, task| {
        let range = task * per_task * channels..((task + 1) * per_task).min(rows) * channels;
        // SAFETY: nobody writes z or the residual in this region; tasks write disjoint rows of y.
        let (z, y) = unsafe { (z.part(range.clone()).get(), y.part(range.clone()).get_mut()) };
        match residual {
            Some(residual) => {
                // SAFETY: as above.
                let residual = unsafe { residual.part(range).get() };
                let rows = y.chunks_exact_mut(channels).zip(z.chunks_exact(channels));
                for ((y, z), r) in rows.zip(residual.chunks_exact(channels)) {
                    for c in 0..channels {
                        y[c] = at_least(floor, z[c] * scale[c] + shift[c] + r[c]);
                    }
                }
            }
            None => {
                for (y, z) in y.chunks_exact_mut(channels).zip(z.chunks_exact(channels)) {
                    for c in 0..channels {
                        y[c] = at_least(floor, z[c] * scale[c] + shift[c]);
                    }
                }
            }
        }
    });
}

/// Where the gradient of a residual goes.
pub(crate) struct Residual<'a> {
    pub(crate) dx: Span<'a, f32>,
    pub(crate) accumulate: bool,
}

/// Turns `d`, the gradient of y, into that of z, in place, and sends the masked gradient to the residual; returns
/// the gradients of scale and shift through `done(channel, dgamma, dbeta)`.
///
/// With g = d where y > 0 (without ReLU: d), m rows, and xhat = (z - mean) * inv_std:
/// dbeta = sum g, dgamma = sum g xhat, dz = scale * (g - dbeta / m - xhat * dgamma / m)
/// (Ioffe and Szegedy 2015, section 3).
pub(crate) fn backward(
    pool: &mut Pool,
    tiling: &Tiling,
    state: &NormState<'_>,
    z: Span<'_, f32>,
    y: Option<Span<'_, f32>>,
    d: Span<'_, f32>,
    residual: Option<Residual<'_>>,
    partials: Span<'_, f32>,
    mut done: impl FnMut(usize, f64, f64),
) {
    let channels = tiling.cols;
    let mean = &*state.mean;
    pool.run(tiling.tasks(), |_, task| {
        let (rows, _) = tiling.task(task);
        let range = rows.start * channels..rows.end * channels;
        // SAFETY: nobody writes z or y in this region; tasks own disjoint rows of d and the residual, and disjoint
        // partials.
        let (z, d, sums) = unsafe {
            let sums = partials
                .part(task * 2 * channels..(task + 1) * 2 * channels)
                .get_mut();
            (
                z.part(range.clone()).get(),
                d.part(range.clone()).get_mut(),
                sums,
            )
        };
        if let Some(y) = y {
            // SAFETY: as above.
            let y = unsafe { y.part(range.clone()).get() };
            d.iter_mut()
                .zip(y)
                .for_each(|(d, y)| *d = if *y <= 0.0 { 0.0 } else { *d });
        }
        if let Some(Residual { dx, accumulate }) = &residual {
            // SAFETY: as above.
            let dx = unsafe { dx.part(range).get_mut() };
            if *accumulate {
                dx.iter_mut().zip(&*d).for_each(|(dx, d)| *dx += d);
            } else {
                dx.copy_from_slice(d);
            }
        }
        sums.fill(0.0);
        let (sum, sum_z) = sums.split_at_mut(channels);
        for (d, z) in d.chunks_exact(channels).zip(z.chunks_exact(channels)) {
            for c in 0..channels {
                sum[c] += d[c];
                sum_z[c] += d[c] * (z[c] - mean[c]);
            }
        }
    });
    // SAFETY: the region is over; from here on the partials belong to this thread until the next region.
    let sums = unsafe { partials.get_mut() };
    let count = tiling.rows as f64;
    let (first, rest) = sums.split_at_mut(2 * channels);
    for c in 0..channels {
        let add = |at: usize, first: f32| {
            rest.iter()
                .skip(at)
                .step_by(2 * channels)
                .fold(f64::from(first), |sum, v| sum + f64::from(*v))
        };
        let (dbeta, sum_z) = (add(c, first[c]), add(channels + c, first[channels + c]));
        let inv_std = f64::from(state.inv_std[c]);
        done(c, sum_z * inv_std, dbeta);
        // dz = scale * g + (b * (z - mean) + a): keep a and b where the sums were.
        let scale = f64::from(state.scale[c]);
        first[c] = (-scale * dbeta / count) as f32;
        first[channels + c] = (-scale * inv_std * inv_std * sum_z / count) as f32;
    }
    let (a, b) = first.split_at(channels);
    let scale = &*state.scale;
    pool.run(tiling.tasks(), |_, task| {
        let (rows, _) = tiling.task(task);
        let range = rows.start * channels..rows.end * channels;
        // SAFETY: nobody writes z in this region; tasks own disjoint rows of d.
        let (z, d) = unsafe { (z.part(range.clone()).get(), d.part(range).get_mut()) };
        for (d, z) in d.chunks_exact_mut(channels).zip(z.chunks_exact(channels)) {
            for c in 0..channels {
                d[c] = scale[c] * d[c] + (b[c] * (z[c] - mean[c]) + a[c]);
            }
        }
    });
}
