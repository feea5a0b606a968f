//! Kernels that visit the pixels of a plane: input, pools, and the gradients of the pools.

use std::ops::Range;

use graph::{Plane, Window};

use super::fuse::{Epilogue, Finish, HEAD, Out, Partials, Read, SUMS, Source, finish_as, read_as};
use super::memory::Span;
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};
use crate::{MEAN, Pixels, STD};

/// Three values over and over.
const fn repeated(of: [f32; 3]) -> [f32; 48] {
    let mut all = [0.0; 48];
    let mut i = 0;
    while i < 48 {
        all[i] = of[i % 3];
        i += 1;
    }
    all
}

const MEANS: [f32; 48] = repeated(MEAN);
const SCALES: [f32; 48] = repeated([1.0 / STD[0], 1.0 / STD[1], 1.0 / STD[2]]);

/// Normalises values of three channels.
struct Normalise<'a, T: Element> {
    pixels: Pixels<'a>,
    y: &'a mut [T],
}

impl<T: Element> Job for Normalise<'_, T> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Self { pixels, y } = self;
        let whole = y.len() / (3 * I::LANES) * 3 * I::LANES;
        for i in (0..whole).step_by(I::LANES) {
            let phase = i % (3 * I::LANES);
            // SAFETY: a vector lies before `whole`, and a phase in the constants.
            unsafe {
                let x = match pixels {
                    Pixels::U8(p) => I::load_u8(p[i..i + I::LANES].as_ptr()),
                    Pixels::F32(p) => I::load(p[i..i + I::LANES].as_ptr()),
                };
                let centred = I::sub(x, I::load(MEANS[phase..phase + I::LANES].as_ptr()));
                let scale = I::load(SCALES[phase..phase + I::LANES].as_ptr());
                T::store::<I>(y[i..i + I::LANES].as_mut_ptr(), I::mul(centred, scale));
            }
        }
        for i in whole..y.len() {
            y[i] = T::from_f32((pixels.get(i) - MEANS[i % 3]) * SCALES[i % 3]);
        }
    }
}

/// y = (pixels - mean) / std.
pub(crate) fn input<T: Element>(
    pool: &mut Pool,
    level: Level,
    pixels: Pixels<'_>,
    images: usize,
    y: Span<'_, T>,
) {
    let per_image = pixels.len() / images;
    pool.run(images, |_, image| {
        let range = image * per_image..(image + 1) * per_image;
        // SAFETY: tasks write disjoint images of y; the engine has the level's instructions.
        unsafe {
            let y = y.part(range.clone()).get_mut();
            let pixels = pixels.slice(range);
            level.call(Normalise { pixels, y });
        }
    });
}

/// Rows of a plane that a task visits.
fn task_rows(plane: Plane) -> usize {
    (65_536 / (plane.w * plane.c)).clamp(1, plane.h)
}

/// Tasks of a kernel that visits every pixel and closes a value.
pub(crate) fn visits(plane: Plane, batch: usize) -> usize {
    batch * plane.h.div_ceil(task_rows(plane))
}

/// Image and rows of task `index`.
fn visit(plane: Plane, index: usize) -> (usize, Range<usize>) {
    let rows = task_rows(plane);
    let blocks = plane.h.div_ceil(rows);
    let first = index % blocks * rows;
    (index / blocks, first..(first + rows).min(plane.h))
}

/// Rows of results of a max-pool that a task makes: neighbours read the same rows.
const MAX_ROWS: usize = 8;

/// One row of results of a max-pool.
struct MaxRow<'a, T: Element, S: Read> {
    window: Window,
    source: S,
    image: usize,
    row: usize,
    y: Span<'a, T>,
    argmax: Option<Span<'a, u8>>,
}

impl<T: Element, S: Read> Job for MaxRow<'_, T, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let channels = self.window.output.c;
        for ow in 0..self.window.output.w {
            let mut c = 0;
            // SAFETY: the row and its windows are inside of the tensors.
            unsafe {
                while c + I::LANES <= channels {
                    match self.argmax {
                        Some(_) => self.channels::<I, true, true>(ow, c, I::LANES),
                        None => self.channels::<I, true, false>(ow, c, I::LANES),
                    }
                    c += I::LANES;
                }
                if c < channels {
                    self.channels::<I, false, true>(ow, c, channels - c);
                }
            }
        }
    }
}

