//! Winograd convolution F(4x4, 3x3): 3x3, stride 1, padding 1, with a quarter of the multiplications (Winograd 1980;
//! Lavin and Gray 2016, "Fast algorithms for convolutional neural networks").
//!
//! # The algorithm
//! Four neighbouring results y of a one-dimensional convolution with three weights g need six inputs d. They are the
//! middle of a product of polynomials, and a product of polynomials is a product of their values at enough points:
//!
//! y = A^T [ (G g) . (B^T d) ]
//!
//! with the elementwise product `.` in the middle. G evaluates g at the points, A evaluates (transposed), and B^T is
//! the transpose of the interpolation. Nested over rows and columns, a tile of 4 x 4 results costs 36 products
//! instead of 144: y = A^T [ (G g G^T) . (B^T d B) ] A. Summed over input channels, each of the 36 products is a
//! matrix product of tiles x inputs with inputs x outputs, and that is where the time goes. U = G g G^T is made once
//! per step ([`transform`]), V = B^T d B for some tiles at a time, with the [`Source`] applied on the way.
//!
//! The gradient of the input is the same convolution of the gradient of the output, the taps turned round and inputs
//! and outputs exchanged. The gradient of the weight is dg = G^T [ sum over tiles (B^T d B) . (A dy A^T) ] G: the
//! same transforms, transposed.
//!
//! # The points
//! They are 0, +-5/8, +-3/2 and infinity. The usual 0, +-1, +-2 and infinity cost the same number of instructions but
//! twice the error (rms; four times at the maximum): products with 4 and 8 blow up rounding errors, and 5/8 * 3/2 is
//! near 1, so that the powers of both stay close to it. Pairs +-p share the even and the odd half of each polynomial.
//! All constants of A and B are exact in f32. Error relative to the rms of the result, rms | maximum, of f32 against
//! f64 for inputs after ReLU and weights of He et al. (numpy, sums over channels in blocks):
//!
//! | channels @ plane | | forward | gradient of input | gradient of weight |
//! |---|---|---|---|---|
//! | 64 @ 28 | direct | 2.1e-7, 2.2e-6 | 3.0e-7, 3.1e-6 | 2.7e-7, 1.5e-6 |
//! | | F(2x2, 3x3) | 2.2e-7, 1.5e-6 | 2.6e-7, 2.1e-6 | 3.1e-7, 1.5e-6 |
//! | | 1, 2 | 1.3e-6, 2.6e-5 | 1.7e-6, 3.3e-5 | 1.8e-6, 1.9e-5 |
//! | | 5/8, 3/2 | 6.2e-7, 7.5e-6 | 7.6e-7, 9.4e-6 | 8.0e-7, 6.1e-6 |
//! | 512 @ 7 | direct | 2.7e-7, 2.0e-6 | 3.7e-7, 2.8e-6 | 2.3e-7, 2.7e-6 |
//! | | F(2x2, 3x3) | 4.2e-7, 2.6e-6 | 4.9e-7, 2.7e-6 | 2.8e-7, 2.1e-6 |
//! | | 1, 2 | 2.1e-6, 5.1e-5 | 2.5e-6, 5.1e-5 | 9.8e-7, 1.4e-5 |
//! | | 5/8, 3/2 | 1.2e-6, 1.3e-5 | 1.4e-6, 1.3e-5 | 6.0e-7, 8.2e-6 |
//!
//! 0, +-1, 1/2, -2 (Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution") lies
//! between (8.8e-7 forward at 64), and halves no sums. U and dg are transformed in f32: f64 with one rounding changes
//! the error by 2 %.
//!
//! # How tasks are cut
//! Where there are many tiles and few channels, a task transforms a block of tiles into its worker's memory, where V
//! stays in the second cache, and goes through all outputs with U of [`transform`]. Where there are many channels, or
//! few tiles, the tiles of a block are transformed into shared memory first, and tasks are panels of outputs. U of
//! many channels would not even stay in the last cache (512 x 512: 38 MB), and to write and read it takes as long as
//! the products; so tasks make it themselves, for a panel and a chunk of inputs at a time, from masters that have a
//! quarter of the size. The cut depends on the shape only, so no bit depends on the number of threads.
//!
//! # Contract
//! The jobs of this module take pointers into spans whose lengths the three functions have checked against the plan;
//! ranges of tiles, channels and panels are the plan's own. Nobody writes what they read meanwhile, and tasks write
//! disjoint memory: that is what `SAFETY` comments here mean by the contract.

#![expect(
    clippy::needless_range_loop,
    reason = "indices of constant bounds unroll, and the arrays stay in registers"
)]

use std::ops::Range;

use super::fuse::{Epilogue, Finish, Out, Partials, Read, SUMS, Source, finish_as, read_as};
use super::memory::{ALIGNMENT, Scratch, Span};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level, prefetch};
use super::weights::{CHUNK, Panels};

/// Results of a tile in each direction.
const RESULTS: usize = 4;
/// Inputs of a tile in each direction, and products.
const WINDOW: usize = 6;
/// Products of a tile.
const PRODUCTS: usize = WINDOW * WINDOW;
/// Between rows of the transformed tiles, so that the 36 of them do not fall on the same lines of the first cache.
const PAD: usize = 16;

/// The points beside 0 and infinity are +-P and +-Q.
const P: f32 = 0.625;
const Q: f32 = 1.5;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;

/// G divides the value at p by the product of p - q over the other finite points q: p q (from (0 - q)...) at 0, and
/// 2 p^2 (p^2 - q^2) at +-p.
const AT_ZERO: f32 = 1.0 / (P2 * Q2);
const AT_P: f32 = 1.0 / (2.0 * P2 * (P2 - Q2));
const AT_Q: f32 = 1.0 / (2.0 * Q2 * (Q2 - P2));

/// B^T d. Its row for a point is the product of x - q over the other finite points q, as coefficients: at 0
/// (x^2 - p^2)(x^2 - q^2), at +-p (x^2 +- p x)(x^2 - q^2), at infinity x (x^2 - p^2)(x^2 - q^2).
#[inline(always)]
unsafe fn input<I: Isa>(d: [I::V; 6]) -> [I::V; 6] {
    // SAFETY: the caller has I's instructions.
    unsafe {
        let (p, q) = (I::splat(P), I::splat(Q));
        let (p2, q2) = (I::splat(P2), I::splat(Q2));
        let (product, sum) = (I::splat(P2 * Q2), I::splat(P2 + Q2));
        let p_even = I::fnma(q2, d[2], d[4]);
        let p_odd = I::fnma(q2, d[1], d[3]);
        let q_even = I::fnma(p2, d[2], d[4]);
        let q_odd = I::fnma(p2, d[1], d[3]);
        [
            I::fma(product, d[0], I::fnma(sum, d[2], d[4])),
            I::fma(p, p_odd, p_even),
            I::fnma(p, p_odd, p_even),
            I::fma(q, q_odd, q_even),
            I::fnma(q, q_odd, q_even),
            I::fma(product, d[1], I::fnma(sum, d[3], d[5])),
        ]
    }
}

/// A^T m: row i has the i-th powers of the points, infinity counting in the last only.
#[inline(always)]
unsafe fn output<I: Isa>(m: [I::V; 6]) -> [I::V; 4] {
    // SAFETY: the caller has I's instructions.
    unsafe {
        let (p_even, p_odd) = (I::add(m[1], m[2]), I::sub(m[1], m[2]));
        let (q_even, q_odd) = (I::add(m[3], m[4]), I::sub(m[3], m[4]));
        [
            I::add(m[0], I::add(p_even, q_even)),
            I::fma(I::splat(P), p_odd, I::mul(I::splat(Q), q_odd)),
            I::fma(I::splat(P2), p_even, I::mul(I::splat(Q2), q_even)),
            I::fma(
                I::splat(P2 * P),
                p_odd,
                I::fma(I::splat(Q2 * Q), q_odd, m[5]),
            ),
        ]
    }
}

/// A dy.
#[inline(always)]
unsafe fn gradient<I: Isa>(y: [I::V; 4]) -> [I::V; 6] {
    // SAFETY: the caller has I's instructions.
    unsafe {
        let p_even = I::fma(I::splat(P2), y[2], y[0]);
        let p_odd = I::fma(I::splat(P2 * P), y[3], I::mul(I::splat(P), y[1]));
        let q_even = I::fma(I::splat(Q2), y[2], y[0]);
        let q_odd = I::fma(I::splat(Q2 * Q), y[3], I::mul(I::splat(Q), y[1]));
        [
            y[0],
            I::add(p_even, p_odd),
            I::sub(p_even, p_odd),
            I::add(q_even, q_odd),
            I::sub(q_even, q_odd),
            y[3],
        ]
    }
}

/// G g.
#[inline(always)]
unsafe fn weight<I: Isa>(g: [I::V; 3]) -> [I::V; 6] {
    // SAFETY: the caller has I's instructions.
    unsafe {
        let p_even = I::mul(I::splat(AT_P), I::fma(I::splat(P2), g[2], g[0]));
        let q_even = I::mul(I::splat(AT_Q), I::fma(I::splat(Q2), g[2], g[0]));
        let (p, q) = (I::splat(AT_P * P), I::splat(AT_Q * Q));
        [
            I::mul(I::splat(AT_ZERO), g[0]),
            I::fma(p, g[1], p_even),
            I::fnma(p, g[1], p_even),
            I::fma(q, g[1], q_even),
            I::fnma(q, g[1], q_even),
            g[2],
        ]
    }
}

