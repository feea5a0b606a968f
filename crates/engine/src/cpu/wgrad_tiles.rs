//! The gradient of a convolution's weight by matrix tiles: dw[tap, c, o] = sum over pixels of x[pixel + tap, c] d[pixel, o].
//!
//! Pixels are the depth here. x is packed with its pixels side by side, `[c][position]`, and d as pairs of pixels,
//! `[o / 32][position / 2][32][2]`. Positions count the results of a plane row by row, each row as long as the packed
//! rows of x, so that a tap is the same distance away for all of them; d is zero where a position is no result. Of a
//! strided window x is packed by residue of rows and columns. A block of 32 x 32 of dw is loaded, runs over some
//! hundreds of positions and is stored. Operands of f32 are packed in pieces, see [`super::tiles`].
//!
//! Work is cut by shape only, into slices or groups, as in [`super::wgrad`].

use std::ops::Range;

use graph::Geometry;
use half::bf16;

use super::direct::Arithmetic;
use super::fuse::{Read, Source, read_as};
use super::memory::{Scratch, Span};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};
use super::tiles::{self, Configured, DEPTH, PIECES, SIDE, Step};
use super::weights::{CHUNK, Panels};
use super::wgrad::add_up;

/// Steps of a block: both of its operands fit the first-level cache.
const BLOCK: usize = 8;
/// Positions that a slice packs at once, of large planes.
const BAND: usize = 512;
/// Largest weight, in values, that is worth a copy for each slice.
const SLICED: usize = 160 << 10;
/// Slices at most.
const SLICES: usize = 16;
/// Tasks that a group is worth at least, if its weight is large enough.
const TASKS: usize = 32;
/// Packed operands of a group, bytes.
const GROUP_BYTES: usize = 6 << 20;

/// How the work is cut: a function of the shapes and the level only.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    level: Level,
    g: Geometry,
    batch: usize,
    panels: Panels,
    /// Pixels count one by one over all images (no window).
    linear: bool,
    /// Rows of results of a band; of pixels that count one by one, pixels.
    rows: usize,
    /// Positions in a row: the results, and what windows see beside them. Pixels that count one by one are one row.
    columns: usize,
    /// Positions of a band.
    positions: usize,
    /// Values of a band of x, in one channel.
    x_len: usize,
    /// Bands of a slice's block (1) or of a group.
    bands: usize,
    /// Values between channels of x.
    pitch: usize,
    /// That an operand is the sum of.
    pieces: usize,
    slices: Option<usize>,
    /// Of all bands, and one more.
    steps: Vec<Step>,
}

impl Plan {
    /// None where there are no tiles for the arithmetic, or they do not pay: few channels or pixels.
    pub(crate) fn new(
        level: Level,
        arithmetic: Arithmetic,
        g: &Geometry,
        batch: usize,
    ) -> Option<Self> {
        let has_tiles = level == Level::Amx && arithmetic != Arithmetic::F32;
        let is_small = g.input.pixels().max(g.output.pixels()) <= 4;
        if !has_tiles || !g.input.c.is_multiple_of(SIDE) || is_small && g.kernel > 1 {
            return None;
        }
        let panels = Panels::of(g, SIDE);
        let linear = g.kernel == 1;
        let is_sliced = panels.len() <= SLICED && g.output.pixels() > 196;
        let columns = g.output.w + (g.kernel - 1) / g.stride;
        // Bands of equal height.
        let rows = match (linear, is_sliced) {
            (true, _) => equal(batch * g.output.pixels(), BAND).next_multiple_of(DEPTH),
            (false, true) => equal(g.output.h, (BAND / columns).max(1)),
            (false, false) => g.output.h,
        };
        let mut plan = Self {
            level,
            g: *g,
            batch,
            panels,
            linear,
            rows,
            columns: if linear { usize::MAX } else { columns },
            positions: if linear {
                rows
            } else {
                (rows * columns).next_multiple_of(DEPTH)
            },
            x_len: 0,
            bands: 1,
            pitch: 0,
            pieces: arithmetic.pieces(),
            slices: None,
            steps: vec![],
        };
        plan.x_len = if linear {
            plan.positions
        } else {
            g.stride * g.stride * plan.plane_len()
        };
        if is_sliced {
            plan.slices = Some(plan.all_bands().min(SLICES));
        } else {
            let band = plan.x_len * g.input.c + plan.positions * panels.count() * SIDE;
            let fit = (GROUP_BYTES / (band * plan.pieces * size_of::<bf16>())).max(1);
            plan.bands = fit.min(plan.all_bands());
        }
        // An odd number of cache lines, lest the rows of a tile fall into one set.
        plan.pitch = (plan.bands * plan.x_len).next_multiple_of(32);
        if plan.pitch.is_multiple_of(64) {
            plan.pitch += 32;
        }
        let steps = |band: usize| {
            let (x, d) = (band * plan.x_len, band * plan.positions);
            let steps = (0..plan.positions).step_by(DEPTH);
            steps
                .map(|p| Step::new(x + p, (d + p) * SIDE * plan.pieces))
                .collect::<Vec<_>>()
        };
        plan.steps = (0..=plan.bands).flat_map(steps).collect();
        Some(plan)
    }

