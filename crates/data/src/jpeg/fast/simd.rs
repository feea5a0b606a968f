//! Whole-number vector instructions behind one trait: AVX-512, AVX2, and the same lane by lane in plain Rust.
//!
//! A vector is one, two or four parts of 128 bits, and every operation but [`Vector::load_wide`] stays within its
//! part. All of them are exact, so kernels written with them compute the same bits at every level.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "each is one instruction under the contract that `Vector` states for all of them"
)]

/// Which instructions the decoder uses. Pixels do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Whatever the target has by default.
    Portable,
    /// AVX2 and BMI.
    Avx2,
    /// AVX-512 F, BW, VL and VNNI, and the above.
    Avx512,
}

impl Level {
    pub(crate) const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The highest level of this CPU.
    pub(crate) fn detect() -> Self {
        let works = |level: &Self| level.is_available();
        Self::ALL.into_iter().rfind(works).unwrap_or(Self::Portable)
    }

    pub(crate) fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = || has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt");
            let avx512 =
                || has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni");
            match self {
                Self::Portable => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => avx2() && avx512(),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }
}

/// Work that is written for any vector.
pub(super) trait Work {
    /// # Safety
    /// The CPU has the vector's instructions.
    unsafe fn run<V: Vector>(self);
}

impl Level {
    /// # Safety
    /// The level is available.
    pub(super) unsafe fn run(self, work: impl Work) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
        fn avx2(work: impl Work) {
            // SAFETY: they are enabled.
            unsafe { work.run::<x86::Avx2>() }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,bmi1,bmi2,lzcnt")]
        fn avx512(work: impl Work) {
            // SAFETY: as above.
            unsafe { work.run::<x86::Avx512>() }
        }
        match self {
            // SAFETY: it needs no instructions but the target's.
            Self::Portable => unsafe { work.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's word.
            Self::Avx2 => unsafe { avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller's word.
            Self::Avx512 => unsafe { avx512(work) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("no other level is available"),
        }
    }
}

/// Makes a function that does what another one does, which is inlined into it: compiled for AVX2 where the CPU has it,
/// so that loops that the compiler turns into vectors are twice as wide. Whole numbers, and sums in order, give the same
/// either way.
macro_rules! widely {
    ($(#[$doc:meta])* $visible:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $inner:expr;) => {
        $(#[$doc])*
        #[expect(unsafe_code, reason = "vector instructions, after a look at whether they are there")]
        $visible fn $name($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
                fn with_avx2($($argument: $type),*) $(-> $result)? {
                    $inner($($argument),*)
                }
                if $crate::jpeg::fast::Level::Avx2.is_available() {
                    // SAFETY: the instructions are there.
                    return unsafe { with_avx2($($argument),*) };
                }
            }
            $inner($($argument),*)
        }
    };
}
pub(crate) use widely;

/// A vector of [`Vector::PARTS`] parts of 128 bits, read as bytes, as i16 or as i32, in little-endian order.
///
/// # Safety
/// Of every method: the CPU has the type's instructions; pointers are good for the bytes that the method names.
pub(super) trait Vector: Copy {
    const PARTS: usize;
    unsafe fn splat16(value: i16) -> Self;
    unsafe fn splat32(value: i32) -> Self;
    /// 16 bytes, the same in each part.
    unsafe fn splat128(from: *const u8) -> Self;
    /// 16 bytes a part.
    unsafe fn load(from: *const u8) -> Self;
    /// 8 bytes a part, in sequence over all parts, as i16.
    unsafe fn load_wide(from: *const u8) -> Self;
    /// Each part to a place of its own, `step` bytes apart.
    unsafe fn store_parts(self, to: *mut u8, step: usize);
    unsafe fn add16(self, other: Self) -> Self;
    unsafe fn sub16(self, other: Self) -> Self;
    /// Saturating.
    unsafe fn adds16(self, other: Self) -> Self;
    /// Saturating.
    unsafe fn subs16(self, other: Self) -> Self;
    /// The low half of products.
    unsafe fn mul16(self, other: Self) -> Self;
    /// Products of fractions of 2^15, rounded.
    unsafe fn mul_round16(self, other: Self) -> Self;
    unsafe fn shift16<const RIGHT: u32>(self) -> Self;
    /// Sums of the products of neighbours, as i32.
    unsafe fn madd(self, other: Self) -> Self;
    /// This one, of i32, and the sums of the products of neighbours of the others.
    unsafe fn add_madd(self, a: Self, b: Self) -> Self;
    unsafe fn add32(self, other: Self) -> Self;
    unsafe fn sub32(self, other: Self) -> Self;
    unsafe fn shift32<const RIGHT: u32>(self) -> Self;
    /// i32 to i16, saturating: this one's, then the other's.
    unsafe fn pack32(self, other: Self) -> Self;
    /// i16 to u8, saturating: this one's, then the other's.
    unsafe fn pack16(self, other: Self) -> Self;
    unsafe fn low16(self, other: Self) -> Self;
    unsafe fn high16(self, other: Self) -> Self;
    unsafe fn low32(self, other: Self) -> Self;
    unsafe fn high32(self, other: Self) -> Self;
    unsafe fn low64(self, other: Self) -> Self;
    unsafe fn high64(self, other: Self) -> Self;
    /// Bytes of each part by index; an index of 128 or more gives 0.
    unsafe fn shuffle(self, indices: &[u8; 16]) -> Self;
    unsafe fn or(self, other: Self) -> Self;
}

/// One part, in plain Rust.
#[derive(Clone, Copy)]
struct Portable([i16; 8]);

impl Portable {
    #[inline(always)]
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (pair, lane) in bytes.as_chunks_mut().0.iter_mut().zip(self.0) {
            *pair = lane.to_le_bytes();
        }
        bytes
    }

    #[inline(always)]
    fn of_bytes(bytes: [u8; 16]) -> Self {
        let mut lanes = [0; 8];
        for (lane, pair) in lanes.iter_mut().zip(bytes.as_chunks().0) {
            *lane = i16::from_le_bytes(*pair);
        }
        Self(lanes)
    }

    #[inline(always)]
    fn wide(self) -> [i32; 4] {
        let lane = |i: usize| i32::from(self.0[2 * i] as u16) | i32::from(self.0[2 * i + 1]) << 16;
        [lane(0), lane(1), lane(2), lane(3)]
    }

    #[inline(always)]
    fn of_wide(wide: [i32; 4]) -> Self {
        let mut lanes = [0; 8];
        for (i, value) in wide.into_iter().enumerate() {
            lanes[2 * i] = value as i16;
            lanes[2 * i + 1] = (value >> 16) as i16;
        }
        Self(lanes)
    }

    #[inline(always)]
    fn zip16(self, other: Self, f: impl Fn(i16, i16) -> i16) -> Self {
        let mut lanes = self.0;
        for (a, b) in lanes.iter_mut().zip(other.0) {
            *a = f(*a, b);
        }
        Self(lanes)
    }

    #[inline(always)]
    fn zip32(self, other: Self, f: impl Fn(i32, i32) -> i32) -> Self {
        let (mut lanes, other) = (self.wide(), other.wide());
        for (a, b) in lanes.iter_mut().zip(other) {
            *a = f(*a, b);
        }
        Self::of_wide(lanes)
    }

    /// Runs of `N` i16 from both in turn, beginning at the given one.
    #[inline(always)]
    fn interleave<const N: usize>(self, other: Self, from: usize) -> Self {
        let mut lanes = [0; 8];
        for i in 0..4 {
            let source = from + i;
            let to = 2 * N * (i / N) + i % N;
            lanes[to] = self.0[source];
            lanes[to + N] = other.0[source];
        }
        Self(lanes)
    }
}

impl Vector for Portable {
    const PARTS: usize = 1;
    #[inline(always)]
    unsafe fn splat16(value: i16) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn splat32(value: i32) -> Self {
        Self::of_wide([value; 4])
    }
    #[inline(always)]
    unsafe fn splat128(from: *const u8) -> Self {
        unsafe { Self::load(from) }
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        Self::of_bytes(unsafe { from.cast::<[u8; 16]>().read() })
    }
    #[inline(always)]
    unsafe fn load_wide(from: *const u8) -> Self {
        Self(unsafe { from.cast::<[u8; 8]>().read() }.map(i16::from))
    }
    #[inline(always)]
    unsafe fn store_parts(self, to: *mut u8, _step: usize) {
        unsafe { to.cast::<[u8; 16]>().write(self.bytes()) }
    }
    #[inline(always)]
    unsafe fn add16(self, other: Self) -> Self {
        self.zip16(other, i16::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub16(self, other: Self) -> Self {
        self.zip16(other, i16::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn adds16(self, other: Self) -> Self {
        self.zip16(other, i16::saturating_add)
    }
    #[inline(always)]
    unsafe fn subs16(self, other: Self) -> Self {
        self.zip16(other, i16::saturating_sub)
    }
    #[inline(always)]
    unsafe fn mul16(self, other: Self) -> Self {
        self.zip16(other, i16::wrapping_mul)
    }
    #[inline(always)]
    unsafe fn mul_round16(self, other: Self) -> Self {
        self.zip16(other, |a, b| {
            ((i32::from(a) * i32::from(b) + 0x4000) >> 15) as i16
        })
    }
    #[inline(always)]
    unsafe fn shift16<const RIGHT: u32>(self) -> Self {
        Self(self.0.map(|lane| lane >> RIGHT))
    }
    #[inline(always)]
    unsafe fn madd(self, other: Self) -> Self {
        let product = |i: usize| i32::from(self.0[i]) * i32::from(other.0[i]);
        let sum = |i: usize| product(2 * i).wrapping_add(product(2 * i + 1));
        Self::of_wide([sum(0), sum(1), sum(2), sum(3)])
    }
    #[inline(always)]
    unsafe fn add_madd(self, a: Self, b: Self) -> Self {
        unsafe { self.add32(a.madd(b)) }
    }
    #[inline(always)]
    unsafe fn add32(self, other: Self) -> Self {
        self.zip32(other, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub32(self, other: Self) -> Self {
        self.zip32(other, i32::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn shift32<const RIGHT: u32>(self) -> Self {
        Self::of_wide(self.wide().map(|lane| lane >> RIGHT))
    }
    #[inline(always)]
    unsafe fn pack32(self, other: Self) -> Self {
        let narrow = |lane: i32| lane.clamp(-32768, 32767) as i16;
        let (a, b) = (self.wide().map(narrow), other.wide().map(narrow));
        Self([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]])
    }
    #[inline(always)]
    unsafe fn pack16(self, other: Self) -> Self {
        let mut bytes = [0; 16];
        for i in 0..8 {
            bytes[i] = self.0[i].clamp(0, 255) as u8;
            bytes[8 + i] = other.0[i].clamp(0, 255) as u8;
        }
        Self::of_bytes(bytes)
    }
    #[inline(always)]
    unsafe fn low16(self, other: Self) -> Self {
        self.interleave::<1>(other, 0)
    }
    #[inline(always)]
    unsafe fn high16(self, other: Self) -> Self {
        self.interleave::<1>(other, 4)
    }
    #[inline(always)]
    unsafe fn low32(self, other: Self) -> Self {
        self.interleave::<2>(other, 0)
    }
    #[inline(always)]
    unsafe fn high32(self, other: Self) -> Self {
        self.interleave::<2>(other, 4)
    }
    #[inline(always)]
    unsafe fn low64(self, other: Self) -> Self {
        self.interleave::<4>(other, 0)
    }
    #[inline(always)]
    unsafe fn high64(self, other: Self) -> Self {
        self.interleave::<4>(other, 4)
    }
    #[inline(always)]
    unsafe fn shuffle(self, indices: &[u8; 16]) -> Self {
        let bytes = self.bytes();
        Self::of_bytes(indices.map(|i| {
            if i < 128 {
                bytes[usize::from(i & 15)]
            } else {
                0
            }
        }))
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        self.zip16(other, |a, b| a | b)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256i);

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512i);

    macro_rules! vector {
        ($name:ident, $parts:literal, $add_madd:expr, $load:ident, $narrow:ident, $widen:ident, $splat128:ident, $set16:ident,
         $set32:ident, $or:ident, $srai16:ident, $srai32:ident, [$($method:ident = $op:ident),*], $store:expr) => {
            impl Vector for $name {
                const PARTS: usize = $parts;
                #[inline(always)]
                unsafe fn splat16(value: i16) -> Self {
                    Self(unsafe { $set16(value) })
                }
                #[inline(always)]
                unsafe fn splat32(value: i32) -> Self {
                    Self(unsafe { $set32(value) })
                }
                #[inline(always)]
                unsafe fn splat128(from: *const u8) -> Self {
                    Self(unsafe { $splat128(_mm_loadu_si128(from.cast())) })
                }
                #[inline(always)]
                unsafe fn load(from: *const u8) -> Self {
                    Self(unsafe { $load(from.cast()) })
                }
                #[inline(always)]
                unsafe fn load_wide(from: *const u8) -> Self {
                    Self(unsafe { $widen($narrow(from.cast())) })
                }
                #[inline(always)]
                unsafe fn store_parts(self, to: *mut u8, step: usize) {
                    unsafe { $store(self.0, to, step) }
                }
                #[inline(always)]
                unsafe fn add_madd(self, a: Self, b: Self) -> Self {
                    Self(unsafe { $add_madd(self.0, a.0, b.0) })
                }
                #[inline(always)]
                unsafe fn shift16<const RIGHT: u32>(self) -> Self {
                    Self(unsafe { $srai16(self.0, _mm_cvtsi32_si128(RIGHT as i32)) })
                }
                #[inline(always)]
                unsafe fn shift32<const RIGHT: u32>(self) -> Self {
                    Self(unsafe { $srai32(self.0, _mm_cvtsi32_si128(RIGHT as i32)) })
                }
                #[inline(always)]
                unsafe fn shuffle(self, indices: &[u8; 16]) -> Self {
                    unsafe { self.shuffle_by(Self::splat128(indices.as_ptr())) }
                }
                $(
                    #[inline(always)]
                    unsafe fn $method(self, other: Self) -> Self {
                        Self(unsafe { $op(self.0, other.0) })
                    }
                )*
                #[inline(always)]
                unsafe fn or(self, other: Self) -> Self {
                    Self(unsafe { $or(self.0, other.0) })
                }
            }
        };
    }

    impl Avx2 {
        #[inline(always)]
        unsafe fn shuffle_by(self, indices: Self) -> Self {
            Self(unsafe { _mm256_shuffle_epi8(self.0, indices.0) })
        }
    }

    impl Avx512 {
        #[inline(always)]
        unsafe fn shuffle_by(self, indices: Self) -> Self {
            Self(unsafe { _mm512_shuffle_epi8(self.0, indices.0) })
        }
    }

    #[inline(always)]
    unsafe fn store256(vector: __m256i, to: *mut u8, step: usize) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(vector));
            _mm_storeu_si128(to.add(step).cast(), _mm256_extracti128_si256::<1>(vector));
        }
    }

    #[inline(always)]
    unsafe fn store512(vector: __m512i, to: *mut u8, step: usize) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm512_castsi512_si128(vector));
            _mm_storeu_si128(to.add(step).cast(), _mm512_extracti32x4_epi32::<1>(vector));
            _mm_storeu_si128(
                to.add(2 * step).cast(),
                _mm512_extracti32x4_epi32::<2>(vector),
            );
            _mm_storeu_si128(
                to.add(3 * step).cast(),
                _mm512_extracti32x4_epi32::<3>(vector),
            );
        }
    }

    vector!(
        Avx2,
        2,
        |sum, a, b| _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)),
        _mm256_loadu_si256,
        _mm_loadu_si128,
        _mm256_cvtepu8_epi16,
        _mm256_broadcastsi128_si256,
        _mm256_set1_epi16,
        _mm256_set1_epi32,
        _mm256_or_si256,
        _mm256_sra_epi16,
        _mm256_sra_epi32,
        [
            add16 = _mm256_add_epi16,
            sub16 = _mm256_sub_epi16,
            adds16 = _mm256_adds_epi16,
            subs16 = _mm256_subs_epi16,
            mul16 = _mm256_mullo_epi16,
            mul_round16 = _mm256_mulhrs_epi16,
            madd = _mm256_madd_epi16,
            add32 = _mm256_add_epi32,
            sub32 = _mm256_sub_epi32,
            pack32 = _mm256_packs_epi32,
            pack16 = _mm256_packus_epi16,
            low16 = _mm256_unpacklo_epi16,
            high16 = _mm256_unpackhi_epi16,
            low32 = _mm256_unpacklo_epi32,
            high32 = _mm256_unpackhi_epi32,
            low64 = _mm256_unpacklo_epi64,
            high64 = _mm256_unpackhi_epi64
        ],
        store256
    );
    vector!(
        Avx512,
        4,
        _mm512_dpwssd_epi32,
        _mm512_loadu_si512,
        _mm256_loadu_si256,
        _mm512_cvtepu8_epi16,
        _mm512_broadcast_i32x4,
        _mm512_set1_epi16,
        _mm512_set1_epi32,
        _mm512_or_si512,
        _mm512_sra_epi16,
        _mm512_sra_epi32,
        [
            add16 = _mm512_add_epi16,
            sub16 = _mm512_sub_epi16,
            adds16 = _mm512_adds_epi16,
            subs16 = _mm512_subs_epi16,
            mul16 = _mm512_mullo_epi16,
            mul_round16 = _mm512_mulhrs_epi16,
            madd = _mm512_madd_epi16,
            add32 = _mm512_add_epi32,
            sub32 = _mm512_sub_epi32,
            pack32 = _mm512_packs_epi32,
            pack16 = _mm512_packus_epi16,
            low16 = _mm512_unpacklo_epi16,
            high16 = _mm512_unpackhi_epi16,
            low32 = _mm512_unpacklo_epi32,
            high32 = _mm512_unpackhi_epi32,
            low64 = _mm512_unpacklo_epi64,
            high64 = _mm512_unpackhi_epi64
        ],
        store512
    );
}
