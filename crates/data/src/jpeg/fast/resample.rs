//! Planes of YCbCr samples become the image at its target size: each plane is resampled from its own resolution, then
//! colours are converted once.
//!
//! libjpeg widens subsampled colours before anything else ("fancy" upsampling: 3/4 of a sample and 1/4 of the next).
//! Both steps are sums with fixed weights, so an [`Axis`] holds the weights of both in one: the result differs from
//! the exact decoder's by what that rounds and clamps in between.

use super::simd::Vector;
use crate::Resize;

/// Fraction bits of weights.
const WEIGHT: u32 = 14;
/// Fraction bits of samples between and after the passes.
const FRACTION: u32 = 6;

/// How samples of a plane become pixels along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// A sample is a pixel.
    One,
    /// A sample stands for two pixels, each of which has a quarter of the sample next to it.
    Triangle,
    /// A sample is repeated.
    Twice,
}

/// Fraction bits of a [`Filter`]'s weights, and of those that are made of them.
const FINE: u32 = 18;
const FINER: u32 = FINE + 2;

/// A table with a row for each tap or sample and a column for each output: loops run along the rows, many outputs at a
/// time.
#[derive(Default)]
struct Grid<T> {
    values: Vec<T>,
    width: usize,
}

impl<T: Copy + Default> Grid<T> {
    /// Of this size; what is in it is whatever was there.
    #[inline(always)]
    fn set(&mut self, rows: usize, width: usize) {
        self.values.resize(rows * width, T::default());
        self.width = width;
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[T] {
        &self.values[i * self.width..][..self.width]
    }

    #[inline(always)]
    fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.values[i * self.width..][..self.width]
    }
}

/// The weights of a resize along one axis, of pixels: what [`crate::resize`] uses, in fixed point.
#[derive(Default)]
pub(super) struct Filter {
    /// The first pixel of each output.
    first: Vec<u32>,
    /// How many pixels each has.
    taps: Vec<u32>,
    /// By tap and output; what an output has not is 0.
    weights: Grid<i32>,
    /// The same before they are scaled; what they have to be multiplied with; and where the first pixel is from the
    /// middle.
    exact: Grid<f32>,
    totals: Vec<f32>,
    offsets: Vec<f32>,
    zeros: Vec<i32>,
}

impl Filter {
    /// The most pixels that an output has.
    #[inline(always)]
    fn count(&self) -> usize {
        self.taps.iter().copied().max().unwrap_or(0) as usize
    }

    /// Weights of a tap, zeros where there is none.
    #[inline(always)]
    fn row(&self, tap: isize, count: usize) -> &[i32] {
        match usize::try_from(tap) {
            Ok(tap) if tap < count => self.weights.row(tap),
            _ => &self.zeros,
        }
    }

    /// From so many pixels to so many.
    #[inline(always)]
    pub(super) fn set(&mut self, resize: Resize, from: usize, to: usize) {
        self.first.clear();
        self.taps.clear();
        self.zeros.resize(to, 0);
        match resize {
            Resize::Pillow => self.set_antialiased(from, to),
            Resize::Tf | Resize::Tf1 => {
                let taps = crate::resize::unrounded(resize, from, to);
                for (first, weights) in taps.iter() {
                    self.first.push(first as u32);
                    self.taps.push(weights.len() as u32);
                }
                self.weights.set(self.count(), to);
                self.weights.values.fill(0);
                for (i, (_, weights)) in taps.iter().enumerate() {
                    for (tap, weight) in weights.iter().enumerate() {
                        self.weights.row_mut(tap)[i] = fixed(weight * (1 << FINE) as f32);
                    }
                }
            }
        }
    }

