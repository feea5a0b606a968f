//! An image between its file and its planes: which blocks are read next, and what becomes of those that were.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::Coefficients;
use super::entropy::{self, Group, Pair, Stream};
use super::header::Header;
use super::idct;
use super::points::{self, Maker, Points};
use super::resample::{Plane, ROWS};
use super::simd::{Level, Vector, Work};
use crate::crop::Rect;

/// Units that are decoded before their samples are made: so many blocks side by side fill a group, and few enough
/// coefficients stay next to the tables in the first-level cache.
const TOGETHER: usize = 4;
/// Blocks that are passed over at once, about.
const PASSED: usize = 120;

/// Units that the crop needs, from the first to before the last.
#[derive(Clone, Copy, Default)]
pub(super) struct Region {
    pub(super) x: [usize; 2],
    pub(super) y: [usize; 2],
    /// Units in a row of the image.
    row: usize,
    /// And in all of it.
    all: usize,
}

impl Region {
    pub(super) fn new(header: &Header<'_>, crop: Rect) -> Self {
        // Upsampling looks at the sample beside a pixel's own, which is at most two pixels away.
        let margin = |factor: usize| if factor > 1 { 2 } else { 0 };
        let range = |begin: usize, length: usize, image: usize, factor: usize| {
            let first = begin.saturating_sub(margin(factor)) / (8 * factor);
            let end = (begin + length + margin(factor)).min(image);
            [first, end.div_ceil(8 * factor)]
        };
        let row = header.width.div_ceil(8 * header.across);
        Self {
            x: range(crop.x, crop.w, header.width, header.across),
            y: range(crop.y, crop.h, header.height, header.down),
            row,
            all: row * header.height.div_ceil(8 * header.down),
        }
    }

    /// None of it.
    pub(super) fn nothing(header: &Header<'_>) -> Self {
        let (x, y, w, h) = (0, 0, 0, 0);
        Self {
            x: [0, 0],
            y: [0, 0],
            ..Self::new(header, Rect { x, y, w, h })
        }
    }

    /// Units across.
    fn width(&self) -> usize {
        self.x[1] - self.x[0]
    }
}

/// A component in a unit's memory.
#[derive(Clone, Copy, Default)]
struct Layout {
    /// Blocks in a unit.
    across: usize,
    down: usize,
    /// Of its groups; there are `across` for each of its rows of blocks.
    first: usize,
}

/// Where decoding begins.
pub(crate) enum Seek<'a> {
    /// At the beginning.
    Start,
    /// At the points before what the crop needs: what [`Seek::Note`] has noted of the same file. Pixels are the same.
    Points(&'a [u8]),
    /// At the beginning, and on to the end, to note points. Nothing is noted of a file that is damaged.
    Note,
}

/// From bits to planes, and memory that is used again for every image.
pub(super) struct Scan {
    pub(super) stream: Stream,
    pub(super) planes: [Plane; 3],
    /// What the inverse DCT took, if that is asked for.
    pub(super) idct: Option<Duration>,
    pub(super) region: Region,
    /// Components.
    count: usize,
    layouts: [Layout; 3],
    quantisation: [[i16; 64]; 3],
    /// In a unit.
    blocks: usize,
    /// Units that are passed over at once.
    most: usize,
    /// Empty if there are none.
    points: Points,
    /// Units from a point to the next.
    step: usize,
    maker: Maker,
    /// The first coefficients of the last blocks.
    previous: [i32; 3],
    /// Of the region, the row of units that is being read.
    row: usize,
    /// The unit that begins where the stream is, and before which one the next reading ends.
    at: usize,
    until: usize,
}

impl Scan {
    pub(super) fn new() -> Self {
        Self {
            stream: Stream::new(),
            planes: Default::default(),
            idct: None,
            region: Region::default(),
            count: 0,
            layouts: Default::default(),
            quantisation: [[0; 64]; 3],
            blocks: 1,
            most: 0,
            points: Points::default(),
            step: 1,
            maker: Maker::new(false, 1),
            previous: [0; 3],
            row: 0,
            at: 0,
            until: 0,
        }
    }

