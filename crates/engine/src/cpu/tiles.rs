//! Matrix tiles (AMX): products of bf16 with f32 sums, sixteen rows at a time.
//!
//! A tile register holds 16 rows of 64 bytes. One instruction (`tdpbf16ps`) adds to 16 x 16 sums the products of 16 rows
//! of 32 bf16 with 16 rows of 16 pairs (Intel 64 Architecture, volume 1, chapter 18). A block here is 2 x 2 of them: 32
//! rows by 32 columns, so that four loads serve four products. Both operands are what the vector kernels pack anyway:
//! rows of 32 neighbouring depths, and panels of pairs, [`super::weights::CHUNK`] and a tile's width apart.
//!
//! f32 is multiplied as the sum of three bf16: the value rounded, what that leaves rounded, and what is left then. That
//! is all of its 24 bits. Of the nine products of two such sums six are computed; the other three are some 2^-26 of the
//! product (2^-23 at most), where rounding it to f32 would change 2^-24.
//!
//! Stable Rust has no intrinsics for tiles; the loops are assembler. The system has to be asked once for a process to
//! use them, and each thread configures its tiles ([`Configured`]) before a product.

use half::bf16;

use super::simd::Isa;

/// Rows and columns of a block.
pub(crate) const SIDE: usize = 32;

/// Depth of one instruction.
pub(crate) const DEPTH: usize = 32;

/// Values of bf16 that one of f32 is the sum of.
pub(crate) const PIECES: usize = 3;

/// Products of pieces that make one of f32.
pub(crate) const PRODUCTS: usize = 6;

/// Piece `piece` of vectors of f32; leaves what it does not hold.
///
/// # Safety
/// The CPU has the instructions, and they have sixteen lanes.
#[inline(always)]
pub(crate) unsafe fn pieces<I: Isa, const N: usize>(
    rest: &mut [I::V; N],
    piece: usize,
) -> [I::V; N] {
    let mut pieces = *rest;
    if piece + 1 < PIECES {
        for (piece, rest) in pieces.iter_mut().zip(rest) {
            // SAFETY: the caller's word.
            (*piece, *rest) = unsafe { I::split(*rest) };
        }
    }
    pieces
}

/// Bytes between the rows of a panel of pairs, and between those of a block of f32: 32 columns.
pub(crate) const PANEL_PITCH: usize = SIDE * size_of::<f32>();

/// Where the operands of [`DEPTH`] products lie, in bytes from the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Step {
    rows: u32,
    panel: u32,
}

impl Step {
    /// `rows` and `panel` are in values.
    pub(crate) fn new(rows: usize, panel: usize) -> Self {
        const FITS: &str = "packed operands have fewer than 2^32 bytes";
        let bytes = |values: usize| (values * size_of::<bf16>()).try_into().expect(FITS);
        Self {
            rows: bytes(rows),
            panel: bytes(panel),
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod imp {
    use std::arch::asm;
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    use half::bf16;

    use super::{PANEL_PITCH, Step};
    /// Whether the CPU has tiles of bf16 and the system lets this process use them.
    pub(crate) fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| has_tiles() && is_permitted())
    }

    /// CPUID leaf 7, EDX: bits 22 (AMX-BF16) and 24 (AMX-TILE).
    pub(crate) fn has_tiles() -> bool {
        const BITS: u32 = 1 << 22 | 1 << 24;
        std::arch::x86_64::__cpuid(0).eax >= 7
            && std::arch::x86_64::__cpuid_count(7, 0).edx & BITS == BITS
    }

    /// Asks Linux (5.16 or later) for the tiles' state in this process (Documentation/arch/x86/xstate.rst).
    fn is_permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call takes two numbers and changes only what this process may use.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    }

    /// Asks for eight cache lines of the next step's panel.
    macro_rules! ahead {
        ($at:literal) => {
            concat!(
                "prefetcht0 [{row} + ",
                $at,
                "]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 64]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 128]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 192]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 256]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 320]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 384]\n",
                "prefetcht0 [{row} + ",
                $at,
                " + 448]"
            )
        };
    }

    /// The sums so far, or zeros. A tile has 16 rows of [`PANEL_PITCH`] bytes in a block.
    macro_rules! begin {
        () => {
            "test {at:e}, {at:e}
            jz 2f
            tileloadd tmm0, [{block} + {wide}*1]
            tileloadd tmm1, [{block} + {wide}*1 + 64]
            tileloadd tmm2, [{block} + {wide}*1 + 2048]
            tileloadd tmm3, [{block} + {wide}*1 + 2112]
            jmp 3f
            2:
            tilezero tmm0
            tilezero tmm1
            tilezero tmm2
            tilezero tmm3
            3:"
        };
    }

    macro_rules! end {
        () => {
            "tilestored [{block} + {wide}*1], tmm0
            tilestored [{block} + {wide}*1 + 64], tmm1
            tilestored [{block} + {wide}*1 + 2048], tmm2
            tilestored [{block} + {wide}*1 + 2112], tmm3"
        };
    }

