//! Direct convolution: products of packed tiles of the input with panels of weights. Forward and the gradient of the
//! input are the same kernel with other taps.
//!
//! A task packs the input of a few rows of results once, as `[channels / CHUNK][row][column][CHUNK]`, applying the
//! [`Source`] on the way, with zeros around the plane. Then, for each panel of weights and each handful of results, a
//! micro-kernel keeps the sums of a tile in registers over the whole depth, reading the tile by broadcasts and the
//! panel in one stream; the [`Epilogue`] stores them. No matrix of patches is ever built. Of a strided window the
//! columns are packed by residue, so that neighbouring results always read neighbouring columns.
//!
//! The gradient of the input of a convolution with stride s is s x s convolutions of stride 1 over the gradient of
//! the output, one for each residue of the input's pixels (a *phase*); a residue that no window meets is zero.
//!
//! Of a window of stride 2 on three channels (the stem) whole rows are packed as they are, and a row of the window is one stretch
//! of the depth: neighbouring results read stretches that overlap.

use std::ops::Range;

use graph::Geometry;
use half::bf16;

use super::fuse::{
    Affine, Epilogue, Finish, HEAD, Out, Partials, Read, SUMS, Source, finish_as, read_as,
};
use super::memory::{Scratch, Span};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level, prefetch_near};
use super::tiles::{self, Configured, Step};
use super::weights::{CHUNK, Panels};

/// What the micro-kernel multiplies: f32, or pairs of bf16.
pub(crate) trait Operand: Element {
    /// Neighbouring depths in one lane.
    const STEP: usize;
    /// # Safety
    /// As for [`Isa::load`].
    unsafe fn splat<I: Isa>(p: *const Self) -> I::V;
    /// # Safety
    /// As for [`Isa::load`].
    unsafe fn panel<I: Isa>(p: *const Self) -> I::V;
    /// c + a b, summed over the step.
    /// # Safety
    /// As for [`Isa::fma`].
    unsafe fn fma<I: Isa>(a: I::V, b: I::V, c: I::V) -> I::V;
    /// Puts a vector of each of [`Self::STEP`] neighbouring depths into a panel.
    /// # Safety
    /// As for [`Isa::store`]; there are `STEP` depths.
    unsafe fn put<I: Isa>(p: *mut Self, depths: &[I::V]);
}

impl Operand for f32 {
    const STEP: usize = 1;
    #[inline(always)]
    unsafe fn splat<I: Isa>(p: *const f32) -> I::V {
        // SAFETY: the caller's word.
        unsafe { I::splat(*p) }
    }
    #[inline(always)]
    unsafe fn panel<I: Isa>(p: *const f32) -> I::V {
        // SAFETY: the caller's word.
        unsafe { I::load(p) }
    }
    #[inline(always)]
    unsafe fn fma<I: Isa>(a: I::V, b: I::V, c: I::V) -> I::V {
        // SAFETY: the caller's word.
        unsafe { I::fma(a, b, c) }
    }
    #[inline(always)]
    unsafe fn put<I: Isa>(p: *mut f32, depths: &[I::V]) {
        // SAFETY: the caller's word.
        unsafe { I::store(p, depths[0]) }
    }
}

impl Operand for bf16 {
    const STEP: usize = 2;
    #[inline(always)]
    unsafe fn splat<I: Isa>(p: *const bf16) -> I::V {
        // SAFETY: the caller's word.
        unsafe { I::splat_pair(p) }
    }
    #[inline(always)]
    unsafe fn panel<I: Isa>(p: *const bf16) -> I::V {
        // SAFETY: the caller's word; a lane of bits is a pair.
        unsafe { I::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn fma<I: Isa>(a: I::V, b: I::V, c: I::V) -> I::V {
        // SAFETY: the caller's word.
        unsafe { I::dot2(c, a, b) }
    }
    #[inline(always)]
    unsafe fn put<I: Isa>(p: *mut bf16, depths: &[I::V]) {
        // SAFETY: the caller's word.
        unsafe { I::store(p.cast(), I::pair(depths[0], depths[1])) }
    }
}

/// How a convolution multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// f32 by f32.
    F32,
    /// Pairs of bf16.
    Bf16,
    /// f32 by f32 through matrix tiles, each as the sum of three bf16. Only with [`Level::Amx`], where channels are a multiple
    /// of [`tiles::DEPTH`] (or three, of a strided window) and rows are not short; plans of other shapes are of
    /// [`Self::F32`].
    Split,
}

impl Arithmetic {
    /// Neighbouring depths in a lane.
    fn pairs(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 | Self::Split => 2,
        }
    }

    /// Products of pieces that one of operands takes.
    pub(crate) fn products(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 1,
            Self::Split => tiles::PRODUCTS,
        }
    }

    /// Plain f32 where pieces of it do not pay.
    pub(crate) fn split_if(self, pays: bool) -> Self {
        match self {
            Self::Split if !pays => Self::F32,
            other => other,
        }
    }

    /// Values that an operand is the sum of.
    pub(crate) fn pieces(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 1,
            Self::Split => tiles::PIECES,
        }
    }
}

/// How the input of a task is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    /// Planes with their border.
    Planes,
    /// A pixel for each result (1 x 1 windows), every `stride`-th of each row and column.
    Points,
    /// Rows of three channels with their border, without gaps: neighbouring results read stretches that overlap.
    Rows,
    /// Small planes pixel by pixel, each for all images of the task. Runs go over images, and each pixel of the results
    /// has taps of its own: those that do not fall on the border.
    Images,
}

/// Neighbouring products of a dot product.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// Where the input starts in a packed tile.
    at: usize,
    /// Its length.
    depth: usize,
    /// Row of the panel of weights.
    row: usize,
}

/// Where a tap lies in the plane that is read, from the place of a result, and which tap of the weights it is.
#[derive(Clone, Copy, Debug)]
struct Tap {
    dy: isize,
    dx: isize,
    weight: usize,
}

/// The tap of a window of 1 x 1.
const POINT: Tap = Tap {
    dy: 0,
    dx: 0,
    weight: 0,
};

/// Results of a task that stay in the second-level cache until the next convolution has read them, bytes.
const JOINED_BYTES: usize = 256 << 10;

/// The same where matrix tiles multiply, see [`TILED_PACK_BYTES`].
const TILED_JOINED_BYTES: usize = 512 << 10;

/// Values of weights, in pieces, that stay in the second-level cache from task to task.
const SPLIT_JOINED_WEIGHTS: usize = 512 << 10;

/// One residue of the results' pixels and the taps that reach it.
#[derive(Clone, Debug)]
struct Phase {
    /// Row and column residue of the results.
    at: (usize, usize),
    /// Rows and columns of results.
    grid: (usize, usize),
    stretches: Vec<Stretch>,
    /// The stretches by [`Plan::block`].
    blocks: Vec<Range<usize>>,
    /// Those of each block, for matrix tiles: of a packed tile, and of pixels that are read where they lie.
    steps: Vec<[Vec<Step>; 2]>,
    /// Results in a run and runs in a tile.
    tile: (usize, usize),
}

/// A convolution cut into tasks: a function of the shapes and the level only.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    level: Level,
    batch: usize,
    packing: Packing,
    /// Plane that is read, and its channels.
    from: (usize, usize, usize),
    /// Plane of results, and its channels.
    to: (usize, usize, usize),
    /// Between the windows of neighbouring results of a phase, in the plane that is read.
    step: usize,
    /// Between neighbouring results of a phase, in the plane of results.
    spread: usize,
    /// Of the first tap: rows above and columns left of the result's place (at most 0).
    first: (isize, isize),
    /// Rows and columns between the first and the last tap.
    reach: (usize, usize),
    /// Side of the window, for columns.
    kernel: usize,
    /// Rows and columns of the largest phase.
    grid: (usize, usize),
    /// Packed columns of one residue in a row.
    columns: usize,
    /// Images of a task; if one, `rows` of its rows. Of points and columns `rows` results, from whichever images.
    images: usize,
    rows: usize,
    /// Groups of panels, tasks of their own.
    groups: usize,
    /// Panels that a tile is multiplied by before the next tile.
    abreast: usize,
    arithmetic: Arithmetic,
    /// Multiplied by matrix tiles.
    tiled: bool,
    /// Taps that the weights have.
    taps: usize,
    phases: Vec<Phase>,
}

/// Whether whole rows are packed: three channels would waste most of a chunk.
fn has_rows(g: &Geometry) -> bool {
    g.kernel > 1 && g.stride * g.input.c == ROWS_PITCH
}

/// Values between neighbouring results of a run in packed rows: three channels, every other pixel.
const ROWS_PITCH: usize = 6;

/// What one worker may use for packed rows of three channels, bytes: the results of a task are some times as large.
const ROWS_BYTES: usize = 48 << 10;

/// What one worker may use for packed input, bytes: with a panel of weights it fits the second-level cache.
const PACK_BYTES: usize = 384 << 10;

/// The same where matrix tiles multiply, on CPUs whose second-level cache has 2 MiB. The more results a task has, the
/// less often weights come from further away, and tiles go through them many times as fast.
const TILED_PACK_BYTES: usize = 768 << 10;

/// Most channels of pixels that matrix tiles read where they lie: of more, sixteen neighbours share too few sets of the
/// first-level cache.
const NEAR_CHANNELS: usize = 1024;

/// Weights that a tile meets before the next tile does, bytes: they stay in the second-level cache. So the results of a
/// tile are stored, and what their epilogue reads is read, in long rows and not in strips of one panel that lie a page
/// apart. Cascade Lake, 2026-11-28: 1 x 1, 256 -> 1024 channels with a residual, 103 -> 119 GFLOP/s.
const ABREAST_BYTES: usize = 256 << 10;

/// A run of results that a tile computes side by side: `pixels[skip..len]` of them are new.
#[derive(Clone, Copy, Default)]
struct Run {
    /// Of the first in the packed tile.
    at: u32,
    /// First result.
    pixel: u32,
    skip: u16,
    len: u16,
}

impl Run {
    fn new(at: usize, pixel: usize, skip: usize, len: usize) -> Self {
        const FITS: &str = "a packed tile and the pixels of a batch have fewer than 2^32 values";
        Self {
            at: at.try_into().expect(FITS),
            pixel: pixel.try_into().expect(FITS),
            skip: skip as u16,
            len: len as u16,
        }
    }
}

/// Most runs in a tile.
const RUNS: usize = 8;