    /// Makes room for the planes of an image.
    fn lay_out(&mut self, header: &Header<'_>, region: Region) {
        (self.count, self.region) = (header.count, region);
        let mut first = 0;
        for (i, component) in header.components[..header.count].iter().enumerate() {
            let (across, down) = (component.across, component.down);
            self.layouts[i] = Layout {
                across,
                down,
                first,
            };
            first += across * down;
            let plane = &mut self.planes[i];
            plane.pairs = 16 * region.width().div_ceil(TOGETHER) * across;
            plane.rows = (8 * (region.y[1] - region.y[0]) * down).next_multiple_of(ROWS);
            let bytes = 2 * plane.pairs * plane.rows;
            plane.samples.resize(bytes.max(plane.samples.len()), 0);
        }
    }

    /// Begins an image, with the tables of its components. False if the file is damaged.
    pub(super) fn start(
        &mut self,
        header: &Header<'_>,
        pairs: &[Arc<Pair>],
        region: Region,
        seek: &Seek<'_>,
    ) -> bool {
        self.lay_out(header, region);
        let components = &header.components[..header.count];
        for (scales, component) in self.quantisation.iter_mut().zip(components) {
            let Some(table) = header.quantisation[component.table] else {
                return false;
            };
            *scales = table.map(|scale| scale as i16);
        }
        let blocks = components.iter().map(|c| c.across * c.down);
        let unit: Vec<_> = pairs.iter().cloned().zip(blocks).collect();
        let blocks = unit.iter().map(|&(_, blocks)| blocks).sum();
        if !entropy::unstuff(header.data, &mut self.stream.data) {
            return false;
        }
        let layouts = &self.layouts[..self.count];
        let places = (0..TOGETHER).flat_map(|unit| {
            layouts.iter().flat_map(move |layout| {
                let columns = unit * layout.across..(unit + 1) * layout.across;
                let place =
                    move |y: usize, x: usize| (layout.first + y * layout.across + x / 4, x % 4);
                (0..layout.down).flat_map(move |y| columns.clone().map(move |x| place(y, x)))
            })
        });
        self.blocks = blocks;
        self.most = PASSED / blocks;
        self.stream.start(&unit, places, self.most);
        self.step = points::step(blocks);
        let bits = 8 * (self.stream.data.len() - entropy::PADDING);
        let points = match seek {
            Seek::Points(bytes) => Points::of_bytes(bytes, self.count)
                .filter(|points| points.fit(region.all, self.step, bits)),
            Seek::Start | Seek::Note => None,
        };
        self.points = points.unwrap_or_default();
        self.maker = Maker::new(matches!(seek, Seek::Note), self.step);
        self.previous = [0; 3];
        (self.row, self.at) = (0, 0);
        true
    }

    /// Whether all that is needed has been read; what may still be read is for the points alone.
    fn is_whole(&self) -> bool {
        self.row == self.region.y[1] - self.region.y[0]
    }

    /// The first unit of the row that is being read.
    fn first(&self) -> usize {
        (self.region.y[0] + self.row) * self.region.row + self.region.x[0]
    }

    /// Says what is to be read next. False if that is nothing.
    pub(super) fn next(&mut self) -> bool {
        if self.is_whole() && (!self.maker.is_wanted() || self.at == self.region.all) {
            return false;
        }
        let first = match self.is_whole() {
            true => self.region.all,
            false => self.first(),
        };
        if self.at < first
            && let Some((unit, point)) = self.points.before(first, self.step)
            && unit > self.at
        {
            self.stream.seek(point.bit());
            self.previous = point.previous();
            self.at = unit;
        }
        self.maker.see(self.at, &self.stream, self.previous);
        let is_needed = self.at >= first;
        // The unit of the first turn.
        let from = match is_needed {
            true => self.at - (self.at - first) % TOGETHER,
            false => self.at,
        };
        let end = match is_needed {
            true => (from + TOGETHER).min(first + self.region.width()),
            false => first.min(from + self.most),
        };
        if is_needed && self.at == from {
            self.stream.clear();
        }
        self.until = end.min(self.maker.next());
        let blocks = self.blocks * (self.at - from)..self.blocks * (self.until - from);
        self.stream.begin(is_needed, blocks);
        true
    }