/// G^T du.
#[inline(always)]
unsafe fn weight_gradient<I: Isa>(u: [I::V; 6]) -> [I::V; 3] {
    // SAFETY: the caller has I's instructions.
    unsafe {
        let p_even = I::mul(I::splat(AT_P), I::add(u[1], u[2]));
        let q_even = I::mul(I::splat(AT_Q), I::add(u[3], u[4]));
        let p_odd = I::mul(I::splat(AT_P * P), I::sub(u[1], u[2]));
        [
            I::fma(I::splat(AT_ZERO), u[0], I::add(p_even, q_even)),
            I::fma(I::splat(AT_Q * Q), I::sub(u[3], u[4]), p_odd),
            I::fma(I::splat(P2), p_even, I::fma(I::splat(Q2), q_even, u[5])),
        ]
    }
}

/// Part `i` of as few parts as `0..n` can be cut into with at most `most` in each, all about equal.
fn part(n: usize, most: usize, i: usize) -> Range<usize> {
    let parts = n.div_ceil(most);
    i * n / parts..(i + 1) * n / parts
}

/// Sizes of one convolution, H x W x inputs to H x W x outputs, and how it is cut into tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    h: usize,
    w: usize,
    inputs: usize,
    outputs: usize,
    lanes: usize,
    nr: usize,
    /// Tiles down and across a plane.
    down: usize,
    across: usize,
    /// Tiles in all images.
    tiles: usize,
    /// The most tiles of a task.
    block: usize,
    /// Whether tasks are output panels of a block after the block's tiles are transformed; otherwise they are blocks.
    shared: bool,
    /// Whether tasks transform the weights that they need; otherwise [`transform`] does.
    fresh: bool,
    weight: WeightCut,
}

/// How the gradient of the weight is cut.
#[derive(Clone, Copy, Debug)]
struct WeightCut {
    /// The most tiles that are transformed at once.
    block: usize,
    /// Inputs of a task, at most a chunk.
    rows: usize,
    /// Output panels of a task.
    panels: usize,
    /// Whether a task makes all products of its inputs and outputs or one; then the transform of dU is a task of its
    /// own.
    whole: bool,
}

impl Plan {
    pub(crate) fn new(
        level: Level,
        h: usize,
        w: usize,
        inputs: usize,
        outputs: usize,
        batch: usize,
    ) -> Self {
        let lanes = level.lanes();
        let nr = 2 * lanes;
        let (down, across) = (h.div_ceil(RESULTS), w.div_ceil(RESULTS));
        let tiles = batch * down * across;
        // Transformed weights are worth keeping only if they stay in a cache.
        let fresh = PRODUCTS * inputs * outputs * size_of::<f32>() > 4 << 20;
        // V of a block takes a quarter of a second cache of 1 MiB, beside M and what is streamed.
        let mut block = (1792 / inputs).clamp(14, 56);
        let shared = fresh || tiles < 8 * block;
        if shared {
            block = 128;
        }
        let weight = WeightCut {
            // V and D of a block stay in the second cache, or else it is large enough that dU is not what counts.
            block: if inputs + outputs <= 128 { 28 } else { 64 },
            rows: CHUNK,
            panels: if fresh { CHUNK } else { 128 } / nr,
            whole: fresh,
        };
        Self {
            h,
            w,
            inputs,
            outputs,
            lanes,
            nr,
            down,
            across,
            tiles,
            block,
            shared,
            fresh,
            weight,
        }
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(self.nr)
    }

    /// Blocks of tiles: tasks of [`convolve`] that own a record of partials.
    pub(crate) fn tasks(&self) -> usize {
        self.tiles.div_ceil(self.block)
    }

    /// Outputs, rounded up to whole panels.
    pub(crate) fn columns(&self) -> usize {
        self.panels() * self.nr
    }

    /// f32 of U: `[outputs / nr][36][inputs][nr]`; none if tasks make it.
    pub(crate) fn weights_len(&self) -> usize {
        if self.fresh {
            0
        } else {
            self.columns() * PRODUCTS * self.inputs
        }
    }

    /// From a product to the next in U.
    fn u_pitch(&self) -> usize {
        if self.fresh {
            self.inputs.min(CHUNK) * self.nr + PAD
        } else {
            self.inputs * self.nr
        }
    }

    fn tile_range(&self, block: usize) -> Range<usize> {
        part(self.tiles, self.block, block)
    }

    /// V of at most `tiles` tiles: `[36][channels / width][tiles][width]`.
    fn packed(&self, tiles: usize, channels: usize, width: usize) -> Packed {
        let panel = tiles * width;
        let pitch = channels.div_ceil(width) * panel + PAD;
        Packed { panel, pitch }
    }

    fn v(&self) -> Packed {
        self.packed(self.block.min(self.tiles), self.inputs, self.lanes)
    }

    /// M of one panel: `[36][tiles][nr]`.
    fn m(&self) -> Packed {
        self.packed(self.block.min(self.tiles), self.nr, self.nr)
    }

    /// f32 of each worker's memory for [`convolve`].
    pub(crate) fn worker_len(&self) -> usize {
        let v = if self.shared { 0 } else { self.v().len() };
        let u = if self.fresh {
            PRODUCTS * self.u_pitch()
        } else {
            0
        };
        v + self.m().len() + u
    }

    /// f32 of shared memory for [`convolve`].
    pub(crate) fn shared_len(&self) -> usize {
        if self.shared { self.v().len() } else { 0 }
    }

    /// The tile of index `tile` in the batch.
    fn tile(&self, tile: usize) -> Tile {
        let (row, x) = (tile / self.across, tile % self.across);
        Tile {
            image: row / self.down,
            y: row % self.down,
            x,
        }
    }

    /// The tile after it.
    #[inline(always)]
    fn next(&self, mut tile: Tile) -> Tile {
        tile.x += 1;
        if tile.x == self.across {
            tile.x = 0;
            tile.y += 1;
            if tile.y == self.down {
                tile.y = 0;
                tile.image += 1;
            }
        }
        tile
    }
}

/// Where a tile lies: counted in tiles.
#[derive(Clone, Copy)]
struct Tile {
    image: usize,
    y: usize,
    x: usize,
}

/// How transformed tiles lie: `[36][channels / width][tiles][width]`.
#[derive(Clone, Copy)]
struct Packed {
    /// From a panel to the next.
    panel: usize,
    /// From a product to the next.
    pitch: usize,
}

impl Packed {
    fn len(&self) -> usize {
        PRODUCTS * self.pitch
    }
}

/// The pixels of a tensor that a tile reads.
struct Window {
    /// Where the first pixel's channels start, wrapping round if it is outside.
    at: usize,
    /// From a row, and from a pixel, to the next.
    row: usize,
    col: usize,
    /// Those inside the plane.
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Window {
    /// `size` pixels square for a tile, beginning `before` its results, in a tensor of `channels`.
    #[inline(always)]
    fn new(plan: &Plan, tile: Tile, channels: usize, size: usize, before: usize) -> Self {
        let (y, x) = (tile.y * RESULTS, tile.x * RESULTS);
        let row = plan.w * channels;
        let at = ((tile.image * plan.h + y) * plan.w + x) * channels;
        Self {
            at: at.wrapping_sub(before * (row + channels)),
            row,
            col: channels,
            rows: before.saturating_sub(y)..(plan.h + before - y).min(size),
            cols: before.saturating_sub(x)..(plan.w + before - x).min(size),
        }
    }

    #[inline(always)]
    fn is_inside(&self, size: usize) -> bool {
        self.rows == (0..size) && self.cols == (0..size)
    }

    /// Channels `c..c + n` of pixel (i, j); zero outside the plane. `INSIDE`: it is not; `FULL`: n is LANES.
    #[inline(always)]
    unsafe fn read<I: Isa, R: Read, const INSIDE: bool, const FULL: bool>(
        &self,
        read: &R,
        (i, j): (usize, usize),
        c: usize,
        n: usize,
    ) -> I::V {
        let at = self.at.wrapping_add(i * self.row + j * self.col);
        let is_inside = INSIDE
            || (i >= self.rows.start
                && i < self.rows.end
                && j >= self.cols.start
                && j < self.cols.end);
        // SAFETY: the caller's word; the pixel is in the plane and c..c + n are channels.
        unsafe {
            if !is_inside || (!FULL && n == 0) {
                I::zero()
            } else if FULL {
                read.full::<I>(at, c)
            } else {
                read.part::<I>(at, c, n)
            }
        }
    }
}

/// Transforms tiles of a tensor: V, or with `GRADIENT` D = A dy A^T.
struct Pack<'a, R, const GRADIENT: bool> {
    plan: &'a Plan,
    read: R,
    channels: usize,
    tiles: Range<usize>,
    to: *mut f32,
    /// Index in `to` of the first tile.
    index: usize,
    packed: Packed,
}

impl<R: Read, const GRADIENT: bool> Job for Pack<'_, R, GRADIENT> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let (size, before) = if GRADIENT { (RESULTS, 0) } else { (WINDOW, 1) };
        let mut tile = self.plan.tile(self.tiles.start);
        for index in self.index..self.index + self.tiles.len() {
            let window = Window::new(self.plan, tile, self.channels, size, before);
            let inside = window.is_inside(size);
            // A panel's vectors beyond the channels are zero.
            let width = if GRADIENT { I::NR } else { I::LANES };
            let end = self.channels.next_multiple_of(width);
            for c in (0..end).step_by(I::LANES) {
                let n = self.channels.saturating_sub(c).min(I::LANES);
                let at = c / width * self.packed.panel + c % width;
                // SAFETY: the contract; the window's pixels are in the tensor.
                unsafe {
                    let to = self.to.add(at + index * width);
                    if n < I::LANES {
                        self.vector::<I, false, false>(&window, c, n, to);
                    } else if inside {
                        self.vector::<I, true, true>(&window, c, n, to);
                    } else {
                        self.vector::<I, false, true>(&window, c, n, to);
                    }
                }
            }
            tile = self.plan.next(tile);
        }
    }
}

