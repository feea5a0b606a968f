//! The gradient of a convolution's weight: dw[tap, c, o] = sum over pixels of x[pixel + tap, c] d[pixel, o].
//!
//! Both operands are packed through their [`Source`]: x in panels of eight channels, `[c / 8][row][column][8]`, d in
//! panels of a tile's width, `[o / nr][pixel][nr]`, so that what a micro-kernel reads is dense and stays in the
//! first-level cache. The micro-kernel keeps an 8 x nr tile of dw in registers while it runs over some two hundred
//! pixels.
//!
//! Work is cut by shape only, so sums have one order:
//! - *Slices*, for small weights and large planes: each task takes a slice of the pixels, packs them block by block
//!   in its own scratch, and adds to a dw of its own; the slices are added up in order at the end.
//! - *Groups*, for large weights: a group of images is packed by all workers into shared memory, then each task owns a
//!   part of dw and runs over the whole group.

use std::ops::Range;

use graph::Geometry;

use super::fuse::{Read, Source, read_as};
use super::memory::{Scratch, Span};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};
use super::weights::{CHUNK, Panels};

/// Whether whole patches are packed: a few channels only, which would waste most of a
/// vector.
fn has_patches(kernel: usize, channels: usize) -> bool {
    kernel > 1 && channels < 8 && kernel * kernel * channels + 16 <= PATCH
}

/// Channels of the largest patch, and room behind.
const PATCH: usize = 8 * CHUNK;

/// What a window sees, row by row, as f32.
struct Patch {
    from: (usize, usize, usize),
    kernel: usize,
    stride: usize,
    depth: usize,
    /// The first `depth` are the patch, the others zero.
    values: [f32; PATCH],
}

impl Patch {
    /// Windows of a side of `kernel` on planes of height, width and channels `from`.
    fn new(from: (usize, usize, usize), kernel: usize, stride: usize) -> Self {
        let depth = kernel * kernel * from.2;
        assert!(depth + 16 <= PATCH, "a patch has room");
        Self {
            from,
            kernel,
            stride,
            depth,
            values: [0.0; PATCH],
        }
    }

    /// Reads the patch of the result at row `gy`, column `gx`.
    ///
    /// # Safety
    /// The CPU has `I`'s instructions, the image is one of the source's, and nobody writes it meanwhile.
    #[inline(always)]
    unsafe fn read<I: Isa, S: Read>(&mut self, source: &S, image: usize, gy: usize, gx: usize) {
        let ((h, w, c), k) = (self.from, self.kernel);
        let pad = (k - 1) / 2;
        let (y0, x0) = (gy * self.stride, gx * self.stride);
        let inside_y = pad.saturating_sub(y0)..k.min((h + pad).saturating_sub(y0));
        let inside_x = pad.saturating_sub(x0)..k.min((w + pad).saturating_sub(x0));
        if inside_y.len() < k || inside_x.len() < k {
            self.values[..self.depth].fill(0.0);
        }
        for ky in inside_y {
            let at = ((image * h + y0 + ky - pad) * w + x0 + inside_x.start - pad) * c;
            let length = inside_x.len() * c;
            let first = (ky * k + inside_x.start) * c;
            // SAFETY: the caller's word; `values` has room behind the patch for a whole vector.
            unsafe {
                let to = self.values.as_mut_ptr().add(first);
                if S::FLAT {
                    for j in (0..length).step_by(I::LANES) {
                        let n = (length - j).min(I::LANES);
                        I::store_part(to.add(j), source.part::<I>(at, j, n), n);
                    }
                } else {
                    for pixel in 0..inside_x.len() {
                        let v = source.part::<I>(at + pixel * c, 0, c);
                        I::store_part(to.add(pixel * c), v, c);
                    }
                }
            }
        }
    }
}

/// Channels of x in a panel: rows of a tile.
const ROWS: usize = 8;
/// Pixels of a block: a panel of each operand fits the first-level cache.
const BLOCK: usize = 196;
/// Largest weight, in values, that is worth a copy for each slice.
const SLICED: usize = 160 << 10;
/// Slices at most.
const SLICES: usize = 16;
/// Tasks that a group is worth at least, if its weight is large enough.
const TASKS: usize = 32;
/// Packed images of a group, bytes.
const GROUP_BYTES: usize = 6 << 20;

