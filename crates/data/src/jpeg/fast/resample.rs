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

/// The weights of a resize along one axis, of pixels: what [`crate::resize`] uses, in fixed point.
#[derive(Default)]
pub(super) struct Filter {
    /// The first pixel of each output.
    first: Vec<usize>,
    /// As many for each output; those that are not needed are 0.
    weights: Vec<i32>,
    count: usize,
}

impl Filter {
    pub(super) fn outputs(&self) -> usize {
        self.first.len()
    }

    /// From so many pixels to so many.
    #[inline(always)]
    pub(super) fn set(&mut self, resize: Resize, from: usize, to: usize) {
        self.first.clear();
        self.weights.clear();
        match resize {
            Resize::Pillow => self.set_antialiased(from, to),
            Resize::Tf | Resize::Tf1 => {
                let taps = crate::resize::unrounded(resize, from, to);
                self.count = 4;
                for (first, weights) in taps.iter() {
                    self.first.push(first);
                    let fixed = |&weight: &f32| fixed(weight * (1 << FINE) as f32);
                    self.weights.extend(weights.iter().map(fixed));
                    self.weights.resize(4 * self.first.len(), 0);
                }
            }
        }
    }

    /// Pillow's bicubic as `pillow_taps` has it, in f32 and eight taps at a time.
    #[inline(always)]
    fn set_antialiased(&mut self, from: usize, to: usize) {
        const LANES: usize = 8;
        let scale = from as f64 / to as f64;
        let stretch = scale.max(1.0);
        let support = 2.0 * stretch;
        let narrow = (1.0 / stretch) as f32;
        self.count = ((2.0 * support) as usize + 2).next_multiple_of(LANES);
        self.weights.resize(to * self.count, 0);
        for (i, out) in self.weights.chunks_exact_mut(self.count).enumerate() {
            let centre = (i as f64 + 0.5) * scale;
            // The casts truncate, and a negative start becomes 0.
            let first = (centre - support + 0.5) as usize;
            let taps = ((centre + support + 0.5) as usize).min(from) - first;
            let offset = (first as f64 - centre + 0.5) as f32;
            self.first.push(first);
            let mut exact = [0.0; LANES];
            let mut total = 0.0;
            // Once for their sum, once for the weights; few filters have more than eight taps.
            for pass in 0..2 {
                for (chunk, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    if pass == 0 || self.count > LANES {
                        for (lane, weight) in exact.iter_mut().enumerate() {
                            let tap = LANES * chunk + lane;
                            let x = ((offset + tap as f32) * narrow).abs();
                            let near = (1.5 * x - 2.5) * x * x + 1.0;
                            let far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
                            let inside = if x < 1.0 { near } else { far };
                            *weight = if x < 2.0 && tap < taps { inside } else { 0.0 };
                        }
                    }
                    if pass == 0 {
                        total += exact.iter().sum::<f32>();
                    } else {
                        let factor = (1 << FINE) as f32 / total;
                        for (out, weight) in out.iter_mut().zip(exact) {
                            *out = fixed(weight * factor);
                        }
                    }
                }
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

/// Weights along one axis of one plane: for each output the first pair of samples that it reads, and pairs of weights,
/// as many for each.
#[derive(Default)]
pub(super) struct Axis {
    first: Vec<u32>,
    /// The even sample's weight below, the odd one's above.
    weights: Vec<i32>,
    /// Pairs of each output.
    count: usize,
    /// The weights of an output before they are rounded.
    fine: Vec<i32>,
}

/// Where the weights of one output go.
#[derive(Clone, Copy)]
struct Place {
    spread: Spread,
    /// The first pixel.
    first: usize,
    /// The first sample.
    lowest: usize,
    /// The plane's last sample, from the first.
    last: usize,
    /// Of the first sample in the output's pairs.
    offset: usize,
}

impl Place {
    /// Writes pairs of the samples' weights and returns how many of them are used. `fine` is twice as long as `out`, or
    /// longer.
    #[inline(always)]
    fn set(self, weights: &[i32], fine: &mut [i32], out: &mut [i32]) -> usize {
        fine.fill(0);
        let samples = &mut fine[self.offset..];
        match self.spread {
            Spread::One => {
                for (fine, weight) in samples.iter_mut().zip(weights) {
                    *fine = 4 * weight;
                }
            }
            Spread::Triangle => {
                for (pixel, weight) in (self.first..).zip(weights) {
                    let near = pixel / 2 - self.lowest;
                    let far = match pixel % 2 {
                        0 => near.saturating_sub(1),
                        _ => (near + 1).min(self.last),
                    };
                    samples[near] += 3 * weight;
                    samples[far] += weight;
                }
            }
            Spread::Twice => {
                for (pixel, weight) in (self.first..).zip(weights) {
                    samples[pixel / 2 - self.lowest] += 4 * weight;
                }
            }
        }
        // Rounded, and what is then missing from their sum goes to the one in the middle, so that grey stays grey.
        let round = |fine: i32| (fine + (1 << (FINER - WEIGHT - 1))) >> (FINER - WEIGHT);
        let (mut total, mut rest) = (0, 0);
        for fine in fine.iter_mut() {
            total += *fine;
            *fine = round(*fine);
            rest -= *fine;
        }
        let middle = match self.spread {
            Spread::One => weights.len() / 2,
            _ => weights.len() / 4,
        };
        fine[self.offset + middle] += rest + round(total);
        let mut used = 0;
        for (j, (out, pair)) in out.iter_mut().zip(fine.as_chunks::<2>().0).enumerate() {
            *out = pair[0] & 0xffff | pair[1] << 16;
            if *out != 0 {
                used = j + 1;
            }
        }
        used
    }
}

/// Which samples of a plane there are, along an axis.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// The crop's first pixel in the image, and how many it has.
    pub(super) crop: usize,
    pub(super) length: usize,
    /// Samples of the plane in the image.
    pub(super) samples: usize,
    /// The first that is in memory, an even number.
    pub(super) begin: usize,
    /// How many are, an even number.
    pub(super) held: usize,
}

impl Axis {
    #[inline(always)]
    pub(super) fn set(&mut self, filter: &Filter, span: Span, spread: Spread, is_reversed: bool) {
        let outputs = filter.outputs();
        // A window of n pixels spans n / 2 + 2 samples at most, and begins on any side of a pair.
        let samples = match spread {
            Spread::One => filter.count,
            Spread::Triangle | Spread::Twice => filter.count / 2 + 3,
        };
        self.count = (samples / 2 + 1).min(span.held / 2);
        self.first.clear();
        self.first.resize(outputs, 0);
        self.weights.clear();
        self.weights.resize(outputs * self.count, 0);
        let mut used = 1;
        // Few filters are wider; the size that the compiler knows makes this twice as fast.
        let mut narrow = [0; 16];
        let is_narrow = 2 * self.count <= narrow.len();
        self.fine.resize(2 * self.count, 0);
        for (i, (&first, weights)) in filter
            .first
            .iter()
            .zip(filter.weights.chunks_exact(filter.count))
            .enumerate()
        {
            // Only pixels of the crop have weights that are not 0.
            let weights = &weights[..weights.len().min(span.length - first)];
            let first = span.crop + first;
            let lowest = match spread {
                Spread::One => first,
                Spread::Triangle | Spread::Twice => (first / 2).saturating_sub(1),
            };
            // In pairs, from an even sample on.
            let start = lowest - span.begin;
            let pair = (start / 2).min(span.held / 2 - self.count);
            let offset = start - 2 * pair;
            let last = span.samples - 1 - lowest;
            let i = if is_reversed { outputs - 1 - i } else { i };
            self.first[i] = pair as u32;
            let out = &mut self.weights[i * self.count..][..self.count];
            let place = Place {
                spread,
                first,
                lowest,
                last,
                offset,
            };
            used = used.max(match is_narrow {
                true => place.set(weights, &mut narrow, out),
                false => place.set(weights, &mut self.fine, out),
            });
        }
        // What no output needs is not computed.
        if used < self.count {
            for i in 0..outputs {
                self.weights
                    .copy_within(i * self.count..i * self.count + used, i * used);
            }
            self.count = used;
            self.weights.truncate(outputs * used);
        }
    }
}

/// A plane's samples in pairs of columns (see `idct`).
#[derive(Default)]
pub(super) struct Plane {
    pub(super) samples: Vec<u8>,
    /// Bytes of a pair of columns: twice the rows, which are a multiple of [`ROWS`].
    pub(super) stride: usize,
    /// Pairs of columns.
    pub(super) pairs: usize,
}

/// What the rows of planes are a multiple of.
pub(super) const ROWS: usize = 32;

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
pub(super) unsafe fn across<V: Vector>(plane: &Plane, axis: &Axis, down: &Axis, out: &mut Between) {
    let outputs = axis.first.len();
    let rows = plane.stride / 2;
    out.stride = outputs.next_multiple_of(block::<V>());
    out.rows
        .resize((rows / 2 * out.stride).max(out.rows.len()), 0);
    let last = |axis: &Axis| {
        axis.first
            .iter()
            .max()
            .map_or(0, |&first| first as usize + axis.count)
    };
    assert!(rows.is_multiple_of(ROWS) && plane.samples.len() >= plane.stride * plane.pairs);
    assert!(last(axis) <= plane.pairs && axis.weights.len() == outputs * axis.count);
    // Rows that the second pass reads.
    let step = 8 * V::PARTS;
    let begin = 2 * down.first.iter().min().map_or(0, |&first| first as usize) / step * step;
    let end = (2 * last(down)).next_multiple_of(step).min(rows);
    let mut y = begin;
    while y < end {
        let mut x = 0;
        while x < outputs {
            // SAFETY: of pairs of columns `first + count` are in the plane (checked above), each of `stride` bytes, and
            // `y + step` rows are in that, as `ROWS` is a multiple of `step`; outputs beyond the last repeat it. `out` has
            // `rows / 2` pairs of rows of `stride` outputs, a multiple of `block`.
            unsafe {
                macro_rules! output {
                    ($i:literal) => {{
                        let output = (x + $i).min(outputs - 1);
                        let first = *axis.first.get_unchecked(output) as usize;
                        let mut from = plane.samples.as_ptr().add(first * plane.stride + 2 * y);
                        let mut weight = axis.weights.as_ptr().add(output * axis.count);
                        let (mut low, mut high) = (
                            V::splat32(1 << (WEIGHT - FRACTION - 1)),
                            V::splat32(1 << (WEIGHT - FRACTION - 1)),
                        );
                        let mut t = 0;
                        while t < axis.count {
                            let weights = V::splat32(*weight);
                            low = low.add32(V::load_wide(from).madd(weights));
                            high = high.add32(V::load_wide(from.add(8 * V::PARTS)).madd(weights));
                            from = from.add(plane.stride);
                            weight = weight.add(1);
                            t += 1;
                        }
                        low.shift32::<{ WEIGHT - FRACTION }>()
                            .pack32(high.shift32::<{ WEIGHT - FRACTION }>())
                    }};
                }
                let o = [output!(0), output!(1), output!(2), output!(3)];
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
            x += 4;
        }
        y += step;
    }
}

/// The second pass of one output row: down the columns, then colours; calls back with each block's red, green and
/// blue as bytes, part by part in sequence.
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
                ($c:expr, $half:expr) => {{
                    let (plane, axis) = (&planes[$c], axes[$c]);
                    let first = *axis.first.get_unchecked(y) as usize;
                    let mut from = plane
                        .rows
                        .as_ptr()
                        .add(first * plane.stride + x + 8 * V::PARTS * $half)
                        .cast::<u8>();
                    let mut weight = axis.weights.as_ptr().add(y * axis.count);
                    let (mut low, mut high) =
                        (V::splat32(1 << (WEIGHT - 1)), V::splat32(1 << (WEIGHT - 1)));
                    let mut t = 0;
                    while t < axis.count {
                        let weights = V::splat32(*weight);
                        low = low.add32(V::load(from).madd(weights));
                        high = high.add32(V::load(from.add(16 * V::PARTS)).madd(weights));
                        from = from.add(4 * plane.stride);
                        weight = weight.add(1);
                        t += 1;
                    }
                    low.shift32::<WEIGHT>().pack32(high.shift32::<WEIGHT>())
                }};
            }
            macro_rules! colours {
                ($half:expr) => {{
                    let luma = plane!(0, $half).add16(V::splat16(1 << (FRACTION - 1)));
                    if planes.len() == 1 {
                        let grey = luma.shift16::<FRACTION>();
                        [grey, grey, grey]
                    } else {
                        let middle = V::splat16(128 << FRACTION);
                        let blue = plane!(1, $half).sub16(middle);
                        let red = plane!(2, $half).sub16(middle);
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