impl<T: Element, S: Read> MaxRow<'_, T, S> {
    /// `WINS`: the winner is asked for.
    #[inline(always)]
    unsafe fn channels<I: Isa, const FULL: bool, const WINS: bool>(
        &self,
        ow: usize,
        c: usize,
        n: usize,
    ) {
        let Window {
            input,
            output,
            kernel,
            stride,
            pad_before,
        } = self.window;
        // SAFETY: as in `run`.
        unsafe {
            let mut best = I::splat(f32::NEG_INFINITY);
            let mut winner = I::zero();
            for kh in 0..kernel {
                let h = (self.row * stride + kh).wrapping_sub(pad_before);
                for kw in 0..kernel {
                    let w = (ow * stride + kw).wrapping_sub(pad_before);
                    if h < input.h && w < input.w {
                        let at = ((self.image * input.h + h) * input.w + w) * input.c;
                        let v = if FULL {
                            self.source.full::<I>(at, c)
                        } else {
                            self.source.part::<I>(at, c, n)
                        };
                        if WINS {
                            let tap = I::splat((kh * kernel + kw) as f32);
                            winner = I::select(I::gt(v, best), tap, winner);
                        }
                        // A maximum of NaN stays; one that comes now is `v`.
                        best = I::select(I::eq(best, best), I::max(best, v), best);
                    }
                }
            }
            let to = ((self.image * output.h + self.row) * output.w + ow) * output.c + c;
            if FULL {
                T::store::<I>(self.y.ptr().add(to), best);
            } else {
                T::store_part::<I>(self.y.ptr().add(to), best, n);
            }
            if let Some(argmax) = self.argmax {
                I::store_u8(argmax.ptr().add(to), winner, n);
            }
        }
    }
}

/// y = window maxima; the first in row order wins a tie. The maximum of a window with NaN is NaN.
pub(crate) fn max_pool<T: Element>(
    pool: &mut Pool,
    level: Level,
    window: Window,
    images: usize,
    x: Source<'_, T>,
    y: Span<'_, T>,
    argmax: Option<Span<'_, u8>>,
) {
    assert!(
        x.len() >= images * window.input.elements() && y.len() >= images * window.output.elements(),
        "the tensors hold their planes"
    );
    let rows = window.output.h;
    let blocks = rows.div_ceil(MAX_ROWS);
    pool.run(images * blocks, |_, task| {
        let (image, first) = (task / blocks, task % blocks * MAX_ROWS);
        for row in first..(first + MAX_ROWS).min(rows) {
            // SAFETY: nobody writes x in this region; tasks write disjoint rows of y and argmax.
            unsafe {
                read_as!(x, source => level.call(MaxRow { window, source, image, row, y, argmax }));
            }
        }
    });
}

/// Something that knows the gradient of every pixel.
pub(super) trait Gradient: Copy + Send + Sync {
    /// Channels `c..c + n` of a pixel.
    ///
    /// # Safety
    /// The pixel is inside of the plane, and nobody writes what is read.
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        image: usize,
        h: usize,
        w: usize,
        c: usize,
        n: usize,
    ) -> I::V;
}

/// Rows of a plane: the gradient of each pixel goes through an epilogue.
struct Rows<'a, T: Element, G: Gradient, F: Finish> {
    gradient: G,
    finish: F,
    out: Out<'a, T>,
    plane: Plane,
    image: usize,
    rows: Range<usize>,
    record: Span<'a, f32>,
    columns: usize,
}

impl<T: Element, G: Gradient, F: Finish> Job for Rows<'_, T, G, F> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let mut c = 0;
        // SAFETY: the rows are inside of the plane and belong to this task, and so does the record.
        unsafe {
            while c + I::LANES <= self.plane.c {
                self.channels::<I, true>(c, I::LANES);
                c += I::LANES;
            }
            if c < self.plane.c {
                self.channels::<I, false>(c, self.plane.c - c);
            }
        }
    }
}

