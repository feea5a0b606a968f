//! One separable resampler, three filters: rows first, then columns, each output a weighted sum of a few
//! neighbouring inputs. A crop is resized as an image of its own: nothing outside it is seen.

use std::ops::{AddAssign, Mul};

use crate::Resize;
use crate::crop::Rect;
use crate::jpeg::Image;
use crate::jpeg::fast::widely;

/// Fraction bits of Pillow's fixed-point weights.
const PRECISION: u32 = 22;
/// TensorFlow looks its weights up by the fraction in 1/1024.
const TABLE: f32 = 1024.0;

widely! {
    /// Pillow's `resize(.., BICUBIC)`, which torchvision's is too: antialiased, 8 bits after each pass; bit-equal.
    pub(crate) fn pillow(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [u8]) = pillow_here;
}

#[inline(always)]
fn pillow_here(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [u8]) {
    let taps = |from| pillow_taps(from, size);
    let half = 1 << (PRECISION - 1);
    let finish = |sum: i32| (sum >> PRECISION).clamp(0, 255) as u8;
    resample(image, crop, taps, half, finish, flip, out);
}

widely! {
    /// TensorFlow 2's `tf.image.resize(.., "bicubic", antialias=False)`, not clamped.
    pub(crate) fn tf(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [f32]) = tf_here;
}

#[inline(always)]
fn tf_here(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [f32]) {
    let taps = |from| tf_taps(from, size);
    resample(image, crop, taps, 0.0, |sum| sum, flip, out);
}

widely! {
    /// TensorFlow 1's `resize_bicubic` without `align_corners`, as the reference used it, not clamped.
    pub(crate) fn tf1(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [f32]) = tf1_here;
}

#[inline(always)]
fn tf1_here(image: &Image, crop: Rect, size: usize, flip: bool, out: &mut [f32]) {
    let taps = |from| tf1_taps(from, size);
    resample(image, crop, taps, 0.0, |sum| sum, flip, out);
}

/// The weights of the filters that TensorFlow has, which it does not round.
pub(crate) fn unrounded(resize: Resize, from: usize, to: usize) -> Taps<f32> {
    match resize {
        Resize::Pillow => unreachable!("Pillow rounds its weights"),
        Resize::Tf => tf_taps(from, to),
        Resize::Tf1 => tf1_taps(from, to),
    }
}

/// For each output the first input it reads and the weights of that and the following ones.
#[derive(Default)]
pub(crate) struct Taps<W> {
    /// First input, first weight, number of weights.
    spans: Vec<(usize, usize, usize)>,
    weights: Vec<W>,
}

impl<W: Copy> Taps<W> {
    fn push(&mut self, first: usize, weights: &[W]) {
        self.spans.push((first, self.weights.len(), weights.len()));
        self.weights.extend(weights);
    }

    /// The first input of each output, and the weights of it and those after it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &[W])> {
        self.spans
            .iter()
            .map(|&(first, start, count)| (first, &self.weights[start..start + count]))
    }
}

#[inline(always)]
fn resample<S, T>(
    image: &Image,
    crop: Rect,
    taps: impl Fn(usize) -> Taps<S>,
    start: S,
    finish: impl Fn(S) -> T,
    flip: bool,
    out: &mut [T],
) where
    S: Copy + AddAssign + Mul<Output = S> + From<u8> + From<T>,
    T: Copy,
{
    let (mut across, down) = (taps(crop.w), taps(crop.h));
    if flip {
        across.spans.reverse();
    }
    let row_len = 3 * across.spans.len();
    let mut rows = Vec::with_capacity(crop.h * row_len);
    for y in crop.y..crop.y + crop.h {
        let begin = 3 * (y * image.width + crop.x);
        let row = &image.pixels[begin..begin + 3 * crop.w];
        for (first, weights) in across.iter() {
            let mut sum = [start; 3];
            for (pixel, &weight) in row[3 * first..].chunks_exact(3).zip(weights) {
                for (sum, &value) in sum.iter_mut().zip(pixel) {
                    *sum += weight * S::from(value);
                }
            }
            rows.extend(sum.map(&finish));
        }
    }
    let mut sums = vec![start; row_len];
    for ((first, weights), out) in down.iter().zip(out.chunks_exact_mut(row_len)) {
        sums.fill(start);
        for (row, &weight) in rows[first * row_len..].chunks_exact(row_len).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += weight * S::from(value);
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = finish(sum);
        }
    }
}