    /// Pillow's bicubic as `pillow_taps` has it, in f32.
    #[inline(always)]
    fn set_antialiased(&mut self, from: usize, to: usize) {
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let narrow = (1.0 / stretch) as f32;
        self.first.resize(to, 0);
        self.taps.resize(to, 0);
        self.offsets.resize(to, 0.0);
        let outputs = self.first.iter_mut().zip(&mut self.taps);
        for (i, ((first, taps), offset)) in (0..to as u32).zip(outputs.zip(&mut self.offsets)) {
            let centre = (f64::from(i) + 0.5) * scale;
            // The casts truncate, and a negative start becomes 0.
            *first = (centre - support + 0.5) as u32;
            *taps = ((centre + support + 0.5) as u32).min(from as u32) - *first;
            *offset = (f64::from(*first) - centre + 0.5) as f32;
        }
        let count = self.count();
        self.exact.set(count, to);
        self.weights.set(count, to);
        self.totals.clear();
        self.totals.resize(to, 0.0);
        for tap in 0..count {
            let outputs = self.offsets.iter().zip(&self.taps).zip(&mut self.totals);
            for (weight, ((offset, &taps), total)) in
                self.exact.row_mut(tap).iter_mut().zip(outputs)
            {
                let x = ((offset + tap as f32) * narrow).abs();
                let near = (1.5 * x - 2.5) * x * x + 1.0;
                let far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
                let inside = if x < 1.0 { near } else { far };
                *weight = if (x < 2.0) & ((tap as u32) < taps) {
                    inside
                } else {
                    0.0
                };
                *total += *weight;
            }
        }
        for total in &mut self.totals {
            *total = (1 << FINE) as f32 / *total;
        }
        for tap in 0..count {
            let exact = self.exact.row(tap).iter().zip(&self.totals);
            for (out, (weight, factor)) in self.weights.row_mut(tap).iter_mut().zip(exact) {
                *out = fixed(weight * factor);
            }
        }
    }
}

/// Rounds a number below 2^22 to a whole one: at 1.5 * 2^23 the last bit of an f32 is 1.
#[inline(always)]
fn fixed(value: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// Which samples of a plane there are, along an axis.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// The crop's first pixel in the image.
    pub(super) crop: usize,
    /// Samples of the plane in the image.
    pub(super) samples: usize,
    /// The first that is in memory, an even number.
    pub(super) begin: usize,
}

/// Weights along one axis of one plane: for each output the first pair of samples that it reads, and pairs of weights.
#[derive(Default)]
pub(super) struct Axis {
    /// As many as there are columns of weights.
    first: Vec<u32>,
    /// By pair and output, of which there are [`OUTPUTS`] at a time; the even sample's weight below, the odd one's above.
    weights: Grid<i32>,
    /// Pairs of each output.
    count: usize,
    outputs: usize,
    /// By sample and output, before they are rounded.
    fine: Grid<i32>,
    /// Where pixels begin at an even one; and samples, from the one before the first pixel's on.
    even: Grid<i32>,
    spread: Grid<i32>,
    /// Of each output: the first sample, from the first in memory on; the one in the middle, from the even one before that
    /// on; the sum of weights; what rounding took.
    starts: Vec<i32>,
    middles: Vec<i32>,
    totals: Vec<i32>,
    rests: Vec<i32>,
}

/// Outputs that the first pass does at a time.
const OUTPUTS: usize = 4;

/// `then` where the number is odd, `otherwise` where it is even.
#[inline(always)]
fn by_last_bit(number: i32, then: i32, otherwise: i32) -> i32 {
    let mask = -(number & 1);
    then & mask | otherwise & !mask
}