impl<T: Element, G: Gradient, F: Finish> Rows<'_, T, G, F> {
    #[inline(always)]
    unsafe fn channels<I: Isa, const FULL: bool>(&self, c: usize, n: usize) {
        let plane = self.plane;
        // SAFETY: as in `run`.
        unsafe {
            let mut sums = [I::zero(); SUMS];
            for h in self.rows.clone() {
                for w in 0..plane.w {
                    let v = self.gradient.at::<I, FULL>(self.image, h, w, c, n);
                    let at = ((self.image * plane.h + h) * plane.w + w) * plane.c;
                    let v = self.finish.apply::<I>(v, at, c, n, FULL, &mut sums);
                    self.out.store::<I>(v, at, c, n, FULL);
                }
            }
            for (row, sum) in sums.iter().enumerate() {
                I::store(self.record.ptr().add(HEAD + row * self.columns + c), *sum);
            }
        }
    }
}

/// dx = the gradient of every pixel, closed by `epilogue`.
pub(super) fn visit_all<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    gradient: impl Gradient,
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Partials<'_>,
) {
    assert!(
        out.y.len() >= images * plane.elements(),
        "the gradient holds its plane"
    );
    pool.run(visits(plane, images), |_, task| {
        let (image, rows) = visit(plane, task);
        let (record, columns) = (partials.record(task), partials.columns);
        // SAFETY: nobody writes what the gradient and the epilogue read in this region (but the results themselves,
        // which are read just before they are replaced); tasks write disjoint rows and records.
        unsafe {
            record.get_mut()[0] = (rows.len() * plane.w) as f32;
            finish_as!(epilogue, finish => level.call(Rows {
                gradient,
                finish,
                out,
                plane,
                image,
                rows,
                record,
                columns,
            }));
        }
    });
}

/// d / pixels, everywhere on the plane.
#[derive(Clone, Copy)]
struct Spread<'a> {
    d: Span<'a, f32>,
    channels: usize,
    scale: f32,
}

impl Gradient for Spread<'_> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        image: usize,
        _: usize,
        _: usize,
        c: usize,
        n: usize,
    ) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let p = self.d.ptr().add(image * self.channels + c);
            let d = if FULL { I::load(p) } else { I::load_part(p, n) };
            I::mul(d, I::splat(self.scale))
        }
    }
}

/// dx = d / pixels, everywhere on the plane, closed by `epilogue`.
pub(crate) fn avg_pool_backward<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    d: Span<'_, f32>,
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Partials<'_>,
) {
    assert!(d.len() >= images * plane.c, "a gradient for each channel");
    let spread = Spread {
        d,
        channels: plane.c,
        scale: 1.0 / plane.pixels() as f32,
    };
    visit_all(pool, level, plane, images, spread, out, epilogue, partials);
}

/// The sum over the windows that a pixel won.
#[derive(Clone, Copy)]
struct Won<'a, T: Element> {
    window: Window,
    argmax: Span<'a, u8>,
    d: Span<'a, T>,
}

impl<T: Element> Gradient for Won<'_, T> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        image: usize,
        h: usize,
        w: usize,
        c: usize,
        n: usize,
    ) -> I::V {
        let Window {
            output,
            kernel,
            stride,
            pad_before,
            ..
        } = self.window;
        // Windows o with o s - pad <= h < o s - pad + K.
        let covering = |at: usize, count: usize| {
            let last = (at + pad_before) / stride;
            let first = (at + pad_before + 1)
                .saturating_sub(kernel)
                .div_ceil(stride);
            first..(last + 1).min(count)
        };
        // SAFETY: the caller's word.
        unsafe {
            let mut sum = I::zero();
            for oh in covering(h, output.h) {
                for ow in covering(w, output.w) {
                    let (kh, kw) = (h + pad_before - oh * stride, w + pad_before - ow * stride);
                    let at = ((image * output.h + oh) * output.w + ow) * output.c + c;
                    let tap = I::splat((kh * kernel + kw) as f32);
                    let (won, d) = if FULL {
                        let won = I::load_u8(self.argmax.ptr().add(at));
                        (won, T::load::<I>(self.d.ptr().add(at)))
                    } else {
                        (
                            I::load_u8_part(self.argmax.ptr().add(at), n),
                            T::load_part::<I>(self.d.ptr().add(at), n),
                        )
                    };
                    sum = I::add(sum, I::select(I::eq(won, tap), d, I::zero()));
                }
            }
            sum
        }
    }
}