impl<R: Read, const GRADIENT: bool> Pack<'_, R, GRADIENT> {
    /// Channels `c..c + n` of one tile; `FULL`: n is LANES.
    #[inline(always)]
    unsafe fn vector<I: Isa, const INSIDE: bool, const FULL: bool>(
        &self,
        window: &Window,
        c: usize,
        n: usize,
        to: *mut f32,
    ) {
        // SAFETY: the contract.
        unsafe {
            let mut half = [[I::zero(); WINDOW]; WINDOW];
            if GRADIENT {
                for j in 0..RESULTS {
                    let mut column = [I::zero(); RESULTS];
                    for (i, v) in column.iter_mut().enumerate() {
                        *v = window.read::<I, R, INSIDE, FULL>(&self.read, (i, j), c, n);
                    }
                    let column = gradient::<I>(column);
                    for i in 0..WINDOW {
                        half[i][j] = column[i];
                    }
                }
            } else {
                for j in 0..WINDOW {
                    let mut column = [I::zero(); WINDOW];
                    for (i, v) in column.iter_mut().enumerate() {
                        *v = window.read::<I, R, INSIDE, FULL>(&self.read, (i, j), c, n);
                    }
                    let column = input::<I>(column);
                    for i in 0..WINDOW {
                        half[i][j] = column[i];
                    }
                }
            }
            for (i, half) in half.iter().enumerate() {
                let row = if GRADIENT {
                    gradient::<I>([half[0], half[1], half[2], half[3]])
                } else {
                    input::<I>(*half)
                };
                for (j, v) in row.iter().enumerate() {
                    I::store(to.add((i * WINDOW + j) * self.packed.pitch), *v);
                }
            }
        }
    }
}

/// The 36 products of some tiles with a panel of U, or with a chunk of its inputs.
struct Products<'a> {
    plan: &'a Plan,
    v: *const f32,
    tiles: usize,
    u: *const f32,
    depth: usize,
    m: *mut f32,
    accumulate: bool,
}

impl Job for Products<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let (v, m, u_pitch) = (self.plan.v(), self.plan.m(), self.plan.u_pitch());
        // As few groups of tiles as there can be, all about equal; a division takes as long as a tenth of a group.
        let groups = self.tiles.div_ceil(I::MR);
        let (least, larger) = (self.tiles / groups, self.tiles % groups);
        for product in 0..PRODUCTS {
            let mut first = 0;
            for i in 0..groups {
                let tiles = least + usize::from(i < larger);
                // While one product is computed, what the next one reads from far away is on its way: V that tasks
                // share, U that they do not make.
                let (ahead, step) = if self.plan.fresh || i > 0 {
                    let done = i * self.depth * I::LANES;
                    (
                        self.v.wrapping_add((product + 1) * v.pitch + done),
                        I::LANES,
                    )
                } else {
                    (self.u.wrapping_add((product + 1) * u_pitch), I::NR)
                };
                // SAFETY: the contract.
                unsafe {
                    product_of::<I>(
                        tiles,
                        Operands {
                            v: self.v.add(product * v.pitch + first * I::LANES),
                            panel: v.panel,
                            u: self.u.add(product * u_pitch),
                            depth: self.depth,
                            m: self.m.add(product * m.pitch + first * I::NR),
                            accumulate: self.accumulate,
                            ahead,
                            step,
                        },
                    );
                }
                first += tiles;
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Operands {
    v: *const f32,
    panel: usize,
    u: *const f32,
    depth: usize,
    m: *mut f32,
    accumulate: bool,
    /// What to ask the caches for: two vectors, and so on `step` further for each of the inputs.
    ahead: *const f32,
    step: usize,
}

/// m (+)= v u for `TILES` tiles and a panel: `TILES` x 2 vectors of sums in registers.
struct Product<const TILES: usize>(Operands);

impl<const TILES: usize> Job for Product<TILES> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Operands {
            mut v,
            panel,
            mut u,
            depth,
            m,
            accumulate,
            mut ahead,
            step,
        } = self.0;
        // SAFETY: the contract.
        unsafe {
            let mut sums = [[I::zero(); 2]; TILES];
            let mut left = depth;
            while left > 0 {
                let n = left.min(I::LANES);
                for k in 0..n {
                    let (u0, u1) = (I::load(u), I::load(u.add(I::LANES)));
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let v = I::splat(*v.add(i * I::LANES + k));
                        sums[0] = I::fma(v, u0, sums[0]);
                        sums[1] = I::fma(v, u1, sums[1]);
                    }
                    prefetch(ahead.cast());
                    if I::LANES == 16 {
                        prefetch(ahead.wrapping_add(I::LANES).cast());
                    }
                    ahead = ahead.wrapping_add(step);
                    u = u.add(I::NR);
                }
                v = v.add(panel);
                left -= n;
            }
            for (i, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    let to = m.add(i * I::NR + half * I::LANES);
                    let mut sum = *sum;
                    if accumulate {
                        sum = I::add(I::load(to), sum);
                    }
                    I::store(to, sum);
                }
            }
        }
    }
}

/// Calls the kernel for a number of tiles; more than MR are never asked for, nor compiled.
#[inline(always)]
unsafe fn product_of<I: Isa>(tiles: usize, o: Operands) {
    macro_rules! kernels {
        ($($tiles:literal)*) => {
            match tiles {
                // SAFETY: the contract.
                $($tiles if $tiles <= I::MR => unsafe { I::call(Product::<$tiles>(o)) },)*
                _ => unreachable!("groups have at most MR tiles"),
            }
        };
    }
    kernels!(14 13 12 11 10 9 8 7 6 5 4 3 2 1)
}

/// Turns products into results and hands them to the epilogue.
struct Emit<'a, T: Element, F> {
    plan: &'a Plan,
    finish: F,
    out: Out<'a, T>,
    tiles: Range<usize>,
    panel: usize,
    m: *const f32,
    /// The record of the tiles' block.
    record: Option<(Partials<'a>, Span<'a, f32>)>,
}

impl<T: Element, F: Finish> Job for Emit<'_, T, F> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let c = self.panel * I::NR;
        let left = self.plan.outputs - c;
        // SAFETY: the contract.
        let mut sums = unsafe { [[I::zero(); SUMS]; 2] };
        let mut count = 0;
        let mut tile = self.plan.tile(self.tiles.start);
        for t in 0..self.tiles.len() {
            let window = Window::new(self.plan, tile, self.plan.outputs, RESULTS, 0);
            // SAFETY: the contract.
            unsafe {
                let m = self.m.add(t * I::NR);
                if left >= I::NR {
                    self.tile::<I, true>(m, &window, c, t == 0, &mut sums);
                } else {
                    self.tile::<I, false>(m, &window, c, t == 0, &mut sums);
                }
            }
            count += window.rows.end * window.cols.end;
            tile = self.plan.next(tile);
        }
        if let Some((partials, record)) = self.record {
            // SAFETY: the contract; this task alone writes these columns.
            unsafe { self.close::<I>(&partials, record, c, &sums, count) }
        }
    }
}

impl<T: Element, F: Finish> Emit<'_, T, F> {
    /// The results of a tile for the panel from channel `c`.
    #[inline(always)]
    unsafe fn tile<I: Isa, const FULL: bool>(
        &self,
        m: *const f32,
        window: &Window,
        c: usize,
        first: bool,
        sums: &mut [[I::V; SUMS]; 2],
    ) {
        let pitch = self.plan.m().pitch;
        let left = self.plan.outputs - c;
        // SAFETY: the contract.
        unsafe {
            let mut half = [[[I::zero(); WINDOW]; RESULTS]; 2];
            for (v, half) in half.iter_mut().enumerate() {
                for j in 0..WINDOW {
                    let mut column = [I::zero(); WINDOW];
                    for (i, value) in column.iter_mut().enumerate() {
                        *value = I::load(m.add((i * WINDOW + j) * pitch + v * I::LANES));
                    }
                    let column = output::<I>(column);
                    for i in 0..RESULTS {
                        half[i][j] = column[i];
                    }
                }
            }
            // Row by row, both vectors of a pixel before the next row: bf16 fills whole cache lines only together.
            for i in 0..RESULTS {
                if i >= window.rows.end {
                    break;
                }
                for v in 0..2 {
                    let c = c + v * I::LANES;
                    let n = if FULL {
                        I::LANES
                    } else {
                        left.saturating_sub(v * I::LANES).min(I::LANES)
                    };
                    if n == 0 {
                        break;
                    }
                    let row = output::<I>(half[v][i]);
                    if first && i == 0 {
                        self.finish.begin::<I>(row[0], &mut sums[v]);
                    }
                    for (j, value) in row.iter().enumerate() {
                        if j < window.cols.end {
                            let full = FULL || n == I::LANES;
                            let at = window.at + i * window.row + j * window.col;
                            let value =
                                self.finish.apply::<I>(*value, at, c, n, full, &mut sums[v]);
                            self.out.store::<I>(value, at, c, n, full);
                        }
                    }
                }
            }
        }
    }

    /// Leaves the sums of a panel in the record.
    #[inline(always)]
    unsafe fn close<I: Isa>(
        &self,
        partials: &Partials<'_>,
        record: Span<'_, f32>,
        c: usize,
        sums: &[[I::V; SUMS]; 2],
        count: usize,
    ) {
        // SAFETY: the contract.
        unsafe {
            if c == 0 {
                record.ptr().write(count as f32);
            }
            for (v, sums) in sums.iter().enumerate() {
                let sums = [
                    I::to_array(sums[0]),
                    I::to_array(sums[1]),
                    I::to_array(sums[2]),
                ];
                for lane in 0..I::LANES {
                    let closed = [sums[0][lane], sums[1][lane], sums[2][lane]];
                    let closed = self.finish.close(closed, count);
                    for (row, value) in closed.into_iter().enumerate() {
                        let at = partials.at(row, c + v * I::LANES + lane);
                        record.ptr().add(at).write(value);
                    }
                }
            }
        }
    }
}

