//! Two inverse DCTs of 8 x 8 coefficients, in integers, equal to those of libjpeg to the bit.
//!
//! First the columns, then the rows. Sums wrap: only coefficients that no encoder makes can overflow, and they must not
//! panic.

use std::array::from_fn;
use std::num::Wrapping;

use super::fast::widely;

type W = Wrapping<i32>;

/// Which inverse DCT: pixels of the two differ by a few levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dct {
    /// libjpeg's `islow`: Loeffler, Ligtenberg and Moschytz, "Practical fast 1-D DCT algorithms
    /// with 11 multiplications", 1989; constants of 13 bits.
    Accurate,
    /// libjpeg's `ifast`: Arai, Agui and Nakajima, "A fast DCT-SQ scheme for images", 1988; constants of
    /// 8 bits, truncated products.
    Fast,
}

/// A quantisation table as the inverse DCT wants it, in rows.
pub(super) fn scaled(quantisation: &[u16; 64], dct: Dct) -> [i32; 64] {
    from_fn(|i| match dct {
        Dct::Accurate => i32::from(quantisation[i]),
        Dct::Fast => {
            // The scheme's output scales, in 14 bits; two of them stay.
            let scale = |k: usize| match k {
                0 => 1.0,
                k => (k as f64 * std::f64::consts::PI / 16.0).cos() * std::f64::consts::SQRT_2,
            };
            let factor = (scale(i / 8) * scale(i % 8) * 16384.0).round() as i32;
            // 16 bits by 15.
            (i32::from(quantisation[i]) * factor + (1 << 11)) >> 12
        }
    })
}

widely! {
    /// Writes the block's pixels, in rows `stride` apart.
    pub(super) fn inverse(
        coefficients: &[i16; 64],
        scales: &[i32; 64],
        dct: Dct,
        out: &mut [u8],
        stride: usize,
    ) = inverse_here;
}

#[inline(always)]
fn inverse_here(
    coefficients: &[i16; 64],
    scales: &[i32; 64],
    dct: Dct,
    out: &mut [u8],
    stride: usize,
) {
    let mut block: [i32; 64] = from_fn(|i| i32::from(coefficients[i]).wrapping_mul(scales[i]));
    match dct {
        // Two bits more between the passes; the last three are the transform's own factor of 8.
        Dct::Accurate => {
            columns(&mut block, accurate::<11>);
            transpose(&mut block);
            columns(&mut block, accurate::<18>);
        }
        Dct::Fast => {
            columns(&mut block, fast);
            transpose(&mut block);
            columns(&mut block, |x| fast(x).map(|x| x >> 5));
        }
    }
    transpose(&mut block);
    for (row, out) in block.as_chunks::<8>().0.iter().zip(out.chunks_mut(stride)) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = x.wrapping_add(128).clamp(0, 255) as u8;
        }
    }
}

/// Puts each column through a transform. The loop is made for the compiler to do several columns at a time.
#[inline(always)]
fn columns(block: &mut [i32; 64], transform: impl Fn([W; 8]) -> [W; 8]) {
    for x in 0..8 {
        let column = transform(from_fn(|y| Wrapping(block[8 * y + x])));
        for y in 0..8 {
            block[8 * y + x] = column[y].0;
        }
    }
}

#[inline(always)]
fn transpose(block: &mut [i32; 64]) {
    for y in 0..8 {
        for x in 0..y {
            block.swap(8 * y + x, 8 * x + y);
        }
    }
}

/// A block whose only coefficient is the first: one value, the same from both.
pub(super) fn flat(first: i16, scale: i32, dct: Dct) -> u8 {
    let first = i32::from(first).wrapping_mul(scale);
    let value = match dct {
        Dct::Accurate => first.wrapping_add(4) >> 3,
        Dct::Fast => first >> 5,
    };
    value.wrapping_add(128).clamp(0, 255) as u8
}

/// 2^13 times x.
const fn fix(x: f64) -> W {
    Wrapping((x * 8192.0 + 0.5) as i32)
}