/// Neighbouring results of a tile: rows of it from `row` on.
#[derive(Clone, Copy)]
struct Segment {
    row: usize,
    /// Of the first.
    pixel: usize,
    len: usize,
}

impl Segment {
    /// Rows of the tile and pixels.
    fn results(self, spread: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.len).map(move |r| (self.row + r, self.pixel + r * spread))
    }
}

/// A tile of sums: where its runs begin in the packed tile, and which of its rows are results.
#[derive(Clone, Copy)]
struct Rows<'a> {
    runs: &'a [u32],
    segments: &'a [Segment],
}

impl Rows<'_> {
    fn len(&self) -> usize {
        self.segments.iter().map(|s| s.len).sum()
    }
}

/// The tiles of a task.
#[derive(Default)]
struct AllRows {
    runs: Vec<u32>,
    segments: Vec<Segment>,
    /// The first of each tile, and the end.
    firsts: Vec<[usize; 2]>,
}

impl AllRows {
    /// Tiles of `q` runs of `length`.
    fn new(runs: impl Iterator<Item = Run>, (length, q): (usize, usize), spread: usize) -> Self {
        let mut all = Self::default();
        for (i, run) in runs.enumerate() {
            if i % q == 0 {
                all.begin();
            }
            let skip = run.skip as usize;
            all.runs.push(run.at);
            all.segments.push(Segment {
                row: i % q * length + skip,
                pixel: run.pixel as usize + skip * spread,
                len: run.len as usize - skip,
            });
        }
        all.begin();
        all
    }

    /// What comes belongs to the next tile.
    fn begin(&mut self) {
        self.firsts.push([self.runs.len(), self.segments.len()]);
    }

    /// Tiles of `q` runs of `length` packed positions that go on over the ends of rows; what lies on the borders is no
    /// result. `rows` are those of each image.
    fn flowing(
        plan: &Plan,
        phase: &Phase,
        images: Range<usize>,
        rows: Range<usize>,
        (length, q): (usize, usize),
    ) -> Self {
        let mut all = Self::default();
        let (width, columns) = (phase.grid.1, plan.columns);
        let positions = plan.flow(phase, rows.len());
        let mut count = 0;
        for image in images.clone() {
            let base = (image - images.start) * plan.packed_rows(plan.rows) * columns;
            for first in (0..positions).step_by(length) {
                if count % q == 0 {
                    all.begin();
                }
                let tile_row = count % q * length;
                all.runs.push(Run::new((base + first) * CHUNK, 0, 0, 0).at);
                for row in first / columns..(first + length).div_ceil(columns).min(rows.len()) {
                    let from = (row * columns).max(first);
                    let to = (row * columns + width).min(first + length);
                    if from < to {
                        let y = (rows.start + row) * plan.spread + phase.at.0;
                        let x = (from - row * columns) * plan.spread + phase.at.1;
                        all.segments.push(Segment {
                            row: tile_row + from - first,
                            pixel: (image * plan.to.0 + y) * plan.to.1 + x,
                            len: to - from,
                        });
                    }
                }
                count += 1;
            }
        }
        all.begin();
        all
    }

    fn tiles(&self) -> impl Iterator<Item = Rows<'_>> {
        self.firsts.windows(2).map(|pair| {
            let [[r0, s0], [r1, s1]] = [pair[0], pair[1]];
            Rows {
                runs: &self.runs[r0..r1],
                segments: &self.segments[s0..s1],
            }
        })
    }
}

/// A convolution before it is cut; the fields are those of [`Plan`].
struct Shape {
    packing: Packing,
    from: (usize, usize, usize),
    to: (usize, usize, usize),
    step: usize,
    spread: usize,
    kernel: usize,
    taps: usize,
    phases: Vec<PhaseTaps>,
}

impl Plan {
    /// y = x * w.
    pub(crate) fn forward(
        level: Level,
        arithmetic: Arithmetic,
        g: &Geometry,
        batch: usize,
    ) -> Self {
        let pad = g.pad() as isize;
        let tap = |weight: usize| Tap {
            dy: (weight / g.kernel) as isize - pad,
            dx: (weight % g.kernel) as isize - pad,
            weight,
        };
        let taps: Vec<Tap> = (0..g.kernel * g.kernel).map(tap).collect();
        let (packing, arithmetic) = match g.kernel {
            1 => (Packing::Points, arithmetic),
            _ if has_rows(g) => (Packing::Rows, arithmetic),
            _ => (Packing::Planes, arithmetic),
        };
        let to = (g.output.h, g.output.w, g.output.c);
        let from = (g.input.h, g.input.w, g.input.c);
        let shape = Shape {
            packing,
            from,
            to,
            step: g.stride,
            spread: 1,
            kernel: g.kernel,
            taps: taps.len(),
            phases: vec![((0, 0), (to.0, to.1), taps)],
        };
        Self::new(level, arithmetic, batch, shape)
    }

    /// Two convolutions of 1 x 1, the second of which reads the results of the first, cut into tasks alike; none if
    /// they are not so, or if the results of a task are too large to stay near.
    pub(crate) fn joined(
        level: Level,
        arithmetic: Arithmetic,
        [first, second]: [&Geometry; 2],
        batch: usize,
    ) -> Option<[Self; 2]> {
        let is_matmul = |g: &Geometry| g.kernel == 1 && g.stride == 1;
        if !is_matmul(first) || !is_matmul(second) {
            return None;
        }
        let mut plans = [first, second].map(|g| Self::forward(level, arithmetic, g, batch));
        let all = batch * first.output.pixels();
        let (most, unit, least) = if plans.iter().all(|plan| plan.tiled) {
            (TILED_JOINED_BYTES, tiles::SIDE, 64)
        } else {
            (JOINED_BYTES, 14, 56)
        };
        // Tensors of f32 are never multiplied as pairs.
        let stored = match plans[0].arithmetic {
            Arithmetic::Bf16 => size_of::<bf16>(),
            Arithmetic::F32 | Arithmetic::Split => size_of::<f32>(),
        };
        let result = first.output.c * stored;
        let near = (most / 2 / result).max(least).min(all / 8) / unit * unit;
        let rows = plans[0].rows.min(plans[1].rows).min(near);
        // Two convolutions in turn read all of their weights for every few results.
        let weights: usize = plans.iter().map(Self::weights_len).sum();
        let is_heavy = plans[0].arithmetic == Arithmetic::Split && weights > SPLIT_JOINED_WEIGHTS;
        if is_heavy
            || rows < least
            || rows * result > most
            || plans[0].arithmetic != plans[1].arithmetic
        {
            return None;
        }
        for plan in &mut plans {
            plan.rows = rows;
            plan.groups = 1;
            plan.phases = plan.with_stretches(vec![((0, 0), plan.grid, vec![POINT])]);
        }
        Some(plans)
    }

    /// The gradient of x from that of y.
    pub(crate) fn backward(
        level: Level,
        arithmetic: Arithmetic,
        g: &Geometry,
        batch: usize,
    ) -> Self {
        let packing = if g.is_matmul() {
            Packing::Points
        } else {
            Packing::Planes
        };
        let from = (g.output.h, g.output.w, g.output.c);
        let to = (g.input.h, g.input.w, g.input.c);
        let used = backward_taps(g);
        let mut phases = backward_phases(g);
        for tap in phases.iter_mut().flat_map(|p| &mut p.2) {
            tap.weight = used.iter().position(|u| *u == tap.weight).unwrap_or(0);
        }
        let shape = Shape {
            packing,
            from,
            to,
            step: 1,
            spread: g.stride,
            kernel: g.kernel,
            taps: used.len(),
            phases,
        };
        Self::new(level, arithmetic, batch, shape)
    }

    fn new(level: Level, arithmetic: Arithmetic, batch: usize, shape: Shape) -> Self {
        let Shape {
            packing,
            from,
            to,
            step,
            spread,
            kernel,
            taps,
            phases,
        } = shape;
        let (packing, step, spread, phases) = match packing {
            Packing::Planes if is_small(from, to) => {
                let phases = by_pixel(from, to, step, spread, &phases);
                (Packing::Images, 1, 1, phases)
            }
            packing => (packing, step, spread, phases),
        };
        let all = || phases.iter().flat_map(|p| &p.2);
        let first = (
            all().map(|t| t.dy).min().unwrap_or(0),
            all().map(|t| t.dx).min().unwrap_or(0),
        );
        let last = (
            all().map(|t| t.dy).max().unwrap_or(0),
            all().map(|t| t.dx).max().unwrap_or(0),
        );
        let reach = ((last.0 - first.0) as usize, (last.1 - first.1) as usize);
        let grid = (
            phases.iter().map(|p| p.1.0).max().unwrap_or(0),
            phases.iter().map(|p| p.1.1).max().unwrap_or(0),
        );
        let fits_tiles = level == Level::Amx
            && match packing {
                // A row of the window is one step, whose rows overlap.
                Packing::Rows => kernel * from.2 <= tiles::DEPTH,
                _ => from.2.is_multiple_of(tiles::DEPTH),
            };
        // Of a tile's sixteen rows most would be empty.
        let is_narrow = packing == Packing::Planes && grid.1 < 8;
        let arithmetic = match arithmetic {
            Arithmetic::Split if !fits_tiles || is_narrow => Arithmetic::F32,
            // Pairs of three channels are no neighbours.
            Arithmetic::Bf16 if !fits_tiles && packing == Packing::Rows => Arithmetic::F32,
            arithmetic => arithmetic,
        };
        let mut plan = Self {
            level,
            batch,
            packing,
            from,
            to,
            step,
            spread,
            first,
            reach,
            kernel,
            grid,
            columns: match packing {
                Packing::Rows => (grid.1 - 1) * step + reach.1 + 1,
                _ => grid.1 + reach.1 / step,
            },
            images: 1,
            rows: 1,
            groups: 1,
            abreast: 1,
            arithmetic,
            tiled: fits_tiles && arithmetic != Arithmetic::F32,
            taps,
            phases: vec![],
        };
        plan.cut();
        plan.phases = plan.with_stretches(phases);
        plan
    }