/// Weights of a layer for a plan.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    /// The masters, and how they lie.
    pub(crate) panels: Panels,
    pub(crate) w: Span<'a, f32>,
    /// U of [`transform`], where the plan has it.
    pub(crate) u: Span<'a, f32>,
    /// For the gradient of the input: taps are turned round, and the plan's inputs are the layer's outputs.
    pub(crate) backward: bool,
}

impl Weights<'_> {
    fn check(&self, plan: &Plan) {
        let panels = &self.panels;
        let (inputs, outputs) = if self.backward {
            (panels.outputs, panels.inputs)
        } else {
            (panels.inputs, panels.outputs)
        };
        assert!(
            (inputs, outputs, 9, plan.nr) == (plan.inputs, plan.outputs, panels.taps, panels.nr),
            "the plan is one for these weights"
        );
        assert!(
            self.w.len() >= panels.len() && self.u.len() >= plan.weights_len(),
            "all weights are there"
        );
    }
}

/// Some panels of outputs for a block of tiles.
struct Task<'a, T: Element> {
    plan: &'a Plan,
    source: Source<'a, T>,
    weights: Weights<'a>,
    out: Out<'a, T>,
    epilogue: Epilogue<'a, T>,
    record: Option<(Partials<'a>, Span<'a, f32>)>,
    tiles: Range<usize>,
    panels: Range<usize>,
    v: *mut f32,
    m: *mut f32,
    /// Where the weights go that it transforms.
    u: *mut f32,
}

impl<T: Element> Job for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Self { plan, out, m, .. } = self;
        let inputs = plan.inputs;
        // SAFETY: the contract.
        unsafe {
            if !plan.shared {
                read_as!(self.source, read => I::call(Pack::<_, false> {
                    plan,
                    read,
                    channels: inputs,
                    tiles: self.tiles.clone(),
                    to: self.v,
                    index: 0,
                    packed: plan.v(),
                }));
            }
            for panel in self.panels.clone() {
                let products = Products {
                    plan,
                    v: self.v,
                    tiles: self.tiles.len(),
                    u: self.weights.u.ptr(),
                    depth: inputs,
                    m,
                    accumulate: false,
                };
                if plan.fresh {
                    for first in (0..inputs).step_by(CHUNK) {
                        let depth = (inputs - first).min(CHUNK);
                        I::call(Transform {
                            weights: &self.weights,
                            panel,
                            first,
                            depth,
                            to: self.u,
                            pitch: plan.u_pitch(),
                        });
                        I::call(Products {
                            v: self.v.add(first / I::LANES * plan.v().panel),
                            u: self.u,
                            depth,
                            accumulate: first > 0,
                            ..products
                        });
                    }
                } else {
                    I::call(Products {
                        u: products.u.add(panel * PRODUCTS * plan.u_pitch()),
                        ..products
                    });
                }
                finish_as!(self.epilogue, finish => I::call(Emit {
                    plan,
                    finish,
                    out,
                    tiles: self.tiles.clone(),
                    panel,
                    m,
                    record: self.record,
                }));
            }
        }
    }
}

/// Tiles that are transformed by one task where tasks do only that.
const PIECE: usize = 8;

/// y = x * w, or the gradient of the input.
///
/// If `partials`, the block of tiles `i` leaves its sums in record `i` of [`Plan::tasks`].
pub(crate) fn convolve<T: Element>(
    pool: &mut Pool,
    level: Level,
    scratch: Scratch<'_>,
    shared: Span<'_, f32>,
    plan: &Plan,
    source: Source<'_, T>,
    weights: Weights<'_>,
    out: Out<'_, T>,
    epilogue: Epilogue<'_, T>,
    partials: Option<Partials<'_>>,
) {
    let pixels = plan.tiles / (plan.down * plan.across).max(1) * plan.h * plan.w;
    weights.check(plan);
    assert!(
        source.len() >= pixels * plan.inputs
            && out.y.len() >= pixels * plan.outputs
            && out.channels == plan.outputs,
        "the tensors have all pixels"
    );
    assert!(
        scratch.per_worker >= plan.worker_len() && shared.len() >= plan.shared_len(),
        "the working memory is as planned"
    );
    if let Some(partials) = partials {
        assert!(
            partials.columns == plan.columns()
                && partials.all.len() >= plan.tasks() * Partials::record_len(partials.columns),
            "a record per block of tiles"
        );
    }
    let out = Out {
        stream: out.stream && plan.outputs.is_multiple_of(plan.lanes),
        ..out
    };
    let run = |worker: usize, block: usize, panels: Range<usize>| {
        let mine = scratch.of(worker);
        let (v, rest) = if plan.shared {
            (shared, mine)
        } else {
            let len = plan.v().len();
            (mine.part(0..len), mine.part(len..mine.len()))
        };
        // SAFETY: the contract; blocks have their own pixels and panels their own channels.
        unsafe {
            level.call(Task {
                plan,
                source,
                weights,
                out,
                epilogue,
                record: partials.map(|p| (p, p.record(block))),
                tiles: plan.tile_range(block),
                panels,
                v: v.ptr(),
                m: rest.ptr(),
                u: rest.part(plan.m().len()..rest.len()).ptr(),
            });
        }
    };
    if !plan.shared {
        pool.run(plan.tasks(), |worker, block| {
            run(worker, block, 0..plan.panels())
        });
        return;
    }
    for block in 0..plan.tasks() {
        let tiles = plan.tile_range(block);
        pack(
            pool,
            level,
            plan,
            tiles,
            &[(source, plan.v(), shared, false)],
        );
        pool.run(plan.panels(), |worker, panel| {
            run(worker, block, panel..panel + 1)
        });
    }
}

/// U of some inputs of one panel of outputs.
struct Transform<'a> {
    weights: &'a Weights<'a>,
    panel: usize,
    first: usize,
    depth: usize,
    to: *mut f32,
    /// From a product to the next.
    pitch: usize,
}

impl Job for Transform<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the contract.
        unsafe {
            if self.weights.backward {
                for from in (0..self.depth).step_by(I::NR) {
                    self.turned::<I>(from);
                }
            } else {
                self.straight::<I>();
            }
        }
    }
}

impl Transform<'_> {
    /// Outputs are in the lanes of the masters.
    #[inline(always)]
    unsafe fn straight<I: Isa>(&self) {
        let panels = &self.weights.panels;
        let (panel, chunk) = (self.panel * panels.panel_len(), self.first / CHUNK);
        for k in 0..self.depth {
            for v in 0..2 {
                // SAFETY: the contract.
                unsafe {
                    let mut taps = [I::zero(); 9];
                    for (tap, value) in taps.iter_mut().enumerate() {
                        let at = panel + panels.rows(chunk, tap) + k * I::NR;
                        *value = I::load(self.weights.w.ptr().add(at + v * I::LANES));
                    }
                    let to = self.to.add(k * I::NR + v * I::LANES);
                    store_weight::<I>(taps, to, self.pitch);
                }
            }
        }
    }

    /// The layer's inputs become lanes, so weights are transposed first: a panel of the layer's outputs at a time,
    /// from `from` on.
    #[inline(always)]
    unsafe fn turned<I: Isa>(&self, from: usize) {
        let panels = &self.weights.panels;
        let outputs = (self.depth - from).min(I::NR);
        let panel = (self.first + from) / I::NR * panels.panel_len();
        for v in 0..2 {
            let first = self.panel * I::NR + v * I::LANES;
            let inputs = panels.inputs.saturating_sub(first).min(I::LANES);
            // SAFETY: the contract. A vector of inputs lies in one chunk, and no panel has more than 32 outputs.
            unsafe {
                let mut turned = [[[0.0f32; 16]; 32]; 9];
                for lane in 0..inputs {
                    for (tap, turned) in turned.iter_mut().enumerate() {
                        let rows = panels.rows(first / CHUNK, 8 - tap);
                        let at = panel + rows + (first % CHUNK + lane) * I::NR;
                        for (o, turned) in turned.iter_mut().enumerate().take(outputs) {
                            turned[lane] = *self.weights.w.ptr().add(at + o);
                        }
                    }
                }
                for o in 0..outputs {
                    let mut taps = [I::zero(); 9];
                    for (tap, value) in taps.iter_mut().enumerate() {
                        *value = I::load(turned[tap][o].as_ptr());
                    }
                    let to = self.to.add((from + o) * I::NR + v * I::LANES);
                    store_weight::<I>(taps, to, self.pitch);
                }
            }
        }
    }
}

