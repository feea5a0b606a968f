//! What convolutions do to their operands on the way in and to their results on the way out, so that normalisation,
//! ReLU, the sum of a residual block and their gradients are no passes over memory of their own.
//!
//! A [`Source`] is a tensor as a kernel reads it, an [`Epilogue`] what happens to each result before it is stored.
//! Both are matched once per task ([`read_as`], [`finish_as`]) and inlined from there.
//!
//! # The gradient of a batch normalisation
//! y = gamma xhat + beta with xhat = (z - mean) / std over m values of a channel. With g the gradient of y (already
//! zero where a ReLU was off), the gradient of z is gamma / std * (g - sum(g) / m - xhat * sum(g xhat) / m)
//! (Ioffe and Szegedy 2015, section 3). The two sums have to be known before the first value is: whoever computes g
//! adds up g and g (z - mean) as it stores g. What is left is linear in g and z with three constants per channel,
//! `a g + b (z - mean) + c`, and is computed where g is read.

use super::memory::Span;
use super::simd::{Element, Isa};

/// A tensor of pixels x channels as a kernel reads it.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a, T: Element> {
    Raw(Raw<'a, T>),
    Norm(Norm<'a, T>),
    Grad(Grad<'a, T>),
}

/// As it is stored.
#[derive(Clone, Copy)]
pub(crate) struct Raw<'a, T: Element>(pub(crate) Span<'a, T>);

/// max(floor, z * scale + shift): a normalisation, with its ReLU if the floor is 0 (without: -infinity).
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a, T: Element> {
    pub(crate) z: Span<'a, T>,
    pub(crate) scale: &'a [f32],
    pub(crate) shift: &'a [f32],
    pub(crate) floor: f32,
}

/// a g + b (z - mean) + c: the gradient of a normalisation's input.
#[derive(Clone, Copy)]
pub(crate) struct Grad<'a, T: Element> {
    pub(crate) g: Span<'a, T>,
    pub(crate) z: Span<'a, T>,
    pub(crate) mean: &'a [f32],
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) c: &'a [f32],
}

/// Evaluates `$body` with `$reader` bound to the variant of a [`Source`], a [`Read`].
macro_rules! read_as {
    ($source:expr, $reader:ident => $body:expr) => {
        match $source {
            $crate::cpu::fuse::Source::Raw($reader) => $body,
            $crate::cpu::fuse::Source::Norm($reader) => $body,
            $crate::cpu::fuse::Source::Grad($reader) => $body,
        }
    };
}
pub(crate) use read_as;

impl<T: Element> Source<'_, T> {
    /// Values that it has, so that callers can check their indices once per kernel.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Raw(raw) => raw.0.len(),
            Self::Norm(norm) => norm.z.len(),
            Self::Grad(grad) => grad.g.len().min(grad.z.len()),
        }
    }
}

/// Reads vectors of a tensor.
pub(crate) trait Read: Copy + Send + Sync {
    /// No constants belong to channels, so that a vector may reach over several pixels.
    const FLAT: bool;

    /// Channels `c..c + LANES` of the pixel whose channels start at `at`.
    ///
    /// # Safety
    /// They are inside, the CPU has `I`'s instructions, and nobody writes them meanwhile.
    unsafe fn full<I: Isa>(&self, at: usize, c: usize) -> I::V;

    /// Channels `c..c + n`; the other lanes are zero.
    ///
    /// # Safety
    /// As for `full`.
    unsafe fn part<I: Isa>(&self, at: usize, c: usize, n: usize) -> I::V;
}

impl<T: Element> Read for Raw<'_, T> {
    const FLAT: bool = true;

    #[inline(always)]
    unsafe fn full<I: Isa>(&self, at: usize, c: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe { T::load::<I>(self.0.ptr().add(at + c)) }
    }

    #[inline(always)]
    unsafe fn part<I: Isa>(&self, at: usize, c: usize, n: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe { T::load_part::<I>(self.0.ptr().add(at + c), n) }
    }
}

impl<T: Element> Read for Norm<'_, T> {
    const FLAT: bool = false;

    #[inline(always)]
    unsafe fn full<I: Isa>(&self, at: usize, c: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let z = T::load::<I>(self.z.ptr().add(at + c));
            let scale = I::load(self.scale.as_ptr().add(c));
            let shift = I::load(self.shift.as_ptr().add(c));
            I::max(I::splat(self.floor), I::fma(z, scale, shift))
        }
    }

    #[inline(always)]
    unsafe fn part<I: Isa>(&self, at: usize, c: usize, n: usize) -> I::V {
        // SAFETY: the caller's word. Lanes beyond n: max(floor, 0 * 0 + 0) = 0 as the floor is at most 0.
        unsafe {
            let z = T::load_part::<I>(self.z.ptr().add(at + c), n);
            let scale = I::load_part(self.scale.as_ptr().add(c), n);
            let shift = I::load_part(self.shift.as_ptr().add(c), n);
            I::max(I::splat(self.floor), I::fma(z, scale, shift))
        }
    }
}