impl Axis {
    #[inline(always)]
    pub(super) fn set(&mut self, filter: &Filter, span: Span, spread: Spread, is_reversed: bool) {
        self.outputs = filter.first.len();
        let taps = filter.count();
        let begin = span.begin as i32;
        let last = span.samples as i32 - 1;
        let pixel = |first: &u32| (span.crop + *first as usize) as i32;
        // Where windows start and have their middle, and how many samples the widest has from the even one before.
        self.starts.resize(self.outputs, 0);
        self.middles.resize(self.outputs, 0);
        let mut used = 0;
        let outputs = self.starts.iter_mut().zip(&mut self.middles);
        for ((first, &taps), (start, middle)) in filter.first.iter().zip(&filter.taps).zip(outputs)
        {
            let (first, taps) = (pixel(first), taps as i32);
            let end;
            (*start, *middle, end) = match spread {
                Spread::One => (first, first + (taps >> 1), first + taps),
                // An even pixel has a share of the sample before its own, an odd one of the one after.
                _ => (
                    ((first >> 1) - 1).max(0),
                    (first >> 1) + (taps >> 2),
                    ((first + taps) >> 1).min(last) + 1,
                ),
            };
            *start -= begin;
            let even = begin + (*start & !1);
            *middle -= even;
            used = used.max(end - even);
        }
        self.count = (used as usize).div_ceil(2);
        self.fine.set(2 * self.count, self.outputs);
        match spread {
            Spread::One => {
                for sample in 0..2 * self.count {
                    let tap = sample as isize;
                    let (even, odd) = (filter.row(tap, taps), filter.row(tap - 1, taps));
                    let weights = even.iter().zip(odd).zip(&self.starts);
                    for (fine, ((even, odd), &start)) in
                        self.fine.row_mut(sample).iter_mut().zip(weights)
                    {
                        *fine = 4 * by_last_bit(start, *odd, *even);
                    }
                }
            }
            Spread::Triangle => {
                self.set_triangle(filter, span, taps);
                for (i, (first, &taps)) in filter.first.iter().zip(&filter.taps).enumerate() {
                    // At the edges shares go to the last sample itself.
                    if pixel(first) < 2 || pixel(first) + taps as i32 > 2 * last + 1 {
                        self.set_single(filter, span, spread, i);
                    }
                }
            }
            Spread::Twice => {
                (0..self.outputs).for_each(|i| self.set_single(filter, span, spread, i))
            }
        }
        // Rounded, and what is then missing from their sum goes to the one in the middle, so that grey stays grey.
        let round = |fine: i32| (fine + (1 << (FINER - WEIGHT - 1))) >> (FINER - WEIGHT);
        self.totals.clear();
        self.totals.resize(self.outputs, 0);
        self.rests.clear();
        self.rests.resize(self.outputs, 0);
        for sample in 0..2 * self.count {
            let sums = self.totals.iter_mut().zip(&mut self.rests);
            for (fine, (total, rest)) in self.fine.row_mut(sample).iter_mut().zip(sums) {
                *total += *fine;
                *fine = round(*fine);
                *rest -= *fine;
            }
        }
        for (total, rest) in self.totals.iter().zip(&mut self.rests) {
            *rest += round(*total);
        }
        let outputs = self.outputs;
        self.first.clear();
        self.first
            .extend(self.starts.iter().map(|&start| start as u32 / 2));
        if is_reversed {
            self.first.reverse();
        }
        self.first.resize(outputs.next_multiple_of(OUTPUTS), 0);
        self.weights.set(self.count, self.first.len());
        for pair in 0..self.count {
            let (even, odd) = (self.fine.row(2 * pair), self.fine.row(2 * pair + 1));
            let sample = 2 * pair as i32;
            let missing = self.rests.iter().zip(&self.middles);
            let pairs = even.iter().zip(odd).zip(missing);
            let pairs = pairs.map(|((even, odd), (rest, &middle))| {
                let even = even + if middle == sample { *rest } else { 0 };
                let odd = odd + if middle == sample + 1 { *rest } else { 0 };
                even & 0xffff | odd << 16
            });
            let (out, rest) = self.weights.row_mut(pair).split_at_mut(outputs);
            if is_reversed {
                out.iter_mut()
                    .rev()
                    .zip(pairs)
                    .for_each(|(out, pair)| *out = pair);
            } else {
                out.iter_mut()
                    .zip(pairs)
                    .for_each(|(out, pair)| *out = pair);
            }
            rest.fill(0);
        }
    }

