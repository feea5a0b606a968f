//! Convolution as matrix products over gathered tiles (implicit GEMM), NHWC.
//!
//! Forward: a task gathers the windows of a few hundred output pixels into a matrix of pixels x (K K C), multiplies
//! it with the weight, (K K C) x O, and takes the batch statistics of what it just wrote.
//!
//! Gradient of the weight: a task owns a tile of the weight and sums over all pixels, so no sum is split over tasks.
//!
//! Gradient of the input: a pixel (h, w) meets the taps kh with (h + pad - kh) divisible by the stride. For each of
//! the stride^2 residues of (h, w) those taps are the same for all pixels, so each residue is a convolution of
//! stride 1 over the gradient of the output, with the weight's taps turned round and O and C exchanged.

use std::ops::Range;

use graph::{Geometry, Plane, Tiling, WEIGHT_CHUNK};

use super::memory::{Scratch, Span, matmul};
use super::pool::Pool;

/// Neighbouring taps in one row of the window: they are contiguous in NHWC.
#[derive(Clone, Copy)]
struct Run {
    /// Row relative to the anchor.
    dy: isize,
    /// First column relative to the anchor.
    dx: isize,
    /// Taps.
    len: usize,
}

/// Reads windows of `plane`: row r of the matrix belongs to point r of a grid, whose anchor is `stride` times it.
struct Gather {
    plane: Plane,
    grid: (usize, usize),
    stride: usize,
    runs: Vec<Run>,
}

impl Gather {
    fn forward(g: &Geometry) -> Self {
        let pad = g.pad() as isize;
        let runs = (0..g.kernel)
            .map(|kh| Run {
                dy: kh as isize - pad,
                dx: -pad,
                len: g.kernel,
            })
            .collect();
        Self {
            plane: g.input,
            grid: (g.output.h, g.output.w),
            stride: g.stride,
            runs,
        }
    }

    /// Values in a row of the matrix.
    fn depth(&self) -> usize {
        self.runs.iter().map(|r| r.len).sum::<usize>() * self.plane.c
    }

    /// Image and anchor of grid point `row`.
    fn anchor(&self, row: usize) -> (usize, isize, isize) {
        let (gh, gw) = self.grid;
        let (image, point) = (row / (gh * gw), row % (gh * gw));
        (
            image,
            (point / gw * self.stride) as isize,
            (point % gw * self.stride) as isize,
        )
    }

    /// Where in `src` the window's row starts at column `x` (which may lie outside), if that row exists.
    fn line(&self, image: usize, y: isize) -> Option<usize> {
        let p = self.plane;
        (0..p.h as isize)
            .contains(&y)
            .then(|| (image * p.h + y as usize) * p.w * p.c)
    }

    /// Copies taps `dx..dx + len` of the line at `line` into `out`, zeros outside.
    fn copy(&self, src: &[f32], line: Option<usize>, x: isize, len: usize, out: &mut [f32]) {
        let (w, c) = (self.plane.w as isize, self.plane.c);
        let (from, to) = (x.clamp(0, w), (x + len as isize).clamp(0, w));
        let Some(line) = line.filter(|_| from < to) else {
            out.fill(0.0);
            return;
        };
        let (before, inside) = ((from - x) as usize * c, (to - from) as usize * c);
        out[..before].fill(0.0);
        out[before..before + inside].copy_from_slice(&src[line + from as usize * c..][..inside]);
        out[before + inside..].fill(0.0);
    }

    /// Whole rows of the matrix.
    fn rows(&self, src: &[f32], rows: Range<usize>, out: &mut [f32]) {
        let depth = self.depth();
        for (row, out) in rows.zip(out.chunks_exact_mut(depth)) {
            let (image, y, x) = self.anchor(row);
            let mut at = 0;
            for run in &self.runs {
                let len = run.len * self.plane.c;
                self.copy(
                    src,
                    self.line(image, y + run.dy),
                    x + run.dx,
                    run.len,
                    &mut out[at..at + len],
                );
                at += len;
            }
        }
    }