    /// What was to be read has been. False if it is damaged.
    ///
    /// # Safety
    /// The level is available.
    pub(super) unsafe fn finish(&mut self, level: Level) -> bool {
        let blocks = self.blocks * (self.until - self.at);
        let is_good = self.stream.finish(blocks, &mut self.previous);
        self.at = self.until;
        if self.is_whole() {
            // The image is there all the same.
            let is_last = self.at == self.region.all;
            self.maker
                .keep(is_good && !(is_last && self.stream.is_over()));
            return true;
        }
        let first = self.first();
        let end = first + self.region.width();
        if is_good
            && self.at > first
            && ((self.at - first).is_multiple_of(TOGETHER) || self.at == end)
        {
            let start = self.idct.map(|_| Instant::now());
            let begin = (self.at - first - 1) / TOGETHER;
            // SAFETY: the caller's word.
            unsafe { level.run(Render { scan: self, begin }) };
            if let (Some(idct), Some(start)) = (&mut self.idct, start) {
                *idct += start.elapsed();
            }
        }
        if self.at == end {
            self.row += 1;
            return is_good && !self.stream.is_over();
        }
        is_good
    }

    /// Of a file that was read to its end.
    pub(super) fn noted(&mut self) -> Option<Vec<u8>> {
        let points = self.maker.finish();
        points.map(|points| points.to_bytes(self.count))
    }

    /// Takes an image from coefficients that are known already. False if they are not the header's.
    ///
    /// # Safety
    /// The level is available.
    pub(super) unsafe fn fill(
        &mut self,
        level: Level,
        header: &Header<'_>,
        region: Region,
        components: &[Coefficients],
    ) -> bool {
        if components.len() != header.count {
            return false;
        }
        self.lay_out(header, region);
        for (scales, component) in self.quantisation.iter_mut().zip(components) {
            *scales = component.scales.map(|scale| scale as i16);
        }
        // Nothing is to be read, and nothing noted.
        self.row = region.y[1] - region.y[0];
        self.maker = Maker::new(false, 1);
        let start = self.idct.map(|_| Instant::now());
        // SAFETY: the caller's word.
        unsafe {
            level.run(Fill {
                scan: self,
                components,
            });
        }
        if let (Some(idct), Some(start)) = (&mut self.idct, start) {
            *idct += start.elapsed();
        }
        true
    }
}

/// The samples of [`TOGETHER`] units.
struct Render<'a> {
    scan: &'a mut Scan,
    /// So many times as many are before them in their row.
    begin: usize,
}

impl Work for Render<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Scan {
            layouts,
            planes,
            quantisation,
            stream,
            count,
            row,
            ..
        } = self.scan;
        let layouts = &layouts[..*count];
        for ((layout, plane), scales) in layouts.iter().zip(planes).zip(quantisation) {
            for y in 0..layout.down {
                let groups = &stream.groups()[layout.first + y * layout.across..];
                for (i, group) in groups[..layout.across].iter().enumerate() {
                    let (x, y) = (self.begin * layout.across + i, *row * layout.down + y);
                    // SAFETY: the caller's word.
                    unsafe { idct::inverse::<V>(group, scales, plane.group(x, y)) };
                }
            }
        }
    }
}

/// The samples of a region whose coefficients are known.
struct Fill<'a> {
    scan: &'a mut Scan,
    components: &'a [Coefficients],
}

impl Work for Fill<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Scan {
            layouts,
            planes,
            quantisation,
            region,
            ..
        } = self.scan;
        let parts = layouts.iter().zip(planes).zip(quantisation);
        for (((layout, plane), scales), component) in parts.zip(self.components) {
            let columns = region.x.map(|unit| unit * layout.across);
            let rows = region.y.map(|unit| unit * layout.down);
            for y in rows[0]..rows[1] {
                let blocks = &component.blocks[y * component.across..][columns[0]..columns[1]];
                for (x, blocks) in blocks.chunks(4).enumerate() {
                    let group = Group::of(blocks.iter());
                    // SAFETY: the caller's word.
                    unsafe { idct::inverse::<V>(&group, scales, plane.group(x, y - rows[0])) };
                }
            }
        }
    }
}
