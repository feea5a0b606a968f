//! The small kernels: classifier, loss, update.

use std::sync::OnceLock;

use super::memory::{Span, matmul};
use super::pool::Pool;
use crate::labels::{Target, hits, targets};
use crate::{Batch, Dropout, Metrics, TensorRule};

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

/// dx = d w, dw = d^T x, db = column sums of d; dw and db are added if `accumulate`.
pub(crate) fn linear_backward(
    pool: &mut Pool,
    (images, inputs, outputs): (usize, usize, usize),
    (x, w, d): (Span<'_, f32>, Span<'_, f32>, Span<'_, f32>),
    (dw, db, accumulate): (Span<'_, f32>, Span<'_, f32>, bool),
    dx: Span<'_, f32>,
) {
    let columns = column_tasks(inputs);
    pool.run(inputs.div_ceil(COLUMNS), |_, task| {
        let cols = columns(task);
        // SAFETY: nobody writes d, w or x in this region; tasks write disjoint columns of dx and dw.
        unsafe {
            let (d, w, x) = (d.get(), w.get(), x.get());
            let out = dx.part(cols.start..(images - 1) * inputs + cols.end);
            let size = (images, cols.len(), outputs);
            matmul(
                size,
                out,
                inputs,
                false,
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

/// Multiplies images x channels by the factors of dropout.
pub(crate) fn drop_out(dropout: Option<(Dropout, usize)>, channels: usize, x: Span<'_, f32>) {
    let Some((dropout, first)) = dropout else {
        return;
    };
    let mask = dropout.mask(channels);
    // SAFETY: no region runs.
    let x = unsafe { x.get_mut() };
    for (i, row) in x.chunks_exact_mut(channels).enumerate() {
        for (c, v) in row.iter_mut().enumerate() {
            *v *= mask.factor(first + i, c) as f32;
        }
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
    let single = targets(smoothing, classes);
    // SAFETY: no region runs, and logits and their gradient are different buffers.
    let (logits, mut d) = unsafe { (logits.get(), d.map(|d| d.get_mut())) };
    let mut metrics = Metrics {
        images: batch.images(),
        ..Metrics::default()
    };
    for (i, row) in logits.chunks_exact(classes).enumerate() {
        let target = Target::new(batch, i, single);
        let off = target.off;
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - max).exp()).sum();
        let log_sum = max + sum.ln();
        // -sum target * log p, with sum target = 1.
        let total: f64 = row.iter().map(|&v| f64::from(v)).sum();
        let above = |(class, on): (usize, f64)| (on - off) * f64::from(row[class]);
        let mut sharp = above(target.first);
        if target.second.0 != target.first.0 {
            sharp += above(target.second);
        }
        metrics.loss_sum += log_sum - sharp - off * total;
        let (first, fifth) = hits(row, target.label);
        metrics.top1 += usize::from(first);
        metrics.top5 += usize::from(fifth);
        if let Some(d) = &mut d {
            for (class, (d, &v)) in d[i * classes..(i + 1) * classes]
                .iter_mut()
                .zip(row)
                .enumerate()
            {
                *d = (scale * ((f64::from(v) - log_sum).exp() - target.of(class))) as f32;
            }
        }
    }
    metrics
}

/// Values of one task of the update.
const UPDATE: usize = 1 << 18;

/// One tensor's update; the gradient counts `scale` times. The rate is inside of `momentum` or outside, as the rule
/// says.
pub(crate) fn update(
    pool: &mut Pool,
    w: Span<'_, f32>,
    momentum: Span<'_, f32>,
    grad: Span<'_, f32>,
    rule: TensorRule,
    (m, nesterov, scale): (f64, bool, f64),
) {
    let (rate, m, decay, scale) = (rule.rate as f32, m as f32, rule.decay as f32, scale as f32);
    pool.run(w.len().div_ceil(UPDATE), |_, task| {
        let range = task * UPDATE..((task + 1) * UPDATE).min(w.len());
        // SAFETY: tasks own disjoint ranges of the three.
        let (w, a, g) = unsafe {
            let a = momentum.part(range.clone()).get_mut();
            (w.part(range.clone()).get_mut(), a, grad.part(range).get())
        };
        for ((w, a), g) in w.iter_mut().zip(a).zip(g) {
            let g = scale * g + decay * *w;
            if rule.is_rate_inside {
                *a = m * *a + rate * g;
                *w -= *a;
            } else {
                *a = m * *a + g;
                *w -= rate * if nesterov { g + m * *a } else { *a };
            }
        }
    });
}

/// Sums of w^2 and of (scale grad + decay w)^2 over one tensor, in an order that no number of threads changes.
pub(crate) fn squares(
    pool: &mut Pool,
    w: Span<'_, f32>,
    grad: Span<'_, f32>,
    scale: f64,
    decay: f64,
) -> (f64, f64) {
    /// Sums that run side by side.
    const LANES: usize = 8;
    let tasks = w.len().div_ceil(UPDATE);
    let sums: Vec<OnceLock<(f64, f64)>> = (0..tasks).map(|_| OnceLock::new()).collect();
    pool.run(tasks, |_, task| {
        let range = task * UPDATE..((task + 1) * UPDATE).min(w.len());
        // SAFETY: nobody writes either in this region.
        let (w, g) = unsafe { (w.part(range.clone()).get(), grad.part(range).get()) };
        let mut lanes = [(0.0, 0.0); LANES];
        for (w, g) in w.chunks(LANES).zip(g.chunks(LANES)) {
            for (sum, (w, g)) in lanes.iter_mut().zip(w.iter().zip(g)) {
                let (w, g) = (f64::from(*w), f64::from(*g));
                let g = scale * g + decay * w;
                *sum = (sum.0 + w * w, sum.1 + g * g);
            }
        }
        let add = |a: (f64, f64), b: &(f64, f64)| (a.0 + b.0, a.1 + b.1);
        let sum = lanes.iter().fold((0.0, 0.0), add);
        sums[task].set(sum).expect("each task once");
    });
    sums.into_iter().fold((0.0, 0.0), |a, sum| {
        let b = sum.into_inner().expect("every task is done");
        (a.0 + b.0, a.1 + b.1)
    })
}

/// v = v + rate (w - v), a moving average.
pub(crate) fn average(pool: &mut Pool, v: Span<'_, f32>, w: Span<'_, f32>, rate: f32) {
    pool.run(w.len().div_ceil(UPDATE), |_, task| {
        let range = task * UPDATE..((task + 1) * UPDATE).min(w.len());
        // SAFETY: tasks own disjoint ranges of v, and nobody writes w in this region.
        let (v, w) = unsafe { (v.part(range.clone()).get_mut(), w.part(range).get()) };
        average_values(v, w, rate);
    });
}

/// The same on one thread.
pub(crate) fn average_values(v: &mut [f32], w: &[f32], rate: f32) {
    v.iter_mut().zip(w).for_each(|(v, w)| *v += rate * (w - *v));
}