/// How the work is cut: a function of the shapes and the level only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    level: Level,
    g: Geometry,
    batch: usize,
    /// x is packed as patches: the whole window becomes channels.
    patches: bool,
    /// Pixels count one by one over all images (no window, or patches).
    linear: bool,
    /// Small planes are packed pixel by pixel, each for all images of a group: a tap meets only pixels that are there.
    by_pixel: bool,
    panels: Panels,
    /// Rows (pixels, if linear) of a block.
    rows: usize,
    cut: Cut,
}

#[derive(Clone, Copy, Debug)]
enum Cut {
    Slices(usize),
    /// Images of a group.
    Groups(usize),
}

impl Plan {
    pub(crate) fn new(level: Level, g: &Geometry, batch: usize) -> Self {
        let panels = Panels::of(g, 2 * level.lanes());
        let patches = has_patches(g.kernel, g.input.c);
        let linear = g.kernel == 1 || patches;
        let by_pixel = !linear && g.input.pixels().max(g.output.pixels()) <= 4;
        let rows = if linear {
            BLOCK
        } else {
            (BLOCK / g.output.w).clamp(1, g.output.h)
        };
        let mut plan = Self {
            level,
            g: *g,
            batch,
            patches,
            linear,
            by_pixel,
            panels,
            rows,
            cut: Cut::Slices(1),
        };
        if panels.len() <= SLICED && !by_pixel && (g.output.pixels() > BLOCK || patches) {
            plan.cut = Cut::Slices(plan.blocks().min(SLICES));
        } else {
            let image = (plan.x_image_len() * plan.x_panels() + plan.d_image_len()) * 4;
            plan.cut = Cut::Groups((GROUP_BYTES / image).clamp(1, batch));
        }
        plan
    }

    /// Channels of x as they are packed.
    fn depth(&self) -> usize {
        if self.patches {
            self.panels.depth()
        } else {
            self.panels.inputs
        }
    }

    fn x_panels(&self) -> usize {
        self.depth().div_ceil(ROWS)
    }

    /// Blocks of all images.
    fn blocks(&self) -> usize {
        let pixels = self.batch * self.g.output.pixels();
        if self.linear {
            pixels.div_ceil(self.rows)
        } else {
            self.batch * self.g.output.h.div_ceil(self.rows)
        }
    }

    /// Packed columns of one residue.
    fn columns(&self) -> usize {
        self.g.output.w + (self.g.kernel - 1) / self.g.stride
    }

    /// Values of a packed row of x in a panel.
    fn x_row(&self) -> usize {
        self.g.stride * self.columns() * ROWS
    }

    fn packed_rows(&self, rows: usize) -> usize {
        (rows - 1) * self.g.stride + self.g.kernel
    }

    /// Values of a panel of x for `rows` rows of results (pixels, if linear).
    fn x_len(&self, rows: usize) -> usize {
        if self.linear {
            rows * ROWS
        } else {
            self.packed_rows(rows) * self.x_row()
        }
    }

    /// Values of one image in a panel of x.
    fn x_image_len(&self) -> usize {
        if self.by_pixel {
            self.g.input.pixels() * ROWS
        } else if self.linear {
            self.g.output.pixels() * ROWS
        } else {
            self.x_len(self.g.output.h)
        }
    }

    /// Values of one image in all panels of d.
    fn d_image_len(&self) -> usize {
        self.g.output.pixels() * self.panels.count() * self.panels.nr
    }

    fn block_pixels(&self) -> usize {
        if self.linear {
            self.rows
        } else {
            self.rows * self.g.output.w
        }
    }

    /// f32 of scratch per worker.
    pub(crate) fn worker_len(&self) -> usize {
        match self.cut {
            Cut::Slices(_) => {
                let d = self.block_pixels() * self.panels.count() * self.panels.nr;
                self.x_panels() * self.x_len(self.rows) + d
            }
            Cut::Groups(_) => 0,
        }
    }

    /// f32 of memory that all workers share.
    pub(crate) fn shared_len(&self) -> usize {
        match self.cut {
            Cut::Slices(slices) => slices * self.panels.len(),
            Cut::Groups(images) => {
                images * (self.x_image_len() * self.x_panels() + self.d_image_len())
            }
        }
    }

