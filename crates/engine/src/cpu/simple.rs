//! The kernels without a matrix product of their own shape: input, pools, classifier, loss, update.

use graph::Plane;

use super::memory::{Span, matmul};
use super::pool::Pool;
use crate::labels::{hits, targets};
use crate::{Batch, Hyper, MEAN, Metrics, Pixels, STD};

/// y = (pixels - mean) / std.
pub(crate) fn input(pool: &mut Pool, pixels: Pixels<'_>, images: usize, y: Span<'_, f32>) {
    let per_image = pixels.len() / images;
    let inv: [f32; 3] = STD.map(|s| 1.0 / s);
    pool.run(images, |_, image| {
        let range = image * per_image..(image + 1) * per_image;
        // SAFETY: tasks write disjoint images of y.
        let y = unsafe { y.part(range.clone()).get_mut() };
        let set =
            |y: &mut [f32], x: [f32; 3]| (0..3).for_each(|c| y[c] = (x[c] - MEAN[c]) * inv[c]);
        let rows = y.chunks_exact_mut(3);
        match pixels {
            Pixels::U8(p) => {
                rows.zip(p[range].chunks_exact(3))
                    .for_each(|(y, x)| set(y, [x[0], x[1], x[2]].map(f32::from)));
            }
            Pixels::F32(p) => rows
                .zip(p[range].chunks_exact(3))
                .for_each(|(y, x)| set(y, [x[0], x[1], x[2]])),
        }
    });
}

/// A max-pool's window.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) from: Plane,
    pub(crate) to: Plane,
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) pad: usize,
}

impl Window {
    /// Calls `f(tap, input offset in the image)` for the taps of an output pixel that lie inside.
    fn taps(&self, oh: usize, ow: usize, mut f: impl FnMut(u8, usize)) {
        for kh in 0..self.kernel {
            for kw in 0..self.kernel {
                let h = (oh * self.stride + kh).wrapping_sub(self.pad);
                let w = (ow * self.stride + kw).wrapping_sub(self.pad);
                if h < self.from.h && w < self.from.w {
                    f(
                        (kh * self.kernel + kw) as u8,
                        (h * self.from.w + w) * self.from.c,
                    );
                }
            }
        }
    }
}

/// y = window maxima; the first in row order wins a tie, and NaN wins over everything.
pub(crate) fn max_pool(
    pool: &mut Pool,
    window: &Window,
    images: usize,
    x: Span<'_, f32>,
    y: Span<'_, f32>,
    argmax: Option<Span<'_, u8>>,
) {
    let (c, (from, to)) = (window.to.c, (window.from.elements(), window.to.elements()));
    pool.run(images * window.to.h, |_, task| {
        let (image, oh) = (task / window.to.h, task % window.to.h);
        let row = image * to + oh * window.to.w * c;
        let row = row..row + window.to.w * c;
        // SAFETY: nobody writes x in this region; tasks write disjoint rows of y and argmax.
        let (x, y, mut argmax) = unsafe {
            let x = x.part(image * from..(image + 1) * from).get();
            (
                x,
                y.part(row.clone()).get_mut(),
                argmax.map(|a| a.part(row).get_mut()),
            )
        };
        for (ow, y) in y.chunks_exact_mut(c).enumerate() {
            let mut winners = argmax.as_deref_mut().map(|a| &mut a[ow * c..(ow + 1) * c]);
            y.fill(f32::NEG_INFINITY);
            if let Some(winners) = winners.as_deref_mut() {
                winners.fill(u8::MAX);
            }
            window.taps(oh, ow, |tap, at| {
                let x = &x[at..at + c];
                match winners.as_deref_mut() {
                    Some(winners) => {
                        for i in 0..c {
                            if x[i] > y[i] || x[i].is_nan() || winners[i] == u8::MAX {
                                (y[i], winners[i]) = (x[i], tap);
                            }
                        }
                    }
                    None => (0..c).for_each(|i| {
                        y[i] = if x[i] > y[i] || x[i].is_nan() {
                            x[i]
                        } else {
                            y[i]
                        }
                    }),
                }
            });
        }
    });
}