    /// Values of the plane of one residue of rows and columns, and room behind for the last step of the last tap.
    fn plane_len(&self) -> usize {
        let reach = (self.g.kernel - 1) / self.g.stride;
        (self.positions + reach * self.columns + reach).next_multiple_of(32)
    }

    /// Bands of all images.
    fn all_bands(&self) -> usize {
        if self.linear {
            (self.batch * self.g.output.pixels()).div_ceil(self.rows)
        } else {
            self.batch * self.g.output.h.div_ceil(self.rows)
        }
    }

    /// Values of packed x, one piece of it.
    fn x_piece(&self) -> usize {
        self.g.input.c * self.pitch
    }

    /// Values of packed x, up to a whole cache line.
    fn x_all(&self) -> usize {
        (self.x_piece() * self.pieces).next_multiple_of(32)
    }

    /// Values of a panel of d.
    fn d_panel(&self) -> usize {
        self.bands * self.positions * SIDE * self.pieces
    }

    /// f32 of both packed operands.
    fn packed_len(&self) -> usize {
        let values = self.x_all() + self.panels.count() * self.d_panel();
        values.div_ceil(2)
    }

    /// f32 of scratch per worker.
    pub(crate) fn worker_len(&self) -> usize {
        self.slices.map_or(0, |_| self.packed_len())
    }

    /// f32 of memory that all workers share.
    pub(crate) fn shared_len(&self) -> usize {
        self.slices
            .map_or_else(|| self.packed_len(), |slices| slices * self.panels.len())
    }

    /// Where the windows' tap `tap` lies from a position, in x.
    fn tap_at(&self, tap: usize) -> usize {
        let (g, s) = (&self.g, self.g.stride);
        if self.linear {
            return 0;
        }
        let (ky, kx) = (tap / g.kernel, tap % g.kernel);
        (ky % s * s + kx % s) * self.plane_len() + ky / s * self.columns + kx / s
    }

    /// The first row (pixel, if linear) of a band, its image, and how many rows it has.
    fn band(&self, index: usize) -> (usize, usize, usize) {
        let (g, rows) = (&self.g, self.rows);
        if self.linear {
            let all = self.batch * g.output.pixels();
            let first = index * rows;
            return (0, first, rows.min(all - first));
        }
        let per_image = g.output.h.div_ceil(rows);
        let (image, first) = (index / per_image, index % per_image * rows);
        (image, first, rows.min(g.output.h - first))
    }

    /// The pixel of the results at a row and column of a band, if it is one.
    fn result(&self, band: (usize, usize, usize), (row, column): (usize, usize)) -> Option<usize> {
        let (image, first, rows) = band;
        if self.linear {
            return (column < rows).then_some(first + column);
        }
        let (h, w) = (self.g.output.h, self.g.output.w);
        (row < rows && column < w).then(|| (image * h + first + row) * w + column)
    }

    /// The pixel of x at a row and column of a band (in its plane of residues), if there is one.
    fn input(
        &self,
        band: (usize, usize, usize),
        (ry, rx): (usize, usize),
        (row, column): (usize, usize),
    ) -> Option<usize> {
        let (g, s) = (&self.g, self.g.stride);
        let (h, w) = (g.input.h, g.input.w);
        if self.linear {
            let result = self.result(band, (row, column))?;
            if s == 1 {
                return Some(result);
            }
            let (image, rest) = (result / g.output.pixels(), result % g.output.pixels());
            let (y, x) = (rest / g.output.w * s, rest % g.output.w * s);
            return Some((image * h + y) * w + x);
        }
        let (image, first, _) = band;
        let y = ((first + row) * s + ry).checked_sub(g.pad())?;
        let x = (column * s + rx).checked_sub(g.pad())?;
        (y < h && x < w).then(|| (image * h + y) * w + x)
    }

