//! The accurate inverse DCT (libjpeg's `islow`) of [`Group`]s, in 16 and 32 bits as libjpeg-turbo's vector code has it.

use super::entropy::Group;
use super::resample::PAIR;
use super::simd::Vector;

/// 2^13 times x.
const fn fix(x: f64) -> i32 {
    (x * 8192.0 + 0.5) as i32
}

/// A pair of factors for neighbours.
#[inline(always)]
unsafe fn pair<V: Vector>(low: i32, high: i32) -> V {
    // SAFETY: the caller's word.
    unsafe { V::splat32((low & 0xffff) | high << 16) }
}

/// One dimension over eight vectors, scaled by 2^13, and then down by 2^SHIFT after `round` is added. The same
/// scheme as `accurate` in the exact decoder's, with each rotation as sums of two products.
///
/// # Safety
/// The CPU has the vector's instructions.
#[inline(always)]
unsafe fn pass<V: Vector, const SHIFT: u32>(x: [V; 8], round: i32) -> [V; 8] {
    // SAFETY: the caller's word.
    unsafe {
        let round = V::splat32(round);
        let (s73, s51) = (x[7].add16(x[3]), x[5].add16(x[1]));
        macro_rules! half {
            ($interleave:ident) => {{
                let p26 = x[2].$interleave(x[6]);
                let even2 = p26.madd(pair(
                    fix(0.541_196_100),
                    fix(0.541_196_100) - fix(1.847_759_065),
                ));
                let even3 = p26.madd(pair(
                    fix(0.541_196_100) + fix(0.765_366_865),
                    fix(0.541_196_100),
                ));
                let p04 = x[0].$interleave(x[4]);
                let even0 = p04.madd(pair(1 << 13, 1 << 13)).add32(round);
                let even1 = p04.madd(pair(1 << 13, -(1 << 13))).add32(round);
                let even = [
                    even0.add32(even3),
                    even1.add32(even2),
                    even1.sub32(even2),
                    even0.sub32(even3),
                ];

                let sums = s73.$interleave(s51);
                let z3 = sums.madd(pair(
                    fix(1.175_875_602) - fix(1.961_570_560),
                    fix(1.175_875_602),
                ));
                let z4 = sums.madd(pair(
                    fix(1.175_875_602),
                    fix(1.175_875_602) - fix(0.390_180_644),
                ));
                let (p71, p53) = (x[7].$interleave(x[1]), x[5].$interleave(x[3]));
                let (f0899, f2562) = (fix(0.899_976_223), fix(2.562_915_447));
                let odd = [
                    p71.madd(pair(-f0899, fix(1.501_321_110) - f0899)).add32(z4),
                    p53.madd(pair(-f2562, fix(3.072_711_026) - f2562)).add32(z3),
                    p53.madd(pair(fix(2.053_119_869) - f2562, -f2562)).add32(z4),
                    p71.madd(pair(fix(0.298_631_336) - f0899, -f0899)).add32(z3),
                ];
                [
                    even[0].add32(odd[0]).shift32::<SHIFT>(),
                    even[1].add32(odd[1]).shift32::<SHIFT>(),
                    even[2].add32(odd[2]).shift32::<SHIFT>(),
                    even[3].add32(odd[3]).shift32::<SHIFT>(),
                    even[3].sub32(odd[3]).shift32::<SHIFT>(),
                    even[2].sub32(odd[2]).shift32::<SHIFT>(),
                    even[1].sub32(odd[1]).shift32::<SHIFT>(),
                    even[0].sub32(odd[0]).shift32::<SHIFT>(),
                ]
            }};
        }
        let (low, high) = (half!(low16), half!(high16));
        [
            low[0].pack32(high[0]),
            low[1].pack32(high[1]),
            low[2].pack32(high[2]),
            low[3].pack32(high[3]),
            low[4].pack32(high[4]),
            low[5].pack32(high[5]),
            low[6].pack32(high[6]),
            low[7].pack32(high[7]),
        ]
    }
}

/// 8 x 8 within each part.
#[inline(always)]
unsafe fn transpose<V: Vector>(x: [V; 8]) -> [V; 8] {
    // SAFETY: the caller's word.
    unsafe {
        let a = [
            x[0].low16(x[1]),
            x[0].high16(x[1]),
            x[2].low16(x[3]),
            x[2].high16(x[3]),
            x[4].low16(x[5]),
            x[4].high16(x[5]),
            x[6].low16(x[7]),
            x[6].high16(x[7]),
        ];
        let b = [
            a[0].low32(a[2]),
            a[0].high32(a[2]),
            a[1].low32(a[3]),
            a[1].high32(a[3]),
            a[4].low32(a[6]),
            a[4].high32(a[6]),
            a[5].low32(a[7]),
            a[5].high32(a[7]),
        ];
        [
            b[0].low64(b[4]),
            b[0].high64(b[4]),
            b[1].low64(b[5]),
            b[1].high64(b[5]),
            b[2].low64(b[6]),
            b[2].high64(b[6]),
            b[3].low64(b[7]),
            b[3].high64(b[7]),
        ]
    }
}

/// Writes the samples of a group's four blocks as sixteen pairs of columns: those of a pair in turn from top to bottom,
/// the pairs [`PAIR`] apart.
///
/// # Safety
/// The CPU has the vector's instructions.
#[inline(always)]
pub(super) unsafe fn inverse<V: Vector>(group: &Group, quantisation: &[i16; 64], out: &mut [u8]) {
    /// Turns eight samples of two columns into eight pairs.
    const PAIRS: [u8; 16] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];
    assert!(out.len() >= 15 * PAIR + 16);
    let out = out.as_mut_ptr();
    let mut block = 0;
    while block < 4 {
        // SAFETY: a row of the group is 32 coefficients, of which `block` is a multiple of `PARTS` below 4; each of 16
        // places has 16 bytes, as asserted; the rest is the caller's word.
        unsafe {
            let from = group.0.as_ptr().add(8 * block).cast::<u8>();
            let scales = quantisation.as_ptr().cast::<u8>();
            macro_rules! row {
                ($y:literal) => {
                    V::load(from.add(64 * $y)).mul16(V::splat128(scales.add(16 * $y)))
                };
            }
            let rows = [
                row!(0),
                row!(1),
                row!(2),
                row!(3),
                row!(4),
                row!(5),
                row!(6),
                row!(7),
            ];
            // Two bits more between the passes; the last three are the transform's own factor of 8. 128 is the middle.
            let rows = pass::<V, 11>(rows, 1 << 10);
            let columns = pass::<V, 18>(transpose(rows), (1 << 17) + (128 << 18));
            let mut i = 0;
            while i < 4 {
                let pairs = columns[2 * i].pack16(columns[2 * i + 1]).shuffle(&PAIRS);
                pairs.store_parts(out.add((4 * block + i) * PAIR), 4 * PAIR);
                i += 1;
            }
        }
        block += V::PARTS;
    }
}