/// Keys' cubic: an interpolating kernel on [-2, 2] with slope `a` at 1.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

/// Half-pixel centres, the kernel stretched by the scale when shrinking, weights normalised in f64 and then rounded
/// to fixed point. An unchanged size gives the weight 1 alone, so it need not be treated apart.
fn pillow_taps(from: usize, to: usize) -> Taps<i32> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    let mut taps = Taps::default();
    for i in 0..to {
        let centre = (i as f64 + 0.5) * scale;
        // The casts truncate, and a negative start becomes 0.
        let first = (centre - support + 0.5) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end)
            .map(|x| cubic((x as f64 - centre + 0.5) * (1.0 / stretch), -0.5))
            .collect();
        let total: f64 = weights.iter().sum();
        let fixed: Vec<i32> = weights
            .iter()
            .map(|w| (w / total * f64::from(1 << PRECISION)).round() as i32)
            .collect();
        taps.push(first, &fixed);
    }
    taps
}

/// The four weights around a fraction in 1/1024.
fn table(fraction: f32, a: f64) -> [f32; 4] {
    let fraction = f64::from((fraction * TABLE).round_ties_even() / TABLE);
    [1.0 + fraction, fraction, 1.0 - fraction, 2.0 - fraction].map(|x| cubic(x, a) as f32)
}

/// Half-pixel centres, a = -0.5; taps outside are dropped and the others made to sum to one.
fn tf_taps(from: usize, to: usize) -> Taps<f32> {
    let scale = from as f32 / to as f32;
    let mut taps = Taps::default();
    for i in 0..to {
        let at = (i as f32 + 0.5) * scale - 0.5;
        let weights = table(at - at.floor(), -0.5);
        let start = at.floor() as isize - 1;
        let first = start.max(0);
        let end = (start + 4).min(from as isize);
        let inside = &weights[(first - start) as usize..(end - start) as usize];
        let total: f32 = inside.iter().sum();
        let scaled: Vec<f32> = inside.iter().map(|w| w * (1.0 / total)).collect();
        taps.push(first as usize, &scaled);
    }
    taps
}