    /// The pixels at [`DEPTH`] positions from `first` on.
    fn pixels(&self, first: usize, of: impl Fn((usize, usize)) -> Option<usize>) -> Pixels {
        let (mut row, mut column) = (first / self.columns, first % self.columns);
        std::array::from_fn(|_| {
            let pixel = of((row, column));
            column += 1;
            if column == self.columns {
                (row, column) = (row + 1, 0);
            }
            pixel.map_or(NONE, |p| p.try_into().expect("pixels of a batch fit u32"))
        })
    }
}

/// The height of the fewest parts of `all` that are at most `most` high, all but the last alike.
fn equal(all: usize, most: usize) -> usize {
    all.div_ceil(all.div_ceil(most))
}

/// No pixel.
const NONE: u32 = u32::MAX;

/// Pixels of [`DEPTH`] positions.
type Pixels = [u32; DEPTH];

/// Neighbouring pixels in each lane, piece `piece` of them; leaves what it does not hold.
///
/// # Safety
/// The CPU has the instructions, with sixteen lanes.
#[inline(always)]
unsafe fn paired<I: Isa, const N: usize>(rest: &mut [I::V; 2], piece: usize) -> I::V {
    // SAFETY: the caller's word.
    unsafe {
        if N == 1 {
            return I::pair(rest[0], rest[1]);
        }
        let [low, high] = tiles::pieces::<I, 2>(rest, piece);
        I::join(low, high)
    }
}

/// Packs positions of x: pixels side by side, in N pieces.
struct PackX<'a, S: Read, const N: usize> {
    source: &'a S,
    channels: usize,
    pixels: Pixels,
    to: *mut bf16,
    pitch: usize,
    /// Values between pieces.
    piece_len: usize,
}

impl<S: Read, const N: usize> Job for PackX<'_, S, N> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: `to` has room for the positions in every channel, and pixels are inside the plane; there are whole
        // vectors of channels.
        unsafe {
            for c in (0..self.channels).step_by(16) {
                let mut rest = [[I::zero(); 2]; 16];
                for (rest, pixels) in rest.iter_mut().zip(self.pixels.chunks_exact(2)) {
                    for (v, pixel) in rest.iter_mut().zip(pixels) {
                        *v = value::<I, S>(self.source, *pixel, self.channels, c);
                    }
                }
                for piece in 0..N {
                    let mut rows = [I::zero(); 16];
                    for (row, rest) in rows.iter_mut().zip(&mut rest) {
                        *row = paired::<I, N>(rest, piece);
                    }
                    I::transpose(&mut rows);
                    let to = self.to.add(piece * self.piece_len + c * self.pitch);
                    for (i, row) in rows.iter().enumerate() {
                        I::store(to.add(i * self.pitch).cast(), *row);
                    }
                }
            }
        }
    }
}

/// Packs positions of d: pairs of pixels, in N pieces.
struct PackD<'a, S: Read, const N: usize> {
    source: &'a S,
    channels: usize,
    pixels: Pixels,
    to: *mut bf16,
    panel_len: usize,
}

impl<S: Read, const N: usize> Job for PackD<'_, S, N> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let whole = self.channels / I::LANES * I::LANES;
        // SAFETY: `to` has room for the positions in every panel, and pixels are inside the plane.
        unsafe {
            for (pair, pixels) in self.pixels.chunks_exact(2).enumerate() {
                let to = self.to.add(pair * 2 * SIDE);
                for c in (0..whole).step_by(I::LANES) {
                    let low = value::<I, S>(self.source, pixels[0], self.channels, c);
                    let high = value::<I, S>(self.source, pixels[1], self.channels, c);
                    self.put::<I>(to, c, [low, high]);
                }
                // A last panel that is not full: the channels that are left, then zeros.
                for c in (whole..self.channels.next_multiple_of(SIDE)).step_by(I::LANES) {
                    let n = self.channels.saturating_sub(c);
                    let part = |pixel: u32| (pixel != NONE && n > 0).then_some(pixel as usize);
                    let [mut low, mut high] = [I::zero(); 2];
                    if let Some(pixel) = part(pixels[0]) {
                        low = self.source.part::<I>(pixel * self.channels, c, n);
                    }
                    if let Some(pixel) = part(pixels[1]) {
                        high = self.source.part::<I>(pixel * self.channels, c, n);
                    }
                    self.put::<I>(to, c, [low, high]);
                }
            }
        }
    }
}