/// G g G^T of nine taps, row by row.
#[inline(always)]
unsafe fn store_weight<I: Isa>(g: [I::V; 9], to: *mut f32, pitch: usize) {
    // SAFETY: the contract.
    unsafe {
        let mut half = [[I::zero(); 3]; WINDOW];
        for j in 0..3 {
            let column = weight::<I>([g[j], g[3 + j], g[6 + j]]);
            for i in 0..WINDOW {
                half[i][j] = column[i];
            }
        }
        for (i, half) in half.iter().enumerate() {
            for (j, v) in weight::<I>(*half).iter().enumerate() {
                I::store(to.add((i * WINDOW + j) * pitch), *v);
            }
        }
    }
}

/// U = G g G^T of the weights, where the plan wants it before [`convolve`].
pub(crate) fn transform(pool: &mut Pool, level: Level, plan: &Plan, weights: Weights<'_>) {
    weights.check(plan);
    if plan.fresh {
        return;
    }
    let chunks = plan.inputs.div_ceil(CHUNK);
    pool.run(plan.panels() * chunks, |_, task| {
        let (panel, first) = (task / chunks, task % chunks * CHUNK);
        let pitch = plan.u_pitch();
        let at = panel * PRODUCTS * pitch + first * plan.nr;
        // SAFETY: the contract; a task has its own rows of U.
        unsafe {
            level.call(Transform {
                weights: &weights,
                panel,
                first,
                depth: (plan.inputs - first).min(CHUNK),
                to: weights.u.ptr().add(at),
                pitch,
            });
        }
    });
}

/// A tensor, how and where its tiles are to lie, and whether it is a gradient of results.
type Packing<'a, T> = (Source<'a, T>, Packed, Span<'a, f32>, bool);

/// Transforms some tiles of each tensor by tasks that do only that.
fn pack<T: Element>(
    pool: &mut Pool,
    level: Level,
    plan: &Plan,
    tiles: Range<usize>,
    tensors: &[Packing<'_, T>],
) {
    let pieces = tiles.len().div_ceil(PIECE);
    pool.run(tensors.len() * pieces, |_, task| {
        let (source, packed, to, is_gradient) = tensors[task / pieces];
        let index = task % pieces * PIECE;
        let first = tiles.start + index;
        let tiles = first..(first + PIECE).min(tiles.end);
        let to = to.part(0..packed.len()).ptr();
        // SAFETY: the contract; a piece has its own tiles.
        unsafe {
            if is_gradient {
                read_as!(source, read => level.call(Pack::<_, true> {
                    plan,
                    read,
                    channels: plan.outputs,
                    tiles,
                    to,
                    index,
                    packed,
                }));
            } else {
                read_as!(source, read => level.call(Pack::<_, false> {
                    plan,
                    read,
                    channels: plan.inputs,
                    tiles,
                    to,
                    index,
                    packed,
                }));
            }
        }
    });
}

/// dU of a block of inputs and outputs over the tiles that are packed.
struct Correlate<'a> {
    plan: &'a Plan,
    v: *const f32,
    d: *const f32,
    tiles: usize,
    /// The packed ones lie with room for so many.
    room: usize,
    products: Range<usize>,
    inputs: Range<usize>,
    panels: Range<usize>,
    /// `[36][panels][inputs][nr]`.
    du: *mut f32,
    accumulate: bool,
}

/// Tiles that are summed over before the next tile of dU: both operands stay in the first cache.
const RUN: usize = 128;

impl Job for Correlate<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let v = self.plan.packed(self.room, self.plan.inputs, I::LANES);
        let d = self.plan.packed(self.room, self.plan.outputs, I::NR);
        let rows = self.inputs.len().next_multiple_of(I::LANES);
        for product in self.products.clone() {
            for i in 0..self.tiles.div_ceil(RUN) {
                let run = part(self.tiles, RUN, i);
                for (p, panel) in self.panels.clone().enumerate() {
                    for row in (0..rows).step_by(I::LANES / 2) {
                        let c = self.inputs.start + row;
                        let at = (product * self.panels.len() + p) * rows + row;
                        // SAFETY: the contract.
                        unsafe {
                            let v_at = product * v.pitch + c / I::LANES * v.panel;
                            let d_at = product * d.pitch + panel * d.panel;
                            // What the next product reads is on its way, V by one half and D by the other.
                            let ahead = if p > 0 {
                                self.v.wrapping_add(v_at)
                            } else if row % I::LANES == 0 {
                                self.v.wrapping_add(v_at + v.pitch)
                            } else {
                                let done = row / I::LANES * run.len() * LINE;
                                self.d.wrapping_add(d_at + d.pitch + done)
                            };
                            let outer = Pair {
                                v: self.v.add(v_at + run.start * I::LANES + c % I::LANES),
                                d: self.d.add(d_at + run.start * I::NR),
                                tiles: run.len(),
                                du: self.du.add(at * I::NR),
                                accumulate: self.accumulate || i > 0,
                                ahead,
                            };
                            if I::LANES == 16 {
                                I::call(Outer::<8>(outer));
                            } else {
                                I::call(Outer::<4>(outer));
                            }
                        }
                    }
                }
            }
        }
    }
}

struct Pair {
    v: *const f32,
    d: *const f32,
    tiles: usize,
    du: *mut f32,
    accumulate: bool,
    /// What to ask the caches for, a line for each tile.
    ahead: *const f32,
}

/// f32 in a line of the caches.
const LINE: usize = 16;

/// du (+)= sum over tiles of v d, for `ROWS` inputs, half a vector, and a panel of outputs.
struct Outer<const ROWS: usize>(Pair);

impl<const ROWS: usize> Job for Outer<ROWS> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Pair {
            mut v,
            mut d,
            du,
            mut ahead,
            ..
        } = self.0;
        // SAFETY: the contract.
        unsafe {
            let mut sums = [[I::zero(); 2]; ROWS];
            for _ in 0..self.0.tiles {
                let (d0, d1) = (I::load(d), I::load(d.add(I::LANES)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let v = I::splat(*v.add(i));
                    sums[0] = I::fma(v, d0, sums[0]);
                    sums[1] = I::fma(v, d1, sums[1]);
                }
                prefetch(ahead.cast());
                ahead = ahead.wrapping_add(LINE);
                v = v.add(I::LANES);
                d = d.add(I::NR);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    let to = du.add(i * I::NR + half * I::LANES);
                    let mut sum = *sum;
                    if self.0.accumulate {
                        sum = I::add(I::load(to), sum);
                    }
                    I::store(to, sum);
                }
            }
        }
    }
}

/// dw (+)= G^T dU G for a block of inputs and outputs.
struct Restore<'a> {
    plan: &'a Plan,
    inputs: Range<usize>,
    panels: Range<usize>,
    du: *const f32,
    dw: *mut f32,
    accumulate: bool,
    /// Past the caches.
    stream: bool,
}