/// Corner origin, a = -0.75; taps outside read the pixel at the edge, so their weight is added to its own.
fn tf1_taps(from: usize, to: usize) -> Taps<f32> {
    let scale = from as f32 / to as f32;
    let mut taps = Taps::default();
    for i in 0..to {
        let at = i as f32 * scale;
        let clamp = |tap: usize| (at.floor() as usize + tap).saturating_sub(1).min(from - 1);
        let first = clamp(0);
        let mut merged = [0.0; 4];
        for (tap, weight) in table(at - at.floor(), -0.75).into_iter().enumerate() {
            merged[clamp(tap) - first] += weight;
        }
        taps.push(first, &merged[..=clamp(3) - first]);
    }
    taps
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Image width, height, shift; crop x, y, width, height; output side: CASES of tests/goldens/goldens.py.
    const CASES: [[usize; 8]; 9] = [
        [37, 23, 0, 0, 0, 37, 23, 32],
        [37, 23, 4, 0, 0, 37, 23, 8],
        [64, 48, 3, 5, 3, 41, 37, 32],
        [9, 7, 0, 0, 0, 9, 7, 32],
        [100, 75, 5, 1, 2, 98, 70, 16],
        [32, 32, 2, 0, 0, 32, 32, 32],
        [1, 1, 0, 0, 0, 1, 1, 8],
        [2, 3, 0, 0, 0, 2, 3, 16],
        [5, 200, 0, 0, 0, 5, 200, 24],
    ];

    fn formula(width: usize, height: usize, shift: usize) -> Image {
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for c in 0..3 {
                    let value = x * x * 7 + y * y * 13 + x * y * 5 + x * 31 + y * 17 + c * 91;
                    pixels.push((value >> shift) as u8);
                }
            }
        }
        Image {
            pixels,
            width,
            height,
        }
    }

    fn check<T: Copy + Default + Into<f64>>(
        resize: fn(&Image, Rect, usize, bool, &mut [T]),
        golden: Vec<T>,
        tolerance: f64,
    ) {
        let mut rest = &golden[..];
        for case in CASES {
            let [width, height, shift, x, y, w, h, size] = case;
            let image = formula(width, height, shift);
            let mut out = vec![T::default(); 3 * size * size];
            resize(&image, Rect { x, y, w, h }, size, false, &mut out);
            let (expected, after) = rest.split_at(out.len());
            rest = after;
            let worst = out
                .iter()
                .zip(expected)
                .map(|(&a, &b)| (a.into() - b.into()).abs())
                .fold(0.0, f64::max);
            assert!(worst <= tolerance, "{case:?}: off by {worst}");
        }
        assert!(rest.is_empty());
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn pillow_is_bit_equal_to_pillow() {
        let golden = include_bytes!("../tests/goldens/pillow.u8").to_vec();
        check(pillow, golden, 0.0);
    }

    /// TensorFlow sums columns first, which moves the last bits: 1e-4 of a range of 255 is far above them.
    #[test]
    fn tf_is_tensorflow_2() {
        let golden = floats(include_bytes!("../tests/goldens/tf.f32"));
        check(tf, golden, 1e-4);
    }

    #[test]
    fn tf1_is_tensorflow_1() {
        let golden = floats(include_bytes!("../tests/goldens/tf1.f32"));
        check(tf1, golden, 1e-4);
    }

    /// notes/reference-vectors.json, `bicubic_legacy_1d`.
    #[test]
    fn tf1_is_the_reference_vectors() {
        let check = |input: &[f32], expected: &[f32]| {
            let taps = tf1_taps(input.len(), expected.len());
            for ((first, weights), expected) in taps.iter().zip(expected) {
                let sum: f32 = weights
                    .iter()
                    .zip(&input[first..])
                    .map(|(w, v)| w * v)
                    .sum();
                assert!((sum - expected).abs() <= 1e-5 * 255.0, "{sum} {expected}");
            }
        };
        check(
            &[0.0, 10.0, 20.0, 30.0],
            &[0.0, 4.0625, 10.0, 15.0, 20.0, 25.9375, 30.0, 30.9375],
        );
        check(
            &[0.0, 255.0, 0.0, 255.0],
            &[
                0.0, 151.40625, 255.0, 127.5, 0.0, 103.59375, 255.0, 278.90625,
            ],
        );
        check(
            &[0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0],
            &[0.0, 20.0, 40.0, 60.0],
        );
        check(
            &[10.0, 20.0, 40.0, 80.0, 160.0],
            &[10.0, 29.821_06, 109.601_42],
        );
        check(
            &[0.0, 100.0, 255.0],
            &[0.0, 44.422_096, 136.914_66, 230.094_12, 271.734_53],
        );
        check(
            &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
            &[1.0, 2.71875, 8.0, 24.75],
        );
    }

    #[test]
    fn an_unchanged_size_copies() {
        let image = formula(32, 32, 1);
        let mut out = vec![0; image.pixels.len()];
        pillow(&image, Rect::whole(32, 32), 32, false, &mut out);
        assert_eq!(out, image.pixels);
    }

    #[test]
    fn flip_reverses_the_pixels_of_each_row() {
        let image = formula(40, 30, 2);
        let crop = Rect::whole(40, 30);
        let (mut plain, mut flipped) = (vec![0; 3 * 256], vec![0; 3 * 256]);
        pillow(&image, crop, 16, false, &mut plain);
        pillow(&image, crop, 16, true, &mut flipped);
        assert_ne!(plain, flipped);
        for (a, b) in plain.chunks(48).zip(flipped.chunks(48)) {
            assert!(a.chunks(3).eq(b.chunks(3).rev()));
        }
    }
}