impl<T: Element> Read for Grad<'_, T> {
    const FLAT: bool = false;

    #[inline(always)]
    unsafe fn full<I: Isa>(&self, at: usize, c: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let g = T::load::<I>(self.g.ptr().add(at + c));
            let z = T::load::<I>(self.z.ptr().add(at + c));
            let centred = I::sub(z, I::load(self.mean.as_ptr().add(c)));
            let b = I::load(self.b.as_ptr().add(c));
            let rest = I::fma(b, centred, I::load(self.c.as_ptr().add(c)));
            I::fma(I::load(self.a.as_ptr().add(c)), g, rest)
        }
    }

    #[inline(always)]
    unsafe fn part<I: Isa>(&self, at: usize, c: usize, n: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let g = T::load_part::<I>(self.g.ptr().add(at + c), n);
            let z = T::load_part::<I>(self.z.ptr().add(at + c), n);
            let centred = I::sub(z, I::load_part(self.mean.as_ptr().add(c), n));
            let b = I::load_part(self.b.as_ptr().add(c), n);
            let rest = I::fma(b, centred, I::load_part(self.c.as_ptr().add(c), n));
            I::fma(I::load_part(self.a.as_ptr().add(c), n), g, rest)
        }
    }
}

/// What happens to each result of a convolution.
#[derive(Clone, Copy)]
pub(crate) enum Epilogue<'a, T: Element> {
    Store(Store<'a, T>),
    Stats(Stats),
    Affine(Affine<'a, T>),
    Mask(Mask<'a, T>),
    Join(Join<'a, T>),
}

/// Stored, or added to another tensor.
#[derive(Clone, Copy)]
pub(crate) struct Store<'a, T: Element> {
    pub(crate) add: Option<Span<'a, T>>,
}

/// Stored; mean and sum of squared deviations of each channel are gathered.
#[derive(Clone, Copy)]
pub(crate) struct Stats;

/// max(floor, v + shift + residual): a folded normalisation in inference.
#[derive(Clone, Copy)]
pub(crate) struct Affine<'a, T: Element> {
    pub(crate) shift: &'a [f32],
    pub(crate) residual: Option<Span<'a, T>>,
    pub(crate) floor: f32,
}

/// The gradient of relu(z * scale + shift), or without ReLU of what is in the brackets, becomes that of the brackets;
/// sums of g and g (z - mean).
#[derive(Clone, Copy)]
pub(crate) struct Mask<'a, T: Element> {
    pub(crate) z: Span<'a, T>,
    pub(crate) scale: &'a [f32],
    pub(crate) shift: &'a [f32],
    pub(crate) mean: &'a [f32],
    pub(crate) relu: bool,
}

/// The gradient of a stored value y = relu(sum of normalisations, or of one and a residual) becomes that of the sum:
/// g = (v + add) where y > 0; sums of g, and of g (z - mean) for each normalisation that y is a sum of.
#[derive(Clone, Copy)]
pub(crate) struct Join<'a, T: Element> {
    pub(crate) add: Option<Span<'a, T>>,
    /// The mask; none where there was no ReLU.
    pub(crate) y: Option<Span<'a, T>>,
    pub(crate) norms: [Option<Centred<'a, T>>; 2],
}

/// z and its mean.
#[derive(Clone, Copy)]
pub(crate) struct Centred<'a, T: Element> {
    pub(crate) z: Span<'a, T>,
    pub(crate) mean: &'a [f32],
}

/// Evaluates `$body` with `$finish` bound to the variant of an [`Epilogue`], a [`Finish`].
macro_rules! finish_as {
    ($epilogue:expr, $finish:ident => $body:expr) => {
        match $epilogue {
            $crate::cpu::fuse::Epilogue::Store($finish) => $body,
            $crate::cpu::fuse::Epilogue::Stats($finish) => $body,
            $crate::cpu::fuse::Epilogue::Affine($finish) => $body,
            $crate::cpu::fuse::Epilogue::Mask($finish) => $body,
            $crate::cpu::fuse::Epilogue::Join($finish) => $body,
        }
    };
}
pub(crate) use finish_as;

/// Rows of sums that an epilogue may keep per channel.
pub(crate) const SUMS: usize = 3;

/// Handles vectors of results.
pub(crate) trait Finish: Copy + Send + Sync {
    /// Whether the sums are used.
    const SUMMED: bool;