    /// The pieces of rows at `{low}` and `{high}`.
    macro_rules! rows {
        () => {
            "tileloadd tmm4, [{low} + {pitch}*1]
            tileloadd tmm5, [{high} + {pitch}*1]"
        };
    }

    /// The pieces of a panel that lie `$at` bytes behind the first.
    macro_rules! panel {
        ($at:literal) => {
            concat!(
                "tileloadd tmm6, [{at} + {wide}*1 + ",
                $at,
                "]\n",
                "tileloadd tmm7, [{at} + {wide}*1 + 64 + ",
                $at,
                "]"
            )
        };
    }

    /// Four products.
    macro_rules! products {
        () => {
            "tdpbf16ps tmm0, tmm4, tmm6
            tdpbf16ps tmm1, tmm4, tmm7
            tdpbf16ps tmm2, tmm5, tmm6
            tdpbf16ps tmm3, tmm5, tmm7"
        };
    }

    /// Palette 1; eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config([u8; 64]);

    static CONFIG: Config = {
        let mut config = [0; 64];
        config[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
            tile += 1;
        }
        Config(config)
    };

    /// This thread's tiles, while it lives.
    pub(crate) struct Configured(PhantomData<*const ()>);

    impl Configured {
        /// # Safety
        /// Tiles are available, and this thread has no other such value.
        pub(crate) unsafe fn new() -> Self {
            // SAFETY: the configuration is a valid one; no Rust code uses tiles but `multiply`.
            unsafe {
                asm!(
                    "ldtilecfg [{}]",
                    in(reg) &raw const CONFIG,
                    options(nostack, readonly, preserves_flags)
                );
            }
            Self(PhantomData)
        }
    }

    impl Drop for Configured {
        fn drop(&mut self) {
            // SAFETY: the thread has tiles, or there were no value. Without state to save, switches of context are cheap.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
        }
    }