    /// The taps one by one, as offsets from the anchor.
    fn taps(&self) -> Vec<(isize, isize)> {
        let of = |r: &Run| {
            let (dy, dx) = (r.dy, r.dx);
            (0..r.len as isize).map(move |i| (dy, dx + i))
        };
        self.runs.iter().flat_map(of).collect()
    }

    /// Columns `cols` of some rows of the matrix.
    fn cols(
        &self,
        taps: &[(isize, isize)],
        src: &[f32],
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
    ) {
        let c = self.plane.c;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            let (image, y, x) = self.anchor(row);
            let mut at = 0;
            while at < cols.len() {
                let (tap, skip) = ((cols.start + at) / c, (cols.start + at) % c);
                let len = (c - skip).min(cols.len() - at);
                let (dy, dx) = taps[tap];
                let column = x + dx;
                let line = self
                    .line(image, y + dy)
                    .filter(|_| (0..self.plane.w as isize).contains(&column));
                match line {
                    Some(line) => {
                        let from = line + column as usize * c + skip;
                        out[at..at + len].copy_from_slice(&src[from..from + len]);
                    }
                    None => out[at..at + len].fill(0.0),
                }
                at += len;
            }
        }
    }
}

/// y = x * w. With `partials` also, for each row task, mean and sum of squared deviations of every channel.
pub(crate) fn forward(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    g: &Geometry,
    tiling: &Tiling,
    x: Span<'_, f32>,
    w: Span<'_, f32>,
    y: Span<'_, f32>,
    partials: Option<Span<'_, f32>>,
) {
    let gather = Gather::forward(g);
    let (depth, o) = (g.depth(), g.output.c);
    pool.run(tiling.tasks(), |worker, task| {
        let (rows, cols) = tiling.task(task);
        // SAFETY: nobody writes x or w in this region, and tasks write disjoint tiles of y and of the partials.
        unsafe {
            let (x, w) = (x.get(), w.get());
            let a = if g.is_matmul() {
                &x[rows.start * depth..rows.end * depth]
            } else {
                let tile = scratch.of(worker).part(0..rows.len() * depth).get_mut();
                gather.rows(x, rows.clone(), tile);
                tile
            };
            let out = y.part(rows.start * o + cols.start..(rows.end - 1) * o + cols.end);
            let size = (rows.len(), cols.len(), depth);
            matmul(size, out, o, false, a, (depth, 1), &w[cols.start..], (o, 1));
            if let Some(partials) = partials {
                let base = task / tiling.col_tasks() * 2 * o;
                let mean = partials.part(base + cols.start..base + cols.end).get_mut();
                let m2 = partials
                    .part(base + o + cols.start..base + o + cols.end)
                    .get_mut();
                tile_moments(
                    rows.len(),
                    |r| out.part(r * o..r * o + cols.len()).get(),
                    mean,
                    m2,
                );
            }
        }
    });
}

/// Mean and sum of squared deviations of each column, in two passes over a tile that is still in cache.
fn tile_moments<'a>(
    rows: usize,
    row: impl Fn(usize) -> &'a [f32],
    mean: &mut [f32],
    m2: &mut [f32],
) {
    mean.fill(0.0);
    m2.fill(0.0);
    for r in 0..rows {
        mean.iter_mut().zip(row(r)).for_each(|(sum, v)| *sum += v);
    }
    mean.iter_mut().for_each(|sum| *sum /= rows as f32);
    for r in 0..rows {
        m2.iter_mut()
            .zip(row(r))
            .zip(&*mean)
            .for_each(|((sum, v), mean)| *sum += (v - mean) * (v - mean));
    }
}