    /// Where tap `tap` starts in a packed row of x.
    fn tap_at(&self, tap: usize) -> usize {
        let (ky, kx) = (tap / self.g.kernel, tap % self.g.kernel);
        let s = self.g.stride;
        ky * self.x_row() + ((kx % s) * self.columns() + kx / s) * ROWS
    }
}

/// Packs rows of x.
struct PackX<'a, S: Read> {
    plan: &'a Plan,
    source: S,
    image: usize,
    /// Packed rows, counted from the top of the window of the first row of results; or pixels over all images.
    rows: Range<usize>,
    /// Row of results that the first packed row belongs to.
    first: usize,
    to: *mut f32,
    /// Between panels.
    panel_len: usize,
    /// Between pixels, of small planes.
    pixel_len: usize,
}

impl<S: Read> Job for PackX<'_, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let (plan, g) = (self.plan, &self.plan.g);
        let (h, w, c) = (g.input.h, g.input.w, g.input.c);
        // SAFETY: `to` has room for the rows in every panel, and pixels are inside the plane.
        unsafe {
            if plan.by_pixel {
                for pixel in 0..h * w {
                    let at = (self.image * h * w + pixel) * c;
                    self.pixel::<I>(at, self.to.add(pixel * self.pixel_len));
                }
            } else if plan.patches {
                self.patches::<I>();
            } else if plan.linear {
                for (i, result) in self.rows.clone().enumerate() {
                    let pixel = if g.stride == 1 {
                        result
                    } else {
                        let (image, rest) =
                            (result / g.output.pixels(), result % g.output.pixels());
                        let (y, x) = (rest / g.output.w * g.stride, rest % g.output.w * g.stride);
                        (image * h + y) * w + x
                    };
                    self.pixel::<I>(pixel * c, self.to.add(i * ROWS));
                }
            } else {
                let pad = g.pad() as isize;
                for (i, row) in self.rows.clone().enumerate() {
                    let y = (self.first * g.stride + row) as isize - pad;
                    let inside = y >= 0 && y < h as isize;
                    for residue in 0..g.stride {
                        for column in 0..plan.columns() {
                            let x = (column * g.stride + residue) as isize - pad;
                            let to = (residue * plan.columns() + column) * ROWS;
                            let to = self.to.add(i * plan.x_row() + to);
                            if inside && x >= 0 && x < w as isize {
                                let at = ((self.image * h + y as usize) * w + x as usize) * c;
                                self.pixel::<I>(at, to);
                            } else {
                                for panel in 0..plan.x_panels() {
                                    std::ptr::write_bytes(to.add(panel * self.panel_len), 0, ROWS);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

impl<S: Read> PackX<'_, S> {
    #[inline(always)]
    unsafe fn pixel<I: Isa>(&self, at: usize, to: *mut f32) {
        let channels = self.plan.g.input.c;
        let mut c = 0;
        // SAFETY: as in `run`.
        unsafe {
            while c + I::LANES <= channels {
                let to = to.add(c / ROWS * self.panel_len);
                I::scatter8(to, self.panel_len, self.source.full::<I>(at, c));
                c += I::LANES;
            }
            if c < channels {
                let v = I::to_array(self.source.part::<I>(at, c, channels - c));
                for (i, values) in v.chunks_exact(ROWS).enumerate() {
                    if c + i * ROWS < channels {
                        let to = to.add((c / ROWS + i) * self.panel_len);
                        to.copy_from_nonoverlapping(values.as_ptr(), ROWS);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn patches<I: Isa>(&self) {
        let g = &self.plan.g;
        let from = (g.input.h, g.input.w, g.input.c);
        let mut patch = Patch::new(from, g.kernel, g.stride);
        for (i, result) in self.rows.clone().enumerate() {
            let (image, rest) = (result / g.output.pixels(), result % g.output.pixels());
            // SAFETY: as in `run`; behind the patch there are zeros.
            unsafe {
                patch.read::<I, S>(&self.source, image, rest / g.output.w, rest % g.output.w);
                for panel in 0..self.plan.x_panels() {
                    let values = &patch.values[panel * ROWS..(panel + 1) * ROWS];
                    let to = self.to.add(panel * self.panel_len + i * ROWS);
                    to.copy_from_nonoverlapping(values.as_ptr(), ROWS);
                }
            }
        }
    }
}

/// Packs pixels of d.
struct PackD<'a, S: Read> {
    plan: &'a Plan,
    source: S,
    /// Over all images.
    pixels: Range<usize>,
    to: *mut f32,
    panel_len: usize,
    /// Between pixels.
    pixel_len: usize,
}

impl<S: Read> Job for PackD<'_, S> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let channels = self.plan.panels.outputs;
        for (i, pixel) in self.pixels.clone().enumerate() {
            let at = pixel * channels;
            for panel in 0..self.plan.panels.count() {
                for half in 0..2 {
                    let c = panel * I::NR + half * I::LANES;
                    // SAFETY: `to` has room for the pixels in every panel, and the pixels are inside.
                    unsafe {
                        let v = if c + I::LANES <= channels {
                            self.source.full::<I>(at, c)
                        } else if c < channels {
                            self.source.part::<I>(at, c, channels - c)
                        } else {
                            I::zero()
                        };
                        let to = panel * self.panel_len + i * self.pixel_len + half * I::LANES;
                        I::store(self.to.add(to), v);
                    }
                }
            }
        }
    }
}

/// Pixels that a tile runs over: runs of `width` pixels, `rows` of them in each of `images` images.
#[derive(Clone, Copy)]
struct Stretch {
    x: *const f32,
    d: *const f32,
    width: usize,
    rows: usize,
    images: usize,
    /// Between rows and images of x and of d.
    x_row: usize,
    x_image: usize,
    d_row: usize,
    d_image: usize,
}

/// Adds to M rows of a tile of dw.
struct Accumulate<const M: usize> {
    over: Stretch,
    dw: *mut f32,
}

impl<const M: usize> Job for Accumulate<M> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let Self { over, dw } = self;
        // SAFETY: dw holds M rows of NR, the stretch lies in the packed operands.
        unsafe {
            let mut sums = [[I::zero(); 2]; M];
            for image in 0..over.images {
                for row in 0..over.rows {
                    let mut x = over.x.add(image * over.x_image + row * over.x_row);
                    let mut d = over.d.add(image * over.d_image + row * over.d_row);
                    for _ in 0..over.width {
                        let (d0, d1) = (I::load(d), I::load(d.add(I::LANES)));
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let v = I::splat(*x.add(i));
                            sum[0] = I::fma(v, d0, sum[0]);
                            sum[1] = I::fma(v, d1, sum[1]);
                        }
                        x = x.add(ROWS);
                        d = d.add(I::NR);
                    }
                }
            }
            // A block's sum is added as one: rounding errors grow with the length of a chain.
            for (i, sum) in sums.iter().enumerate() {
                let (p0, p1) = (dw.add(i * I::NR), dw.add(i * I::NR + I::LANES));
                I::store(p0, I::add(I::load(p0), sum[0]));
                I::store(p1, I::add(I::load(p1), sum[1]));
            }
        }
    }
}

/// # Safety
/// As for [`Accumulate`], with `rows` rows.
unsafe fn accumulate(level: Level, over: Stretch, dw: *mut f32, rows: usize) {
    // SAFETY: the caller's word; the small tile has room for all rows.
    unsafe {
        if rows < ROWS {
            let nr = 2 * level.lanes();
            let mut tile = [0.0f32; ROWS * 32];
            tile.as_mut_ptr().copy_from_nonoverlapping(dw, rows * nr);
            accumulate(level, over, tile.as_mut_ptr(), ROWS);
            dw.copy_from_nonoverlapping(tile.as_ptr(), rows * nr);
        } else if level.lanes() == 16 {
            level.call(Accumulate::<8> { over, dw });
        } else {
            // Sixteen registers hold half a tile.
            level.call(Accumulate::<4> { over, dw });
            let (over, dw) = (
                Stretch {
                    x: over.x.add(4),
                    ..over
                },
                dw.add(4 * 2 * level.lanes()),
            );
            level.call(Accumulate::<4> { over, dw });
        }
    }
}

impl Plan {
    /// Adds the products of packed operands to all of `dw` that lies in x's panels `inputs` and d's panel `output`.
    ///
    /// # Safety
    /// The stretch for panel 0 and tap 0 lies in the operands, and so do those of the other panels, `x_panel` apart;
    /// nobody else touches that part of dw.
    unsafe fn tiles(
        &self,
        over: Stretch,
        x_panel: usize,
        inputs: Range<usize>,
        output: usize,
        dw: *mut f32,
    ) {
        let panels = &self.panels;
        let (taps, channels) = if self.patches {
            (1, panels.depth())
        } else {
            (panels.taps, panels.inputs)
        };
        for input in inputs {
            let c = input * ROWS;
            let rows = (channels - c).min(ROWS);
            for tap in 0..taps {
                let at = if self.patches {
                    output * panels.panel_len() + c * panels.nr
                } else {
                    let first = output * panels.panel_len();
                    first + panels.rows(c / CHUNK, tap) + c % CHUNK * panels.nr
                };
                let tap_at = if self.linear { 0 } else { self.tap_at(tap) };
                // SAFETY: the caller's word.
                unsafe {
                    let x = over.x.add(input * x_panel + tap_at);
                    accumulate(self.level, Stretch { x, ..over }, dw.add(at), rows);
                }
            }
        }
    }
}

impl Plan {
    /// As `tiles`, for small planes of `images.1` images in room for `images.0`: every tap adds the products of each
    /// pair of pixels that it brings together.
    ///
    /// # Safety
    /// The operands hold their planes, and nobody else touches that part of dw.
    unsafe fn pixels(
        &self,
        x: *const f32,
        d: *const f32,
        images: (usize, usize),
        x_panel: usize,
        inputs: Range<usize>,
        output: usize,
        dw: *mut f32,
    ) {
        let (g, panels) = (&self.g, &self.panels);
        for input in inputs {
            let c = input * ROWS;
            let rows = (panels.inputs - c).min(ROWS);
            for tap in 0..panels.taps {
                let first = output * panels.panel_len() + c % CHUNK * panels.nr;
                let at = first + panels.rows(c / CHUNK, tap);
                for pixel in 0..g.output.pixels() {
                    let y = pixel / g.output.w * g.stride + tap / g.kernel;
                    let z = pixel % g.output.w * g.stride + tap % g.kernel;
                    let (y, z) = (y.wrapping_sub(g.pad()), z.wrapping_sub(g.pad()));
                    if y >= g.input.h || z >= g.input.w {
                        continue;
                    }
                    // SAFETY: the caller's word.
                    unsafe {
                        let from = (y * g.input.w + z) * images.0 * ROWS;
                        let over = Stretch {
                            x: x.add(input * x_panel + from),
                            d: d.add(pixel * images.0 * panels.nr),
                            width: images.1,
                            rows: 1,
                            images: 1,
                            x_row: 0,
                            x_image: 0,
                            d_row: 0,
                            d_image: 0,
                        };
                        accumulate(self.level, over, dw.add(at), rows);
                    }
                }
            }
        }
    }
}

/// dw = gradient of the weight, added to what is there if `accumulate`; `dw` lies as [`Panels`] say. `shared` is of
/// [`Plan::shared_len`].
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
    match plan.cut {
        Cut::Slices(slices) => {
            by_slices(pool, scratch, shared, plan, slices, &x, &d);
            add_up(pool, plan.panels.len(), slices, shared, dw, accumulate);
        }
        Cut::Groups(images) => {
            by_groups(pool, shared, plan, images, &x, &d, dw, accumulate);
        }
    }
}

fn by_slices<T: Element>(
    pool: &mut Pool,
    scratch: Scratch<'_>,
    shared: Span<'_, f32>,
    plan: &Plan,
    slices: usize,
    x: &Source<'_, T>,
    d: &Source<'_, T>,
) {
    let (g, blocks) = (&plan.g, plan.blocks());
    let row_blocks = g.output.h.div_ceil(plan.rows);
    pool.run(slices, |worker, slice| {
        let share = scratch.of(worker).part(0..plan.worker_len());
        let x_panel = plan.x_len(plan.rows);
        let d_panel = plan.block_pixels() * plan.panels.nr;
        let packed_x = share.ptr();
        let len = plan.panels.len();
        // SAFETY: the share belongs to this worker and is `worker_len` long: x's panels, then d's. Each slice has a
        // dw of its own. Nobody writes the sources in this region.
        unsafe {
            let packed_d = packed_x.add(plan.x_panels() * x_panel);
            let dw = shared.part(slice * len..(slice + 1) * len);
            dw.get_mut().fill(0.0);
            for block in blocks * slice / slices..blocks * (slice + 1) / slices {
                let (image, first, rows, pixels) = if plan.linear {
                    let first = block * plan.rows;
                    let all = plan.batch * g.output.pixels();
                    let pixels = first..(first + plan.rows).min(all);
                    (0, 0, pixels.clone(), pixels)
                } else {
                    let (image, first) = (block / row_blocks, block % row_blocks * plan.rows);
                    let last = (first + plan.rows).min(g.output.h);
                    let start = image * g.output.h;
                    let pixels = (start + first) * g.output.w..(start + last) * g.output.w;
                    (image, first, 0..plan.packed_rows(last - first), pixels)
                };
                let (to, panel_len) = (packed_x, x_panel);
                read_as!(*x, source => plan.level.call(PackX { plan, source, image, rows, first, to, panel_len, pixel_len: 0 }));
                let (to, panel_len, over) = (packed_d, d_panel, pixels.clone());
                let pixel_len = plan.panels.nr;
                read_as!(*d, source => plan.level.call(PackD { plan, source, pixels: over, to, panel_len, pixel_len }));
                let (width, rows) = if plan.linear {
                    (pixels.len(), 1)
                } else {
                    (g.output.w, pixels.len() / g.output.w)
                };
                for output in 0..plan.panels.count() {
                    let over = Stretch {
                        x: packed_x,
                        d: packed_d.add(output * d_panel),
                        width,
                        rows,
                        images: 1,
                        x_row: g.stride * plan.x_row(),
                        x_image: 0,
                        d_row: g.output.w * plan.panels.nr,
                        d_image: 0,
                    };
                    plan.tiles(over, x_panel, 0..plan.x_panels(), output, dw.ptr());
                }
            }
        }
    });
}

/// dw of `len` values is the sum of the slices', in their order.
pub(crate) fn add_up(
    pool: &mut Pool,
    len: usize,
    slices: usize,
    shared: Span<'_, f32>,
    dw: Span<'_, f32>,
    accumulate: bool,
) {
    const PART: usize = 16 << 10;
    pool.run(len.div_ceil(PART), |_, task| {
        let part = task * PART..((task + 1) * PART).min(len);
        // SAFETY: nobody writes the slices in this region; tasks write disjoint parts of dw.
        unsafe {
            let dw = dw.part(part.clone()).get_mut();
            if !accumulate {
                dw.fill(0.0);
            }
            for slice in 0..slices {
                let from = shared
                    .part(slice * len + part.start..slice * len + part.end)
                    .get();
                dw.iter_mut().zip(from).for_each(|(dw, v)| *dw += v);
            }
        }
    });
}

fn by_groups<T: Element>(
    pool: &mut Pool,
    shared: Span<'_, f32>,
    plan: &Plan,
    images: usize,
    x: &Source<'_, T>,
    d: &Source<'_, T>,
    dw: Span<'_, f32>,
    accumulate: bool,
) {
    let (g, panels) = (&plan.g, &plan.panels);
    let (x_image, d_image) = (plan.x_image_len(), g.output.pixels() * panels.nr);
    let x_panel = images * x_image;
    let d_panel = images * d_image;
    let (packed_x, rest) = (
        shared.part(0..plan.x_panels() * x_panel),
        plan.x_panels() * x_panel,
    );
    let packed_d = shared.part(rest..rest + panels.count() * d_panel);
    // A task's part of dw: the more, the less often operands are read; but enough tasks to share.
    let (mut per_task, mut wide) = (CHUNK / ROWS, 1);
    let count_of = |per_task: usize, wide: usize| {
        plan.x_panels().div_ceil(per_task) * panels.count().div_ceil(wide)
    };
    if count_of(per_task, 2) >= TASKS {
        wide = 2;
    }
    if count_of(2 * per_task, wide) >= TASKS {
        per_task *= 2;
    }
    let tasks = plan.x_panels().div_ceil(per_task);
    // Images whose pixels make a block.
    let block_images = (BLOCK / g.output.pixels()).max(1);
    for first in (0..plan.batch).step_by(images) {
        let count = images.min(plan.batch - first);
        pool.run(2 * count, |_, task| {
            let (local, is_d) = (task / 2, task % 2 == 1);
            let image = first + local;
            // SAFETY: nobody writes the sources in this region; tasks pack disjoint images.
            unsafe {
                if is_d {
                    let pixels = image * g.output.pixels()..(image + 1) * g.output.pixels();
                    let (at, pixel_len) = if plan.by_pixel {
                        (local * panels.nr, images * panels.nr)
                    } else {
                        (local * d_image, panels.nr)
                    };
                    let to = packed_d.part(at..packed_d.len()).ptr();
                    let panel_len = d_panel;
                    read_as!(*d, source => plan.level.call(PackD { plan, source, pixels, to, panel_len, pixel_len }));
                } else {
                    let rows = if plan.linear {
                        image * g.output.pixels()..(image + 1) * g.output.pixels()
                    } else {
                        0..plan.packed_rows(g.output.h)
                    };
                    let (at, pixel_len) = if plan.by_pixel {
                        (local * ROWS, images * ROWS)
                    } else {
                        (local * x_image, 0)
                    };
                    let to = packed_x.part(at..packed_x.len()).ptr();
                    let (panel_len, first) = (x_panel, 0);
                    read_as!(*x, source => plan.level.call(PackX { plan, source, image, rows, first, to, panel_len, pixel_len }));
                }
            }
        });
        pool.run(tasks * panels.count().div_ceil(wide), |_, task| {
            let (outputs, chunk) = (task / tasks * wide, task % tasks);
            let outputs = outputs..(outputs + wide).min(panels.count());
            let inputs = chunk * per_task..((chunk + 1) * per_task).min(plan.x_panels());
            // SAFETY: nobody writes the packed operands in this region; a task owns the rows of its inputs and
            // outputs in dw.
            unsafe {
                if first == 0 && !accumulate {
                    for output in outputs.clone() {
                        plan.clear(inputs.clone(), output, dw);
                    }
                }
                if plan.by_pixel {
                    let (x, d) = (packed_x.ptr(), packed_d.ptr());
                    for output in outputs.clone() {
                        let d = d.add(output * d_panel);
                        plan.pixels(
                            x,
                            d,
                            (images, count),
                            x_panel,
                            inputs.clone(),
                            output,
                            dw.ptr(),
                        );
                    }
                    return;
                }
                for block in (0..count).step_by(block_images) {
                    // Planes larger than a block are cut into rows.
                    let images = block_images.min(count - block);
                    let (step, all) = if plan.linear {
                        (BLOCK, images * g.output.pixels())
                    } else if images > 1 {
                        (g.output.h, g.output.h)
                    } else {
                        (plan.rows, g.output.h)
                    };
                    for row in (0..all).step_by(step) {
                        let rows = step.min(all - row);
                        let (width, rows, images, x_at, d_at) = if plan.linear {
                            (rows, 1, 1, row * ROWS, row * panels.nr)
                        } else {
                            let x_at = row * g.stride * plan.x_row();
                            (g.output.w, rows, images, x_at, row * g.output.w * panels.nr)
                        };
                        for output in outputs.clone() {
                            let over = Stretch {
                                x: packed_x.ptr().add(block * x_image + x_at),
                                d: packed_d
                                    .ptr()
                                    .add(output * d_panel + block * d_image + d_at),
                                width,
                                rows,
                                images,
                                x_row: g.stride * plan.x_row(),
                                x_image,
                                d_row: g.output.w * panels.nr,
                                d_image,
                            };
                            plan.tiles(over, x_panel, inputs.clone(), output, dw.ptr());
                        }
                    }
                }
            }
        });
    }
}

impl Plan {
    /// Zeros the part of dw that lies in x's panels `inputs` and d's panel `output`.
    ///
    /// # Safety
    /// Nobody else touches it.
    unsafe fn clear(&self, inputs: Range<usize>, output: usize, dw: Span<'_, f32>) {
        let panels = &self.panels;
        let first = output * panels.panel_len();
        for input in inputs {
            let c = input * ROWS;
            let (taps, channels) = if self.patches {
                (1, panels.depth())
            } else {
                (panels.taps, panels.inputs)
            };
            let rows = (channels - c).min(ROWS);
            for tap in 0..taps {
                let at = if self.patches {
                    first + c * panels.nr
                } else {
                    first + panels.rows(c / CHUNK, tap) + c % CHUNK * panels.nr
                };
                // SAFETY: the caller's word.
                unsafe { dw.part(at..at + rows * panels.nr).get_mut() }.fill(0.0);
            }
        }
    }
}