    fn with_stretches(&self, phases: Vec<PhaseTaps>) -> Vec<Phase> {
        let phase = |(at, grid, taps): PhaseTaps| {
            let stretches = self.stretches(&taps);
            let width = match self.packing {
                Packing::Planes | Packing::Rows => grid.1,
                Packing::Images => self.images,
                Packing::Points => self.rows,
            };
            let blocks = blocks(&stretches, self.block());
            let steps = |block: &Range<usize>| {
                let stretches = &stretches[block.clone()];
                [false, true].map(|lies| self.steps(stretches, lies))
            };
            Phase {
                at,
                grid,
                steps: blocks.iter().map(steps).collect(),
                blocks,
                stretches,
                tile: if self.tiled {
                    TILED
                } else {
                    tile_shape(self.level, width)
                },
            }
        };
        phases.into_iter().map(phase).collect()
    }

    /// Chooses the results of a task.
    fn cut(&mut self) {
        let (value, most, unit) = if self.tiled {
            (self.value_len(), TILED_PACK_BYTES, tiles::SIDE)
        } else {
            (size_of::<f32>(), PACK_BYTES, 14)
        };
        let depth = self.pixel_len() * value;
        match self.packing {
            Packing::Planes => {
                let row = self.step * self.columns * depth;
                let image = self.packed_rows(self.grid.0) * row;
                if image <= most / 2 || self.grid.0 * self.grid.1 <= 49 {
                    self.images = (most / image).clamp(1, self.batch);
                    // Enough tasks to share the work, but not at the price of tiles that are half empty.
                    let few = (self.batch / 8).max(1);
                    let pixels = self.grid.0 * self.grid.1;
                    self.images = self.images.min(few.max(96usize.div_ceil(pixels))).max(1);
                    self.rows = self.grid.0;
                } else {
                    let mut rows = self.grid.0;
                    while rows > 1 && self.packed_rows(rows) * row > most {
                        rows -= 1;
                    }
                    // Blocks of equal height.
                    self.rows = self.grid.0.div_ceil(self.grid.0.div_ceil(rows));
                }
            }
            Packing::Images => {
                let image = self.from.0 * self.from.1 * depth;
                self.images = (most / image).clamp(1, self.batch);
            }
            Packing::Rows => {
                let row = self.columns * self.from.2 * self.value_len();
                let mut rows = self.grid.0;
                while rows > 1 && self.packed_rows(rows) * row > ROWS_BYTES {
                    rows -= 1;
                }
                self.rows = self.grid.0.div_ceil(self.grid.0.div_ceil(rows));
            }
            Packing::Points => {
                let all = self.batch * self.grid.0 * self.grid.1;
                let fit = (most / depth).clamp(64, 448) / unit * unit;
                self.rows = fit.min(all);
            }
        }
        let panels = self.to.2.div_ceil(2 * self.level.lanes());
        let tasks = self.tasks();
        // Each group packs what it reads, which costs more in pieces.
        let least: usize = if self.arithmetic == Arithmetic::Split {
            4
        } else {
            8
        };
        self.groups = least.div_ceil(tasks).min(panels).max(1);
        let depth = (self.from.2 * self.taps).min(self.block());
        let block = depth * 2 * self.level.lanes() * self.value_len();
        self.abreast = (ABREAST_BYTES / block).clamp(1, panels);
    }

    /// Values of one packed pixel in all chunks, the last one filled up.
    fn pixel_len(&self) -> usize {
        self.from.2.div_ceil(CHUNK) * CHUNK
    }

    /// Neighbouring depths in a lane: 1, or 2 of bf16.
    pub(crate) fn pairs(&self) -> usize {
        self.arithmetic.pairs()
    }

    /// Bytes of a packed value, all its pieces.
    fn value_len(&self) -> usize {
        size_of::<f32>() / self.pairs() * self.arithmetic.pieces()
    }

    fn packed_rows(&self, rows: usize) -> usize {
        (rows - 1) * self.step + self.reach.0 + 1
    }

    /// Values between the chunks of a packed tile, or between the pieces of a chunk.
    fn chunk_len(&self) -> usize {
        match self.packing {
            Packing::Planes => {
                self.images * self.packed_rows(self.rows) * self.step * self.columns * CHUNK
            }
            Packing::Images => self.images * self.from.0 * self.from.1 * CHUNK,
            // And what the last step reads on.
            Packing::Rows => {
                self.packed_rows(self.rows) * self.columns * self.from.2 + tiles::DEPTH
            }
            Packing::Points => self.rows * CHUNK,
        }
    }

    /// Rows of a panel of weights for a row of the window, where whole rows are packed. Matrix tiles multiply what lies
    /// behind it by zero.
    fn window_row(&self) -> usize {
        let depth = self.kernel * self.from.2;
        if self.tiled {
            depth.next_multiple_of(tiles::DEPTH)
        } else {
            depth
        }
    }

    /// Rows of a panel of weights for one tap of a chunk.
    fn chunk_rows(&self, chunk: usize) -> usize {
        let length = (self.from.2 - chunk * CHUNK).min(CHUNK);
        length.next_multiple_of(self.pairs())
    }

    fn stretches(&self, taps: &[Tap]) -> Vec<Stretch> {
        let channels = self.from.2;
        let mut out = vec![];
        if self.packing == Packing::Rows {
            let depth = self.kernel * channels;
            let stretch = |row: usize| Stretch {
                at: row * self.columns * channels,
                depth,
                row: row * self.window_row(),
            };
            return (0..self.kernel).map(stretch).collect();
        }
        for chunk in 0..channels.div_ceil(CHUNK) {
            let depth = (channels - chunk * CHUNK).min(CHUNK);
            let first_row = chunk * CHUNK * self.taps;
            let start = chunk * self.chunk_len() * self.arithmetic.pieces();
            let mut push = |at: usize, weight: usize| {
                out.push(Stretch {
                    at: start + at * CHUNK,
                    depth,
                    row: first_row + weight * self.chunk_rows(chunk),
                });
            };
            match self.packing {
                Packing::Planes => {
                    for tap in taps {
                        let row = (tap.dy - self.first.0) as usize;
                        let column = (tap.dx - self.first.1) as usize;
                        let place = (row * self.step + column % self.step) * self.columns
                            + column / self.step;
                        push(place, tap.weight);
                    }
                }
                // Of a pixel's phase the taps are places in the plane.
                Packing::Images => {
                    for tap in taps {
                        let pixel = tap.dy as usize * self.from.1 + tap.dx as usize;
                        push(pixel * self.images, tap.weight);
                    }
                }
                Packing::Rows => {}
                Packing::Points => {
                    for tap in taps {
                        push(0, tap.weight);
                    }
                }
            }
        }
        out
    }

    /// Stretches as steps of matrix tiles; `lies`, of pixels that are not packed.
    fn steps(&self, stretches: &[Stretch], lies: bool) -> Vec<Step> {
        if !self.tiled || lies && self.packing != Packing::Points {
            return vec![];
        }
        let row_len = tiles::SIDE * self.arithmetic.pieces();
        let steps = |s: &Stretch| {
            let Stretch { at, depth, row } = *s;
            // Of a window of 1 x 1 a row of the panel is a channel.
            let at = if lies { row } else { at };
            let depths = (0..depth).step_by(tiles::DEPTH);
            depths.map(move |k| Step::new(at + k, (row + k) * row_len))
        };
        // The next panel's follow.
        let first = stretches.first().map_or(0, |s| s.row * row_len);
        let next = Step::new(0, first + self.panel_len());
        stretches.iter().flat_map(steps).chain([next]).collect()
    }

    /// Tasks that differ in their results' pixels; each has a record of partials.
    pub(crate) fn tasks(&self) -> usize {
        match self.packing {
            Packing::Images => self.batch.div_ceil(self.images),
            Packing::Planes if self.rows == self.grid.0 => self.batch.div_ceil(self.images),
            Packing::Planes | Packing::Rows => self.batch * self.grid.0.div_ceil(self.rows),
            Packing::Points => (self.batch * self.grid.0 * self.grid.1).div_ceil(self.rows),
        }
    }

    /// Packed positions from the first result of so many rows to the last, where runs may go on over the ends of rows.
    fn flow(&self, phase: &Phase, rows: usize) -> usize {
        match rows {
            0 => 0,
            rows => (rows - 1) * self.columns + phase.grid.1,
        }
    }

    /// Whether runs that go on over the ends of rows are fewer.
    fn flows(&self, phase: &Phase, rows: usize) -> bool {
        let length = phase.tile.0;
        self.tiled
            && (self.packing, self.step) == (Packing::Planes, 1)
            && self.flow(phase, rows).div_ceil(length) < rows * phase.grid.1.div_ceil(length)
    }

    /// Whether matrix tiles read so many results' pixels where they lie, if those are bf16 as they are stored: neighbours
    /// that fill a tile's rows, and whose channels are not so far apart that they push each other out of the first-level
    /// cache.
    fn reads_in_place(&self, results: usize) -> bool {
        self.tiled
            && (self.packing, self.step, self.arithmetic) == (Packing::Points, 1, Arithmetic::Bf16)
            && results >= TILED.0
            && self.from.2 <= NEAR_CHANNELS
    }

    /// Whether [`finish_whole`] knows the tile.
    fn has_fused_finish(&self, tile: (usize, usize)) -> bool {
        let known = if self.level.lanes() == 16 {
            (7, 2)
        } else {
            (6, 1)
        };
        tile == known && self.packing != Packing::Rows
    }

    /// Pixels between neighbouring results of a run.
    fn run_spread(&self) -> usize {
        match self.packing {
            Packing::Images => self.to.0 * self.to.1,
            _ => self.spread,
        }
    }

    /// Channels of the results, rounded up to whole panels.
    pub(crate) fn columns(&self) -> usize {
        self.to.2.next_multiple_of(2 * self.level.lanes())
    }

    /// Values of scratch per worker, in f32.
    pub(crate) fn worker_len(&self) -> usize {
        // A last run may be shorter than the tile's and then reads on behind the packed tile.
        let packed = self.pixel_len() / CHUNK * self.chunk_len() * self.arithmetic.pieces();
        self.tiles_len() + packed.div_ceil(self.pairs()) + RUNS * CHUNK
    }

    /// Values of the tiles that a worker keeps from one block of the depth to the next.
    fn tiles_len(&self) -> usize {
        let tiles = self.phases.iter().map(|phase| {
            let (length, q) = phase.tile;
            let runs = match self.packing {
                Packing::Planes | Packing::Rows => {
                    self.images * self.rows * phase.grid.1.div_ceil(length)
                }
                Packing::Images => self.images.div_ceil(length),
                Packing::Points => self.rows.div_ceil(length),
            };
            match phase.blocks.len() {
                1 => self.waiting(phase),
                _ => runs.div_ceil(q) * self.waiting(phase),
            }
        });
        tiles.max().unwrap_or(1) * self.tile_len()
    }