/// dw = sum over pixels of window x gradient (added to what is there if `accumulate`).
pub(crate) fn backward_weight(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    g: &Geometry,
    tiling: &Tiling,
    pixels: usize,
    x: Span<'_, f32>,
    d: Span<'_, f32>,
    dw: Span<'_, f32>,
    accumulate: bool,
) {
    let gather = Gather::forward(g);
    let taps = gather.taps();
    let (depth, o) = (g.depth(), g.output.c);
    pool.run(tiling.tasks(), |worker, task| {
        let (rows, cols) = tiling.task(task);
        // SAFETY: nobody writes x or d in this region, and tasks write disjoint tiles of dw.
        unsafe {
            let (x, d) = (x.get(), d.get());
            let out = dw.part(rows.start * o + cols.start..(rows.end - 1) * o + cols.end);
            for from in (0..pixels).step_by(WEIGHT_CHUNK) {
                let to = (from + WEIGHT_CHUNK).min(pixels);
                let (a, strides) = if g.is_matmul() {
                    (&x[from * depth + rows.start..], (1, depth))
                } else {
                    let tile = scratch
                        .of(worker)
                        .part(0..(to - from) * rows.len())
                        .get_mut();
                    gather.cols(&taps, x, from..to, rows.clone(), tile);
                    (&*tile, (1, rows.len()))
                };
                let size = (rows.len(), cols.len(), to - from);
                matmul(
                    size,
                    out,
                    o,
                    accumulate || from > 0,
                    a,
                    strides,
                    &d[from * o + cols.start..],
                    (o, 1),
                );
            }
        }
    });
}

/// One residue of the input's pixels modulo the stride.
struct Phase {
    /// Row and column residue.
    at: (usize, usize),
    gather: Gather,
    /// The taps in the order in which the gather reads them: (kh, kw).
    taps: Vec<(usize, usize)>,
    /// Where its weights start in the packed buffer.
    packed: usize,
}

impl Phase {
    /// Where channels `cols` of grid point `row` lie in the input.
    fn pixel(&self, g: &Geometry, row: usize, cols: &Range<usize>) -> Range<usize> {
        let (image, h, w) = self.gather.anchor(row);
        let (h, w) = (
            h as usize * g.stride + self.at.0,
            w as usize * g.stride + self.at.1,
        );
        let at = ((image * g.input.h + h) * g.input.w + w) * g.input.c;
        at + cols.start..at + cols.end
    }

    /// The gradient of pixels that no window covers.
    ///
    /// # Safety
    /// Nobody else touches these rows and columns of `dx` meanwhile.
    unsafe fn zero(
        &self,
        g: &Geometry,
        rows: Range<usize>,
        cols: Range<usize>,
        dx: Span<'_, f32>,
        accumulate: bool,
    ) {
        for row in rows.filter(|_| !accumulate) {
            // SAFETY: the caller's word.
            unsafe { dx.part(self.pixel(g, row, &cols)).get_mut() }.fill(0.0);
        }
    }
}

fn phases(g: &Geometry) -> Vec<Phase> {
    let (s, pad) = (g.stride, g.pad());
    // For residue r: the taps k, largest first, and the output index minus the grid index for each.
    let axis = |r: usize| -> Vec<(usize, isize)> {
        let taps = (0..g.kernel)
            .rev()
            .filter(|k| (r + pad + s * g.kernel - k).is_multiple_of(s));
        taps.map(|k| (k, (r + pad) as isize - k as isize))
            .map(|(k, d)| (k, d.div_euclid(s as isize)))
            .collect()
    };
    let mut packed = 0;
    let mut phases = vec![];
    for rh in 0..s.min(g.input.h) {
        for rw in 0..s.min(g.input.w) {
            let (ys, xs) = (axis(rh), axis(rw));
            let runs = ys.iter().filter_map(|&(_, dy)| {
                xs.first().map(|&(_, dx)| Run {
                    dy,
                    dx,
                    len: xs.len(),
                })
            });
            let runs = runs.collect();
            let taps: Vec<_> = ys
                .iter()
                .flat_map(|&(kh, _)| xs.iter().map(move |&(kw, _)| (kh, kw)))
                .collect();
            let grid = ((g.input.h - rh).div_ceil(s), (g.input.w - rw).div_ceil(s));
            let size = taps.len() * g.output.c * g.input.c;
            let gather = Gather {
                plane: g.output,
                grid,
                stride: 1,
                runs,
            };
            phases.push(Phase {
                at: (rh, rw),
                gather,
                taps,
                packed,
            });
            packed += size;
        }
    }
    phases
}

