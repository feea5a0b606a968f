//! One image on its way from bits to samples, which can stop after any symbol: so that a thread decodes two at a time.
//!
//! Huffman decoding waits: each look at a table has to know how many bits the one before it took. A CPU that waits for
//! one image can work on another, if the two are interleaved symbol by symbol; they have nothing to do with each other
//! and each gives the same as alone.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::entropy::{self, AcTable, Bits, DcTable, Step};
use super::header::Header;
use super::points::{self, Maker, Points};
use super::resample::{Plane, ROWS};
use super::simd::{self, Level, Vector};
use super::{Region, Seek, idct};

/// Units that are decoded before their samples are made: so many blocks side by side fill a group, and few enough
/// coefficients stay next to the tables in the first-level cache.
const TOGETHER: usize = 4;
/// Blocks of a unit at most: two by two of three components.
const BLOCKS: usize = 12;
/// Groups of [`TOGETHER`] units, and one for what is not needed.
const GROUPS: usize = BLOCKS + 1;
/// Where a block goes that is not needed.
const NOWHERE: Place = Place(BLOCKS as u16 * 256);

/// Four blocks side by side: rows of four times eight coefficients.
pub(super) type Group = [i16; 256];

#[repr(align(64))]
struct Groups([Group; GROUPS]);

/// Where a block's first coefficient is in [`Groups`]: in the first row of one, at a multiple of eight.
#[derive(Clone, Copy)]
struct Place(u16);

impl Place {
    fn new(group: usize, block: usize) -> Self {
        assert!(group < BLOCKS && block < 4);
        Self((256 * group + 8 * block) as u16)
    }
}

/// A component in a unit.
#[derive(Clone, Copy, Default)]
struct Layout {
    /// Blocks.
    across: usize,
    down: usize,
    /// The first of its groups; there are `across` for each of its rows of blocks.
    first: usize,
}

/// What of an image stays the same while it is decoded.
struct Image {
    tables: Vec<(Rc<DcTable>, Rc<AcTable>)>,
    quantisation: [[i16; 64]; 3],
    layouts: [Layout; 3],
    /// Groups that are used.
    groups: usize,
    /// The component of each block of a unit.
    components: Vec<u8>,
    /// Where each goes, by the unit's place among [`TOGETHER`].
    places: [[Place; BLOCKS]; TOGETHER],
    region: Region,
    points: Points,
    /// Units from a point to the next.
    step: usize,
}

/// How far an image has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Going,
    /// All samples of the region are there.
    Whole,
    Damaged,
}

/// An image in the making, or memory for one.
pub(super) struct Lane {
    /// The entropy-coded data without stuffing.
    data: Vec<u8>,
    groups: Box<Groups>,
    pub(super) planes: [Plane; 3],
    /// What the inverse DCT took, if that is asked for.
    pub(super) idct: Option<Duration>,
    image: Option<Image>,
    maker: Maker,
    bits: Bits,
    /// In the block: the next coefficient.
    k: u32,
    place: Place,
    /// In the unit.
    block: usize,
    /// The unit.
    at: usize,
    /// The first unit of the row that the region has.
    first: usize,
    /// Rows of units that are done.
    rows: usize,
    /// Whether this unit is in the region; if not, `first` or the end is waited for.
    is_needed: bool,
    /// First coefficients of the blocks before, by component.
    previous: [i32; 3],
}

impl Lane {
    pub(super) fn new() -> Self {
        Self {
            data: vec![],
            groups: Box::new(Groups([[0; 256]; GROUPS])),
            planes: Default::default(),
            idct: None,
            image: None,
            maker: Maker::new(false, 1),
            bits: Bits::default(),
            k: 1,
            place: NOWHERE,
            block: 0,
            at: 0,
            first: 0,
            rows: 0,
            is_needed: false,
            previous: [0; 3],
        }
    }