    /// Tiles of the same results that wait for the next block, or for each other.
    fn waiting(&self, phase: &Phase) -> usize {
        if self.tiled || phase.blocks.len() > 1 {
            self.abreast
        } else {
            1
        }
    }

    /// Least depth of a block.
    fn block(&self) -> usize {
        if self.tiled { TILED_BLOCK } else { BLOCK }
    }

    /// Values of a tile of sums, at most.
    fn tile_len(&self) -> usize {
        if self.tiled {
            tiles::SIDE * tiles::SIDE
        } else {
            TILE
        }
    }

    /// Values of a panel of weights.
    fn panel_len(&self) -> usize {
        let chunks = 0..self.from.2.div_ceil(CHUNK);
        let rows = match self.packing {
            Packing::Rows => self.kernel * self.window_row(),
            _ => self.taps * chunks.map(|chunk| self.chunk_rows(chunk)).sum::<usize>(),
        };
        rows * 2 * self.level.lanes() * self.arithmetic.pieces()
    }

    /// Whether a panel has rows that are no depth.
    fn pads_depth(&self) -> bool {
        let chunks = 0..self.from.2.div_ceil(CHUNK);
        chunks.map(|chunk| self.chunk_rows(chunk)).sum::<usize>() > self.from.2
    }

    /// A row of a panel, or a pair of them: pieces of [`tiles::DEPTH`] rows lie one behind the other.
    fn panel_row<'a, P>(&self, panel: &'a mut [P], row: usize) -> PanelRow<'a, P> {
        let (nr, pieces) = (2 * self.level.lanes(), self.arithmetic.pieces());
        let filled = row / tiles::DEPTH * tiles::DEPTH;
        let first = (filled * pieces + row - filled) * nr;
        PanelRow {
            values: &mut panel[first..],
            pieces,
            stride: tiles::DEPTH * nr,
        }
    }

    /// Values of the weights.
    pub(crate) fn weights_len(&self) -> usize {
        self.panel_len() * (self.columns() / (2 * self.level.lanes()))
    }

    /// Where task `index` is: images, rows (or results, counted over all images).
    fn place(&self, index: usize) -> (Range<usize>, Range<usize>) {
        match self.packing {
            Packing::Images => {
                let first = index * self.images;
                (first..(first + self.images).min(self.batch), 0..1)
            }
            Packing::Planes if self.rows == self.grid.0 => {
                let first = index * self.images;
                (first..(first + self.images).min(self.batch), 0..self.rows)
            }
            Packing::Planes | Packing::Rows => {
                let blocks = self.grid.0.div_ceil(self.rows);
                let (image, first) = (index / blocks, index % blocks * self.rows);
                let rows = first..(first + self.rows).min(self.grid.0);
                (image..image + 1, rows)
            }
            Packing::Points => {
                let first = index * self.rows;
                let all = self.batch * self.grid.0 * self.grid.1;
                (0..1, first..(first + self.rows).min(all))
            }
        }
    }
}

/// A tile in registers, f32: at most 14 results of 32 channels.
const TILE: usize = 14 * 32;

/// Results in a run and runs in a tile of sums, by matrix tiles.
const TILED: (usize, usize) = (tiles::SIDE / 2, 2);

/// Results in a run and runs in a tile, for rows of `width` results: the shape that wastes least, then the largest.
fn tile_shape(level: Level, width: usize) -> (usize, usize) {
    let shapes: &[(usize, usize)] = if level.lanes() == 16 {
        &[(7, 2), (6, 2), (5, 2), (4, 3), (3, 4), (2, 6), (1, 8)]
    } else {
        &[(6, 1), (5, 1), (4, 1), (3, 2), (2, 3), (1, 6)]
    };
    let fits = shapes.iter().filter(|(r, _)| *r <= width);
    let best = fits.min_by_key(|(r, q)| (width.div_ceil(*r) * r * 14 / (r * q), *r));
    *best.unwrap_or(&shapes[shapes.len() - 1])
}

/// Residue (or pixel) and grid of the results of a phase, and its taps.
type PhaseTaps = ((usize, usize), (usize, usize), Vec<Tap>);

/// Whether planes are so small that most windows hang over their border.
fn is_small(from: (usize, usize, usize), to: (usize, usize, usize)) -> bool {
    (from.0 * from.1).max(to.0 * to.1) <= 4
}

/// A phase for each pixel of the results, with the taps that lie inside, as places in the plane that is read.
fn by_pixel(
    (h, w, _): (usize, usize, usize),
    to: (usize, usize, usize),
    step: usize,
    spread: usize,
    phases: &[PhaseTaps],
) -> Vec<PhaseTaps> {
    let mut out = vec![];
    for (at, grid, taps) in phases {
        for gy in 0..grid.0 {
            for gx in 0..grid.1 {
                let inside = taps.iter().filter_map(|tap| {
                    let (dy, dx) = ((gy * step) as isize + tap.dy, (gx * step) as isize + tap.dx);
                    let is_inside = (0..h as isize).contains(&dy) && (0..w as isize).contains(&dx);
                    is_inside.then_some(Tap { dy, dx, ..*tap })
                });
                let pixel = (gy * spread + at.0, gx * spread + at.1);
                debug_assert!(
                    pixel.0 < to.0 && pixel.1 < to.1,
                    "a result lies in its plane"
                );
                out.push((pixel, (1, 1), inside.collect()));
            }
        }
    }
    out
}

/// Puts weights into the order of [`Plan::forward`] as pairs of bf16, or of pieces of f32. For plain f32 the masters have
/// it already.
pub(crate) fn pack_forward(
    pool: &mut Pool,
    plan: &Plan,
    masters: Span<'_, f32>,
    to: Span<'_, bf16>,
) {
    let nr = 2 * plan.level.lanes();
    let panels = plan.columns() / nr;
    let (from_len, to_len) = (masters.len() / panels, plan.panel_len());
    assert!(
        plan.pairs() == 2 && to.len() >= to_len * panels,
        "pairs have room"
    );
    pool.run(panels, |_, panel| {
        // SAFETY: nobody writes masters in this region; tasks write disjoint panels.
        let (mut from, to) = unsafe {
            let from = masters.part(panel * from_len..(panel + 1) * from_len).get();
            (
                from,
                to.part(panel * to_len..(panel + 1) * to_len).get_mut(),
            )
        };
        let channels = plan.from.2;
        // Rows of masters that belong together, and the rows of the panel that they take.
        let groups: Vec<(usize, usize)> = if plan.packing == Packing::Rows {
            to.fill(bf16::ZERO);
            vec![(plan.kernel * channels, plan.window_row()); plan.kernel]
        } else {
            let depth = |chunk: usize| (channels - chunk * CHUNK).min(CHUNK);
            let taps = |chunk| vec![(depth(chunk), plan.chunk_rows(chunk)); plan.taps];
            (0..channels.div_ceil(CHUNK)).flat_map(taps).collect()
        };
        let mut first = 0;
        for (depth, rows) in groups {
            let (masters, rest) = from.split_at(depth * nr);
            from = rest;
            for (pair, rows) in masters.chunks(2 * nr).enumerate() {
                let to = plan.panel_row(to, first + 2 * pair);
                // SAFETY: the engine has the level's instructions.
                unsafe { plan.level.call(Pair { rows, to }) };
            }
            first += rows;
        }
    });
}

/// Interleaves two rows of a panel, or one and zeros.
struct Pair<'a> {
    rows: &'a [f32],
    to: PanelRow<'a, bf16>,
}

impl Job for Pair<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Self { rows, mut to } = self;
        let two = rows.len() == 2 * I::NR;
        for half in [0, I::LANES] {
            // SAFETY: a row is two vectors.
            unsafe {
                let low = I::load(rows[half..half + I::LANES].as_ptr());
                let high = if two {
                    I::load(rows[I::NR + half..I::NR + half + I::LANES].as_ptr())
                } else {
                    I::zero()
                };
                to.put::<I>(2 * half, &[low, high]);
            }
        }
    }
}

/// Turns a square of weights, sixteen inputs of sixteen outputs, into depths of a panel.
struct Turn<'a, P: Operand> {
    /// Outputs of the first input; the next input's are a panel's width further.
    from: *const f32,
    /// The first output's.
    to: PanelRow<'a, P>,
    /// Its first input.
    column: usize,
}

impl<P: Operand> Job for Turn<'_, P> {
    #[inline(always)]
    unsafe fn run<I: Isa>(mut self) {
        // SAFETY: the caller's word: the square lies in the masters and in the panel, and vectors have sixteen lanes.
        unsafe {
            let mut rows = [I::zero(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = I::load(self.from.add(i * I::NR));
            }
            I::transpose(&mut rows);
            for (step, depths) in rows.chunks_exact(P::STEP).enumerate() {
                let at = (step * I::NR + self.column) * P::STEP;
                self.to.put::<I>(at, depths);
            }
        }
    }
}

/// Rows of a panel of weights, of [`Plan::panel_row`].
struct PanelRow<'a, P> {
    values: &'a mut [P],
    pieces: usize,
    /// Values between the pieces of a row.
    stride: usize,
}

impl<P: Operand> PanelRow<'_, P> {
    /// A vector of each of [`Operand::STEP`] neighbouring depths.
    #[inline(always)]
    unsafe fn put<I: Isa>(&mut self, at: usize, depths: &[I::V]) {
        let mut to = |piece: usize| {
            let at = at + piece * self.stride;
            self.values[at..at + P::STEP * I::LANES].as_mut_ptr()
        };
        // SAFETY: the caller has the instructions.
        unsafe {
            if self.pieces == 1 {
                P::put::<I>(to(0), depths);
                return;
            }
            let mut rest = [depths[0], depths[1]];
            for piece in 0..tiles::PIECES {
                let [low, high] = tiles::pieces::<I, 2>(&mut rest, piece);
                I::store(to(piece).cast(), I::join(low, high));
            }
        }
    }

    /// One value.
    fn set(&mut self, at: usize, mut value: f32) {
        for piece in 0..self.pieces {
            let rounded = P::from_f32(value);
            self.values[at + piece * self.stride] = rounded;
            value -= rounded.to_f32();
        }
    }
}

