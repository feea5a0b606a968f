//! Vector instructions behind one trait, and the choice among them at run time.
//!
//! A kernel is written once, generic over [`Isa`], as a [`Job`]. `Level::call` runs it compiled for the instructions
//! of that level. Everything a job calls is `#[inline(always)]` (a function that is not inlined would be compiled
//! without the instructions), or is itself a job, run by `I::call`. Closures do not inherit instructions either.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "each is one instruction under the contract that `Isa` states for all of them"
)]

use std::fmt;
use std::str::FromStr;

use half::bf16;

use super::tiles;

/// Which vector instructions kernels use. Bits differ between levels, and only between levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target has by default.
    Portable,
    /// AVX2 with FMA: 8 lanes, 16 registers.
    Avx2,
    /// AVX-512 F, BW, DQ and VL: 16 lanes, 32 registers. bf16 tensors are computed with in f32.
    Avx512,
    /// AVX-512 with the dot products of bf16.
    Avx512Bf16,
    /// AVX-512 with matrix tiles of bf16 (AMX), which multiply f32 too, in pieces.
    Amx,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// The fastest level of this CPU: the highest, but for the dot products of bf16 where the CPU has matrix tiles that
    /// the system does not give out. Such CPUs do them at half the rate of f32's multiply-adds or less (Xeon with AMX,
    /// 2 cores, 2026-11-28: 165 GFLOP/s against 225 and more), and lose Winograd by them.
    pub fn detect() -> Self {
        let pays = |level: &Level| {
            level.is_available() && !(*level == Self::Avx512Bf16 && tiles::has_tiles())
        };
        Self::ALL.into_iter().rfind(pays).unwrap_or(Self::Portable)
    }

    /// Whether this CPU has the instructions.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = || has!("avx2") && has!("fma") && has!("f16c") && has!("bmi2");
            let avx512 =
                || has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => avx2() && avx512(),
                Self::Avx512Bf16 => avx2() && avx512() && has!("avx512bf16"),
                Self::Amx => Self::Avx512Bf16.is_available() && tiles::is_available(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// Lanes of a vector of f32.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Self::Portable => Portable::LANES,
            _ => self.x86_lanes(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn x86_lanes(self) -> usize {
        if self == Self::Avx2 {
            x86::Avx2::LANES
        } else {
            x86::Avx512::LANES
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn x86_lanes(self) -> usize {
        unreachable!("no engine is built for a level that is not available")
    }

    /// Runs the job compiled for this level.
    ///
    /// # Safety
    /// The CPU has the level's instructions, and the job's own conditions hold.
    pub(crate) unsafe fn call<J: Job>(self, job: J) {
        // SAFETY: the caller's word.
        unsafe {
            match self {
                Self::Portable => Portable::call(job),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::Avx2::call(job),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::Avx512::call(job),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 | Self::Amx => x86::Avx512Bf16::call(job),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("no engine is built for a level that is not available"),
            }
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        })
    }
}

impl FromStr for Level {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL
            .into_iter()
            .find(|l| l.to_string() == name)
            .ok_or(())
    }
}

/// A piece of work that is compiled for each level. `run` is `#[inline(always)]` in every implementation.
pub(crate) trait Job {
    /// # Safety
    /// The CPU has `I`'s instructions; the rest is the implementation's to say.
    unsafe fn run<I: Isa>(self);
}

/// One set of vector instructions. Pointers need no alignment except where it says so.
///
/// # Safety
/// Every function needs a CPU with the instructions; those with pointers need memory for what they read or write.
pub(crate) unsafe trait Isa: Copy + Send + Sync + 'static {
    /// `LANES` f32.
    type V: Copy;
    /// A truth value per lane.
    type M: Copy;
    const LANES: usize;
    /// Output channels of a tile: two vectors.
    const NR: usize = 2 * Self::LANES;
    /// Accumulators of two vectors that fit the registers beside the operands: pixels of a convolution's tile.
    const MR: usize;

    /// Runs a job in a function of its own, compiled with these instructions.
    unsafe fn call<J: Job>(job: J);

    unsafe fn zero() -> Self::V;
    unsafe fn splat(v: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// The first `n` lanes, the others zero.
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize);
    /// Stores past the caches where the instructions can; `p` is aligned to the vector.
    unsafe fn stream(p: *mut f32, v: Self::V);
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    /// Rounds to nearest even.
    unsafe fn store_bf16(p: *mut bf16, v: Self::V);
    /// As `stream`.
    unsafe fn stream_bf16(p: *mut bf16, v: Self::V);
    /// Rounds two vectors, side by side.
    #[inline(always)]
    unsafe fn store_two_bf16(p: *mut bf16, low: Self::V, high: Self::V) {
        // SAFETY: the caller's word.
        unsafe {
            Self::store_bf16(p, low);
            Self::store_bf16(p.add(Self::LANES), high);
        }
    }
    unsafe fn load_u8(p: *const u8) -> Self::V;
    /// The first `n` of them; the other lanes are zero.
    #[inline(always)]
    unsafe fn load_u8_part(p: *const u8, n: usize) -> Self::V {
        let mut all = [0u8; 16];
        // SAFETY: the caller's word; the longest vector has sixteen lanes.
        unsafe {
            std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n);
            Self::load_u8(all.as_ptr())
        }
    }
    /// The first `n` lanes as whole numbers below 256.
    unsafe fn store_u8(p: *mut u8, v: Self::V, n: usize);
    unsafe fn eq(a: Self::V, b: Self::V) -> Self::M;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c - a * b.
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN, so that a floor as `a` lets NaN pass.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a > b, false where either is NaN.
    unsafe fn gt(a: Self::V, b: Self::V) -> Self::M;
    /// Lanes that are not at most 0: positive or NaN.
    unsafe fn not_le0(v: Self::V) -> Self::M;
    /// `a` where the mask is set, else `b`.
    unsafe fn select(m: Self::M, a: Self::V, b: Self::V) -> Self::V;
    /// Lane 0 of `a`, and so on, as an array.
    #[inline(always)]
    unsafe fn to_array(v: Self::V) -> [f32; 16] {
        let mut out = [0.0; 16];
        // SAFETY: no set of instructions has more than 16 lanes.
        unsafe { Self::store(out.as_mut_ptr(), v) };
        out
    }
    /// Stores eight lanes at `p`, the next eight at `p + pitch`, and so on.
    unsafe fn scatter8(p: *mut f32, pitch: usize, v: Self::V);
    /// Two neighbouring bf16 at `p`, in every lane as bits.
    unsafe fn splat_pair(p: *const bf16) -> Self::V;
    /// acc + a0 b0 + a1 b1 in each lane, where a lane of `a` and `b` holds two bf16.
    unsafe fn dot2(acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Rounded to bf16, two in each lane: that of `low` and that of `high`.
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V;
    /// Rows become columns, where there are sixteen lanes.
    unsafe fn transpose(rows: &mut [Self::V; 16]);
    /// Rounded to bf16, halves away from zero, and what that leaves. Where there are sixteen lanes.
    unsafe fn split(v: Self::V) -> (Self::V, Self::V);
    /// Stores two vectors of what bf16 holds, side by side. Where there are sixteen lanes.
    unsafe fn store_halves(p: *mut bf16, low: Self::V, high: Self::V);
    /// Two of what bf16 holds in each lane, as [`Self::pair`]. Where there are sixteen lanes.
    unsafe fn join(low: Self::V, high: Self::V) -> Self::V;
}