    /// Takes an image. False if it is damaged.
    pub(super) fn begin(
        &mut self,
        header: &Header<'_>,
        tables: Vec<(Rc<DcTable>, Rc<AcTable>)>,
        region: Region,
        seek: &Seek<'_>,
    ) -> bool {
        if !entropy::unstuff(header.data, &mut self.data) {
            return false;
        }
        // An image without units would never end.
        let units = [region.x[1] - region.x[0], region.y[1] - region.y[0]];
        if units[0] == 0 && units[1] > 0 {
            return false;
        }
        let mut image = Image {
            tables,
            quantisation: [[0; 64]; 3],
            layouts: [Layout::default(); 3],
            groups: 0,
            components: vec![],
            places: [[NOWHERE; BLOCKS]; TOGETHER],
            region,
            points: Points::default(),
            step: 1,
        };
        for (i, component) in header.components[..header.count].iter().enumerate() {
            let Some(scales) = header.quantisation[component.table] else {
                return false;
            };
            image.quantisation[i] = scales.map(|scale| scale as i16);
            let layout = Layout {
                across: component.across,
                down: component.down,
                first: image.groups,
            };
            image.layouts[i] = layout;
            image.groups += layout.across * layout.down;
            for (y, x) in (0..layout.down).flat_map(|y| (0..layout.across).map(move |x| (y, x))) {
                let block = image.components.len();
                for (unit, places) in image.places.iter_mut().enumerate() {
                    let x = unit * layout.across + x;
                    let group = layout.first + y * layout.across + x / 4;
                    places[block] = Place::new(group, x % 4);
                }
                image.components.push(i as u8);
            }
            let plane = &mut self.planes[i];
            plane.pairs = 16 * units[0].div_ceil(TOGETHER) * layout.across;
            plane.stride = 2 * (8 * units[1] * layout.down).next_multiple_of(ROWS);
            let bytes = plane.pairs * plane.stride;
            plane.samples.resize(bytes.max(plane.samples.len()), 0);
        }
        image.step = points::step(image.components.len());
        if let Seek::Points(bytes) = seek {
            let bits = 8 * (self.data.len() - entropy::PADDING);
            image.points = Points::of_bytes(bytes, header.count)
                .filter(|points| points.fit(region.all, image.step, bits))
                .unwrap_or_default();
        }
        self.maker = Maker::new(matches!(seek, Seek::Note(_)), image.step);
        self.bits = Bits::new(&self.data, 0);
        (self.block, self.at, self.rows) = (0, 0, 0);
        self.previous = [0; 3];
        self.groups.0[..image.groups].as_flattened_mut().fill(0);
        self.image = Some(image);
        self.next_row() == Progress::Going && self.begin_block()
    }

    /// The points that were noted, if they were asked for.
    pub(super) fn points(&mut self) -> Option<Points> {
        std::mem::replace(&mut self.maker, Maker::new(false, 1)).finish()
    }

    fn image(&self) -> &Image {
        self.image.as_ref().expect("an image was taken")
    }

    /// Goes to the next row of units that the region has. The next unit begins at the next bit.
    fn next_row(&mut self) -> Progress {
        let image = self.image.as_ref().expect("an image was taken");
        let Region { x, y, row, all } = image.region;
        if self.rows == y[1] - y[0] {
            self.is_needed = false;
            if self.maker.is_wanted() && self.at < all {
                self.first = all;
                self.maker.see(self.at, &self.bits, self.previous);
                return Progress::Going;
            }
            self.maker.keep(!self.bits.is_over(&self.data));
            return Progress::Whole;
        }
        self.first = (y[0] + self.rows) * row + x[0];
        if let Some((unit, point)) = image.points.before(self.first, image.step)
            && unit > self.at
        {
            self.bits = Bits::new(&self.data, point.bit());
            self.previous = point.previous();
            self.at = unit;
        }
        self.is_needed = self.at == self.first;
        self.maker.see(self.at, &self.bits, self.previous);
        Progress::Going
    }