/// Puts weights into the order of [`Plan::backward`]: inputs and outputs change places, taps that no pixel meets are
/// left out.
pub(crate) fn pack_backward<P: Operand>(
    pool: &mut Pool,
    plan: &Plan,
    g: &Geometry,
    masters: Span<'_, f32>,
    to: Span<'_, P>,
) {
    let nr = 2 * plan.level.lanes();
    let from = Panels::of(g, nr);
    let (panels, taps) = (plan.columns() / nr, backward_taps(g));
    let len = plan.panel_len();
    assert!(
        plan.pairs() == P::STEP && taps.len() == plan.taps && to.len() >= len * panels,
        "the weights have room"
    );
    pool.run(panels, |_, panel| {
        // SAFETY: nobody writes masters in this region; tasks write disjoint panels.
        let (masters, to) = unsafe {
            let to = to.part(panel * len..(panel + 1) * len).get_mut();
            (masters.get(), to)
        };
        let mut row = 0;
        let inputs = (from.inputs - panel * nr).min(nr);
        if inputs < nr || plan.pads_depth() {
            to.fill(P::from_f32(0.0));
        }
        for chunk in 0..from.outputs.div_ceil(CHUNK) {
            let outputs = chunk * CHUNK..(chunk * CHUNK + CHUNK).min(from.outputs);
            for &tap in &taps {
                let start = row;
                row += plan.chunk_rows(chunk);
                // Blocks of outputs that lie in one panel of the masters; its inputs are `nr` apart.
                for first in outputs.clone().step_by(nr) {
                    let block = first..(first + nr).min(outputs.end);
                    if nr == 32 && inputs == nr && block.len() == nr {
                        for square in 0..4 {
                            let (o, i) = (square / 2 * 16, square % 2 * 16);
                            let at = from.at(first + o, panel * nr + i, tap);
                            let from = masters[at..at + 15 * nr + 16].as_ptr();
                            let to = plan.panel_row(to, start + first + o - outputs.start);
                            let column = i;
                            // SAFETY: inputs of a panel lie in one chunk, a panel's width apart, and the level has
                            // sixteen lanes.
                            unsafe { plan.level.call(Turn { from, to, column }) };
                        }
                        continue;
                    }
                    for i in 0..inputs {
                        let at = from.at(first, panel * nr + i, tap);
                        let values = &masters[at..at + block.len()];
                        for (o, v) in block.clone().zip(values) {
                            let row = start + o - outputs.start;
                            let mut to = plan.panel_row(to, row - row % P::STEP);
                            to.set(i * P::STEP + row % P::STEP, *v);
                        }
                    }
                }
            }
        }
    });
}

/// The taps of the weights that reach any pixel of the input, in order.
fn backward_taps(g: &Geometry) -> Vec<usize> {
    let mut used: Vec<usize> = vec![];
    let from = (g.output.h, g.output.w, g.output.c);
    let to = (g.input.h, g.input.w, g.input.c);
    let phases = backward_phases(g);
    let phases = if g.kernel > 1 && is_small(from, to) {
        by_pixel(from, to, 1, g.stride, &phases)
    } else {
        phases
    };
    used.extend(phases.iter().flat_map(|p| &p.2).map(|tap| tap.weight));
    used.sort_unstable();
    used.dedup();
    used
}

fn backward_phases(g: &Geometry) -> Vec<PhaseTaps> {
    let (s, pad) = (g.stride, g.pad());
    // For residue r: the taps k and how far the result of the window lies from the grid point: the window of result
    // o covers input o s + k - pad, so input i s + r is met where o - i = (r + pad - k) / s.
    let axis = |r: usize| -> Vec<(usize, isize)> {
        let met = (0..g.kernel).rev().filter_map(|k| {
            let distance = (r + pad) as isize - k as isize;
            (distance.rem_euclid(s as isize) == 0).then_some((k, distance.div_euclid(s as isize)))
        });
        met.collect()
    };
    let mut phases = vec![];
    for rh in 0..s.min(g.input.h) {
        for rw in 0..s.min(g.input.w) {
            let (ys, xs) = (axis(rh), axis(rw));
            let taps = ys.iter().flat_map(|&(kh, dy)| {
                xs.iter().map(move |&(kw, dx)| Tap {
                    dy,
                    dx,
                    weight: kh * g.kernel + kw,
                })
            });
            let grid = ((g.input.h - rh).div_ceil(s), (g.input.w - rw).div_ceil(s));
            phases.push(((rh, rw), grid, taps.collect()));
        }
    }
    phases
}

/// Reads `[.., CHUNK]` pixels of a source into a packed tile.
struct Pack<'a, P: Operand, S: Read> {
    plan: &'a Plan,
    source: S,
    images: Range<usize>,
    rows: Range<usize>,
    to: *mut P,
}

impl<P: Operand, S: Read> Job for Pack<'_, P, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the task's share of scratch holds the packed tile; indices are inside the planes.
        unsafe {
            match self.plan.packing {
                Packing::Planes => self.planes::<I>(),
                Packing::Images => self.small_planes::<I>(),
                Packing::Points => self.points::<I>(),
                Packing::Rows => self.rows::<I>(),
            }
        }
    }
}