/// Asks for the cache line of an address, into the second level: pixels whose channels lie 4 KiB apart would push each
/// other out of the first. A hint: no address is wrong.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, of the baseline's instructions.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the cache line of an address, into the first level. A hint: no address is wrong.
#[inline(always)]
pub(crate) fn prefetch_near<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, of the baseline's instructions.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the cache line of an address in order to write it. A hint: no address is wrong.
#[inline(always)]
pub(crate) fn prefetch_to_write<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a hint; CPUs that do not have it take it as no operation.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Rounds the bits of an f32 to those of the nearest bf16, NaN staying NaN.
#[inline(always)]
fn round_bits(bits: u32) -> u32 {
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) | 0x40;
    }
    (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
}

/// Eight lanes of plain arithmetic.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Applies `f` to each lane.
macro_rules! lanes {
    ($i:ident => $e:expr) => {{
        let mut out = [0.0f32; 8];
        let mut $i = 0;
        while $i < 8 {
            out[$i] = $e;
            $i += 1;
        }
        out
    }};
}

// SAFETY: plain Rust; pointers are the caller's word.
unsafe impl Isa for Portable {
    type V = [f32; 8];
    type M = [bool; 8];
    const LANES: usize = 8;
    const MR: usize = 6;

    #[inline(never)]
    unsafe fn call<J: Job>(job: J) {
        // SAFETY: the caller's word.
        unsafe { job.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::V {
        [v; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller's word.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller's word.
        lanes!(i => if i < n { unsafe { p.add(i).read() } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller's word.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, v: Self::V, n: usize) {
        for (i, v) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller's word.
            unsafe { p.add(i).write(v) }
        }
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, v: Self::V) {
        // SAFETY: the caller's word.
        unsafe { Self::store(p, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::V {
        // SAFETY: the caller's word.
        lanes!(i => unsafe { f32::from_bits(u32::from(p.add(i).read().to_bits()) << 16) })
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut bf16, v: Self::V) {
        for (i, v) in v.into_iter().enumerate() {
            let rounded = bf16::from_bits(round_bits(v.to_bits()) as u16);
            // SAFETY: the caller's word.
            unsafe { p.add(i).write(rounded) }
        }
    }
    #[inline(always)]
    unsafe fn stream_bf16(p: *mut bf16, v: Self::V) {
        // SAFETY: the caller's word.
        unsafe { Self::store_bf16(p, v) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::V {
        // SAFETY: the caller's word.
        lanes!(i => f32::from(unsafe { p.add(i).read() }))
    }
    #[inline(always)]
    unsafe fn store_u8(p: *mut u8, v: Self::V, n: usize) {
        for (i, v) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller's word.
            unsafe { p.add(i).write(v as u8) }
        }
    }
    #[inline(always)]
    unsafe fn eq(a: Self::V, b: Self::V) -> Self::M {
        std::array::from_fn(|i| a[i] == b[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(i => a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(i => c[i] - a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn gt(a: Self::V, b: Self::V) -> Self::M {
        std::array::from_fn(|i| a[i] > b[i])
    }
    #[inline(always)]
    unsafe fn not_le0(v: Self::V) -> Self::M {
        v.map(|v| v > 0.0 || v.is_nan())
    }
    #[inline(always)]
    unsafe fn select(m: Self::M, a: Self::V, b: Self::V) -> Self::V {
        lanes!(i => if m[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn scatter8(p: *mut f32, _: usize, v: Self::V) {
        // SAFETY: the caller's word.
        unsafe { Self::store(p, v) }
    }
    #[inline(always)]
    unsafe fn splat_pair(p: *const bf16) -> Self::V {
        // SAFETY: the caller's word.
        [f32::from_bits(unsafe { p.cast::<u32>().read_unaligned() }); 8]
    }
    #[inline(always)]
    unsafe fn dot2(acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        let low = |v: f32| f32::from_bits(v.to_bits() << 16);
        let high = |v: f32| f32::from_bits(v.to_bits() & 0xffff_0000);
        lanes!(i => low(a[i]) * low(b[i]) + (high(a[i]) * high(b[i]) + acc[i]))
    }
    #[inline(always)]
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V {
        let rounded = |v: f32| round_bits(v.to_bits());
        lanes!(i => f32::from_bits(rounded(low[i]) & 0xffff | rounded(high[i]) << 16))
    }
    #[inline(always)]
    unsafe fn transpose(_: &mut [Self::V; 16]) {
        unreachable!("there are eight lanes")
    }
    #[inline(always)]
    unsafe fn split(_: Self::V) -> (Self::V, Self::V) {
        unreachable!("there are eight lanes")
    }
    #[inline(always)]
    unsafe fn store_halves(_: *mut bf16, _: Self::V, _: Self::V) {
        unreachable!("there are eight lanes")
    }
    #[inline(always)]
    unsafe fn join(_: Self::V, _: Self::V) -> Self::V {
        unreachable!("there are eight lanes")
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! AVX2 and AVX-512.

    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Isa, Job};

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    /// The first n of eight lanes are set at `MASKS[8 - n..]`.
    static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
    unsafe fn avx2<J: Job>(job: J) {
        // SAFETY: the caller's word.
        unsafe { job.run::<Avx2>() }
    }

    #[inline(always)]
    unsafe fn round8(v: __m256) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16)
        }
    }

    // SAFETY: each function is the instruction that its name says.
    unsafe impl Isa for Avx2 {
        type V = __m256;
        type M = __m256;
        const LANES: usize = 8;
        const MR: usize = 6;

        #[inline(always)]
        unsafe fn call<J: Job>(job: J) {
            // SAFETY: the caller's word.
            unsafe { avx2(job) }
        }
        #[inline(always)]
        unsafe fn zero() -> __m256 {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(v: f32) -> __m256 {
            unsafe { _mm256_set1_ps(v) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_part(p: *const f32, n: usize) -> __m256 {
            unsafe {
                _mm256_maskload_ps(
                    p,
                    _mm256_loadu_si256(MASKS.as_ptr().add(8 - n.min(8)).cast()),
                )
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn store_part(p: *mut f32, v: __m256, n: usize) {
            unsafe {
                _mm256_maskstore_ps(
                    p,
                    _mm256_loadu_si256(MASKS.as_ptr().add(8 - n.min(8)).cast()),
                    v,
                )
            }
        }
        #[inline(always)]
        unsafe fn stream(p: *mut f32, v: __m256) {
            unsafe { _mm256_stream_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m256 {
            unsafe {
                let half = _mm_loadu_si128(p.cast());
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut bf16, v: __m256) {
            unsafe {
                let r = round8(v);
                let packed =
                    _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
                _mm_storeu_si128(p.cast(), packed);
            }
        }
        #[inline(always)]
        unsafe fn stream_bf16(p: *mut bf16, v: __m256) {
            unsafe {
                let r = round8(v);
                let packed =
                    _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
                _mm_stream_si128(p.cast(), packed);
            }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn store_u8(p: *mut u8, v: __m256, n: usize) {
            unsafe {
                let v = _mm256_cvtps_epi32(v);
                let v = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
                let v = _mm_packus_epi16(v, v);
                if n >= 8 {
                    _mm_storel_epi64(p.cast(), v);
                } else {
                    let bytes = _mm_cvtsi128_si64(v).to_ne_bytes();
                    p.copy_from_nonoverlapping(bytes.as_ptr(), n);
                }
            }
        }
        #[inline(always)]
        unsafe fn eq(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fnmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn gt(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_cmp_ps::<_CMP_GT_OQ>(a, b) }
        }
        #[inline(always)]
        unsafe fn not_le0(v: __m256) -> __m256 {
            unsafe { _mm256_cmp_ps::<_CMP_NLE_UQ>(v, _mm256_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn select(m: __m256, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_blendv_ps(b, a, m) }
        }
        #[inline(always)]
        unsafe fn scatter8(p: *mut f32, _: usize, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn splat_pair(p: *const bf16) -> __m256 {
            unsafe { _mm256_castsi256_ps(_mm256_set1_epi32(p.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn dot2(acc: __m256, a: __m256, b: __m256) -> __m256 {
            unsafe {
                let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
                let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
                let (a0, b0) = (_mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
                let (a1, b1) = (_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
                let acc = _mm256_fmadd_ps(_mm256_castsi256_ps(a1), _mm256_castsi256_ps(b1), acc);
                _mm256_fmadd_ps(_mm256_castsi256_ps(a0), _mm256_castsi256_ps(b0), acc)
            }
        }
        #[inline(always)]
        unsafe fn pair(low: __m256, high: __m256) -> __m256 {
            unsafe {
                let high = _mm256_slli_epi32(round8(high), 16);
                _mm256_castsi256_ps(_mm256_or_si256(round8(low), high))
            }
        }
        #[inline(always)]
        unsafe fn transpose(_: &mut [__m256; 16]) {
            unreachable!("there are eight lanes")
        }
        #[inline(always)]
        unsafe fn split(_: __m256) -> (__m256, __m256) {
            unreachable!("there are eight lanes")
        }
        #[inline(always)]
        unsafe fn store_halves(_: *mut bf16, _: __m256, _: __m256) {
            unreachable!("there are eight lanes")
        }
        #[inline(always)]
        unsafe fn join(_: __m256, _: __m256) -> __m256 {
            unreachable!("there are eight lanes")
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    /// With the dot products of bf16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Bf16;

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt"
    )]
    unsafe fn avx512<J: Job>(job: J) {
        // SAFETY: the caller's word.
        unsafe { job.run::<Avx512>() }
    }

    #[target_feature(
        enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt"
    )]
    unsafe fn avx512_bf16<J: Job>(job: J) {
        // SAFETY: the caller's word.
        unsafe { job.run::<Avx512Bf16>() }
    }

    #[inline(always)]
    unsafe fn round16(v: __m512) -> __m512i {
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let quiet = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x0040_0000));
            _mm512_srli_epi32(quiet, 16)
        }
    }

    #[inline(always)]
    fn first(n: usize) -> __mmask16 {
        if n >= 16 { 0xffff } else { (1 << n) - 1 }
    }

    macro_rules! avx512_isa {
        ($name:ident, $call:ident, $round:expr, $dot:expr) => {
            // SAFETY: each function is the instruction that its name says.
            unsafe impl Isa for $name {
                type V = __m512;
                type M = __mmask16;
                const LANES: usize = 16;
                const MR: usize = 14;

                #[inline(always)]
                unsafe fn call<J: Job>(job: J) {
                    // SAFETY: the caller's word.
                    unsafe { $call(job) }
                }
                #[inline(always)]
                unsafe fn zero() -> __m512 {
                    unsafe { _mm512_setzero_ps() }
                }
                #[inline(always)]
                unsafe fn splat(v: f32) -> __m512 {
                    unsafe { _mm512_set1_ps(v) }
                }
                #[inline(always)]
                unsafe fn load(p: *const f32) -> __m512 {
                    unsafe { _mm512_loadu_ps(p) }
                }
                #[inline(always)]
                unsafe fn load_part(p: *const f32, n: usize) -> __m512 {
                    unsafe { _mm512_maskz_loadu_ps(first(n), p) }
                }
                #[inline(always)]
                unsafe fn store(p: *mut f32, v: __m512) {
                    unsafe { _mm512_storeu_ps(p, v) }
                }
                #[inline(always)]
                unsafe fn store_part(p: *mut f32, v: __m512, n: usize) {
                    unsafe { _mm512_mask_storeu_ps(p, first(n), v) }
                }
                #[inline(always)]
                unsafe fn stream(p: *mut f32, v: __m512) {
                    unsafe { _mm512_stream_ps(p, v) }
                }
                #[inline(always)]
                unsafe fn load_bf16(p: *const bf16) -> __m512 {
                    unsafe {
                        let half = _mm256_loadu_si256(p.cast());
                        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
                    }
                }
                #[inline(always)]
                unsafe fn store_bf16(p: *mut bf16, v: __m512) {
                    unsafe { _mm256_storeu_si256(p.cast(), $round(v)) }
                }
                #[inline(always)]
                unsafe fn stream_bf16(p: *mut bf16, v: __m512) {
                    unsafe { _mm256_stream_si256(p.cast(), $round(v)) }
                }
                #[inline(always)]
                unsafe fn store_two_bf16(p: *mut bf16, low: __m512, high: __m512) {
                    unsafe {
                        let low = _mm512_castsi256_si512($round(low));
                        let both = _mm512_inserti64x4::<1>(low, $round(high));
                        _mm512_storeu_si512(p.cast(), both);
                    }
                }
                #[inline(always)]
                unsafe fn load_u8(p: *const u8) -> __m512 {
                    unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
                }
                #[inline(always)]
                unsafe fn store_u8(p: *mut u8, v: __m512, n: usize) {
                    unsafe {
                        let v = _mm512_cvtps_epi32(v);
                        _mm512_mask_cvtepi32_storeu_epi8(p.cast(), first(n), v);
                    }
                }
                #[inline(always)]
                unsafe fn eq(a: __m512, b: __m512) -> __mmask16 {
                    unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
                }
                #[inline(always)]
                unsafe fn add(a: __m512, b: __m512) -> __m512 {
                    unsafe { _mm512_add_ps(a, b) }
                }
                #[inline(always)]
                unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                    unsafe { _mm512_sub_ps(a, b) }
                }
                #[inline(always)]
                unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                    unsafe { _mm512_mul_ps(a, b) }
                }
                #[inline(always)]
                unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                    unsafe { _mm512_fmadd_ps(a, b, c) }
                }
                #[inline(always)]
                unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
                    unsafe { _mm512_fnmadd_ps(a, b, c) }
                }
                #[inline(always)]
                unsafe fn max(a: __m512, b: __m512) -> __m512 {
                    unsafe { _mm512_max_ps(a, b) }
                }
                #[inline(always)]
                unsafe fn gt(a: __m512, b: __m512) -> __mmask16 {
                    unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
                }
                #[inline(always)]
                unsafe fn not_le0(v: __m512) -> __mmask16 {
                    unsafe { _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(v, _mm512_setzero_ps()) }
                }
                #[inline(always)]
                unsafe fn select(m: __mmask16, a: __m512, b: __m512) -> __m512 {
                    unsafe { _mm512_mask_blend_ps(m, b, a) }
                }
                #[inline(always)]
                unsafe fn scatter8(p: *mut f32, pitch: usize, v: __m512) {
                    unsafe {
                        _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
                        _mm256_storeu_ps(p.add(pitch), _mm512_extractf32x8_ps::<1>(v));
                    }
                }
                #[inline(always)]
                unsafe fn splat_pair(p: *const bf16) -> __m512 {
                    unsafe {
                        _mm512_castsi512_ps(_mm512_set1_epi32(p.cast::<i32>().read_unaligned()))
                    }
                }
                #[inline(always)]
                unsafe fn dot2(acc: __m512, a: __m512, b: __m512) -> __m512 {
                    unsafe { $dot(acc, a, b) }
                }
                #[inline(always)]
                unsafe fn pair(low: __m512, high: __m512) -> __m512 {
                    unsafe {
                        let low = _mm512_cvtepu16_epi32($round(low));
                        let high = _mm512_slli_epi32(_mm512_cvtepu16_epi32($round(high)), 16);
                        _mm512_castsi512_ps(_mm512_or_si512(low, high))
                    }
                }
                #[inline(always)]
                unsafe fn transpose(rows: &mut [__m512; 16]) {
                    unsafe { transpose16(rows) }
                }
                #[inline(always)]
                unsafe fn split(v: __m512) -> (__m512, __m512) {
                    unsafe {
                        let bits = _mm512_castps_si512(v);
                        let up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
                        let piece = _mm512_and_si512(up, _mm512_set1_epi32(-0x1_0000));
                        let piece = _mm512_castsi512_ps(piece);
                        (piece, _mm512_sub_ps(v, piece))
                    }
                }
                #[inline(always)]
                unsafe fn store_halves(p: *mut bf16, low: __m512, high: __m512) {
                    unsafe {
                        let (low, high) = (_mm512_castps_si512(low), _mm512_castps_si512(high));
                        let both = _mm512_permutex2var_epi16(low, upper_halves(), high);
                        _mm512_storeu_si512(p.cast(), both);
                    }
                }
                #[inline(always)]
                unsafe fn join(low: __m512, high: __m512) -> __m512 {
                    unsafe {
                        let low = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
                        let mask = _mm512_set1_epi32(-0x1_0000);
                        let high = _mm512_and_si512(_mm512_castps_si512(high), mask);
                        _mm512_castsi512_ps(_mm512_or_si512(low, high))
                    }
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn low_pairs(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
    }

    #[inline(always)]
    unsafe fn high_pairs(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))) }
    }

    /// The upper half of every lane of two vectors.
    #[inline(always)]
    unsafe fn upper_halves() -> __m512i {
        const ODD: [u16; 32] = {
            let mut odd = [0; 32];
            let mut i = 0;
            while i < 32 {
                odd[i] = 2 * i as u16 + 1;
                i += 1;
            }
            odd
        };
        unsafe { _mm512_loadu_si512(ODD.as_ptr().cast()) }
    }

    /// Lanes of neighbouring rows side by side, then pairs of them, then the quarters of vectors change places.
    #[inline(always)]
    unsafe fn transpose16(rows: &mut [__m512; 16]) {
        unsafe {
            let mut t = *rows;
            let mut i = 0;
            while i < 16 {
                t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
                t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
                i += 2;
            }
            let mut u = t;
            i = 0;
            while i < 16 {
                u[i] = low_pairs(t[i], t[i + 2]);
                u[i + 1] = high_pairs(t[i], t[i + 2]);
                u[i + 2] = low_pairs(t[i + 1], t[i + 3]);
                u[i + 3] = high_pairs(t[i + 1], t[i + 3]);
                i += 4;
            }
            // Now u[4 q + r] holds, in quarter k, column 4 k + r of rows 4 q to 4 q + 3.
            i = 0;
            while i < 4 {
                let (a, b, c, d) = (u[i], u[i + 4], u[i + 8], u[i + 12]);
                let (ab0, ab1) = (
                    _mm512_shuffle_f32x4::<0x88>(a, b),
                    _mm512_shuffle_f32x4::<0xdd>(a, b),
                );
                let (cd0, cd1) = (
                    _mm512_shuffle_f32x4::<0x88>(c, d),
                    _mm512_shuffle_f32x4::<0xdd>(c, d),
                );
                rows[i] = _mm512_shuffle_f32x4::<0x88>(ab0, cd0);
                rows[i + 8] = _mm512_shuffle_f32x4::<0xdd>(ab0, cd0);
                rows[i + 4] = _mm512_shuffle_f32x4::<0x88>(ab1, cd1);
                rows[i + 12] = _mm512_shuffle_f32x4::<0xdd>(ab1, cd1);
                i += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn narrow(v: __m512) -> __m256i {
        unsafe { _mm512_cvtepi32_epi16(round16(v)) }
    }

    #[inline(always)]
    unsafe fn dot_by_fma(acc: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let mask = _mm512_set1_epi32(0xffff_0000u32 as i32);
            let (a0, b0) = (_mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16));
            let (a1, b1) = (_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
            let acc = _mm512_fmadd_ps(_mm512_castsi512_ps(a1), _mm512_castsi512_ps(b1), acc);
            _mm512_fmadd_ps(_mm512_castsi512_ps(a0), _mm512_castsi512_ps(b0), acc)
        }
    }

    #[inline(always)]
    unsafe fn narrow_bf16(v: __m512) -> __m256i {
        // SAFETY: both types are 256 bits.
        unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: all types are 512 bits.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }

    avx512_isa!(Avx512, avx512, narrow, dot_by_fma);
    avx512_isa!(Avx512Bf16, avx512_bf16, narrow_bf16, dot_bf16);
}

/// How a tensor is stored. Arithmetic is f32 in any case.
pub(crate) trait Element: super::memory::Plain + 'static {
    /// # Safety
    /// As for [`Isa::load`], and so on.
    unsafe fn load<I: Isa>(p: *const Self) -> I::V;
    /// The first `n` lanes, the others zero.
    /// # Safety
    /// As for [`Isa::load_part`].
    unsafe fn load_part<I: Isa>(p: *const Self, n: usize) -> I::V;
    /// # Safety
    /// As for [`Isa::store`].
    unsafe fn store<I: Isa>(p: *mut Self, v: I::V);
    /// Two vectors, side by side.
    /// # Safety
    /// As for [`Isa::store`].
    unsafe fn store_two<I: Isa>(p: *mut Self, low: I::V, high: I::V);
    /// # Safety
    /// As for [`Isa::store_part`].
    unsafe fn store_part<I: Isa>(p: *mut Self, v: I::V, n: usize);
    /// # Safety
    /// As for [`Isa::stream`].
    unsafe fn stream<I: Isa>(p: *mut Self, v: I::V);
    /// Rounds.
    fn from_f32(v: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<I: Isa>(p: *const f32) -> I::V {
        unsafe { I::load(p) }
    }
    #[inline(always)]
    unsafe fn load_part<I: Isa>(p: *const f32, n: usize) -> I::V {
        unsafe { I::load_part(p, n) }
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(p: *mut f32, v: I::V) {
        unsafe { I::store(p, v) }
    }
    #[inline(always)]
    unsafe fn store_two<I: Isa>(p: *mut f32, low: I::V, high: I::V) {
        unsafe {
            I::store(p, low);
            I::store(p.add(I::LANES), high);
        }
    }
    #[inline(always)]
    unsafe fn store_part<I: Isa>(p: *mut f32, v: I::V, n: usize) {
        unsafe { I::store_part(p, v, n) }
    }
    #[inline(always)]
    unsafe fn stream<I: Isa>(p: *mut f32, v: I::V) {
        unsafe { I::stream(p, v) }
    }
    #[inline(always)]
    fn from_f32(v: f32) -> f32 {
        v
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<I: Isa>(p: *const bf16) -> I::V {
        unsafe { I::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn load_part<I: Isa>(p: *const bf16, n: usize) -> I::V {
        let mut all = [bf16::ZERO; 16];
        // SAFETY: n values are there, by the caller's word, and `all` has room for a vector.
        unsafe {
            std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n.min(I::LANES));
            I::load_bf16(all.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(p: *mut bf16, v: I::V) {
        unsafe { I::store_bf16(p, v) }
    }
    #[inline(always)]
    unsafe fn store_two<I: Isa>(p: *mut bf16, low: I::V, high: I::V) {
        unsafe { I::store_two_bf16(p, low, high) }
    }
    #[inline(always)]
    unsafe fn store_part<I: Isa>(p: *mut bf16, v: I::V, n: usize) {
        let mut all = [bf16::ZERO; 16];
        // SAFETY: as for `load_part`.
        unsafe {
            I::store_bf16(all.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(all.as_ptr(), p, n.min(I::LANES));
        }
    }
    #[inline(always)]
    unsafe fn stream<I: Isa>(p: *mut bf16, v: I::V) {
        unsafe { I::stream_bf16(p, v) }
    }
    #[inline(always)]
    fn from_f32(v: f32) -> bf16 {
        bf16::from_f32(v)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}