    /// Called with the first result that a task has for these channels, before `apply`, while the sums are zero.
    ///
    /// # Safety
    /// The CPU has `I`'s instructions.
    #[inline(always)]
    unsafe fn begin<I: Isa>(&self, _v: I::V, _sums: &mut [I::V; SUMS]) {}

    /// What to store for result `v`: channels `c..c + n` (n is at most LANES; if `full`, n is LANES) of the pixel
    /// whose channels start at `at`.
    ///
    /// # Safety
    /// The channels are inside all tensors, the CPU has `I`'s instructions, and nobody writes there meanwhile.
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        at: usize,
        c: usize,
        n: usize,
        full: bool,
        sums: &mut [I::V; SUMS],
    ) -> I::V;

    /// Asks for what `apply` will read for channels `c..c + panel` of the pixel whose channels start at `at`.
    #[inline(always)]
    fn prefetch(&self, _at: usize, _c: usize, _panel: usize) {}

    /// Turns the sums of one channel over `count` results into what the partials keep.
    #[inline(always)]
    fn close(&self, sums: [f32; SUMS], _count: usize) -> [f32; SUMS] {
        sums
    }
}

/// Asks for `panel` values from `at` on. A hint: no address is wrong.
#[inline(always)]
fn prefetch<T: Element>(from: Span<'_, T>, at: usize, panel: usize) {
    let first = from.ptr().wrapping_add(at).cast::<u8>();
    for line in (0..panel * size_of::<T>()).step_by(64) {
        super::simd::prefetch(first.wrapping_add(line));
    }
}

/// A vector or part of one.
#[inline(always)]
pub(super) unsafe fn vector<I: Isa, T: Element>(p: *const T, n: usize, full: bool) -> I::V {
    // SAFETY: the caller's word.
    unsafe {
        if full {
            T::load::<I>(p)
        } else {
            T::load_part::<I>(p, n)
        }
    }
}

impl<T: Element> Finish for Store<'_, T> {
    const SUMMED: bool = false;

    #[inline(always)]
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        at: usize,
        c: usize,
        n: usize,
        full: bool,
        _: &mut [I::V; SUMS],
    ) -> I::V {
        match self.add {
            // SAFETY: the caller's word.
            Some(add) => unsafe { I::add(v, vector::<I, T>(add.ptr().add(at + c), n, full)) },
            None => v,
        }
    }
}

impl Finish for Stats {
    const SUMMED: bool = true;

    /// The first result is the pivot: sums of d = v - pivot and d^2 lose no digits where the mean is far from zero.
    #[inline(always)]
    unsafe fn begin<I: Isa>(&self, v: I::V, sums: &mut [I::V; SUMS]) {
        sums[2] = v;
    }

    #[inline(always)]
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        _: usize,
        _: usize,
        _: usize,
        _: bool,
        sums: &mut [I::V; SUMS],
    ) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let d = I::sub(v, sums[2]);
            sums[0] = I::add(sums[0], d);
            sums[1] = I::fma(d, d, sums[1]);
        }
        v
    }

    /// Mean and sum of squared deviations.
    #[inline(always)]
    fn close(&self, [sum, squares, pivot]: [f32; SUMS], count: usize) -> [f32; SUMS] {
        let n = count.max(1) as f32;
        let rest = squares - sum * (sum / n);
        // Not `max`, which would hide a NaN.
        [pivot + sum / n, if rest < 0.0 { 0.0 } else { rest }, 0.0]
    }
}

impl<T: Element> Finish for Affine<'_, T> {
    const SUMMED: bool = false;

    #[inline(always)]
    fn prefetch(&self, at: usize, c: usize, panel: usize) {
        if let Some(residual) = self.residual {
            prefetch(residual, at + c, panel);
        }
    }

    #[inline(always)]
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        at: usize,
        c: usize,
        n: usize,
        full: bool,
        _: &mut [I::V; SUMS],
    ) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let mut v = I::add(v, vector::<I, f32>(self.shift.as_ptr().add(c), n, full));
            if let Some(residual) = self.residual {
                v = I::add(v, vector::<I, T>(residual.ptr().add(at + c), n, full));
            }
            I::max(I::splat(self.floor), v)
        }
    }
}

impl<T: Element> Finish for Mask<'_, T> {
    const SUMMED: bool = true;

    #[inline(always)]
    fn prefetch(&self, at: usize, c: usize, panel: usize) {
        prefetch(self.z, at + c, panel);
    }

    #[inline(always)]
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        at: usize,
        c: usize,
        n: usize,
        full: bool,
        sums: &mut [I::V; SUMS],
    ) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let z = vector::<I, T>(self.z.ptr().add(at + c), n, full);
            let mean = vector::<I, f32>(self.mean.as_ptr().add(c), n, full);
            let mut g = v;
            if self.relu {
                let scale = vector::<I, f32>(self.scale.as_ptr().add(c), n, full);
                let shift = vector::<I, f32>(self.shift.as_ptr().add(c), n, full);
                g = I::select(I::not_le0(I::fma(z, scale, shift)), v, I::zero());
            }
            sums[0] = I::add(sums[0], g);
            sums[1] = I::fma(g, I::sub(z, mean), sums[1]);
            g
        }
    }
}