impl<P: Operand, S: Read> Pack<'_, P, S> {
    #[inline(always)]
    unsafe fn planes<I: Isa>(&self) {
        let p = self.plan;
        let (h, w, c) = p.from;
        let rows = p.packed_rows(self.rows.len());
        let (row_len, chunk_len) = (p.step * p.columns * CHUNK, p.chunk_len());
        let image_len = p.packed_rows(p.rows) * row_len;
        for image in self.images.clone() {
            for row in 0..rows {
                let y = (self.rows.start * p.step + row) as isize + p.first.0;
                // SAFETY: as in `run`.
                unsafe {
                    let to = self
                        .to
                        .add((image - self.images.start) * image_len + row * row_len);
                    let inside = y >= 0 && y < h as isize;
                    for residue in 0..p.step {
                        for column in 0..p.columns {
                            let to = to.add((residue * p.columns + column) * CHUNK);
                            let x = (column * p.step + residue) as isize + p.first.1;
                            if inside && x >= 0 && x < w as isize {
                                let at = ((image * h + y as usize) * w + x as usize) * c;
                                self.pixel::<I>(at, to, chunk_len);
                            } else {
                                self.nothing(to, chunk_len);
                            }
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn small_planes<I: Isa>(&self) {
        let p = self.plan;
        let (pixels, c) = (p.from.0 * p.from.1, p.from.2);
        for image in self.images.clone() {
            for pixel in 0..pixels {
                let at = (image * pixels + pixel) * c;
                let to = (pixel * p.images + image - self.images.start) * CHUNK;
                // SAFETY: as in `run`.
                unsafe { self.pixel::<I>(at, self.to.add(to), p.chunk_len()) };
            }
        }
    }

    #[inline(always)]
    unsafe fn points<I: Isa>(&self) {
        let p = self.plan;
        let (h, w, c) = p.from;
        let chunk_len = p.chunk_len();
        for (i, result) in self.rows.clone().enumerate() {
            let pixel = if p.step == 1 {
                result
            } else {
                let (image, rest) = (
                    result / (p.grid.0 * p.grid.1),
                    result % (p.grid.0 * p.grid.1),
                );
                let (y, x) = (rest / p.grid.1 * p.step, rest % p.grid.1 * p.step);
                (image * h + y) * w + x
            };
            // SAFETY: as in `run`.
            unsafe { self.pixel::<I>(pixel * c, self.to.add(i * CHUNK), chunk_len) };
        }
    }

    /// All channels of one pixel.
    #[inline(always)]
    unsafe fn pixel<I: Isa>(&self, at: usize, to: *mut P, chunk_len: usize) {
        let channels = self.plan.from.2;
        let mut c = 0;
        if self.plan.arithmetic == Arithmetic::Split {
            // SAFETY: as in `run`.
            unsafe { self.split::<I>(at, to, chunk_len) };
            return;
        }
        // SAFETY: as in `run`; a chunk has whole vectors, so the filling of the last one fits.
        unsafe {
            while c + I::NR <= channels {
                let to = to.add(c / CHUNK * chunk_len + c % CHUNK);
                let (low, high) = (
                    self.source.full::<I>(at, c),
                    self.source.full::<I>(at, c + I::LANES),
                );
                P::store_two::<I>(to, low, high);
                c += I::NR;
            }
            while c + I::LANES <= channels {
                let to = to.add(c / CHUNK * chunk_len + c % CHUNK);
                P::store::<I>(to, self.source.full::<I>(at, c));
                c += I::LANES;
            }
            if c < channels {
                let to = to.add(c / CHUNK * chunk_len + c % CHUNK);
                P::store::<I>(to, self.source.part::<I>(at, c, channels - c));
            }
        }
    }

    /// The same in pieces, those of a chunk one behind the other.
    #[inline(always)]
    unsafe fn split<I: Isa>(&self, at: usize, to: *mut P, chunk_len: usize) {
        for c in (0..self.plan.from.2).step_by(I::NR) {
            // SAFETY: as in `run`; channels are whole pairs of vectors.
            unsafe {
                let to = to.add(c / CHUNK * tiles::PIECES * chunk_len + c % CHUNK);
                let mut to = to.cast::<bf16>();
                let (low, high) = (c, c + I::LANES);
                let mut rest = [low, high].map(|c| self.source.full::<I>(at, c));
                for piece in 0..tiles::PIECES {
                    let [low, high] = tiles::pieces::<I, 2>(&mut rest, piece);
                    I::store_halves(to, low, high);
                    to = to.add(chunk_len);
                }
            }
        }
    }

    /// A pixel outside of the plane.
    #[inline(always)]
    unsafe fn nothing(&self, to: *mut P, chunk_len: usize) {
        for chunk in 0..self.plan.from.2.div_ceil(CHUNK) * self.plan.arithmetic.pieces() {
            // SAFETY: as in `run`. All bits zero are 0 in f32 and bf16.
            unsafe { std::ptr::write_bytes(to.add(chunk * chunk_len), 0, CHUNK) };
        }
    }

    #[inline(always)]
    unsafe fn rows<I: Isa>(&self) {
        let p = self.plan;
        let (h, w, c) = p.from;
        let row_len = p.columns * c;
        let rows = p.packed_rows(self.rows.len());
        if p.tiled {
            for piece in 0..p.arithmetic.pieces() {
                // SAFETY: as in `run`. The last step of a piece reads on behind it, what it multiplies by zero.
                unsafe {
                    let end = self.to.add(piece * p.chunk_len() + rows * row_len);
                    std::ptr::write_bytes(end, 0, tiles::DEPTH);
                }
            }
        }
        // Of the packed columns: on the border left of the plane, inside, and on the border right of it.
        let left = p.first.1.unsigned_abs().min(p.columns);
        let inside = w.min(p.columns - left);
        for row in 0..rows {
            let y = (self.rows.start * p.step + row) as isize + p.first.0;
            // SAFETY: as in `run`.
            unsafe {
                let to = self.to.add(row * row_len);
                let is_outside = y < 0 || y >= h as isize;
                for piece in 0..p.arithmetic.pieces() {
                    let to = to.add(piece * p.chunk_len());
                    // All bits zero are 0.
                    if is_outside {
                        std::ptr::write_bytes(to, 0, row_len);
                        continue;
                    }
                    std::ptr::write_bytes(to, 0, left * c);
                    let right = (left + inside) * c;
                    std::ptr::write_bytes(to.add(right), 0, row_len - right);
                }
                if is_outside {
                    continue;
                }
                let at = (self.images.start * h + y as usize) * w * c;
                let to = to.add(left * c);
                let each = if S::FLAT { I::LANES } else { c };
                for i in (0..inside * c).step_by(each) {
                    let n = (inside * c - i).min(each);
                    let v = if S::FLAT {
                        self.source.part::<I>(at, i, n)
                    } else {
                        self.source.part::<I>(at + i, 0, n)
                    };
                    let mut rest = [v];
                    for piece in 0..p.arithmetic.pieces() {
                        let mut v = v;
                        if p.arithmetic == Arithmetic::Split {
                            [v] = tiles::pieces::<I, 1>(&mut rest, piece);
                        }
                        let to = to.add(piece * p.chunk_len() + i);
                        if n == I::LANES {
                            P::store::<I>(to, v);
                        } else {
                            P::store_part::<I>(to, v, n);
                        }
                    }
                }
            }
        }
    }
}

/// Depth of a block where matrix tiles multiply: the rows of 32 results stay in the first-level cache.
const TILED_BLOCK: usize = 256;

/// Depth of a block. All tiles of a task pass through a block before the next, so that its weights stay in the caches
/// nearby. And rounding errors grow with the length of a chain of sums, which ends with the block.
const BLOCK: usize = 512;

/// Neighbouring stretches of a depth of at least `least` together.
fn blocks(stretches: &[Stretch], least: usize) -> Vec<Range<usize>> {
    let (mut out, mut start, mut depth) = (vec![], 0, 0);
    for (i, stretch) in stretches.iter().enumerate() {
        depth += stretch.depth;
        if depth >= least || i + 1 == stretches.len() {
            out.push(start..i + 1);
            (start, depth) = (i + 1, 0);
        }
    }
    if out.is_empty() {
        // No window meets these results: their sums are zero.
        out.push(0..0);
    }
    out
}

/// Sums of R x Q results of two vectors over a block of the depth. Neighbours in a run are PITCH values apart.
struct Product<'a, P: Operand, const R: usize, const Q: usize, const PITCH: usize> {
    runs: [*const P; Q],
    stretches: &'a [Stretch],
    weights: *const P,
    /// R x Q rows, with the sums of earlier blocks if `adds`.
    tile: *mut f32,
    adds: bool,
}

impl<P: Operand, const R: usize, const Q: usize, const PITCH: usize> Product<'_, P, R, Q, PITCH> {
    /// # Safety
    /// Runs and stretches lie in the packed tile, the weights hold the depth, `tile` holds R x Q rows, and the CPU has
    /// `I`'s instructions.
    #[expect(
        clippy::needless_range_loop,
        reason = "indices of constant bounds unroll, and the sums stay in registers"
    )]
    #[inline(always)]
    unsafe fn sums<I: Isa>(&self) -> [[[I::V; 2]; R]; Q] {
        // SAFETY: the caller's word.
        unsafe {
            let mut sums = [[[I::zero(); 2]; R]; Q];
            for &Stretch { at, depth, row } in self.stretches {
                let mut w = self.weights.add(row * I::NR);
                let mut runs = self.runs;
                for run in &mut runs {
                    *run = run.add(at);
                }
                let mut k = 0;
                while k < depth {
                    let second = w.add(I::LANES * P::STEP);
                    let (b0, b1) = (P::panel::<I>(w), P::panel::<I>(second));
                    prefetch_near(w.wrapping_add(AHEAD * I::NR * P::STEP));
                    prefetch_near(second.wrapping_add(AHEAD * I::NR * P::STEP));
                    for q in 0..Q {
                        for r in 0..R {
                            let a = P::splat::<I>(runs[q].add(k + r * PITCH));
                            sums[q][r][0] = P::fma::<I>(a, b0, sums[q][r][0]);
                            sums[q][r][1] = P::fma::<I>(a, b1, sums[q][r][1]);
                        }
                    }
                    w = w.add(I::NR * P::STEP);
                    k += P::STEP;
                }
            }
            if self.adds {
                for q in 0..Q {
                    for r in 0..R {
                        for half in 0..2 {
                            let earlier = I::load(self.row::<I>(q, r, half));
                            sums[q][r][half] = I::add(sums[q][r][half], earlier);
                        }
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    fn row<I: Isa>(&self, q: usize, r: usize, half: usize) -> *mut f32 {
        self.tile
            .wrapping_add((q * R + r) * I::NR + half * I::LANES)
    }
}

/// Steps of the depth that the weights are asked for in advance. Cascade Lake, 2026-11-28: its own prefetcher leaves
/// 5 to 10 % of the time waiting where a panel comes from the second level.
const AHEAD: usize = 8;

/// Leaves the sums in the tile.
struct Multiply<'a, P: Operand, const R: usize, const Q: usize, const PITCH: usize>(
    Product<'a, P, R, Q, PITCH>,
);

impl<P: Operand, const R: usize, const Q: usize, const PITCH: usize> Job
    for Multiply<'_, P, R, Q, PITCH>
{
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's word.
        unsafe {
            let sums = self.0.sums::<I>();
            for (q, run) in sums.iter().enumerate() {
                for (r, [first, second]) in run.iter().enumerate() {
                    I::store(self.0.row::<I>(q, r, 0), *first);
                    I::store(self.0.row::<I>(q, r, 1), *second);
                }
            }
        }
    }
}

/// The same for a last block, with an epilogue that needs no sums, from registers: the runs are whole, and so is the
/// panel of channels.
struct MultiplyFinish<'a, P: Operand, T: Element, F: Finish, const R: usize, const Q: usize> {
    product: Product<'a, P, R, Q, CHUNK>,
    finish: F,
    out: Out<'a, T>,
    /// First channel.
    channel: usize,
    segments: &'a [Segment],
    /// Pixels between neighbouring results.
    spread: usize,
}

impl<P: Operand, T: Element, F: Finish, const R: usize, const Q: usize> Job
    for MultiplyFinish<'_, P, T, F, R, Q>
{
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let at =
            |q: usize, r: usize| (self.segments[q].pixel + r * self.spread) * self.out.channels;
        // SAFETY: the caller's word; the runs' pixels are results of this task, and the channels are inside.
        unsafe {
            let mut values = self.product.sums::<I>();
            let unused = &mut [I::zero(); SUMS];
            // All reads come before the first store, as in `FinishTile`.
            for (q, run) in values.iter_mut().enumerate() {
                for (r, vectors) in run.iter_mut().enumerate() {
                    for (half, v) in vectors.iter_mut().enumerate() {
                        let c = self.channel + half * I::LANES;
                        *v = self
                            .finish
                            .apply::<I>(*v, at(q, r), c, I::LANES, true, unused);
                    }
                }
            }
            for (q, run) in values.iter().enumerate() {
                for (r, vectors) in run.iter().enumerate() {
                    for (half, v) in vectors.iter().enumerate() {
                        let c = self.channel + half * I::LANES;
                        self.out.store::<I>(*v, at(q, r), c, I::LANES, true);
                    }
                }
            }
        }
    }
}

/// Multiplies a tile.
///
/// # Safety
/// As for [`Product::sums`], of runs of `length` and a tile of `q` of them.
unsafe fn multiply<P: Operand>(plan: &Plan, (length, q): (usize, usize), tile: &TileOf<'_, P>) {
    macro_rules! shapes {
        ($pitch:ident: $(($r:literal, $q:literal))*) => {
            match (length, q) {
                // SAFETY: the caller's word.
                $(($r, $q) => unsafe { plan.level.call(Multiply::<P, $r, $q, $pitch>(tile.product())) },)*
                other => unreachable!("no tile of {other:?}"),
            }
        };
    }
    match (plan.level.lanes(), plan.packing) {
        (16, Packing::Rows) if P::STEP == 1 => {
            shapes!(ROWS_PITCH: (7, 2) (6, 2) (5, 2) (4, 3) (3, 4) (2, 6) (1, 8));
        }
        (16, _) => shapes!(CHUNK: (7, 2) (6, 2) (5, 2) (4, 3) (3, 4) (2, 6) (1, 8)),
        (_, Packing::Rows) if P::STEP == 1 => {
            shapes!(ROWS_PITCH: (6, 1) (5, 1) (4, 1) (3, 2) (2, 3) (1, 6));
        }
        _ => shapes!(CHUNK: (6, 1) (5, 1) (4, 1) (3, 2) (2, 3) (1, 6)),
    }
}

/// What a tile is the product of.
struct TileOf<'a, P: Operand> {
    packed: *const P,
    rows: Rows<'a>,
    stretches: &'a [Stretch],
    weights: *const P,
    tile: *mut f32,
    adds: bool,
}

impl<'a, P: Operand> TileOf<'a, P> {
    /// Multiplies by matrix tiles.
    ///
    /// # Safety
    /// `P` is bf16; the steps are those of the stretches; and as for [`tiles::multiply`].
    unsafe fn by_tiles(&self, plan: &Plan, pitch: usize, tiles: &Configured, steps: &[Step]) {
        let at = |run: &u32| self.packed.wrapping_add(*run as usize).cast();
        let runs = self.rows.runs;
        let first = at(&runs[0]);
        let rows = [first, runs.get(1).map_or(first, at)];
        let (weights, tile) = (self.weights.cast(), self.tile);
        // SAFETY: the caller's word.
        unsafe {
            let pitch = pitch * size_of::<bf16>();
            if plan.arithmetic == Arithmetic::Split {
                let piece = plan.chunk_len();
                tiles::multiply_pieces(tiles, rows, pitch, piece, weights, steps, tile, self.adds);
            } else {
                tiles::multiply(tiles, rows, pitch, weights, steps, tile, self.adds);
            }
        }
    }

    /// Runs that the tile has not are as the first.
    #[inline(always)]
    fn product<const R: usize, const Q: usize, const PITCH: usize>(
        &self,
    ) -> Product<'a, P, R, Q, PITCH> {
        let runs = self.rows.runs;
        let at = |run: usize| *runs.get(run).unwrap_or(&runs[0]) as usize;
        Product {
            runs: std::array::from_fn(|run| self.packed.wrapping_add(at(run))),
            stretches: self.stretches,
            weights: self.weights,
            tile: self.tile,
            adds: self.adds,
        }
    }
}

