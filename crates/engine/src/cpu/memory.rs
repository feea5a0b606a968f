//! Memory that tasks share: one allocation, and views of parts of it that several threads may hold.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use crate::Error;

/// Cache line and widest vector register, bytes.
pub(crate) const ALIGNMENT: usize = 64;

/// A huge page, bytes: kernels walk through channels of neighbouring pixels, which lie kilobytes apart, and would miss
/// the address translation of each on small pages.
const HUGE: usize = 2 << 20;

/// Zeroed memory, aligned to [`ALIGNMENT`].
pub(crate) struct Block {
    start: NonNull<u8>,
    bytes: usize,
    /// What was asked of the system, which gives whole pages of zeros; none for what the allocator gave.
    mapped: Option<(NonNull<u8>, usize)>,
}

// SAFETY: a block owns its memory; access goes through `Span`, whose users keep the rules of borrowing.
unsafe impl Send for Block {}

impl Block {
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT)
            .expect("a size that memory can have")
    }

    pub(crate) fn new(bytes: usize) -> Result<Self, Error> {
        #[cfg(target_os = "linux")]
        if bytes >= 2 * HUGE {
            return Self::map(bytes);
        }
        // SAFETY: the layout has at least one byte.
        let start = NonNull::new(unsafe { alloc_zeroed(Self::layout(bytes)) });
        Ok(Self {
            start: start.ok_or(Error::OutOfMemory { bytes })?,
            bytes,
            mapped: None,
        })
    }

    /// Huge pages, if the system has them to give: they have to be asked for before the first touch, and the allocator
    /// would touch aligned memory to zero it.
    #[cfg(target_os = "linux")]
    fn map(bytes: usize) -> Result<Self, Error> {
        let length = bytes
            .checked_add(HUGE)
            .ok_or(Error::OutOfMemory { bytes })?;
        // SAFETY: a new private mapping of no file; its pages are zero. Inside, the first address that is a multiple
        // of a huge page leaves `bytes` behind it. The advice is a hint.
        unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let mapped = libc::mmap(std::ptr::null_mut(), length, prot, flags, -1, 0);
            if mapped == libc::MAP_FAILED {
                return Err(Error::OutOfMemory { bytes });
            }
            let mapped = mapped.cast::<u8>();
            let start = mapped.add(mapped.align_offset(HUGE));
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
            Ok(Self {
                start: NonNull::new_unchecked(start),
                bytes,
                mapped: Some((NonNull::new_unchecked(mapped), length)),
            })
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The part of `bytes` length at `offset`, as values of type T; the offset is a multiple of [`ALIGNMENT`].
    pub(crate) fn span<T: Plain>(&self, offset: usize, bytes: usize) -> Span<'_, T> {
        assert!(
            offset.is_multiple_of(ALIGNMENT) && offset + bytes <= self.bytes,
            "a buffer lies in its block"
        );
        // SAFETY: the offset is inside the allocation, as just checked.
        let ptr = unsafe { self.start.as_ptr().add(offset) }.cast();
        Span {
            ptr,
            len: bytes / size_of::<T>(),
            block: PhantomData,
        }
    }

    /// The whole as values of type T.
    pub(crate) fn all<T: Plain>(&self) -> Span<'_, T> {
        self.span(0, self.bytes)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match self.mapped {
            #[cfg(target_os = "linux")]
            Some((start, length)) => {
                // SAFETY: mapped in `map`, and no span outlives the block.
                unsafe { libc::munmap(start.as_ptr().cast(), length) };
            }
            // SAFETY: allocated in `new` with the same layout.
            _ => unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) },
        }
    }
}

/// Values for which every bit pattern is valid.
pub(crate) trait Plain: Copy + Send + Sync {}
impl Plain for f32 {}
impl Plain for u8 {}
impl Plain for half::bf16 {}

/// A part of a block that several tasks may read and write at once.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a, T> {
    ptr: *mut T,
    len: usize,
    block: PhantomData<&'a Block>,
}

// SAFETY: a span is an address; `get` and `get_mut` state what their callers owe.
unsafe impl<T: Plain> Send for Span<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Span<'_, T> {}

impl<'a, T: Plain> Span<'a, T> {
    pub(crate) fn len(self) -> usize {
        self.len
    }

    /// A shorter span.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: inside the span, as just checked.
        let ptr = unsafe { self.ptr.add(range.start) };
        Self {
            ptr,
            len: range.len(),
            block: PhantomData,
        }
    }

    pub(crate) fn ptr(self) -> *mut T {
        self.ptr
    }

    /// The values, for reading.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    pub(crate) unsafe fn get(self) -> &'a [T] {
        // SAFETY: the block is alive, zeroed at first, and T takes any bits; the rest is the caller's word.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The values, for writing.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives.
    pub(crate) unsafe fn get_mut(self) -> &'a mut [T] {
        // SAFETY: as in `get`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// Working memory of each worker.
#[derive(Clone, Copy)]
pub(crate) struct Scratch<'a> {
    pub(crate) all: Span<'a, f32>,
    pub(crate) per_worker: usize,
}

impl<'a> Scratch<'a> {
    /// A worker's share; nobody else touches it.
    pub(crate) fn of(self, worker: usize) -> Span<'a, f32> {
        self.all
            .part(worker * self.per_worker..(worker + 1) * self.per_worker)
    }
}

/// `c = a b`, or `c += a b`: `m` x `k` times `k` x `n`, one thread. `c` has rows of `c_stride`; `a` and `b` have
/// (row, column) strides.
///
/// # Safety
/// Nobody else reads or writes the m x n elements of `c` meanwhile.
pub(crate) unsafe fn matmul(
    (m, n, k): (usize, usize, usize),
    c: Span<'_, f32>,
    c_stride: usize,
    accumulate: bool,
    a: &[f32],
    (a_row, a_col): (usize, usize),
    b: &[f32],
    (b_row, b_col): (usize, usize),
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.len() >= (m - 1) * c_stride + n, "c holds m x n");
    assert!(
        k > 0 && a.len() > (m - 1) * a_row + (k - 1) * a_col,
        "a holds m x k"
    );
    assert!(b.len() > (k - 1) * b_row + (n - 1) * b_col, "b holds k x n");
    let (alpha, beta) = (if accumulate { 1.0 } else { 0.0 }, 1.0f32);
    // SAFETY: the three matrices lie inside their memory, as just checked; the caller keeps others away from c.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.ptr(),
            1,
            c_stride as isize,
            accumulate,
            a.as_ptr(),
            a_col as isize,
            a_row as isize,
            b.as_ptr(),
            b_col as isize,
            b_row as isize,
            alpha,
            beta,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