/// Sends d to the winners of each window, closed by `epilogue`.
pub(crate) fn max_pool_backward<T: Element>(
    pool: &mut Pool,
    level: Level,
    window: Window,
    images: usize,
    argmax: Span<'_, u8>,
    d: Span<'_, T>,
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Partials<'_>,
) {
    let len = images * window.output.elements();
    assert!(
        argmax.len() >= len && d.len() >= len,
        "the tensors hold their planes"
    );
    let won = Won { window, argmax, d };
    visit_all(
        pool,
        level,
        window.input,
        images,
        won,
        out,
        epilogue,
        partials,
    );
}

/// What is summed up over the pixels of an image, for each channel.
trait Terms<const K: usize>: Copy + Send + Sync {
    /// Those of channels `c..c + n` of the pixel whose channels start at `at`; the other lanes are zero.
    ///
    /// # Safety
    /// The channels are inside, and nobody writes what is read.
    unsafe fn at<I: Isa>(&self, at: usize, c: usize, n: usize) -> [I::V; K];
}

/// Channels of a task of [`plane_sums`].
const CHANNELS: usize = 256;

/// Sums over the pixels of an image in their order, some channels at a time.
struct PlaneSums<'a, T: Terms<K>, const K: usize> {
    terms: T,
    plane: Plane,
    image: usize,
    channels: Range<usize>,
    /// K sums, images x channels each.
    sums: [Span<'a, f32>; K],
    scale: f32,
}

impl<T: Terms<K>, const K: usize> Job for PlaneSums<'_, T, K> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let (mut c, end) = (self.channels.start, self.channels.end);
        // SAFETY: the channels are inside of the image and belong to this task.
        unsafe {
            while c + 4 * I::LANES <= end {
                self.vectors::<I, 4>(c, I::LANES);
                c += 4 * I::LANES;
            }
            while c < end {
                self.vectors::<I, 1>(c, I::LANES.min(end - c));
                c += I::LANES;
            }
        }
    }
}

impl<T: Terms<K>, const K: usize> PlaneSums<'_, T, K> {
    /// `G` vectors from channel `c` on, of `n` channels each.
    #[inline(always)]
    unsafe fn vectors<I: Isa, const G: usize>(&self, c: usize, n: usize) {
        let plane = self.plane;
        // SAFETY: as in `run`.
        unsafe {
            let mut sums = [[I::zero(); K]; G];
            for pixel in 0..plane.pixels() {
                let at = (self.image * plane.pixels() + pixel) * plane.c;
                for (v, sums) in sums.iter_mut().enumerate() {
                    let terms = self.terms.at::<I>(at, c + v * I::LANES, n);
                    for (sum, term) in sums.iter_mut().zip(terms) {
                        *sum = I::add(*sum, term);
                    }
                }
            }
            for (v, sums) in sums.iter().enumerate() {
                for (k, sum) in sums.iter().enumerate() {
                    let to = self.image * plane.c + c + v * I::LANES;
                    let sum = I::mul(*sum, I::splat(self.scale));
                    I::store_part(self.sums[k].ptr().add(to), sum, n);
                }
            }
        }
    }
}

/// Sums over planes, times `scale`.
fn plane_sums<T: Terms<K>, const K: usize>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    terms: T,
    sums: [Span<'_, f32>; K],
    scale: f32,
) {
    assert!(
        sums.iter().all(|sums| sums.len() >= images * plane.c),
        "a sum for each channel"
    );
    let blocks = plane.c.div_ceil(CHANNELS);
    pool.run(images * blocks, |_, task| {
        let first = task % blocks * CHANNELS;
        // SAFETY: nobody writes what is read in this region; tasks write sums of their own.
        unsafe {
            level.call(PlaneSums {
                terms,
                plane,
                image: task / blocks,
                channels: first..(first + CHANNELS).min(plane.c),
                sums,
                scale,
            });
        }
    });
}

/// A tensor's values.
#[derive(Clone, Copy)]
struct Value<S: Read>(S);