/// Runs the epilogue over a tile, or over neighbouring ones: the same results in the panels that follow.
struct FinishTile<'a, T: Element, F: Finish> {
    finish: F,
    out: Out<'a, T>,
    tile: *mut f32,
    /// Tiles, and values from one to the next.
    panels: usize,
    tile_len: usize,
    segments: &'a [Segment],
    /// Between neighbouring results, in pixels.
    spread: usize,
    /// First channel.
    channel: usize,
    /// Sums of that channel, zero at first, rows `columns` apart; null if there are none.
    sums: *mut f32,
    columns: usize,
    /// The first of the task for these channels.
    begins: bool,
}

/// Sums of a panel: those of both of its vectors.
type PanelSums<I> = [[<I as Isa>::V; SUMS]; 2];

impl<T: Element, F: Finish> Job for FinishTile<'_, T, F> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let whole = ((self.out.channels - self.channel) / I::NR).min(self.panels);
        // SAFETY: the tiles hold every segment, whose pixels are results of this task.
        unsafe {
            if whole == 1 {
                self.panel::<I>();
            } else {
                self.rows::<I>(whole);
            }
            if whole < self.panels {
                self.part::<I>(whole);
            }
        }
    }
}

impl<T: Element, F: Finish> FinishTile<'_, T, F> {
    /// One panel.
    #[inline(always)]
    unsafe fn panel<I: Isa>(&self) {
        // SAFETY: as in `run`.
        unsafe {
            let mut sums = self.load_sums::<I>(0);
            let mut begins = self.begins;
            for &segment in self.segments {
                let mut r = 0;
                while r + 4 <= segment.len {
                    self.group::<I, 4>(0, segment, r, begins, &mut sums);
                    begins = false;
                    r += 4;
                }
                while r < segment.len {
                    self.group::<I, 1>(0, segment, r, begins, &mut sums);
                    begins = false;
                    r += 1;
                }
            }
            self.store_sums::<I>(0, &sums);
        }
    }

    /// Several panels, a few results after the other: their channels are stored in long rows.
    #[inline(always)]
    unsafe fn rows<I: Isa>(&self, panels: usize) {
        let mut begins = self.begins;
        for &segment in self.segments {
            let mut r = 0;
            while r < segment.len {
                let whole = r + 4 <= segment.len;
                for panel in 0..panels {
                    // SAFETY: as in `run`.
                    unsafe {
                        let mut sums = self.load_sums::<I>(panel);
                        if whole {
                            self.group::<I, 4>(panel, segment, r, begins, &mut sums);
                        } else {
                            self.group::<I, 1>(panel, segment, r, begins, &mut sums);
                        }
                        self.store_sums::<I>(panel, &sums);
                    }
                }
                begins = false;
                r += if whole { 4 } else { 1 };
            }
        }
    }

    #[inline(always)]
    unsafe fn load_sums<I: Isa>(&self, panel: usize) -> PanelSums<I> {
        // SAFETY: as in `run`.
        unsafe {
            let mut sums = [[I::zero(); SUMS]; 2];
            if F::SUMMED {
                for (half, sums) in sums.iter_mut().enumerate() {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        *sum = I::load(self.sums_at::<I>(panel, half, row));
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn store_sums<I: Isa>(&self, panel: usize, sums: &PanelSums<I>) {
        if F::SUMMED {
            for (half, sums) in sums.iter().enumerate() {
                for (row, sum) in sums.iter().enumerate() {
                    // SAFETY: as in `run`.
                    unsafe { I::store(self.sums_at::<I>(panel, half, row), *sum) };
                }
            }
        }
    }

    #[inline(always)]
    fn sums_at<I: Isa>(&self, panel: usize, half: usize, row: usize) -> *mut f32 {
        let at = row * self.columns + panel * I::NR + half * I::LANES;
        self.sums.wrapping_add(at)
    }

    /// N neighbouring results of a panel, the `r`-th of a segment and so on. All reads come before the first store: what the
    /// epilogue reads often lies as the results do, and where pixels are 4 KiB apart a load that follows a store to the
    /// pixel before waits for it, as their low address bits are equal.
    #[inline(always)]
    unsafe fn group<I: Isa, const N: usize>(
        &self,
        panel: usize,
        segment: Segment,
        r: usize,
        begins: bool,
        sums: &mut PanelSums<I>,
    ) {
        let pixel = segment.pixel + r * self.spread;
        let at = |i: usize| (pixel + i * self.spread) * self.out.channels;
        let row = segment.row + r;
        let first = self.channel + panel * I::NR;
        // SAFETY: as in `run`.
        unsafe {
            let tile = self.tile.add(panel * self.tile_len);
            let mut values = [[I::zero(); 2]; N];
            for (i, values) in values.iter_mut().enumerate() {
                for (half, value) in values.iter_mut().enumerate() {
                    let v = I::load(tile.add((row + i) * I::NR + half * I::LANES));
                    if begins && i == 0 {
                        self.finish.begin::<I>(v, &mut sums[half]);
                    }
                    let c = first + half * I::LANES;
                    *value = self
                        .finish
                        .apply::<I>(v, at(i), c, I::LANES, true, &mut sums[half]);
                }
            }
            for (i, [low, high]) in values.iter().enumerate() {
                let to = self.out.y.ptr().add(at(i) + first);
                if self.out.stream {
                    T::stream::<I>(to, *low);
                    T::stream::<I>(to.add(I::LANES), *high);
                } else {
                    T::store_two::<I>(to, *low, *high);
                }
            }
        }
    }

    /// A panel that is not full.
    #[inline(always)]
    unsafe fn part<I: Isa>(&self, panel: usize) {
        let tile = self.tile.wrapping_add(panel * self.tile_len);
        for half in 0..2 {
            let c = self.channel + panel * I::NR + half * I::LANES;
            if c >= self.out.channels {
                return;
            }
            let n = (self.out.channels - c).min(I::LANES);
            // SAFETY: as in `run`.
            unsafe {
                let mut sums = [I::zero(); SUMS];
                if F::SUMMED {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        *sum = I::load(self.sums_at::<I>(panel, half, row));
                    }
                }
                let mut begins = self.begins;
                for segment in self.segments {
                    for (row, pixel) in segment.results(self.spread) {
                        let v = I::load(tile.add(row * I::NR + half * I::LANES));
                        if begins {
                            self.finish.begin::<I>(v, &mut sums);
                            begins = false;
                        }
                        let at = pixel * self.out.channels;
                        let v = self.finish.apply::<I>(v, at, c, n, false, &mut sums);
                        self.out.store::<I>(v, at, c, n, false);
                    }
                }
                if F::SUMMED {
                    for (row, sum) in sums.iter().enumerate() {
                        I::store(self.sums_at::<I>(panel, half, row), *sum);
                    }
                }
            }
        }
    }
}

/// Where the runs of a task are.
struct Runs<'a> {
    plan: &'a Plan,
    phase: &'a Phase,
    images: Range<usize>,
    rows: Range<usize>,
    /// Values between neighbouring pixels.
    pitch: usize,
    /// Next: image, row, column.
    next: (usize, usize, usize),
}

impl<'a> Runs<'a> {
    fn new(
        plan: &'a Plan,
        phase: &'a Phase,
        images: Range<usize>,
        rows: Range<usize>,
        pitch: usize,
    ) -> Self {
        let rows = match plan.packing {
            Packing::Planes | Packing::Rows => rows.start..rows.end.min(phase.grid.0),
            Packing::Images => 0..images.len(),
            Packing::Points => rows,
        };
        let next = (images.start, rows.start, 0);
        Self {
            plan,
            phase,
            images,
            rows,
            pitch,
            next,
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let (plan, length) = (self.plan, self.phase.tile.0);
        if matches!(plan.packing, Packing::Points | Packing::Images) {
            let done = self.next.2;
            let all = self.rows.len();
            if done >= all {
                return None;
            }
            let from = done.min(all.saturating_sub(length));
            let len = length.min(all - from);
            self.next.2 = from + len;
            let pixel = match plan.packing {
                Packing::Images => {
                    let (y, x) = self.phase.at;
                    ((self.images.start + from) * plan.to.0 + y) * plan.to.1 + x
                }
                _ => self.rows.start + from,
            };
            return Some(Run::new(from * self.pitch, pixel, done - from, len));
        }
        let (image, row, done) = self.next;
        if image >= self.images.end || self.rows.is_empty() {
            return None;
        }
        let width = self.phase.grid.1;
        let from = done.min(width.saturating_sub(length));
        let len = length.min(width - from);
        self.next = if from + len < width {
            (image, row, from + len)
        } else if row + 1 < self.rows.end {
            (image, row + 1, 0)
        } else {
            (image + 1, self.rows.start, 0)
        };
        let packed = match plan.packing {
            Packing::Rows => {
                ((row - self.rows.start) * plan.step * plan.columns + from * plan.step)
                    * plan.from.2
            }
            _ => {
                let row_len = plan.step * plan.columns;
                let row = (row - self.rows.start) * plan.step;
                let image = (image - self.images.start) * plan.packed_rows(plan.rows);
                ((image + row) * row_len + from) * CHUNK
            }
        };
        let y = row * plan.spread + self.phase.at.0;
        let x = from * plan.spread + self.phase.at.1;
        let pixel = (image * plan.to.0 + y) * plan.to.1 + x;
        Some(Run::new(packed, pixel, done - from, len))
    }
}

/// Multiplies a last block by a whole panel and finishes it in registers; the shape is the commonest one.
///
/// # Safety
/// As for [`MultiplyFinish`].
unsafe fn finish_whole<P: Operand, T: Element>(
    plan: &Plan,
    tile: &TileOf<'_, P>,
    finish: Affine<'_, T>,
    out: Out<'_, T>,
    channel: usize,
) {
    let (segments, spread) = (tile.rows.segments, plan.run_spread());
    macro_rules! call {
        ($r:literal, $q:literal) => {{
            let product = tile.product();
            let job = MultiplyFinish::<P, T, Affine<'_, T>, $r, $q> {
                product,
                finish,
                out,
                channel,
                segments,
                spread,
            };
            // SAFETY: the caller's word.
            unsafe { plan.level.call(job) }
        }};
    }
    if plan.level.lanes() == 16 {
        call!(7, 2);
    } else {
        call!(6, 1);
    }
}

/// A convolution with its operands: reads `source`, multiplies by `weights` (of [`Plan::weights_len`], in the order of
/// the phases), hands results to `epilogue` and stores them.
pub(crate) struct Convolution<'a, T: Element, P: Operand> {
    pub(crate) plan: &'a Plan,
    pub(crate) source: Source<'a, T>,
    pub(crate) weights: Span<'a, P>,
    pub(crate) out: Out<'a, T>,
    pub(crate) epilogue: Epilogue<'a, T>,
    pub(crate) partials: Option<Partials<'a>>,
}