impl Job for Restore<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let layout = self.plan.layout();
        let rows = self.inputs.len().next_multiple_of(I::LANES);
        let pitch = self.panels.len() * rows * I::NR;
        for (p, panel) in self.panels.clone().enumerate() {
            let panel = panel * layout.panel_len();
            for (row, input) in self.inputs.clone().enumerate() {
                for half in 0..2 {
                    // SAFETY: the contract.
                    unsafe {
                        let from = (p * rows + row) * I::NR + half * I::LANES;
                        let taps = load_weight::<I>(self.du.add(from), pitch);
                        for (tap, value) in taps.iter().enumerate() {
                            let rows = layout.rows(input / CHUNK, tap);
                            let at = panel + rows + input % CHUNK * I::NR;
                            let to = self.dw.add(at + half * I::LANES);
                            if self.accumulate {
                                I::store(to, I::add(I::load(to), *value));
                            } else if self.stream {
                                I::stream(to, *value);
                            } else {
                                I::store(to, *value);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// G^T du G: nine taps, row by row.
#[inline(always)]
unsafe fn load_weight<I: Isa>(from: *const f32, pitch: usize) -> [I::V; 9] {
    // SAFETY: the contract.
    unsafe {
        let mut half = [[I::zero(); WINDOW]; 3];
        for j in 0..WINDOW {
            let mut column = [I::zero(); WINDOW];
            for (i, value) in column.iter_mut().enumerate() {
                *value = I::load(from.add((i * WINDOW + j) * pitch));
            }
            let column = weight_gradient::<I>(column);
            for i in 0..3 {
                half[i][j] = column[i];
            }
        }
        let mut taps = [I::zero(); 9];
        for (i, half) in half.iter().enumerate() {
            let row = weight_gradient::<I>(*half);
            for (j, v) in row.iter().enumerate() {
                taps[3 * i + j] = *v;
            }
        }
        taps
    }
}

impl Plan {
    /// How the weight lies whose gradient is computed.
    fn layout(&self) -> Panels {
        Panels {
            inputs: self.inputs,
            outputs: self.outputs,
            taps: 9,
            nr: self.nr,
        }
    }

    /// Blocks of tiles for the gradient of the weight.
    fn weight_blocks(&self) -> usize {
        self.tiles.div_ceil(self.weight.block)
    }

    /// The most tiles in one of them.
    fn room(&self) -> usize {
        self.tiles.div_ceil(self.weight_blocks().max(1))
    }

    /// Blocks of inputs, and of outputs.
    fn weight_grid(&self) -> (usize, usize) {
        (
            self.inputs.div_ceil(self.weight.rows),
            self.panels().div_ceil(self.weight.panels),
        )
    }

    /// f32 of dU of one block of inputs and outputs.
    fn du_len(&self) -> usize {
        let rows = self
            .weight
            .rows
            .min(self.inputs)
            .next_multiple_of(self.lanes);
        PRODUCTS * self.weight.panels.min(self.panels()) * rows * self.nr
    }

    /// Whether dU is a task's own: nothing is left to add to it later, nor for others to transform.
    fn is_du_local(&self) -> bool {
        self.weight.whole && self.weight_blocks() <= 1
    }

    /// f32 of each worker's memory for [`backward_weight`].
    pub(crate) fn weight_worker_len(&self) -> usize {
        if self.is_du_local() { self.du_len() } else { 0 }
    }

    /// f32 of shared memory for [`backward_weight`].
    pub(crate) fn weight_shared_len(&self) -> usize {
        let (down, across) = self.weight_grid();
        let du = if self.is_du_local() {
            0
        } else {
            down * across * self.du_len()
        };
        self.packed(self.room(), self.inputs, self.lanes).len()
            + self.packed(self.room(), self.outputs, self.nr).len()
            + du
    }
}

/// dw (+)= the gradient of the weight for input `x` and gradient of the output `d`, in the layout of [`Panels`].
///
/// Tiles of both are transformed into shared memory, a block of them at a time; then each task multiplies all of them
/// for its part of dU. No sum is cut by anything but the shape.
pub(crate) fn backward_weight<T: Element>(
    pool: &mut Pool,
    level: Level,
    scratch: Scratch<'_>,
    shared: Span<'_, f32>,
    plan: &Plan,
    x: Source<'_, T>,
    d: Source<'_, T>,
    dw: Span<'_, f32>,
    accumulate: bool,
) {
    let pixels = plan.tiles / (plan.down * plan.across).max(1) * plan.h * plan.w;
    assert!(
        x.len() >= pixels * plan.inputs && d.len() >= pixels * plan.outputs,
        "the tensors have all pixels"
    );
    assert!(dw.len() >= plan.layout().len(), "all weights are there");
    assert!(
        scratch.per_worker >= plan.weight_worker_len() && shared.len() >= plan.weight_shared_len(),
        "the working memory is as planned"
    );
    let cut = plan.weight;
    let room = plan.room();
    let packed_x = plan.packed(room, plan.inputs, plan.lanes);
    let packed_d = plan.packed(room, plan.outputs, plan.nr);
    let (to_x, rest) = (shared.part(0..packed_x.len()), packed_x.len()..shared.len());
    let (to_d, du) = (
        shared.part(rest.clone()).part(0..packed_d.len()),
        shared.part(rest.start + packed_d.len()..rest.end),
    );
    let (down, across) = plan.weight_grid();
    let products = if cut.whole { 1 } else { PRODUCTS };
    // Inputs and panels of a block of dU.
    let area = |block: usize| {
        let (row, column) = (block / across, block % across);
        (
            row * cut.rows..((row + 1) * cut.rows).min(plan.inputs),
            column * cut.panels..((column + 1) * cut.panels).min(plan.panels()),
        )
    };
    let blocks = plan.weight_blocks();
    // Large gradients have left the caches before they are used.
    let stream = plan.fresh && dw.ptr().addr().is_multiple_of(ALIGNMENT);
    for i in 0..blocks {
        let tiles = part(plan.tiles, cut.block, i);
        let tensors = [(x, packed_x, to_x, false), (d, packed_d, to_d, true)];
        pack(pool, level, plan, tiles.clone(), &tensors);
        pool.run(down * across * products, |worker, task| {
            let (block, product) = (task / products, task % products);
            let (inputs, panels) = area(block);
            let du = if plan.is_du_local() {
                scratch.of(worker)
            } else {
                du.part(block * plan.du_len()..(block + 1) * plan.du_len())
            };
            // SAFETY: the contract; a task has its own part of dU, and of dw.
            unsafe {
                level.call(Correlate {
                    plan,
                    v: to_x.ptr(),
                    d: to_d.ptr(),
                    tiles: tiles.len(),
                    room,
                    products: if cut.whole {
                        0..PRODUCTS
                    } else {
                        product..product + 1
                    },
                    inputs: inputs.clone(),
                    panels: panels.clone(),
                    du: du.ptr(),
                    accumulate: i > 0,
                });
                if cut.whole && i + 1 == blocks {
                    level.call(Restore {
                        plan,
                        inputs,
                        panels,
                        du: du.ptr(),
                        dw: dw.ptr(),
                        accumulate,
                        stream,
                    });
                }
            }
        });
    }
    if !cut.whole {
        pool.run(down * across, |_, block| {
            let (inputs, panels) = area(block);
            // SAFETY: the contract; blocks have their own weights.
            unsafe {
                level.call(Restore {
                    plan,
                    inputs,
                    panels,
                    du: du.part(block * plan.du_len()..du.len()).ptr(),
                    dw: dw.ptr(),
                    accumulate,
                    stream,
                });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::fuse::{Affine, Centred, Grad, Join, Mask, Norm, Raw, Stats, Store};
    use super::super::memory::{Block, Plain};
    use super::*;

    /// Numbers from a seed: uniform in -1..1 (splitmix64, Steele et al. 2014).
    struct Random(u64);

    impl Random {
        fn bits(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn next(&mut self) -> f32 {
            (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }

        fn below(&mut self, n: usize) -> usize {
            (self.bits() % n as u64) as usize
        }

        fn values(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.next()).collect()
        }

        fn tensor<T: Element>(&mut self, n: usize) -> Tensor<T> {
            let tensor = Tensor::new(n);
            for v in tensor.slice() {
                *v = T::from_f32(self.next());
            }
            tensor
        }
    }

    /// Memory of its own, full of NaN, so that what is not written shows.
    struct Tensor<T> {
        block: Block,
        len: usize,
        of: std::marker::PhantomData<T>,
    }

    impl<T: Element> Tensor<T> {
        fn new(len: usize) -> Self {
            let block = Block::new(len * size_of::<T>()).expect("tests are small");
            let tensor = Self {
                block,
                len,
                of: std::marker::PhantomData,
            };
            tensor.slice().fill(T::from_f32(f32::NAN));
            tensor
        }

        fn span(&self) -> Span<'_, T>
        where
            T: Plain,
        {
            self.block.all().part(0..self.len)
        }

        #[expect(clippy::mut_from_ref, reason = "a test is one thread and takes turns")]
        fn slice(&self) -> &mut [T] {
            // SAFETY: no kernel runs while a test looks at its tensors.
            unsafe { self.span().get_mut() }
        }

        fn at(&self, i: usize) -> f64 {
            f64::from(self.slice()[i].to_f32())
        }

        fn bits(&self) -> Vec<u32> {
            self.slice().iter().map(|v| v.to_f32().to_bits()).collect()
        }
    }

    #[derive(Clone, Copy, Debug)]
    struct Shape {
        h: usize,
        w: usize,
        inputs: usize,
        outputs: usize,
        batch: usize,
    }

    impl Shape {
        fn random(random: &mut Random) -> Self {
            Self {
                h: 1 + random.below(13),
                w: 1 + random.below(13),
                inputs: 1 + random.below(80),
                outputs: 1 + random.below(80),
                batch: 1 + random.below(3),
            }
        }

        fn pixels(&self) -> usize {
            self.batch * self.h * self.w
        }

        fn plan(&self, level: Level) -> Plan {
            Plan::new(level, self.h, self.w, self.inputs, self.outputs, self.batch)
        }

        /// The plan, and cuts of it that large planes or many channels would get.
        fn plans(&self, level: Level) -> Vec<Plan> {
            let plan = self.plan(level);
            let weight = |block, whole| WeightCut {
                block,
                rows: 32,
                panels: 1,
                whole,
            };
            let fused = Plan {
                block: 9,
                shared: false,
                weight: weight(5, true),
                ..plan
            };
            let shared = Plan {
                block: 11,
                shared: true,
                weight: weight(150, true),
                ..plan
            };
            let fresh = Plan {
                block: 17,
                shared: true,
                fresh: true,
                weight: weight(200, false),
                ..plan
            };
            vec![plan, fused, shared, fresh]
        }

        /// Calls `f` with the pixel, the neighbour that the tap reads, and the tap.
        fn windows(&self, mut f: impl FnMut(usize, usize, usize)) {
            for pixel in 0..self.pixels() {
                let (y, x) = (pixel / self.w % self.h, pixel % self.w);
                for tap in 0..9 {
                    let (ny, nx) = (y + tap / 3, x + tap % 3);
                    if (1..=self.h).contains(&ny) && (1..=self.w).contains(&nx) {
                        f(
                            pixel,
                            pixel + (ny - 1) * self.w + nx - 1 - y * self.w - x,
                            tap,
                        );
                    }
                }
            }
        }

        /// y in f64; weights `[outputs][inputs][9]`.
        fn convolve(&self, x: &[f64], w: &[f64]) -> Vec<f64> {
            let mut y = vec![0.0; self.pixels() * self.outputs];
            self.windows(|pixel, from, tap| {
                for o in 0..self.outputs {
                    let sum = (0..self.inputs)
                        .map(|i| x[from * self.inputs + i] * w[(o * self.inputs + i) * 9 + tap]);
                    y[pixel * self.outputs + o] += sum.sum::<f64>();
                }
            });
            y
        }

        fn weight_gradient(&self, x: &[f64], d: &[f64]) -> Vec<f64> {
            let mut dw = vec![0.0; self.outputs * self.inputs * 9];
            self.windows(|pixel, from, tap| {
                for o in 0..self.outputs {
                    for i in 0..self.inputs {
                        dw[(o * self.inputs + i) * 9 + tap] +=
                            x[from * self.inputs + i] * d[pixel * self.outputs + o];
                    }
                }
            });
            dw
        }
    }

    fn levels() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|l| l.is_available())
    }

    /// Weights `[outputs][inputs][9]` in panels.
    fn in_panels(panels: &Panels, w: &[f32]) -> Tensor<f32> {
        let tensor = Tensor::new(panels.len());
        tensor.slice().fill(0.0);
        for (at, v) in w.iter().enumerate() {
            let (o, i) = (at / 9 / panels.inputs, at / 9 % panels.inputs);
            tensor.slice()[panels.at(o, i, at % 9)] = *v;
        }
        tensor
    }

    fn widen(values: &[f32]) -> Vec<f64> {
        values.iter().map(|v| f64::from(*v)).collect()
    }

    /// Errors of F(4x4, 3x3) are relative to the size of all results, not of one: up to 1.5e-5 of the rms in the
    /// module's table. bf16 adds half a unit of its last place, 2^-8 of each stored value at most.
    fn close<T: Element>(what: &str, got: impl Fn(usize) -> f64, expected: &[f64]) {
        let squares = expected.iter().map(|v| v * v).sum::<f64>();
        let rms = (squares / expected.len() as f64).sqrt();
        let relative = if size_of::<T>() == 2 {
            1.0 / 255.0
        } else {
            0.0
        };
        for (i, expected) in expected.iter().enumerate() {
            let error = (got(i) - expected).abs();
            assert!(
                error <= 2e-5 * rms + relative * expected.abs() + 1e-12,
                "{what}: {} instead of {expected} at {i}, rms {rms}",
                got(i)
            );
        }
    }

    /// A convolution with its memory.
    struct Bench<'a, T: Element> {
        plan: Plan,
        level: Level,
        panels: Panels,
        w: &'a Tensor<f32>,
        u: Tensor<f32>,
        backward: bool,
        y: Tensor<T>,
        partials: Tensor<f32>,
    }

    impl<'a, T: Element> Bench<'a, T> {
        fn new(
            level: Level,
            plan: Plan,
            panels: Panels,
            w: &'a Tensor<f32>,
            backward: bool,
        ) -> Self {
            let pixels = plan.tiles / plan.down / plan.across * plan.h * plan.w;
            let record = Partials::record_len(plan.columns());
            let bench = Self {
                plan,
                level,
                panels,
                w,
                u: Tensor::new(plan.weights_len()),
                backward,
                y: Tensor::new(pixels * plan.outputs),
                partials: Tensor::new(plan.tasks() * record),
            };
            transform(&mut Pool::new(1), level, &plan, bench.weights());
            bench
        }

        fn weights(&self) -> Weights<'_> {
            Weights {
                panels: self.panels,
                w: self.w.span(),
                u: self.u.span(),
                backward: self.backward,
            }
        }

        fn run(&self, threads: usize, source: Source<'_, T>, epilogue: Epilogue<'_, T>) {
            let scratch = Tensor::<f32>::new(self.plan.worker_len() * threads);
            let shared = Tensor::new(self.plan.shared_len());
            convolve(
                &mut Pool::new(threads),
                self.level,
                Scratch {
                    all: scratch.span(),
                    per_worker: self.plan.worker_len(),
                },
                shared.span(),
                &self.plan,
                source,
                self.weights(),
                Out {
                    y: self.y.span(),
                    channels: self.plan.outputs,
                    stream: true,
                },
                epilogue,
                Some(self.partials()),
            );
        }

        fn partials(&self) -> Partials<'_> {
            Partials {
                all: self.partials.span(),
                columns: self.plan.columns(),
            }
        }

        /// Counts and rows of the records, channel by channel: `[task][count, sums..]`.
        fn sums(&self, c: usize) -> Vec<[f64; 1 + SUMS]> {
            let partials = self.partials();
            let record = |task| {
                // SAFETY: no kernel runs.
                let record = unsafe { partials.record(task).get() };
                let row = |row| f64::from(record[partials.at(row, c)]);
                [f64::from(record[0]), row(0), row(1), row(2)]
            };
            (0..self.plan.tasks()).map(record).collect()
        }
    }

    fn raw<T: Element>(x: &Tensor<T>) -> (Source<'_, T>, Vec<f64>) {
        let values = (0..x.len).map(|i| x.at(i)).collect();
        (Source::Raw(Raw(x.span())), values)
    }

    const STORE: Store<'static, f32> = Store { add: None };

    #[test]
    fn equals_a_convolution() {
        let mut random = Random(1);
        for _ in 0..12 {
            let shape = Shape::random(&mut random);
            for level in levels() {
                for plan in shape.plans(level) {
                    let panels = plan.layout();
                    let w = random.values(shape.outputs * shape.inputs * 9);
                    let x = random.tensor::<f32>(shape.pixels() * shape.inputs);
                    let (source, values) = raw(&x);
                    let w_panels = in_panels(&panels, &w);
                    let bench = Bench::new(level, plan, panels, &w_panels, false);
                    bench.run(2, source, Epilogue::Store(STORE));
                    let expected = shape.convolve(&values, &widen(&w));
                    let what = format!("{level} {plan:?}");
                    close::<f32>(&what, |i| bench.y.at(i), &expected);
                }
            }
        }
    }

    #[test]
    fn backward_weights_give_the_gradient_of_the_input() {
        let mut random = Random(2);
        for _ in 0..6 {
            // The layer's gradient of its outputs is this shape's input.
            let shape = Shape::random(&mut random);
            for level in levels() {
                for plan in shape.plans(level) {
                    let panels = Panels {
                        inputs: shape.outputs,
                        outputs: shape.inputs,
                        ..plan.layout()
                    };
                    let w = random.values(shape.outputs * shape.inputs * 9);
                    let d = random.tensor::<f32>(shape.pixels() * shape.inputs);
                    let (source, values) = raw(&d);
                    let w_panels = in_panels(&panels, &w);
                    let bench = Bench::new(level, plan, panels, &w_panels, true);
                    bench.run(2, source, Epilogue::Store(STORE));
                    let mut turned = vec![0.0; w.len()];
                    for (at, v) in w.iter().enumerate() {
                        let (o, i, tap) = (at / 9 / shape.outputs, at / 9 % shape.outputs, at % 9);
                        turned[(i * shape.inputs + o) * 9 + 8 - tap] = f64::from(*v);
                    }
                    let expected = shape.convolve(&values, &turned);
                    let what = format!("{level} {plan:?}");
                    close::<f32>(&what, |i| bench.y.at(i), &expected);
                }
            }
        }
    }

    /// Per channel: scale, shift, mean and so on.
    struct Rows([Vec<f32>; 4]);

    impl Rows {
        fn new(random: &mut Random, channels: usize) -> Self {
            Self(std::array::from_fn(|_| random.values(channels)))
        }

        fn at(&self, row: usize, c: usize) -> f64 {
            f64::from(self.0[row][c])
        }
    }

    fn norm<'a, T: Element>(z: &'a Tensor<T>, rows: &'a Rows) -> (Source<'a, T>, Vec<f64>) {
        let channels = rows.0[0].len();
        let norm = Norm {
            z: z.span(),
            scale: &rows.0[0],
            shift: &rows.0[1],
            floor: 0.0,
        };
        let value =
            |i: usize| (z.at(i) * rows.at(0, i % channels) + rows.at(1, i % channels)).max(0.0);
        (Source::Norm(norm), (0..z.len).map(value).collect())
    }

    fn grad<'a, T: Element>(
        g: &'a Tensor<T>,
        z: &'a Tensor<T>,
        rows: &'a Rows,
    ) -> (Source<'a, T>, Vec<f64>) {
        let channels = rows.0[0].len();
        let [mean, a, b, c] = &rows.0;
        let source = Grad {
            g: g.span(),
            z: z.span(),
            mean,
            a,
            b,
            c,
        };
        let value = |i: usize| {
            let of = |row| rows.at(row, i % channels);
            of(1) * g.at(i) + of(2) * (z.at(i) - of(0)) + of(3)
        };
        (Source::Grad(source), (0..z.len).map(value).collect())
    }

    /// Every epilogue on top of every source.
    fn check_fusions<T: Element>() {
        let mut random = Random(3);
        for (shape, level) in [(9, 10, 40, 50, 2), (4, 7, 32, 32, 1), (5, 3, 17, 3, 3)]
            .into_iter()
            .flat_map(|shape| levels().map(move |level| (shape, level)))
        {
            let (h, w, inputs, outputs, batch) = shape;
            let shape = Shape {
                h,
                w,
                inputs,
                outputs,
                batch,
            };
            let (nx, ny) = (shape.pixels() * inputs, shape.pixels() * outputs);
            let (x, xz) = (random.tensor::<T>(nx), random.tensor::<T>(nx));
            let (z, z2) = (random.tensor::<T>(ny), random.tensor::<T>(ny));
            let (add, other) = (random.tensor::<T>(ny), random.tensor::<T>(ny));
            let in_rows = Rows::new(&mut random, inputs);
            let rows = Rows::new(&mut random, outputs);
            let weights = random.values(outputs * inputs * 9);
            let sources = [raw(&x), norm(&x, &in_rows), grad(&x, &xz, &in_rows)];
            for (source, values) in sources {
                let conv = shape.convolve(&values, &widen(&weights));
                let centred = |z: &Tensor<T>, i: usize, row| z.at(i) - rows.at(row, i % outputs);
                let affine = |i: usize| z.at(i) * rows.at(0, i % outputs) + rows.at(1, i % outputs);
                let masked = |i: usize| if affine(i) > 0.0 { conv[i] } else { 0.0 };
                let joined = |i: usize| {
                    if other.at(i) > 0.0 {
                        conv[i] + add.at(i)
                    } else {
                        0.0
                    }
                };
                let folded = |i: usize| (conv[i] + rows.at(1, i % outputs) + add.at(i)).max(0.0);
                let all = |f: &dyn Fn(usize) -> f64| (0..ny).map(f).collect::<Vec<_>>();
                type Case<'a, T> = (Epilogue<'a, T>, Vec<f64>, Option<[Vec<f64>; 3]>);
                let cases: [Case<'_, T>; 6] = [
                    (
                        Epilogue::Store(Store {
                            add: Some(add.span()),
                        }),
                        all(&|i| conv[i] + add.at(i)),
                        None,
                    ),
                    (Epilogue::Stats(Stats), conv.clone(), None),
                    (
                        Epilogue::Affine(Affine {
                            shift: &rows.0[1],
                            residual: Some(add.span()),
                            floor: 0.0,
                        }),
                        all(&folded),
                        None,
                    ),
                    (
                        Epilogue::Mask(Mask {
                            z: z.span(),
                            scale: &rows.0[0],
                            shift: &rows.0[1],
                            mean: &rows.0[2],
                            relu: true,
                        }),
                        all(&masked),
                        Some([
                            all(&masked),
                            all(&|i| masked(i) * centred(&z, i, 2)),
                            vec![0.0; ny],
                        ]),
                    ),
                    (
                        Epilogue::Mask(Mask {
                            z: z.span(),
                            scale: &rows.0[0],
                            shift: &rows.0[1],
                            mean: &rows.0[2],
                            relu: false,
                        }),
                        conv.clone(),
                        Some([
                            conv.clone(),
                            all(&|i| conv[i] * centred(&z, i, 2)),
                            vec![0.0; ny],
                        ]),
                    ),
                    (
                        Epilogue::Join(Join {
                            add: Some(add.span()),
                            y: Some(other.span()),
                            norms: [
                                Some(Centred {
                                    z: z.span(),
                                    mean: &rows.0[2],
                                }),
                                Some(Centred {
                                    z: z2.span(),
                                    mean: &rows.0[3],
                                }),
                            ],
                        }),
                        all(&joined),
                        Some([
                            all(&joined),
                            all(&|i| joined(i) * centred(&z, i, 2)),
                            all(&|i| joined(i) * centred(&z2, i, 3)),
                        ]),
                    ),
                ];
                for plan in shape.plans(level) {
                    let panels = plan.layout();
                    let w = in_panels(&panels, &weights);
                    let bench = Bench::<T>::new(level, plan, panels, &w, false);
                    for (case, (epilogue, expected, sums)) in cases.iter().enumerate() {
                        bench.y.slice().fill(T::from_f32(f32::NAN));
                        bench.run(2, source, *epilogue);
                        let what = format!("{level} {plan:?} case {case}");
                        close::<T>(&what, |i| bench.y.at(i), expected);
                        if let Some(sums) = sums {
                            check_sums(&what, &bench, sums);
                        }
                        if matches!(epilogue, Epilogue::Stats(_)) {
                            check_stats(&what, &bench, expected);
                        }
                    }
                }
            }
        }
    }

    /// Sums of a few hundred values, each with an error as in `close`; those add up like their roots, but the bound
    /// takes them as they are: 2e-5 of the sum of magnitudes.
    fn check_sums<T: Element>(what: &str, bench: &Bench<'_, T>, expected: &[Vec<f64>; 3]) {
        let outputs = bench.plan.outputs;
        for c in 0..outputs {
            let records = bench.sums(c);
            for (row, values) in expected.iter().enumerate() {
                let channel = || values.iter().skip(c).step_by(outputs);
                let sum = channel().sum::<f64>();
                let size = channel().map(|v| v.abs()).sum::<f64>();
                let got = records.iter().map(|r| r[1 + row]).sum::<f64>();
                assert!(
                    (got - sum).abs() <= 2e-5 * size + 1e-4,
                    "{what}: sum {row} of channel {c}: {got} instead of {sum}"
                );
            }
        }
    }

    /// Means and squared deviations of the blocks, merged (Chan et al. 1979).
    fn check_stats<T: Element>(what: &str, bench: &Bench<'_, T>, values: &[f64]) {
        let outputs = bench.plan.outputs;
        for c in 0..outputs {
            let (mut n, mut mean, mut m2) = (0.0, 0.0, 0.0);
            for [count, m, s, _] in bench.sums(c) {
                let delta: f64 = m - mean;
                m2 += s + delta * delta * n * count / (n + count);
                mean += delta * count / (n + count);
                n += count;
            }
            let channel = || values.iter().skip(c).step_by(outputs);
            let count = channel().count() as f64;
            let expected = channel().sum::<f64>() / count;
            let squares = channel().map(|v| (v - expected).powi(2)).sum::<f64>();
            let size = (channel().map(|v| v * v).sum::<f64>() / count).sqrt();
            assert!(n == count, "{what}: {n} of {count} results");
            assert!(
                (mean - expected).abs() <= 2e-5 * size,
                "{what}: mean {mean} instead of {expected}"
            );
            assert!(
                (m2 - squares).abs() <= 1e-4 * size * size * count,
                "{what}: {m2} instead of {squares}"
            );
        }
    }

    #[test]
    fn sources_and_epilogues_f32() {
        check_fusions::<f32>();
    }

    #[test]
    fn sources_and_epilogues_bf16() {
        check_fusions::<bf16>();
    }

    fn weight_gradient_of<T: Element>(
        level: Level,
        plan: &Plan,
        threads: usize,
        x: Source<'_, T>,
        d: Source<'_, T>,
        dw: &Tensor<f32>,
        accumulate: bool,
    ) {
        let scratch = Tensor::<f32>::new(plan.weight_worker_len() * threads);
        let shared = Tensor::<f32>::new(plan.weight_shared_len());
        let scratch = Scratch {
            all: scratch.span(),
            per_worker: plan.weight_worker_len(),
        };
        let mut pool = Pool::new(threads);
        let dw = dw.span();
        backward_weight(
            &mut pool,
            level,
            scratch,
            shared.span(),
            plan,
            x,
            d,
            dw,
            accumulate,
        );
    }

    /// Sums over up to a few hundred pixels; storage rounds nothing, as the gradient is f32.
    fn check_weight_gradient<T: Element>(seed: u64) {
        let mut random = Random(seed);
        for round in 0..8 {
            let shape = Shape::random(&mut random);
            let x = random.tensor::<T>(shape.pixels() * shape.inputs);
            let g = random.tensor::<T>(shape.pixels() * shape.outputs);
            let z = random.tensor::<T>(shape.pixels() * shape.outputs);
            let in_rows = Rows::new(&mut random, shape.inputs);
            let rows = Rows::new(&mut random, shape.outputs);
            let (x, x_values) = if round % 2 == 0 {
                raw(&x)
            } else {
                norm(&x, &in_rows)
            };
            let (d, d_values) = if round % 3 == 0 {
                raw(&g)
            } else {
                grad(&g, &z, &rows)
            };
            let before = random.values(shape.outputs * shape.inputs * 9);
            let gradient = shape.weight_gradient(&x_values, &d_values);
            for level in levels() {
                for plan in shape.plans(level) {
                    let panels = plan.layout();
                    for accumulate in [false, true] {
                        let dw = in_panels(&panels, &before);
                        weight_gradient_of(level, &plan, 2, x, d, &dw, accumulate);
                        let expected: Vec<_> = gradient
                            .iter()
                            .zip(&before)
                            .map(|(g, b)| if accumulate { g + f64::from(*b) } else { *g })
                            .collect();
                        let at = |i: usize| {
                            let (o, i, tap) = (i / 9 / shape.inputs, i / 9 % shape.inputs, i % 9);
                            dw.at(panels.at(o, i, tap))
                        };
                        let what = format!("{level} {plan:?} accumulate {accumulate}");
                        close::<f32>(&what, at, &expected);
                        let filling = dw.slice().iter().filter(|v| **v == 0.0).count();
                        assert!(
                            filling >= dw.len - expected.len(),
                            "{what}: the last panel is filled up with zeros"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn gradient_of_the_weight_f32() {
        check_weight_gradient::<f32>(4);
    }

    #[test]
    fn gradient_of_the_weight_bf16() {
        check_weight_gradient::<bf16>(5);
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut random = Random(6);
        let shape = Shape {
            h: 15,
            w: 14,
            inputs: 64,
            outputs: 96,
            batch: 3,
        };
        let x = random.tensor::<f32>(shape.pixels() * shape.inputs);
        let d = random.tensor::<f32>(shape.pixels() * shape.outputs);
        let w = random.values(shape.outputs * shape.inputs * 9);
        for level in levels() {
            for plan in shape.plans(level) {
                let panels = plan.layout();
                let w = in_panels(&panels, &w);
                let run = |threads| {
                    let bench = Bench::<f32>::new(level, plan, panels, &w, false);
                    bench.run(threads, raw(&x).0, Epilogue::Stats(Stats));
                    let dw = Tensor::<f32>::new(panels.len());
                    let (x, d) = (raw(&x).0, raw(&d).0);
                    weight_gradient_of(level, &plan, threads, x, d, &dw, false);
                    (bench.y.bits(), bench.partials.bits(), dw.bits())
                };
                let one = run(1);
                assert!(one == run(2), "{level} {plan:?}: 2 threads");
                assert!(one == run(3), "{level} {plan:?}: 3 threads");
            }
        }
    }
}