impl<S: Read> Terms<1> for Value<S> {
    #[inline(always)]
    unsafe fn at<I: Isa>(&self, at: usize, c: usize, n: usize) -> [I::V; 1] {
        // SAFETY: the caller's word.
        unsafe {
            match n == I::LANES {
                true => [self.0.full::<I>(at, c)],
                false => [self.0.part::<I>(at, c, n)],
            }
        }
    }
}

/// y = mean over the plane.
pub(crate) fn avg_pool<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    x: Source<'_, T>,
    y: Span<'_, f32>,
) {
    assert!(
        x.len() >= images * plane.elements(),
        "the tensor holds its planes"
    );
    let scale = 1.0 / plane.pixels() as f32;
    read_as!(x, x => plane_sums(pool, level, plane, images, Value(x), [y], scale));
}

/// g, g (z - mean) and z - mean.
#[derive(Clone, Copy)]
struct Gated<'a, T: Element> {
    g: Span<'a, T>,
    z: Span<'a, T>,
    mean: &'a [f32],
}

impl<T: Element> Terms<3> for Gated<'_, T> {
    #[inline(always)]
    unsafe fn at<I: Isa>(&self, at: usize, c: usize, n: usize) -> [I::V; 3] {
        // SAFETY: the caller's word.
        unsafe {
            let g = T::load_part::<I>(self.g.ptr().add(at + c), n);
            let z = T::load_part::<I>(self.z.ptr().add(at + c), n);
            let centred = I::sub(z, I::load_part(self.mean.as_ptr().add(c), n));
            [g, I::mul(g, centred), centred]
        }
    }
}

/// The sums of g, of g (z - mean) and of z - mean over each image's plane.
pub(crate) fn gated_sums<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    (g, z, mean): (Span<'_, T>, Span<'_, T>, &[f32]),
    sums: [Span<'_, f32>; 3],
) {
    let len = images * plane.elements();
    assert!(
        g.len() >= len && z.len() >= len && mean.len() >= plane.c,
        "the tensors hold their planes"
    );
    let terms = Gated { g, z, mean };
    plane_sums(pool, level, plane, images, terms, sums, 1.0);
}

/// dz = a g + b (z - mean) + c; a and c are of images x channels, b and mean of channels.
struct GatedRows<'a, T: Element> {
    g: Span<'a, T>,
    z: Span<'a, T>,
    mean: &'a [f32],
    a: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    dz: Span<'a, T>,
    plane: Plane,
    image: usize,
    rows: Range<usize>,
}

impl<T: Element> Job for GatedRows<'_, T> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let channels = self.plane.c;
        let of_image = self.image * channels;
        // SAFETY: the rows are inside of the plane and belong to this task.
        unsafe {
            for pixel in self.rows.start * self.plane.w..self.rows.end * self.plane.w {
                let at = (self.image * self.plane.pixels() + pixel) * channels;
                for c in (0..channels).step_by(I::LANES) {
                    let n = I::LANES.min(channels - c);
                    let by_channel = |row: &[f32]| I::load_part(row.as_ptr().add(c), n);
                    let by_image =
                        |table: &[f32]| I::load_part(table.as_ptr().add(of_image + c), n);
                    let g = T::load_part::<I>(self.g.ptr().add(at + c), n);
                    let z = T::load_part::<I>(self.z.ptr().add(at + c), n);
                    let centred = I::sub(z, by_channel(self.mean));
                    let rest = I::fma(by_channel(self.b), centred, by_image(self.c));
                    let v = I::fma(by_image(self.a), g, rest);
                    T::store_part::<I>(self.dz.ptr().add(at + c), v, n);
                }
            }
        }
    }
}

/// dz = a g + b (z - mean) + c; a and c are of images x channels, b and mean of channels.
pub(crate) fn gated_gradient<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    (g, z, mean): (Span<'_, T>, Span<'_, T>, &[f32]),
    (a, b, c): (&[f32], &[f32], &[f32]),
    dz: Span<'_, T>,
) {
    let (len, of_images) = (images * plane.elements(), images * plane.c);
    assert!(
        g.len().min(z.len()).min(dz.len()) >= len
            && a.len().min(c.len()) >= of_images
            && b.len().min(mean.len()) >= plane.c,
        "the tensors hold their planes"
    );
    pool.run(visits(plane, images), |_, task| {
        let (image, rows) = visit(plane, task);
        // SAFETY: nobody writes what is read in this region; tasks write disjoint rows.
        unsafe {
            level.call(GatedRows {
                g,
                z,
                mean,
                a,
                b,
                c,
                dz,
                plane,
                image,
                rows,
            });
        }
    });
}