    /// Comes to the next unit, which begins at the next bit.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn next_unit<V: Vector>(&mut self) -> Progress {
        self.at += 1;
        if self.is_needed {
            let Region { x, .. } = self.image().region;
            let done = self.at - self.first;
            let is_end = done == x[1] - x[0];
            if is_end || done.is_multiple_of(TOGETHER) {
                let start = self.idct.map(|_| Instant::now());
                // SAFETY: the caller's word.
                unsafe { self.render::<V>((done - 1) / TOGETHER) };
                if let (Some(idct), Some(start)) = (&mut self.idct, start) {
                    *idct += start.elapsed();
                }
            }
            if is_end {
                if self.bits.is_over(&self.data) {
                    return Progress::Damaged;
                }
                self.rows += 1;
                return self.next_row();
            }
        } else if self.at == self.first {
            if self.at == self.image().region.all {
                self.maker.keep(!self.bits.is_over(&self.data));
                return Progress::Whole;
            }
            self.is_needed = true;
        }
        self.maker.see(self.at, &self.bits, self.previous);
        Progress::Going
    }

    /// Decodes the first coefficient of the next block. False if it is damaged.
    #[inline(always)]
    fn begin_block(&mut self) -> bool {
        let image = self.image.as_ref().expect("an image was taken");
        let component = usize::from(image.components[self.block]);
        self.place = match self.is_needed {
            true => image.places[(self.at - self.first) % TOGETHER][self.block],
            false => NOWHERE,
        };
        let (dc, _) = &image.tables[component];
        let previous = &mut self.previous[component];
        let is_good = entropy::first(&mut self.bits, &self.data, dc, previous);
        self.groups.0.as_flattened_mut()[usize::from(self.place.0)] = *previous as i16;
        self.k = 1;
        is_good
    }

    /// Goes on from a step that is not an ordinary one.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn finish<V: Vector>(&mut self, step: Step) -> Progress {
        let mut hot = self.hot();
        let is_end = hot.rare(step);
        let saved = hot.saved();
        self.restore(saved);
        let mut progress = Progress::Going;
        match is_end {
            None => return progress,
            Some(false) => progress = Progress::Damaged,
            Some(true) => {
                self.block += 1;
                if self.block == self.image().components.len() {
                    self.block = 0;
                    // SAFETY: the caller's word.
                    progress = unsafe { self.next_unit::<V>() };
                }
                if progress == Progress::Going && !self.begin_block() {
                    progress = Progress::Damaged;
                }
            }
        }
        let region = self.image().region;
        if progress == Progress::Damaged && self.rows == region.y[1] - region.y[0] {
            // Only points were still to be found.
            self.maker.keep(false);
            progress = Progress::Whole;
        }
        progress
    }

    /// Writes the samples of [`TOGETHER`] units, and makes place for the next.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn render<V: Vector>(&mut self, begin: usize) {
        let image = self.image.as_ref().expect("an image was taken");
        let count = image.tables.len();
        for ((layout, plane), scales) in image.layouts[..count]
            .iter()
            .zip(&mut self.planes)
            .zip(&image.quantisation)
        {
            for y in 0..layout.down {
                let top = 2 * 8 * (self.rows * layout.down + y);
                let groups = &self.groups.0[layout.first + y * layout.across..][..layout.across];
                for (i, group) in groups.iter().enumerate() {
                    // Sixteen pairs of columns a group, as `begin` has made the plane.
                    let column = 16 * (begin * layout.across + i);
                    let out =
                        &mut plane.samples[column * plane.stride..][..16 * plane.stride][top..];
                    assert!(top + 16 <= plane.stride);
                    // SAFETY: each of the 16 columns has 16 bytes from `top` on, as asserted.
                    unsafe { idct::inverse::<V>(group, scales, out.as_mut_ptr(), plane.stride) };
                }
            }
        }
        self.groups.0[..image.groups].as_flattened_mut().fill(0);
    }

    /// What the steps of a block need, in registers.
    #[inline(always)]
    fn hot(&mut self) -> Hot<'_> {
        let image = self.image.as_ref().expect("an image was taken");
        let (_, ac) = &image.tables[usize::from(image.components[self.block])];
        Hot {
            data: &self.data,
            ac,
            groups: &mut self.groups.0,
            place: self.place,
            bits: self.bits,
            k: self.k,
        }
    }

    #[inline(always)]
    fn restore(&mut self, (bits, k): (Bits, u32)) {
        (self.bits, self.k) = (bits, k);
    }
}

/// A block in the making.
struct Hot<'a> {
    data: &'a [u8],
    ac: &'a AcTable,
    groups: &'a mut [Group; GROUPS],
    place: Place,
    bits: Bits,
    /// The next coefficient.
    k: u32,
}