impl<S: Read, const N: usize> PackD<'_, S, N> {
    /// A vector of channels of a pair of pixels, whose panels start at `to`.
    #[inline(always)]
    unsafe fn put<I: Isa>(&self, to: *mut bf16, c: usize, mut rest: [I::V; 2]) {
        for piece in 0..N {
            let at = c / SIDE * self.panel_len + piece * DEPTH * SIDE + c % SIDE * 2;
            // SAFETY: as in `run`.
            unsafe { I::store(to.add(at).cast(), paired::<I, N>(&mut rest, piece)) };
        }
    }
}

/// # Safety
/// As for [`Read::full`].
#[inline(always)]
unsafe fn value<I: Isa, S: Read>(source: &S, pixel: u32, channels: usize, c: usize) -> I::V {
    // SAFETY: the caller's word.
    unsafe {
        if pixel == NONE {
            I::zero()
        } else {
            source.full::<I>(pixel as usize * channels, c)
        }
    }
}

/// Where packed operands are.
#[derive(Clone, Copy)]
struct Packed {
    x: *mut bf16,
    d: *mut bf16,
}

// SAFETY: an address; who follows it says why nobody else does.
unsafe impl Sync for Packed {}

impl Packed {
    fn new(plan: &Plan, memory: Span<'_, f32>) -> Self {
        let x = memory.part(0..plan.packed_len()).ptr().cast::<bf16>();
        let d = x.wrapping_add(plan.x_all());
        Self { x, d }
    }
}

impl Plan {
    /// Packs x of band `index` as the `local`-th.
    ///
    /// # Safety
    /// The source holds its planes and nobody writes them; nobody else touches the band in `to`.
    unsafe fn pack_x<T: Element>(&self, x: &Source<'_, T>, index: usize, local: usize, to: Packed) {
        let (band, s) = (self.band(index), self.g.stride);
        let (residues, len) = if self.linear {
            (1, self.positions)
        } else {
            (s, self.plane_len())
        };
        for residue in 0..residues * residues {
            let at = (residue / residues, residue % residues);
            for first in (0..len).step_by(DEPTH) {
                let pixels = self.pixels(first, |place| self.input(band, at, place));
                let to =
                    to.x.wrapping_add(local * self.x_len + residue * len + first);
                let (channels, pitch, piece_len) = (self.g.input.c, self.pitch, self.x_piece());
                macro_rules! pack {
                    ($n:expr) => {
                        read_as!(x, source => self.level.call(PackX::<_, $n> {
                            source, channels, pixels, to, pitch, piece_len,
                        }))
                    };
                }
                // SAFETY: the caller's word; a band has whole steps.
                unsafe {
                    match self.pieces {
                        1 => pack!(1),
                        _ => pack!(PIECES),
                    }
                }
            }
        }
    }

    /// Packs d, likewise.
    ///
    /// # Safety
    /// As for `pack_x`.
    unsafe fn pack_d<T: Element>(&self, d: &Source<'_, T>, index: usize, local: usize, to: Packed) {
        let band = self.band(index);
        for first in (0..self.positions).step_by(DEPTH) {
            let pixels = self.pixels(first, |place| self.result(band, place));
            let at = (local * self.positions + first) * SIDE * self.pieces;
            let to = to.d.wrapping_add(at);
            let (channels, panel_len) = (self.g.output.c, self.d_panel());
            macro_rules! pack {
                ($n:expr) => {
                    read_as!(d, source => self.level.call(PackD::<_, $n> {
                        source, channels, pixels, to, panel_len,
                    }))
                };
            }
            // SAFETY: the caller's word.
            unsafe {
                match self.pieces {
                    1 => pack!(1),
                    _ => pack!(PIECES),
                }
            }
        }
    }