    /// As many times four products of what lies in the tiles.
    pub(crate) fn spin(_: &Configured, times: usize) {
        // SAFETY: this thread's tiles are configured; every one that changes is declared.
        unsafe {
            asm!(
                "2:",
                products!(),
                "dec {times}",
                "jnz 2b",
                times = inout(reg) times.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem)
            );
        }
    }

    /// A block of sums: 32 rows of 32 f32 (its own, or added to it if `adds`) of products over `steps` but the last, of 16
    /// rows at each of `rows`, `pitch` bytes apart, with the pairs of a panel. The rows should lie in the first-level
    /// cache; the panel of the next step, up to the last one's, is asked for in advance.
    ///
    /// # Safety
    /// This thread's tiles are configured; each step's rows and panel but the last's lie in the operands and nobody
    /// writes them; nobody else touches the block.
    ///
    /// # Panics
    /// If there is no last step.
    pub(crate) unsafe fn multiply(
        _: &Configured,
        rows: [*const bf16; 2],
        pitch: usize,
        panel: *const bf16,
        steps: &[Step],
        block: *mut f32,
        adds: bool,
    ) {
        let (_, products) = steps.split_last().expect("steps end with what comes next");
        // SAFETY: the caller's word. The last instructions of the loop change flags only; every tile is declared.
        unsafe {
            asm!(
                begin!(),
                "cmp {step}, {end}",
                "je 5f",
                "4:",
                "mov {at:e}, dword ptr [{step} + 4]",
                "add {at}, {panel}",
                "tileloadd tmm6, [{at} + {wide}*1]",
                "tileloadd tmm7, [{at} + {wide}*1 + 64]",
                "mov {at:e}, dword ptr [{step}]",
                "lea {row}, [{first} + {at}]",
                "tileloadd tmm4, [{row} + {pitch}*1]",
                "add {at}, {second}",
                "mov {row:e}, dword ptr [{step} + 12]",
                "add {row}, {panel}",
                ahead!(0),
                "tdpbf16ps tmm0, tmm4, tmm6",
                ahead!(512),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{at} + {pitch}*1]",
                ahead!(1024),
                "tdpbf16ps tmm2, tmm5, tmm6",
                ahead!(1536),
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {step}, 8",
                "cmp {step}, {end}",
                "jne 4b",
                "5:",
                end!(),
                block = in(reg) block,
                wide = in(reg) PANEL_PITCH,
                pitch = in(reg) pitch,
                first = in(reg) rows[0],
                second = in(reg) rows[1],
                panel = in(reg) panel,
                step = inout(reg) products.as_ptr_range().start => _,
                end = in(reg) products.as_ptr_range().end,
                at = inout(reg) usize::from(adds) => _,
                row = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }

    /// As [`multiply`], of f32 in [`super::PIECES`]: those of rows lie `piece` values apart, those of a step's panel one
    /// behind the other. Every piece is loaded once or twice for its products.
    ///
    /// # Safety
    /// As for [`multiply`].
    ///
    /// # Panics
    /// If there is no last step.
    pub(crate) unsafe fn multiply_pieces(
        _: &Configured,
        rows: [*const bf16; 2],
        pitch: usize,
        piece: usize,
        panel: *const bf16,
        steps: &[Step],
        block: *mut f32,
        adds: bool,
    ) {
        let (_, products) = steps.split_last().expect("steps end with what comes next");
        // SAFETY: the caller's word. The last instructions of the loop change flags only; every tile is declared.
        unsafe {
            asm!(
                begin!(),
                "cmp {step}, {end}",
                "je 5f",
                "4:",
                "mov {at:e}, dword ptr [{step} + 4]",
                "add {at}, {panel}",
                "mov {row:e}, dword ptr [{step}]",
                "lea {low}, [{first} + {row}]",
                "lea {high}, [{second} + {row}]",
                "mov {row:e}, dword ptr [{step} + 12]",
                "add {row}, {panel}",
                // First by third.
                panel!(4096),
                rows!(),
                products!(),
                ahead!(0),
                ahead!(512),
                // First by second.
                panel!(2048),
                products!(),
                ahead!(1024),
                ahead!(1536),
                // Second by second.
                "add {low}, {piece}",
                "add {high}, {piece}",
                rows!(),
                products!(),
                ahead!(2048),
                ahead!(2560),
                // Second by first.
                panel!(0),
                products!(),
                ahead!(3072),
                ahead!(3584),
                // Third by first.
                "add {low}, {piece}",
                "add {high}, {piece}",
                rows!(),
                products!(),
                ahead!(4096),
                ahead!(4608),
                // First by first.
                "mov {low:e}, dword ptr [{step}]",
                "lea {high}, [{second} + {low}]",
                "add {low}, {first}",
                rows!(),
                products!(),
                ahead!(5120),
                ahead!(5632),
                "add {step}, 8",
                "cmp {step}, {end}",
                "jne 4b",
                "5:",
                end!(),
                block = in(reg) block,
                wide = in(reg) PANEL_PITCH,
                pitch = in(reg) pitch,
                piece = in(reg) piece * size_of::<bf16>(),
                first = in(reg) rows[0],
                second = in(reg) rows[1],
                panel = in(reg) panel,
                step = inout(reg) products.as_ptr_range().start => _,
                end = in(reg) products.as_ptr_range().end,
                at = inout(reg) usize::from(adds) => _,
                row = out(reg) _,
                low = out(reg) _,
                high = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod imp {
    use half::bf16;

    use super::Step;

    pub(crate) fn is_available() -> bool {
        false
    }

    pub(crate) fn has_tiles() -> bool {
        false
    }

    pub(crate) struct Configured(());

    impl Configured {
        pub(crate) unsafe fn new() -> Self {
            unreachable!("no engine is built for a level that is not available")
        }
    }

    pub(crate) fn spin(_: &Configured, _: usize) {}

    pub(crate) unsafe fn multiply(
        _: &Configured,
        _: [*const bf16; 2],
        _: usize,
        _: *const bf16,
        _: &[Step],
        _: *mut f32,
        _: bool,
    ) {
        unreachable!("no engine is built for a level that is not available")
    }

    pub(crate) unsafe fn multiply_pieces(
        _: &Configured,
        _: [*const bf16; 2],
        _: usize,
        _: usize,
        _: *const bf16,
        _: &[Step],
        _: *mut f32,
        _: bool,
    ) {
        unreachable!("no engine is built for a level that is not available")
    }
}

pub(crate) use imp::{Configured, has_tiles, is_available, multiply, multiply_pieces, spin};

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks of depth, whole numbers: sums are exact.
    #[test]
    fn a_block_is_the_sum_of_its_products() {
        if !is_available() {
            return;
        }
        let value = |i: usize| (i % 13) as f32 - 6.0;
        let a: Vec<bf16> = (0..32 * 80).map(|i| bf16::from_f32(value(i))).collect();
        let b: Vec<bf16> = (0..32 * 64)
            .map(|i| bf16::from_f32(value(i * 7 + 3)))
            .collect();
        let steps = [(0, 0), (40, 16 * 64), (0, 0)].map(|(a, b)| Step::new(a, b));
        let mut block = vec![1.0f32; 32 * 32];
        for adds in [false, true] {
            // SAFETY: tiles are available; 32 rows of 80 values hold the steps, and so does the panel.
            unsafe {
                let rows = [a.as_ptr(), a.as_ptr().add(16 * 80)];
                let tiles = Configured::new();
                multiply(
                    &tiles,
                    rows,
                    160,
                    b.as_ptr(),
                    &steps,
                    block.as_mut_ptr(),
                    adds,
                );
            }
            for (i, v) in block.iter().enumerate() {
                let (r, c) = (i / 32, i % 32);
                let product = |k: usize| {
                    let at = if k < 32 { k } else { 40 + k - 32 };
                    a[r * 80 + at].to_f32() * b[k / 2 * 64 + c * 2 + k % 2].to_f32()
                };
                let sum: f32 = (0..64).map(product).sum();
                let times = if adds { 2.0 } else { 1.0 };
                assert_eq!(*v, times * sum, "row {r}, column {c}");
            }
        }
    }
}