    /// Weights of samples of which each stands for two pixels, as if there were no edges.
    #[inline(always)]
    fn set_triangle(&mut self, filter: &Filter, span: Span, taps: usize) {
        // From the even pixel at or before the first.
        let pixels = taps + 1;
        self.even.set(pixels, self.outputs);
        for i in 0..pixels {
            let (even, odd) = (
                filter.row(i as isize, taps),
                filter.row(i as isize - 1, taps),
            );
            let weights = even.iter().zip(odd).zip(&filter.first);
            for (out, ((even, odd), &first)) in self.even.row_mut(i).iter_mut().zip(weights) {
                *out = by_last_bit(span.crop as i32 + first as i32, *odd, *even);
            }
        }
        let even = |pixel: isize| match usize::try_from(pixel) {
            Ok(pixel) if pixel < pixels => self.even.row(pixel),
            _ => &filter.zeros,
        };
        self.spread.set(2 * self.count, self.outputs);
        for sample in 0..2 * self.count {
            let pixel = 2 * (sample as isize - 1);
            let far = even(pixel - 1).iter().zip(even(pixel + 2));
            let near = even(pixel).iter().zip(even(pixel + 1));
            for (out, (far, near)) in self.spread.row_mut(sample).iter_mut().zip(far.zip(near)) {
                *out = 3 * (near.0 + near.1) + far.0 + far.1;
            }
        }
        for sample in 0..2 * self.count {
            let odd = match sample {
                0 => &filter.zeros,
                _ => self.spread.row(sample - 1),
            };
            let weights = self.spread.row(sample).iter().zip(odd).zip(&self.starts);
            for (fine, ((even, odd), &start)) in self.fine.row_mut(sample).iter_mut().zip(weights) {
                *fine = by_last_bit(start, *odd, *even);
            }
        }
    }

    /// Weights of an output, of samples of which each stands for two pixels.
    #[inline(always)]
    fn set_single(&mut self, filter: &Filter, span: Span, spread: Spread, i: usize) {
        for sample in 0..2 * self.count {
            self.fine.row_mut(sample)[i] = 0;
        }
        let start = self.starts[i] as usize & !1;
        for tap in 0..filter.taps[i] as usize {
            let weight = filter.weights.row(tap)[i];
            let pixel = span.crop + filter.first[i] as usize + tap;
            let near = pixel / 2;
            let far = match (spread, pixel % 2) {
                (Spread::Twice, _) => near,
                (_, 0) => near.saturating_sub(1),
                _ => (near + 1).min(span.samples - 1),
            };
            self.fine.row_mut(near - span.begin - start)[i] += 3 * weight;
            self.fine.row_mut(far - span.begin - start)[i] += weight;
        }
    }

    /// One more than the last pair that is read; the weights of those at the end may all be 0.
    fn end(&self) -> usize {
        let last = self.first.iter().copied().max().unwrap_or(0);
        last as usize + self.count
    }
}

/// A plane's samples: blocks of [`ROWS`] rows, of which each is pairs of columns from left to right (see `idct`).
#[derive(Default)]
pub(super) struct Plane {
    pub(super) samples: Vec<u8>,
    /// A multiple of [`ROWS`].
    pub(super) rows: usize,
    /// Pairs of columns.
    pub(super) pairs: usize,
}

impl Plane {
    /// Where the samples of a group go, the x-th from the left of the y-th row of blocks: of sixteen pairs of columns,
    /// [`PAIR`] bytes apart, sixteen bytes each.
    #[inline(always)]
    pub(super) fn group(&mut self, x: usize, y: usize) -> &mut [u8] {
        assert!(16 * (x + 1) <= self.pairs && 8 * (y + 1) <= self.rows);
        let pair = 8 * y / ROWS * self.pairs + 16 * x;
        &mut self.samples[PAIR * pair + 2 * (8 * y % ROWS)..][..15 * PAIR + 16]
    }
}

/// Rows of a plane's block.
pub(super) const ROWS: usize = 32;
/// Bytes of a pair of columns in a block: a line of the cache.
pub(super) const PAIR: usize = 2 * ROWS;

/// What lies between the passes: pairs of rows, each of an output's columns as pairs of i16.
#[derive(Default)]
pub(super) struct Between {
    rows: Vec<i32>,
    /// Of a pair of rows.
    stride: usize,
}

impl Between {
    /// Size of what is held.
    pub(super) fn bytes(&self) -> usize {
        self.rows.len() * size_of::<i32>()
    }
}

/// Outputs that a vector type does at a time in the second pass.
const fn block<V: Vector>() -> usize {
    16 * V::PARTS
}

