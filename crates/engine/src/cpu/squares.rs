//! Squares of channels that training drops (DropBlock): which, what is left of a sum, and its gradient.

use std::sync::atomic::{AtomicUsize, Ordering};

use graph::{DropBlock, Plane};

use super::fuse::{Epilogue, Out, Partials, Raw, Read, Source, read_as, vector};
use super::memory::Span;
use super::pixels::{Gradient, visit_all};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};
use crate::Dropout;
use crate::dropout::make_up;

/// What is left of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    /// A byte for each element: 1, or 0 where it is dropped.
    pub(crate) mask: Span<'a, u8>,
    /// By what the rest is multiplied.
    pub(crate) scale: Span<'a, f32>,
}

impl Left<'_> {
    /// The factor of elements `at..at + n`; lanes beyond are 0.
    ///
    /// # Safety
    /// They are inside, and nobody writes them.
    #[inline(always)]
    unsafe fn factor<I: Isa, const FULL: bool>(&self, at: usize, n: usize) -> I::V {
        // SAFETY: the caller's word.
        unsafe {
            let p = self.mask.ptr().add(at);
            let mask = if FULL {
                I::load_u8(p)
            } else {
                I::load_u8_part(p, n)
            };
            I::mul(mask, I::splat(self.scale.ptr().read()))
        }
    }
}

/// Draws the squares of `images` images. Without dropout nothing is dropped.
pub(crate) fn draw(
    pool: &mut Pool,
    dropout: Option<(Dropout, usize)>,
    (block, plane): (DropBlock, Plane),
    images: usize,
    left: Left<'_>,
) {
    let size = plane.elements();
    assert!(left.mask.len() >= images * size, "a byte for each element");
    let drawn = dropout.map(|(dropout, first)| (dropout.squares(block, plane), first));
    let kept = AtomicUsize::new(0);
    pool.run(images, |_, image| {
        // SAFETY: tasks write disjoint images.
        let mask = unsafe { left.mask.part(image * size..(image + 1) * size).get_mut() };
        let of_image = match &drawn {
            Some((squares, first)) => squares.draw(first + image, mask),
            None => {
                mask.fill(1);
                size
            }
        };
        kept.fetch_add(of_image, Ordering::Relaxed);
    });
    let scale = make_up(images * size, kept.into_inner());
    // SAFETY: no region runs.
    unsafe { left.scale.get_mut()[0] = scale as f32 };
}

/// y = max(floor, main + side), of what is left of them, vector by vector.
struct SumRows<'a, T: Element, M: Read, S: Read> {
    main: M,
    side: Option<S>,
    left: [Option<Left<'a>>; 2],
    y: Span<'a, T>,
    channels: usize,
    pixels: std::ops::Range<usize>,
    floor: f32,
}

impl<T: Element, M: Read, S: Read> Job for SumRows<'_, T, M, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        for pixel in self.pixels.clone() {
            let at = pixel * self.channels;
            let mut c = 0;
            // SAFETY: pixels are inside of the tensors.
            unsafe {
                while c + I::LANES <= self.channels {
                    let v = self.value::<I, true>(at, c, I::LANES);
                    T::store::<I>(self.y.ptr().add(at + c), v);
                    c += I::LANES;
                }
                if c < self.channels {
                    let n = self.channels - c;
                    let v = self.value::<I, false>(at, c, n);
                    T::store_part::<I>(self.y.ptr().add(at + c), v, n);
                }
            }
        }
    }
}

impl<T: Element, M: Read, S: Read> SumRows<'_, T, M, S> {
    #[inline(always)]
    unsafe fn value<I: Isa, const FULL: bool>(&self, at: usize, c: usize, n: usize) -> I::V {
        // SAFETY: as in `run`.
        unsafe {
            let main = match FULL {
                true => self.main.full::<I>(at, c),
                false => self.main.part::<I>(at, c, n),
            };
            let mut v = left_of::<I, FULL>(main, self.left[0], at + c, n);
            if let Some(side) = &self.side {
                let side = match FULL {
                    true => side.full::<I>(at, c),
                    false => side.part::<I>(at, c, n),
                };
                v = I::add(v, left_of::<I, FULL>(side, self.left[1], at + c, n));
            }
            I::max(I::splat(self.floor), v)
        }
    }
}

/// # Safety
/// As for [`Left::factor`].
#[inline(always)]
unsafe fn left_of<I: Isa, const FULL: bool>(
    v: I::V,
    left: Option<Left<'_>>,
    at: usize,
    n: usize,
) -> I::V {
    match left {
        // SAFETY: the caller's word.
        Some(left) => unsafe { I::mul(v, left.factor::<I, FULL>(at, n)) },
        None => v,
    }
}

/// Values of one task.
const TASK: usize = 65_536;

/// y = relu?(main + side), pixels x channels, of what is left of them; `main` is a normalisation with no floor of its
/// own.
pub(crate) fn sum<T: Element>(
    pool: &mut Pool,
    level: Level,
    (pixels, channels): (usize, usize),
    main: Source<'_, T>,
    side: Option<Source<'_, T>>,
    left: [Option<Left<'_>>; 2],
    relu: bool,
    y: Span<'_, T>,
) {
    let Source::Norm(main) = main else {
        unreachable!("training sums normalisations")
    };
    let len = pixels * channels;
    assert!(
        main.z.len() >= len && y.len() >= len && side.is_none_or(|s| s.len() >= len),
        "the tensors hold all pixels"
    );
    let masks = left.iter().flatten();
    assert!(
        masks.map(|left| left.mask.len()).all(|mask| mask >= len),
        "a byte for each element"
    );
    let per_task = (TASK / channels).max(1);
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    pool.run(pixels.div_ceil(per_task), |_, task| {
        let pixels = task * per_task..((task + 1) * per_task).min(pixels);
        macro_rules! rows {
            ($side:expr) => {
                level.call(SumRows {
                    main,
                    side: $side,
                    left,
                    y,
                    channels,
                    pixels,
                    floor,
                })
            };
        }
        // SAFETY: nobody writes what is read in this region; tasks write disjoint pixels of y.
        unsafe {
            match side {
                None => rows!(None::<Raw<'_, T>>),
                Some(side) => read_as!(side, side => rows!(Some(side))),
            }
        }
    });
}

/// The gradient of what is left.
#[derive(Clone, Copy)]
struct Rest<'a, T: Element> {
    d: Span<'a, T>,
    left: Left<'a>,
    plane: Plane,
}

impl<T: Element> Gradient for Rest<'_, T> {
    #[inline(always)]
    unsafe fn at<I: Isa, const FULL: bool>(
        &self,
        image: usize,
        h: usize,
        w: usize,
        c: usize,
        n: usize,
    ) -> I::V {
        let at = ((image * self.plane.h + h) * self.plane.w + w) * self.plane.c + c;
        // SAFETY: the caller's word.
        unsafe {
            let d = vector::<I, T>(self.d.ptr().add(at), n, FULL);
            I::mul(d, self.left.factor::<I, FULL>(at, n))
        }
    }
}

/// dx = d of what is left, closed by `epilogue`.
pub(crate) fn backward<T: Element>(
    pool: &mut Pool,
    level: Level,
    plane: Plane,
    images: usize,
    (d, left): (Span<'_, T>, Left<'_>),
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Partials<'_>,
) {
    let len = images * plane.elements();
    assert!(
        d.len() >= len && left.mask.len() >= len,
        "the tensors hold their planes"
    );
    let rest = Rest { d, left, plane };
    visit_all(pool, level, plane, images, rest, out, epilogue, partials);
}