/// dx = gradient of the input (added to what is there if `accumulate`). `packed` holds the weight's taps turned
/// round, for each phase (taps, O) x C.
pub(crate) fn backward_input(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    g: &Geometry,
    tiling: &Tiling,
    batch: usize,
    w: Span<'_, f32>,
    packed: Span<'_, f32>,
    d: Span<'_, f32>,
    dx: Span<'_, f32>,
    accumulate: bool,
) {
    let phases = phases(g);
    let (c, o) = (g.input.c, g.output.c);
    let jobs: Vec<(usize, usize)> = phases
        .iter()
        .enumerate()
        .flat_map(|(p, phase)| (0..phase.taps.len()).map(move |t| (p, t)))
        .collect();
    pool.run(jobs.len(), |_, job| {
        let (p, t) = jobs[job];
        let (kh, kw) = phases[p].taps[t];
        let start = phases[p].packed + t * o * c;
        // SAFETY: nobody writes w in this region, and each job writes its own o x c block.
        let (from, to) = unsafe { (w.get(), packed.part(start..start + o * c).get_mut()) };
        transpose(&from[(kh * g.kernel + kw) * c * o..][..c * o], c, o, to);
    });
    // The last phases may have fewer rows; every phase has as many tasks as the first, some of them empty.
    pool.run(phases.len() * tiling.tasks(), |worker, task| {
        let phase = &phases[task / tiling.tasks()];
        let (rows, cols) = tiling.task(task % tiling.tasks());
        let (gh, gw) = phase.gather.grid;
        let rows = rows.start..rows.end.min(batch * gh * gw);
        if rows.is_empty() {
            return;
        }
        let depth = phase.gather.depth();
        // SAFETY: nobody writes d or the packed weights in this region, and tasks write disjoint tiles of dx.
        unsafe {
            let d = d.get();
            if depth == 0 {
                phase.zero(g, rows, cols, dx, accumulate);
                return;
            }
            let share = scratch.of(worker);
            let gathered = if g.is_matmul() { 0 } else { rows.len() * depth };
            let a = if g.is_matmul() {
                &d[rows.start * o..rows.end * o]
            } else {
                let tile = share.part(0..gathered).get_mut();
                phase.gather.rows(d, rows.clone(), tile);
                tile
            };
            let size = (rows.len(), cols.len(), depth);
            let b = &packed.part(phase.packed..phase.packed + depth * c).get()[cols.start..];
            if g.stride == 1 {
                let out = dx.part(rows.start * c + cols.start..(rows.end - 1) * c + cols.end);
                matmul(size, out, c, accumulate, a, (depth, 1), b, (c, 1));
                return;
            }
            let result = share.part(gathered..gathered + rows.len() * cols.len());
            matmul(size, result, cols.len(), false, a, (depth, 1), b, (c, 1));
            for (row, values) in rows.zip(result.get().chunks_exact(cols.len())) {
                let to = dx.part(phase.pixel(g, row, &cols)).get_mut();
                if accumulate {
                    to.iter_mut().zip(values).for_each(|(to, v)| *to += v);
                } else {
                    to.copy_from_slice(values);
                }
            }
        }
    });
}

/// `from` is rows x cols, `to` becomes cols x rows.
fn transpose(from: &[f32], rows: usize, cols: usize, to: &mut [f32]) {
    const BLOCK: usize = 16;
    for r0 in (0..rows).step_by(BLOCK) {
        for c0 in (0..cols).step_by(BLOCK) {
            for c in c0..(c0 + BLOCK).min(cols) {
                for r in r0..(r0 + BLOCK).min(rows) {
                    to[c * rows + r] = from[r * cols + c];
                }
            }
        }
    }
}