impl<T: Element> Finish for Join<'_, T> {
    const SUMMED: bool = true;

    #[inline(always)]
    fn prefetch(&self, at: usize, c: usize, panel: usize) {
        let norms = self.norms.iter().flatten().map(|n| n.z);
        for tensor in self.add.into_iter().chain(self.y).chain(norms) {
            prefetch(tensor, at + c, panel);
        }
    }

    #[inline(always)]
    unsafe fn apply<I: Isa>(
        &self,
        v: I::V,
        at: usize,
        c: usize,
        n: usize,
        full: bool,
        sums: &mut [I::V; SUMS],
    ) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let mut g = v;
            if let Some(add) = self.add {
                g = I::add(g, vector::<I, T>(add.ptr().add(at + c), n, full));
            }
            if let Some(y) = self.y {
                let y = vector::<I, T>(y.ptr().add(at + c), n, full);
                g = I::select(I::not_le0(y), g, I::zero());
            }
            sums[0] = I::add(sums[0], g);
            if let Some(Centred { z, mean }) = self.norms[0] {
                let z = vector::<I, T>(z.ptr().add(at + c), n, full);
                let mean = vector::<I, f32>(mean.as_ptr().add(c), n, full);
                sums[1] = I::fma(g, I::sub(z, mean), sums[1]);
            }
            if let Some(Centred { z, mean }) = self.norms[1] {
                let z = vector::<I, T>(z.ptr().add(at + c), n, full);
                let mean = vector::<I, f32>(mean.as_ptr().add(c), n, full);
                sums[2] = I::fma(g, I::sub(z, mean), sums[2]);
            }
            g
        }
    }
}

/// Where results go: pixels x channels.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a, T: Element> {
    pub(crate) y: Span<'a, T>,
    pub(crate) channels: usize,
    /// Past the caches: for tensors that will have left them anyway before they are read again.
    pub(crate) stream: bool,
}

impl<T: Element> Out<'_, T> {
    /// Stores channels `c..c + n` (if `full`, n is LANES) of the pixel whose channels start at `at`.
    ///
    /// # Safety
    /// They are inside and nobody else touches them meanwhile; if `stream`, they are aligned to the vector; the CPU
    /// has `I`'s instructions.
    #[inline(always)]
    pub(crate) unsafe fn store<I: Isa>(&self, v: I::V, at: usize, c: usize, n: usize, full: bool) {
        // SAFETY: the caller's word.
        unsafe {
            let p = self.y.ptr().add(at + c);
            if !full {
                T::store_part::<I>(p, v, n);
            } else if self.stream {
                T::stream::<I>(p, v);
            } else {
                T::store::<I>(p, v);
            }
        }
    }
}

impl<T: Element> Out<'_, T> {
    /// Asks for where `panel` values from `at` on will be stored, unless they go past the caches; `is_near`, into the
    /// first level.
    #[inline(always)]
    pub(crate) fn prefetch(&self, at: usize, panel: usize, is_near: bool) {
        if self.stream {
            return;
        }
        if !is_near {
            return prefetch(self.y, at, panel);
        }
        let first = self.y.ptr().wrapping_add(at).cast::<u8>();
        for line in (0..panel * size_of::<T>()).step_by(64) {
            super::simd::prefetch_to_write(first.wrapping_add(line));
        }
    }
}

/// Sums that tasks leave for the end of a kernel: for each task a record of a head (the number of results of each
/// channel, then nothing up to [`HEAD`]) and [`SUMS`] rows of `columns`.
#[derive(Clone, Copy)]
pub(crate) struct Partials<'a> {
    pub(crate) all: Span<'a, f32>,
    /// Channels, rounded up to whole tiles.
    pub(crate) columns: usize,
}

/// f32 before the rows of a record, to keep them aligned.
pub(crate) const HEAD: usize = 16;

impl<'a> Partials<'a> {
    /// f32 in the record of a task.
    pub(crate) fn record_len(columns: usize) -> usize {
        HEAD + SUMS * columns
    }

    /// The record of a task.
    pub(crate) fn record(&self, task: usize) -> Span<'a, f32> {
        let len = Self::record_len(self.columns);
        self.all.part(task * len..(task + 1) * len)
    }

    /// Row `row` of channel `c` in a record.
    pub(crate) fn at(&self, row: usize, c: usize) -> usize {
        HEAD + row * self.columns + c
    }
}