/// Sends d to the winners of each window.
pub(crate) fn max_pool_backward(
    pool: &mut Pool,
    window: &Window,
    images: usize,
    argmax: Span<'_, u8>,
    d: Span<'_, f32>,
    dx: Span<'_, f32>,
    accumulate: bool,
) {
    let (c, (from, to)) = (window.to.c, (window.from.elements(), window.to.elements()));
    pool.run(images, |_, image| {
        // SAFETY: nobody writes argmax or d in this region; tasks write disjoint images of dx.
        let (argmax, d, dx) = unsafe {
            let of = image * to..(image + 1) * to;
            let dx = dx.part(image * from..(image + 1) * from).get_mut();
            (argmax.part(of.clone()).get(), d.part(of).get(), dx)
        };
        if !accumulate {
            dx.fill(0.0);
        }
        for oh in 0..window.to.h {
            for ow in 0..window.to.w {
                let out = (oh * window.to.w + ow) * c;
                let (winners, d) = (&argmax[out..out + c], &d[out..out + c]);
                window.taps(oh, ow, |tap, at| {
                    let dx = &mut dx[at..at + c];
                    (0..c).for_each(|i| dx[i] += if winners[i] == tap { d[i] } else { 0.0 });
                });
            }
        }
    });
}

/// y = mean over the plane.
pub(crate) fn avg_pool(
    pool: &mut Pool,
    plane: Plane,
    images: usize,
    x: Span<'_, f32>,
    y: Span<'_, f32>,
) {
    let scale = 1.0 / plane.pixels() as f32;
    pool.run(images, |_, image| {
        // SAFETY: nobody writes x in this region; tasks write disjoint images of y.
        let (x, y) = unsafe {
            let x = x
                .part(image * plane.elements()..(image + 1) * plane.elements())
                .get();
            (x, y.part(image * plane.c..(image + 1) * plane.c).get_mut())
        };
        y.fill(0.0);
        for x in x.chunks_exact(plane.c) {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
        y.iter_mut().for_each(|y| *y *= scale);
    });
}

/// dx = d / pixels, everywhere on the plane.
pub(crate) fn avg_pool_backward(
    pool: &mut Pool,
    plane: Plane,
    images: usize,
    d: Span<'_, f32>,
    dx: Span<'_, f32>,
    accumulate: bool,
) {
    let scale = 1.0 / plane.pixels() as f32;
    pool.run(images, |_, image| {
        // SAFETY: nobody writes d in this region; tasks write disjoint images of dx.
        let (d, dx) = unsafe {
            let dx = dx
                .part(image * plane.elements()..(image + 1) * plane.elements())
                .get_mut();
            (d.part(image * plane.c..(image + 1) * plane.c).get(), dx)
        };
        for dx in dx.chunks_exact_mut(plane.c) {
            for (dx, d) in dx.iter_mut().zip(d) {
                *dx = if accumulate { *dx } else { 0.0 } + d * scale;
            }
        }
    });
}

/// Columns of one task of the classifier.
const COLUMNS: usize = 64;

fn column_tasks(cols: usize) -> impl Fn(usize) -> std::ops::Range<usize> + Sync {
    move |task| task * COLUMNS..((task + 1) * COLUMNS).min(cols)
}

/// y = x w^T + b; w is outputs x inputs.
pub(crate) fn linear(
    pool: &mut Pool,
    (images, inputs, outputs): (usize, usize, usize),
    x: Span<'_, f32>,
    w: Span<'_, f32>,
    b: Span<'_, f32>,
    y: Span<'_, f32>,
) {
    let columns = column_tasks(outputs);
    pool.run(outputs.div_ceil(COLUMNS), |_, task| {
        let cols = columns(task);
        // SAFETY: nobody writes x, w or b in this region; tasks write disjoint columns of y.
        unsafe {
            let (x, w, b) = (x.get(), w.get(), b.get());
            for image in 0..images {
                let row = y.part(image * outputs + cols.start..image * outputs + cols.end);
                row.get_mut().copy_from_slice(&b[cols.clone()]);
            }
            let out = y.part(cols.start..(images - 1) * outputs + cols.end);
            let size = (images, cols.len(), inputs);
            matmul(
                size,
                out,
                outputs,
                true,
                x,
                (inputs, 1),
                &w[cols.start * inputs..],
                (1, inputs),
            );
        }
    });
}

/// dx = d w, dw = d^T x, db = column sums of d; dw and db are added if `accumulate`, dx if `dx.1`.
pub(crate) fn linear_backward(
    pool: &mut Pool,
    (images, inputs, outputs): (usize, usize, usize),
    (x, w, d): (Span<'_, f32>, Span<'_, f32>, Span<'_, f32>),
    (dw, db, accumulate): (Span<'_, f32>, Span<'_, f32>, bool),
    dx: (Span<'_, f32>, bool),
) {
    let columns = column_tasks(inputs);
    pool.run(inputs.div_ceil(COLUMNS), |_, task| {
        let cols = columns(task);
        // SAFETY: nobody writes d, w or x in this region; tasks write disjoint columns of dx and dw.
        unsafe {
            let (d, w, x) = (d.get(), w.get(), x.get());
            let out = dx.0.part(cols.start..(images - 1) * inputs + cols.end);
            let size = (images, cols.len(), outputs);
            matmul(
                size,
                out,
                inputs,
                dx.1,
                d,
                (outputs, 1),
                &w[cols.start..],
                (inputs, 1),
            );
            let out = dw.part(cols.start..(outputs - 1) * inputs + cols.end);
            let size = (outputs, cols.len(), images);
            matmul(
                size,
                out,
                inputs,
                accumulate,
                d,
                (1, outputs),
                &x[cols.start..],
                (inputs, 1),
            );
        }
    });
    // SAFETY: no region runs.
    let (d, db) = unsafe { (d.get(), db.get_mut()) };
    if !accumulate {
        db.fill(0.0);
    }
    for row in d.chunks_exact(outputs) {
        db.iter_mut().zip(row).for_each(|(db, d)| *db += d);
    }
}

/// Sums of loss and hits; with `d` also the gradient of `scale` times the sum of losses.
pub(crate) fn loss(
    batch: &Batch<'_>,
    classes: usize,
    smoothing: f64,
    scale: f64,
    logits: Span<'_, f32>,
    d: Option<Span<'_, f32>>,
) -> Metrics {
    let (on, off) = targets(smoothing, classes);
    // SAFETY: no region runs, and logits and their gradient are different buffers.
    let (logits, mut d) = unsafe { (logits.get(), d.map(|d| d.get_mut())) };
    let mut metrics = Metrics {
        images: batch.images(),
        ..Metrics::default()
    };
    for (i, (row, &label)) in logits.chunks_exact(classes).zip(batch.labels).enumerate() {
        let label = label as usize;
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - max).exp()).sum();
        let log_sum = max + sum.ln();
        // -sum target * log p, with sum target = 1.
        let total: f64 = row.iter().map(|&v| f64::from(v)).sum();
        metrics.loss_sum += log_sum - (on - off) * f64::from(row[label]) - off * total;
        let (first, fifth) = hits(row, label);
        metrics.top1 += usize::from(first);
        metrics.top5 += usize::from(fifth);
        if let Some(d) = &mut d {
            for (class, (d, &v)) in d[i * classes..(i + 1) * classes]
                .iter_mut()
                .zip(row)
                .enumerate()
            {
                let target = if class == label { on } else { off };
                *d = (scale * ((f64::from(v) - log_sum).exp() - target)) as f32;
            }
        }
    }
    metrics
}

/// Values of one task of the update.
const UPDATE: usize = 1 << 18;

/// One tensor's update; `weight_decay` is zero where decay does not act.
pub(crate) fn update(
    pool: &mut Pool,
    w: Span<'_, f32>,
    momentum: Span<'_, f32>,
    grad: Span<'_, f32>,
    hyper: &Hyper,
    weight_decay: f64,
) {
    let (lr, m, decay) = (hyper.lr as f32, hyper.momentum as f32, weight_decay as f32);
    pool.run(w.len().div_ceil(UPDATE), |_, task| {
        let range = task * UPDATE..((task + 1) * UPDATE).min(w.len());
        // SAFETY: tasks own disjoint ranges of the three.
        let (w, a, g) = unsafe {
            let a = momentum.part(range.clone()).get_mut();
            (w.part(range.clone()).get_mut(), a, grad.part(range).get())
        };
        for ((w, a), g) in w.iter_mut().zip(a).zip(g) {
            let g = g + decay * *w;
            *a = m * *a + g;
            *w -= lr * if hyper.nesterov { g + m * *a } else { *a };
        }
    });
}