    /// Adds the products of the first `bands` packed bands to the rows `inputs` (in units of [`SIDE`] channels) of dw's
    /// panels `outputs`; begins at zero if `clears`.
    ///
    /// # Safety
    /// The bands are packed and nobody writes them; nobody else touches that part of dw.
    unsafe fn accumulate(
        &self,
        packed: Packed,
        bands: usize,
        inputs: Range<usize>,
        outputs: Range<usize>,
        dw: Span<'_, f32>,
        clears: bool,
    ) {
        // SAFETY: the level has tiles; a thread runs one task at a time.
        let configured = unsafe { Configured::new() };
        let panels = &self.panels;
        let all = bands * self.positions / DEPTH;
        for block in (0..all).step_by(BLOCK) {
            let steps = &self.steps[block..=(block + BLOCK).min(all)];
            for input in inputs.clone() {
                let c = input * SIDE;
                for output in outputs.clone() {
                    let d = packed.d.wrapping_add(output * self.d_panel()).cast_const();
                    for tap in 0..panels.taps {
                        let first = output * panels.panel_len();
                        let at = first + panels.rows(c / CHUNK, tap) + c % CHUNK * SIDE;
                        let dw = dw.part(at..at + SIDE * SIDE).ptr();
                        let x = packed.x.wrapping_add(c * self.pitch + self.tap_at(tap));
                        let second = x.wrapping_add(SIDE / 2 * self.pitch);
                        let rows = [x.cast_const(), second.cast_const()];
                        let pitch = self.pitch * size_of::<bf16>();
                        let adds = block > 0 || !clears;
                        let (tiles, piece) = (&configured, self.x_piece());
                        // SAFETY: the caller's word; a tap's rows lie in the band.
                        unsafe {
                            match self.pieces {
                                1 => tiles::multiply(tiles, rows, pitch, d, steps, dw, adds),
                                _ => tiles::multiply_pieces(
                                    tiles, rows, pitch, piece, d, steps, dw, adds,
                                ),
                            }
                        }
                    }
                }
            }
        }
    }
}

/// As [`super::wgrad::backward_weight`].
pub(crate) fn backward_weight<T: Element>(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    shared: Span<'_, f32>,
    plan: &Plan,
    x: Source<'_, T>,
    d: Source<'_, T>,
    dw: Span<'_, f32>,
    accumulate: bool,
) {
    let (input, output) = (plan.g.input, plan.g.output);
    assert!(
        x.len() >= plan.batch * input.elements() && d.len() >= plan.batch * output.elements(),
        "the sources hold their planes"
    );
    assert!(dw.len() >= plan.panels.len(), "dw holds the weight");
    let (all, count) = (plan.all_bands(), plan.panels.count());
    let channels = plan.g.input.c / SIDE;
    if let Some(slices) = plan.slices {
        let len = plan.panels.len();
        pool.run(slices, |worker, slice| {
            let packed = Packed::new(plan, scratch.of(worker));
            let own = shared.part(slice * len..(slice + 1) * len);
            let bands = all * slice / slices..all * (slice + 1) / slices;
            for band in bands.clone() {
                // SAFETY: the worker's memory and the slice's dw belong to this task; nobody writes the sources.
                unsafe {
                    plan.pack_x(&x, band, 0, packed);
                    plan.pack_d(&d, band, 0, packed);
                    let clears = band == bands.start;
                    plan.accumulate(packed, 1, 0..channels, 0..count, own, clears);
                }
            }
        });
        add_up(pool, len, slices, shared, dw, accumulate);
        return;
    }
    // A task's part of dw: the more, the less often operands are read; but enough tasks to share.
    let (mut per_task, mut wide) = (CHUNK / SIDE, 1);
    let count_of =
        |per_task: usize, wide: usize| channels.div_ceil(per_task) * count.div_ceil(wide);
    while per_task < channels && count_of(2 * per_task, wide) >= TASKS {
        per_task *= 2;
        if count_of(per_task, 2 * wide) >= TASKS {
            wide *= 2;
        }
    }
    let tasks = channels.div_ceil(per_task);
    let packed = Packed::new(plan, shared);
    for first in (0..all).step_by(plan.bands) {
        let bands = plan.bands.min(all - first);
        pool.run(2 * bands, |_, task| {
            let local = task / 2;
            // SAFETY: nobody writes the sources in this region; tasks pack disjoint bands.
            unsafe {
                if task % 2 == 0 {
                    plan.pack_x(&x, first + local, local, packed);
                } else {
                    plan.pack_d(&d, first + local, local, packed);
                }
            }
        });
        pool.run(tasks * count.div_ceil(wide), |_, task| {
            let (outputs, inputs) = (task / tasks * wide, task % tasks * per_task);
            let outputs = outputs..(outputs + wide).min(count);
            let inputs = inputs..(inputs + per_task).min(channels);
            let clears = first == 0 && !accumulate;
            // SAFETY: nobody writes the packed operands in this region; a task owns its part of dw.
            unsafe { plan.accumulate(packed, bands, inputs, outputs, dw, clears) };
        });
    }
}