/// One dimension, scaled by 2^13 and then rounded down by 2^SHIFT.
#[inline(always)]
fn accurate<const SHIFT: usize>(x: [W; 8]) -> [W; 8] {
    let z = (x[2] + x[6]) * fix(0.541_196_100);
    let even2 = z - x[6] * fix(1.847_759_065);
    let even3 = z + x[2] * fix(0.765_366_865);
    let even0 = (x[0] + x[4]) << 13;
    let even1 = (x[0] - x[4]) << 13;
    let even = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];

    let z5 = (x[7] + x[3] + x[5] + x[1]) * fix(1.175_875_602);
    let z1 = (x[7] + x[1]) * fix(0.899_976_223);
    let z2 = (x[5] + x[3]) * fix(2.562_915_447);
    let z3 = z5 - (x[7] + x[3]) * fix(1.961_570_560);
    let z4 = z5 - (x[5] + x[1]) * fix(0.390_180_644);
    let odd = [
        x[1] * fix(1.501_321_110) - z1 + z4,
        x[3] * fix(3.072_711_026) - z2 + z3,
        x[5] * fix(2.053_119_869) - z2 + z4,
        x[7] * fix(0.298_631_336) - z1 + z3,
    ];
    let round = |x: W| (x + Wrapping(1 << (SHIFT - 1))) >> SHIFT;
    from_fn(|i| match i {
        0..4 => round(even[i] + odd[i]),
        _ => round(even[7 - i] - odd[7 - i]),
    })
}

/// One dimension; the scales are in the quantisation table.
#[inline(always)]
fn fast(x: [W; 8]) -> [W; 8] {
    let by = |x: W, factor: i32| (x * Wrapping(factor)) >> 8;
    let (sum, difference) = (x[0] + x[4], x[0] - x[4]);
    let outer = x[2] + x[6];
    let inner = by(x[2] - x[6], 362) - outer;
    let even = [
        sum + outer,
        difference + inner,
        difference - inner,
        sum - outer,
    ];

    let (z13, z10) = (x[5] + x[3], x[5] - x[3]);
    let (z11, z12) = (x[1] + x[7], x[1] - x[7]);
    let z5 = by(z10 + z12, 473);
    let odd0 = z11 + z13;
    let odd1 = by(z10, -669) + z5 - odd0;
    let odd2 = by(z11 - z13, 362) - odd1;
    // The last one has the other sign.
    let odd3 = by(z12, 277) - z5 + odd2;
    [
        even[0] + odd0,
        even[1] + odd1,
        even[2] + odd2,
        even[3] - odd3,
        even[3] + odd3,
        even[2] - odd2,
        even[1] - odd1,
        even[0] - odd0,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition (T.81, A.3.3), in f64.
    fn definition(coefficients: &[i16; 64]) -> [f64; 64] {
        let basis = |x: usize, u: usize| {
            let scale = if u == 0 { 0.5_f64.sqrt() } else { 1.0 };
            scale * ((2 * x + 1) as f64 * u as f64 * std::f64::consts::PI / 16.0).cos() / 2.0
        };
        from_fn(|i| {
            let (y, x) = (i / 8, i % 8);
            let sum: f64 = (0..64)
                .map(|k| f64::from(coefficients[k]) * basis(y, k / 8) * basis(x, k % 8))
                .sum();
            (sum + 128.0).clamp(0.0, 255.0)
        })
    }

    fn blocks() -> impl Iterator<Item = [i16; 64]> {
        let mut state = 1u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as i16 - 128
        };
        (0..200).map(move |_| from_fn(|i| next() / (1 + i as i16 / 4)))
    }

    fn worst(dct: Dct) -> f64 {
        let scales = scaled(&[1; 64], dct);
        let mut worst = 0.0_f64;
        for block in blocks() {
            let mut out = [0; 64];
            inverse(&block, &scales, dct, &mut out, 8);
            for (ours, exact) in out.iter().zip(definition(&block)) {
                worst = worst.max((f64::from(*ours) - exact).abs());
            }
        }
        worst
    }

    /// On noise far louder than a photograph's. The photographs prove the bits; this says which is which.
    #[test]
    fn accurate_is_within_a_level_and_fast_is_not() {
        let (accurate, fast) = (worst(Dct::Accurate), worst(Dct::Fast));
        assert!(accurate < 1.0, "{accurate}");
        assert!((1.0..10.0).contains(&fast), "{fast}");
    }

    #[test]
    fn a_flat_block_is_flat() {
        for dct in [Dct::Accurate, Dct::Fast] {
            let scales = scaled(&[3; 64], dct);
            for first in [-2048, -100, -1, 0, 1, 2, 77, 2047] {
                let mut block = [0; 64];
                block[0] = first;
                let mut out = [0; 64];
                inverse(&block, &scales, dct, &mut out, 8);
                assert_eq!(out, [flat(first, scales[0], dct); 64], "{first} {dct:?}");
            }
        }
    }

    #[test]
    fn absurd_coefficients_do_not_panic() {
        for dct in [Dct::Accurate, Dct::Fast] {
            let scales = scaled(&[u16::MAX; 64], dct);
            for value in [i16::MIN, i16::MAX] {
                inverse(&[value; 64], &scales, dct, &mut [0; 64], 8);
            }
            flat(i16::MIN, scales[0], dct);
        }
    }
}