/// Pixels of the 2 x 2 window at `window`, those of a side that there are.
fn half_window(side: usize, window: usize) -> Range<usize> {
    2 * window..(2 * window + 2).min(side)
}

/// Share of each pixel of a 2 x 2 window in its mean.
fn half_share(plane: Plane, h: usize, w: usize) -> f32 {
    let pixels = half_window(plane.h, h).len() * half_window(plane.w, w).len();
    1.0 / pixels as f32
}

/// One row of means over 2 x 2 windows.
struct HalfRow<'a, T: Element> {
    plane: Plane,
    x: Span<'a, T>,
    y: Span<'a, T>,
    image: usize,
    row: usize,
}

impl<T: Element> Job for HalfRow<'_, T> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Plane { h, w, c: channels } = self.plane;
        let (rows, columns) = (h.div_ceil(2), w.div_ceil(2));
        // SAFETY: the row and its windows are inside of the tensors, and the row belongs to this task.
        unsafe {
            for ow in 0..columns {
                let share = I::splat(half_share(self.plane, self.row, ow));
                let to = ((self.image * rows + self.row) * columns + ow) * channels;
                for c in (0..channels).step_by(I::LANES) {
                    let n = I::LANES.min(channels - c);
                    let mut sum = I::zero();
                    for ih in half_window(h, self.row) {
                        for iw in half_window(w, ow) {
                            let at = ((self.image * h + ih) * w + iw) * channels;
                            sum = I::add(sum, T::load_part::<I>(self.x.ptr().add(at + c), n));
                        }
                    }
                    T::store_part::<I>(self.y.ptr().add(to + c), I::mul(sum, share), n);
                }
            }
        }
    }
}

/// y = means over 2 x 2 windows.
pub(crate) fn half_pool<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    x: Span<'_, T>,
    y: Span<'_, T>,
) {
    let (rows, columns) = (plane.h.div_ceil(2), plane.w.div_ceil(2));
    assert!(
        x.len() >= images * plane.elements() && y.len() >= images * rows * columns * plane.c,
        "the tensors hold their planes"
    );
    pool.run(images * rows, |_, task| {
        let (image, row) = (task / rows, task % rows);
        // SAFETY: nobody writes x in this region; tasks write disjoint rows of y.
        unsafe {
            level.call(HalfRow {
                plane,
                x,
                y,
                image,
                row,
            });
        }
    });
}

/// Each pixel's share of the gradient of its window's mean.
#[derive(Clone, Copy)]
struct Halved<'a, T: Element> {
    plane: Plane,
    d: Span<'a, T>,
}

impl<T: Element> Gradient for Halved<'_, T> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        image: usize,
        h: usize,
        w: usize,
        c: usize,
        n: usize,
    ) -> I::V {
        let (h, w) = (h / 2, w / 2);
        let (rows, columns) = (self.plane.h.div_ceil(2), self.plane.w.div_ceil(2));
        let at = ((image * rows + h) * columns + w) * self.plane.c + c;
        // SAFETY: the caller's word.
        unsafe {
            let p = self.d.ptr().add(at);
            let d = if FULL {
                T::load::<I>(p)
            } else {
                T::load_part::<I>(p, n)
            };
            I::mul(d, I::splat(half_share(self.plane, h, w)))
        }
    }
}

/// Spreads d over the windows of 2 x 2, closed by `epilogue`; `plane` is that of the results.
pub(crate) fn half_pool_backward<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    d: Span<'_, T>,
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Partials<'_>,
) {
    let windows = plane.h.div_ceil(2) * plane.w.div_ceil(2);
    assert!(
        d.len() >= images * windows * plane.c,
        "a gradient for each window"
    );
    let halved = Halved { plane, d };
    visit_all(pool, level, plane, images, halved, out, epilogue, partials);
}