/// The first pass: along the rows.
///
/// # Safety
/// The CPU has the vector's instructions.
#[inline(always)]
pub(super) unsafe fn across<V: Vector>(
    plane: &mut Plane,
    axis: &Axis,
    down: &Axis,
    out: &mut Between,
) {
    let (rows, pairs, count) = (plane.rows, plane.pairs, axis.count);
    let outputs = axis.first.len();
    out.stride = outputs.next_multiple_of(block::<V>());
    // Some windows end past what there is, with weights of 0.
    let read = (rows / 2).max(down.end()) * out.stride;
    out.rows.resize(read.max(out.rows.len()), 0);
    assert!(rows.is_multiple_of(ROWS) && rows > 0 && axis.weights.width == outputs);
    let read = PAIR * ((rows / ROWS - 1) * pairs + pairs.max(axis.end()));
    plane.samples.resize(read.max(plane.samples.len()), 0);
    // Rows that the second pass reads.
    let step = 8 * V::PARTS;
    let begin = 2 * down.first[..down.outputs]
        .iter()
        .min()
        .map_or(0, |&first| first as usize)
        / step
        * step;
    let end = (2 * down.end()).next_multiple_of(step).min(rows);
    let weights = axis.weights.values.as_ptr();
    let mut y = begin;
    while y < end {
        let at = PAIR * pairs * (y / ROWS) + 2 * (y % ROWS);
        let mut x = 0;
        while x < outputs {
            // SAFETY: of a block of rows, pairs of columns up to the axis's end are in memory, of `PAIR` bytes each, and
            // `step` rows from `y` on are in a block, as `ROWS` is a multiple of `step`; there are weights for `count`
            // pairs of `outputs`, a multiple of `OUTPUTS`. `out` has `rows / 2` pairs of rows of `stride` outputs, a
            // multiple of `block`.
            unsafe {
                let samples = plane.samples.as_ptr().add(at);
                macro_rules! from {
                    ($i:literal) => {
                        samples.add(PAIR * *axis.first.get_unchecked(x + $i) as usize)
                    };
                }
                let mut from = [from!(0), from!(1), from!(2), from!(3)];
                let mut weight = weights.add(x);
                let mut sums = [[V::splat32(1 << (WEIGHT - FRACTION - 1)); 2]; OUTPUTS];
                let mut pair = 0;
                while pair < count {
                    macro_rules! add {
                        ($i:literal) => {{
                            let weights = V::splat32(*weight.add($i));
                            let [low, high] = &mut sums[$i];
                            *low = low.add_madd(V::load_wide(from[$i]), weights);
                            *high =
                                high.add_madd(V::load_wide(from[$i].add(8 * V::PARTS)), weights);
                            from[$i] = from[$i].add(PAIR);
                        }};
                    }
                    add!(0);
                    add!(1);
                    add!(2);
                    add!(3);
                    weight = weight.add(outputs);
                    pair += 1;
                }
                let narrow = |[low, high]: [V; 2]| {
                    low.shift32::<{ WEIGHT - FRACTION }>()
                        .pack32(high.shift32::<{ WEIGHT - FRACTION }>())
                };
                let o = [
                    narrow(sums[0]),
                    narrow(sums[1]),
                    narrow(sums[2]),
                    narrow(sums[3]),
                ];
                // Part p of each holds four rows from 4p on and four from 4 (PARTS + p) on, as two pairs each.
                let (a, b) = (o[0].low32(o[1]), o[2].low32(o[3]));
                let (c, d) = (o[0].high32(o[1]), o[2].high32(o[3]));
                // The order that the second pass wants: see `down`.
                let (chunk, inside) = (x / block::<V>(), x % block::<V>() / 4);
                let column = chunk * block::<V>() + 4 * (inside % 4 * V::PARTS + inside / 4);
                let to = out.rows.as_mut_ptr().add(y / 2 * out.stride + column);
                let bytes = |pair: usize| to.add(pair * out.stride).cast::<u8>();
                let step = 8 * out.stride;
                a.low64(b).store_parts(bytes(0), step);
                a.high64(b).store_parts(bytes(1), step);
                c.low64(d).store_parts(bytes(2 * V::PARTS), step);
                c.high64(d).store_parts(bytes(2 * V::PARTS + 1), step);
            }
            x += OUTPUTS;
        }
        y += step;
    }
}