impl<T: Element, P: Operand> Convolution<'_, T, P> {
    fn check(&self) {
        let (plan, (h, w, c)) = (self.plan, self.plan.from);
        assert!(
            plan.pairs() == P::STEP && self.weights.len() >= plan.weights_len(),
            "the weights are those of the plan"
        );
        assert!(
            self.source.len() >= plan.batch * h * w * c,
            "the source holds its planes"
        );
        let results = plan.batch * plan.to.0 * plan.to.1;
        assert!(
            self.out.channels == plan.to.2 && self.out.y.len() >= results * plan.to.2,
            "the results have room"
        );
    }

    /// # Safety
    /// As for [`run_task`].
    unsafe fn task(&self, index: usize, scratch: Span<'_, f32>) {
        let (task, group) = (index / self.plan.groups, index % self.plan.groups);
        let panels = self.plan.to.2.div_ceil(2 * self.plan.level.lanes());
        let from = |group: usize| panels * group / self.plan.groups;
        let record = self.partials.map(|p| (p.record(task), p.columns));
        // SAFETY: the caller's word.
        unsafe {
            run_task(
                self.plan,
                task,
                from(group)..from(group + 1),
                scratch,
                &self.source,
                self.weights,
                self.out,
                &self.epilogue,
                record,
            );
        }
    }
}

/// Runs a convolution.
pub(crate) fn convolve<T: Element, P: Operand>(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    convolution: &Convolution<'_, T, P>,
) {
    convolution.check();
    let plan = convolution.plan;
    pool.run(plan.tasks() * plan.groups, |worker, task| {
        // SAFETY: nobody writes what is read in this region; tasks write disjoint results and records, and each
        // worker has its share of scratch to itself.
        unsafe { convolution.task(task, scratch.of(worker)) };
    });
}

/// Runs two convolutions, the second of which reads the results of the first; their plans are [`Plan::joined`].
pub(crate) fn convolve_both<T: Element, P: Operand>(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    [first, second]: [&Convolution<'_, T, P>; 2],
) {
    first.check();
    second.check();
    assert!(
        first.plan.rows == second.plan.rows && first.plan.tasks() == second.plan.tasks(),
        "plans are cut alike"
    );
    pool.run(first.plan.tasks(), |worker, task| {
        // SAFETY: as in `convolve`; of the results of the first the second reads those of the same task only, and all
        // other operands are different memory.
        unsafe {
            first.task(task, scratch.of(worker));
            second.task(task, scratch.of(worker));
        }
    });
}

/// # Safety
/// Nobody writes the source, weights or operands of the epilogue meanwhile; nobody else touches the task's results,
/// its record's columns or the scratch.
unsafe fn run_task<T: Element, P: Operand>(
    plan: &Plan,
    task: usize,
    panels: Range<usize>,
    scratch: Span<'_, f32>,
    source: &Source<'_, T>,
    weights: Span<'_, P>,
    out: Out<'_, T>,
    epilogue: &Epilogue<'_, T>,
    record: Option<(Span<'_, f32>, usize)>,
) {
    let nr = 2 * plan.level.lanes();
    let (images, rows) = plan.place(task);
    let tiles_len = plan.tiles_len();
    let tiles = scratch.part(0..tiles_len).ptr();
    let packed = scratch.part(tiles_len..plan.worker_len()).ptr();
    let packed = packed.cast::<P>();
    let (packed, pitch, lies) = match source {
        // Of two bytes there is one type of tensors.
        Source::Raw(x) if plan.reads_in_place(rows.len()) && size_of::<T>() == size_of::<P>() => {
            let pixels = x.0.ptr().wrapping_add(rows.start * plan.from.2);
            (pixels.cast::<P>(), plan.from.2, true)
        }
        _ => {
            // SAFETY: the share is `worker_len` long, which holds the packed tile.
            unsafe {
                let (images, rows) = (images.clone(), rows.clone());
                read_as!(*source, source => plan.level.call(Pack { plan, source, images, rows, to: packed }));
            }
            let pitch = match plan.packing {
                Packing::Rows => ROWS_PITCH,
                _ => CHUNK,
            };
            (packed, pitch, false)
        }
    };
    let spread = plan.run_spread();
    let all_rows = |phase: &Phase| {
        let inside = rows.start..rows.end.min(phase.grid.0);
        if plan.flows(phase, inside.len()) {
            return AllRows::flowing(plan, phase, images.clone(), inside, phase.tile);
        }
        let runs = Runs::new(plan, phase, images.clone(), rows.clone(), pitch);
        AllRows::new(runs, phase.tile, spread)
    };
    let phases: Vec<(&Phase, AllRows)> = plan.phases.iter().map(|p| (p, all_rows(p))).collect();
    // SAFETY: the level has tiles; a thread runs one task at a time.
    let configured = plan.tiled.then(|| unsafe { Configured::new() });
    if let Some((record, columns)) = record {
        for row in 0..SUMS {
            let at = HEAD + row * columns;
            // SAFETY: the task's own columns of its record.
            unsafe {
                record
                    .part(at + panels.start * nr..at + panels.end * nr)
                    .get_mut()
            }
            .fill(0.0);
        }
    }
    let sums = |channel: usize| match record {
        Some((record, _)) => record.part(HEAD + channel..HEAD + channel + nr).ptr(),
        None => std::ptr::null_mut(),
    };
    // Tiles of bf16 are multiplied faster than lines come, and the first level waits for few of them at a time.
    let is_near = !(plan.tiled && plan.arithmetic == Arithmetic::Bf16);
    let mut count = 0;
    for first in panels.clone().step_by(plan.abreast) {
        let abreast = first..(first + plan.abreast).min(panels.end);
        count = 0;
        for (phase, all) in &phases {
            let (length, q) = phase.tile;
            let waiting = plan.waiting(phase);
            for (b, block) in phase.blocks.iter().enumerate() {
                let is_last = b + 1 == phase.blocks.len();
                let stretches = &phase.stretches[block.clone()];
                let adds = b > 0;
                for (t, tile_rows) in all.tiles().enumerate() {
                    let is_whole = tile_rows.len() == length * q;
                    let row = match phase.blocks.len() {
                        1 => tiles,
                        _ => tiles.wrapping_add(t * waiting * plan.tile_len()),
                    };
                    // SAFETY: the tiles hold the runs; the record's columns belong to this task.
                    let finish = |first: usize, panels: usize, tile: *mut f32| unsafe {
                        finish_as!(*epilogue, finish => plan.level.call(FinishTile {
                            finish,
                            out,
                            tile,
                            panels,
                            tile_len: plan.tile_len(),
                            segments: tile_rows.segments,
                            spread,
                            channel: first * nr,
                            sums: sums(first * nr),
                            columns: record.map_or(0, |(_, columns)| columns),
                            begins: count == 0,
                        }));
                    };
                    for panel in abreast.clone() {
                        let channel = panel * nr;
                        let w = panel * plan.panel_len();
                        let w = weights.part(w..w + plan.panel_len()).ptr().cast_const();
                        let tile = row.wrapping_add((panel - first) % waiting * plan.tile_len());
                        if is_last {
                            // What the epilogue reads, and where it stores, comes while the tile is multiplied.
                            finish_as!(*epilogue, finish => {
                                for (_, pixel) in tile_rows.segments.iter().flat_map(|s| s.results(spread)) {
                                    let at = pixel * out.channels;
                                    finish.prefetch(at, channel, nr);
                                    out.prefetch(at + channel, nr, is_near);
                                }
                            });
                        }
                        let of = TileOf {
                            packed,
                            rows: tile_rows,
                            stretches,
                            weights: w,
                            tile,
                            adds,
                        };
                        // SAFETY: the runs lie in the packed tile; a run shorter than the tile's reads on inside of
                        // the scratch, and its sums are not used. The record's columns belong to this task.
                        unsafe {
                            if let (Epilogue::Affine(finish), true) =
                                (*epilogue, is_whole && is_last)
                                && plan.has_fused_finish(phase.tile)
                                && channel + nr <= out.channels
                            {
                                finish_whole(plan, &of, finish, out, channel);
                                continue;
                            }
                            match &configured {
                                Some(tiles) => {
                                    let steps = &phase.steps[b][usize::from(lies)];
                                    of.by_tiles(plan, pitch, tiles, steps);
                                }
                                None => multiply(plan, phase.tile, &of),
                            }
                            if is_last && !plan.tiled {
                                finish(panel, 1, tile);
                            }
                        }
                    }
                    if is_last && plan.tiled {
                        finish(first, abreast.len(), row);
                    }
                    if is_last {
                        count += tile_rows.len();
                    }
                }
            }
        }
    }
    if let Some((record, columns)) = record {
        // SAFETY: as above; of several groups the first writes the count.
        unsafe {
            if panels.start == 0 {
                record.part(0..1).get_mut()[0] = count as f32;
            }
            for c in panels.start * nr..panels.end * nr {
                let at = |row: usize| {
                    record.part(HEAD + row * columns + c..HEAD + row * columns + c + 1)
                };
                let sums = [at(0).get()[0], at(1).get()[0], at(2).get()[0]];
                let closed = finish_as!(*epilogue, finish => finish.close(sums, count));
                for (row, v) in closed.into_iter().enumerate() {
                    at(row).get_mut()[0] = v;
                }
            }
        }
    }
}