impl Hot<'_> {
    #[inline(always)]
    fn saved(&self) -> (Bits, u32) {
        (self.bits, self.k)
    }

    #[inline(always)]
    fn put(&mut self, k: u32, value: i16) {
        let place = entropy::place(k) + usize::from(self.place.0);
        // SAFETY: `place` is in the group's rows and columns of the first of four blocks, and a `Place` leads to the
        // same of one of `GROUPS`.
        unsafe { *self.groups.as_flattened_mut().get_unchecked_mut(place) = value };
    }

    /// Up to two coefficients that do not end the block. What is not that is returned, and nothing done.
    #[inline(always)]
    fn step(&mut self) -> Option<Step> {
        let step = self.ac.step(&self.bits);
        let after = self.k + step.goes();
        if after >= 64 {
            return Some(step);
        }
        // In this order: where there is no second, the first is at the same place.
        self.put(after, step.second());
        self.put(self.k + step.first_goes(), step.first());
        self.bits.skip(step.bits());
        self.k = after;
        None
    }

    /// What `step` has returned. None if the block goes on, otherwise whether it ended well.
    #[inline(always)]
    fn rare(&mut self, step: Step) -> Option<bool> {
        self.bits.fill(self.data);
        let symbol = if step.is_symbol() {
            self.ac.symbol(&self.bits, step)
        } else if step.is_pair() && self.k + step.first_goes() >= 64 {
            // The block ends with the first: what looks like a second is of the next block.
            self.ac.first(&self.bits)
        } else {
            let after = self.k + step.goes();
            self.put(self.k + step.first_goes(), step.first());
            if after == 64 && step.is_pair() {
                self.put(64, step.second());
            }
            self.bits.skip(step.bits());
            return Some(entropy::is_end(after));
        };
        self.k += symbol.goes();
        self.put(self.k, symbol.number(&self.bits) as i16);
        self.bits.skip(symbol.bits());
        (self.k >= 64).then(|| entropy::is_end(self.k))
    }
}

/// Goes on with the first lane, or with both, until one of them is done: which, and whether it is whole.
pub(super) fn run(level: Level, lanes: &mut [Lane; 2], both: [bool; 2]) -> (usize, bool) {
    match level {
        // SAFETY: it needs no instructions but the target's.
        Level::Portable => unsafe { run_as::<simd::Portable>(lanes, both) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level is available, by `Level::detect` or the tests' check of it.
        Level::Avx2 => unsafe { run_avx2(lanes, both) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx512 => unsafe { run_avx512(lanes, both) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("no other level is available"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
fn run_avx2(lanes: &mut [Lane; 2], both: [bool; 2]) -> (usize, bool) {
    // SAFETY: the instructions are there, as the caller says.
    unsafe { run_as::<simd::x86::Avx2>(lanes, both) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,bmi1,bmi2,lzcnt")]
fn run_avx512(lanes: &mut [Lane; 2], both: [bool; 2]) -> (usize, bool) {
    // SAFETY: as above.
    unsafe { run_as::<simd::x86::Avx512>(lanes, both) }
}

/// # Safety
/// The CPU has the vector's instructions.
#[inline(always)]
unsafe fn run_as<V: Vector>(lanes: &mut [Lane; 2], are_busy: [bool; 2]) -> (usize, bool) {
    // Five times at most 11 bits of 56 (see `entropy::LOOK`).
    macro_rules! five {
        ($each:ident) => {
            $each!();
            $each!();
            $each!();
            $each!();
            $each!();
        };
    }
    let [a, b] = lanes;
    loop {
        let (which, step) = if are_busy == [true; 2] {
            let (mut hot_a, mut hot_b) = (a.hot(), b.hot());
            let stopped = 'steps: loop {
                hot_a.bits.fill(hot_a.data);
                hot_b.bits.fill(hot_b.data);
                macro_rules! both {
                    () => {
                        if let Some(step) = hot_a.step() {
                            break 'steps (0, step);
                        }
                        if let Some(step) = hot_b.step() {
                            break 'steps (1, step);
                        }
                    };
                }
                five!(both);
            };
            let (saved_a, saved_b) = (hot_a.saved(), hot_b.saved());
            a.restore(saved_a);
            b.restore(saved_b);
            stopped
        } else {
            let which = usize::from(are_busy[1]);
            let lane = if which == 0 { &mut *a } else { &mut *b };
            let mut hot = lane.hot();
            let step = 'steps: loop {
                hot.bits.fill(hot.data);
                macro_rules! one {
                    () => {
                        if let Some(step) = hot.step() {
                            break 'steps step;
                        }
                    };
                }
                five!(one);
            };
            let saved = hot.saved();
            lane.restore(saved);
            (which, step)
        };
        let lane = if which == 0 { &mut *a } else { &mut *b };
        // SAFETY: the caller's word.
        let progress = unsafe { lane.finish::<V>(step) };
        if progress != Progress::Going {
            return (which, progress == Progress::Whole);
        }
    }
}