/// The second pass of one output row: down the columns, then colours; writes it to `line`, in RGB.
///
/// # Safety
/// The CPU has the vector's instructions; `planes` come from [`across`] with the same axes, one or three of them;
/// `line` is good for three bytes for each output, rounded up to a whole [`block`].
#[inline(always)]
pub(super) unsafe fn down<V: Vector>(
    planes: &[Between],
    axes: [&Axis; 3],
    y: usize,
    line: *mut u8,
) {
    /// Where the bytes of sixteen reds, greens and blues go in three times sixteen bytes.
    const RGB: [[[u8; 16]; 3]; 3] = {
        let mut places = [[[128; 16]; 3]; 3];
        let mut at = 0;
        while at < 48 {
            places[at / 16][at % 3][at % 16] = (at / 3) as u8;
            at += 1;
        }
        places
    };
    let stride = planes[0].stride;
    let mut x = 0;
    while x < stride {
        // SAFETY: the caller's word; a plane has `stride` outputs in each pair of rows, and the axis reads pairs that are
        // there.
        unsafe {
            macro_rules! plane {
                ($c:expr) => {{
                    let (plane, axis) = (&planes[$c], axes[$c]);
                    let first = *axis.first.get_unchecked(y) as usize;
                    let mut from = plane
                        .rows
                        .as_ptr()
                        .add(first * plane.stride + x)
                        .cast::<u8>();
                    let mut weight = axis.weights.values.as_ptr().add(y);
                    let mut sums = [V::splat32(1 << (WEIGHT - 1)); 4];
                    let mut pair = 0;
                    while pair < axis.count {
                        let weights = V::splat32(*weight);
                        sums[0] = sums[0].add_madd(V::load(from), weights);
                        sums[1] = sums[1].add_madd(V::load(from.add(16 * V::PARTS)), weights);
                        sums[2] = sums[2].add_madd(V::load(from.add(32 * V::PARTS)), weights);
                        sums[3] = sums[3].add_madd(V::load(from.add(48 * V::PARTS)), weights);
                        from = from.add(4 * plane.stride);
                        weight = weight.add(axis.weights.width);
                        pair += 1;
                    }
                    [
                        sums[0]
                            .shift32::<WEIGHT>()
                            .pack32(sums[1].shift32::<WEIGHT>()),
                        sums[2]
                            .shift32::<WEIGHT>()
                            .pack32(sums[3].shift32::<WEIGHT>()),
                    ]
                }};
            }
            let luma = plane!(0);
            let [blue, red] = match planes.len() {
                1 => [[V::splat16(0); 2]; 2],
                _ => [plane!(1), plane!(2)],
            };
            macro_rules! colours {
                ($half:expr) => {{
                    let luma = luma[$half].add16(V::splat16(1 << (FRACTION - 1)));
                    if planes.len() == 1 {
                        let grey = luma.shift16::<FRACTION>();
                        [grey, grey, grey]
                    } else {
                        let middle = V::splat16(128 << FRACTION);
                        let blue = blue[$half].sub16(middle);
                        let red = red[$half].sub16(middle);
                        // BT.601, as JFIF has it; what is beyond 1 or below -1 is in the additions.
                        let r =
                            luma.adds16(red.adds16(red.mul_round16(V::splat16(fraction(0.402)))));
                        let g = luma
                            .subs16(blue.mul_round16(V::splat16(fraction(0.344_136_286))))
                            .subs16(red.mul_round16(V::splat16(fraction(0.714_136_286))));
                        let twice = blue.adds16(blue);
                        let b = luma
                            .adds16(twice.adds16(blue.mul_round16(V::splat16(fraction(-0.228)))));
                        [
                            r.shift16::<FRACTION>(),
                            g.shift16::<FRACTION>(),
                            b.shift16::<FRACTION>(),
                        ]
                    }
                }};
            }
            let (low, high) = (colours!(0), colours!(1));
            let rgb = [
                low[0].pack16(high[0]),
                low[1].pack16(high[1]),
                low[2].pack16(high[2]),
            ];
            let mut i = 0;
            while i < 3 {
                let places = &RGB[i];
                let bytes = rgb[0]
                    .shuffle(&places[0])
                    .or(rgb[1].shuffle(&places[1]))
                    .or(rgb[2].shuffle(&places[2]));
                bytes.store_parts(line.add(3 * x + 16 * i), 48);
                i += 1;
            }
        }
        x += block::<V>();
    }
}

const fn fraction(x: f64) -> i16 {
    (x * 32768.0 + if x < 0.0 { -0.5 } else { 0.5 }) as i16
}
