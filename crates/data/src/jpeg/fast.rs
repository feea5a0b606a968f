//! Training crops of ordinary photographs, fast: only what the crop needs is decoded, and planes are resampled to the
//! target size before colours are converted.
//!
//! Nothing here is trusted: lengths are checked, entropy-coded data are read by safe code, and whatever is odd or
//! damaged is left to the exact decoder, which has the last word on errors. The luma samples are libjpeg's `islow` to
//! the bit; the image differs from the exact one by roundings in between (docs/decisions/0009). Every [`Level`] gives
//! the same bits.

#![expect(
    unsafe_code,
    reason = "vector instructions; entropy-coded data and headers are read by safe code"
)]

mod entropy;
mod header;
mod idct;
mod points;
mod resample;
mod simd;

pub(crate) use simd::{Level, widely};

use std::array::from_fn;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::Resize;
use crate::crop::Rect;
use entropy::{AcTable, Bits, DcTable, Group};
use header::Header;
use points::{Maker, Points};
use resample::{Axis, Between, Filter, Plane, ROWS, Span, Spread};
use simd::Vector;

/// Huffman tables that are remembered: most files have the standard's.
const TABLES: usize = 8;
/// Units that are decoded before their samples are made: so many blocks side by side fill a group, and few enough
/// coefficients stay next to the tables in the first-level cache.
const TOGETHER: usize = 4;
/// Groups of so many units at most: two by two of each of three components.
const GROUPS: usize = 12;
/// Memory of a plane beyond this, in bytes, is not kept for the next image.
const KEPT: usize = 16 << 20;

/// What two stages of decoding took; the rest is entropy coding and what comes before it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) idct: Duration,
    pub(crate) resample: Duration,
}

/// A thread's tables and memory, used again for every image.
pub(crate) struct Decoder {
    /// Kept only where it is asked for: a clock is read twice for each row of units.
    pub(crate) times: Option<Times>,
    level: Level,
    dc: Tables<DcTable>,
    ac: Tables<AcTable>,
    /// The entropy-coded data without stuffing.
    data: Vec<u8>,
    /// [`TOGETHER`] units, component by component.
    groups: [Group; GROUPS],
    planes: [Plane; 3],
    between: [Between; 3],
    /// Across and down.
    filters: [Filter; 2],
    /// Across and down, for the first and the other components.
    axes: [[Axis; 2]; 2],
    line: Vec<u8>,
}

/// Huffman tables by what a file says; the last used is last.
struct Tables<T>(Vec<(Vec<u8>, T)>);

impl<T> Tables<T> {
    /// Makes a table if it is not here yet. False if it is damaged.
    fn keep(&mut self, listed: &[u8], make: fn(&[u8]) -> Option<T>) -> bool {
        let known = self.0.iter().position(|(known, _)| known == listed);
        let entry = match known {
            Some(i) => self.0.remove(i),
            None => {
                let Some(table) = make(listed) else {
                    return false;
                };
                // A file uses three at most.
                if self.0.len() == TABLES {
                    self.0.remove(0);
                }
                (listed.to_vec(), table)
            }
        };
        self.0.push(entry);
        true
    }

    fn get(&self, listed: &[u8]) -> Option<&T> {
        let known = self.0.iter().find(|(known, _)| known == listed);
        known.map(|(_, table)| table)
    }
}

/// A file whose header has been read.
pub(crate) struct Photo<'a>(Header<'a>);

impl<'a> Photo<'a> {
    /// None if it is not for this decoder.
    pub(crate) fn open(bytes: &'a [u8]) -> Option<Self> {
        Header::parse(bytes).map(Self)
    }

    /// Width and height.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.0.width, self.0.height)
    }
}

/// What to make of a photo.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    /// What is seen of it.
    pub(crate) crop: Rect,
    /// How it is brought to size.
    pub(crate) resize: Resize,
    /// Height and width of the result.
    pub(crate) size: usize,
    /// Whether left becomes right.
    pub(crate) flip: bool,
}

/// Where decoding begins.
pub(crate) enum Seek<'a> {
    /// At the beginning.
    Start,
    /// At the points before what the crop needs: what [`Seek::Note`] has noted of the same file. Pixels are the same.
    Points(&'a [u8]),
    /// At the beginning, and on to the end, to note points. Nothing is noted of a file that is damaged.
    Note(&'a mut Option<Vec<u8>>),
}

/// Units that the crop needs, from the first to before the last.
#[derive(Clone, Copy)]
struct Region {
    x: [usize; 2],
    y: [usize; 2],
    /// Units in a row of the image.
    row: usize,
    /// And in all of it.
    all: usize,
}

impl Region {
    fn new(header: &Header<'_>, crop: Rect) -> Self {
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
}

/// A component in the region's memory.
#[derive(Clone, Copy)]
struct Layout {
    /// Blocks in a unit.
    across: usize,
    down: usize,
    /// Of its groups; there are `across` for each of its rows of blocks.
    first: usize,
}

impl Decoder {
    pub(crate) fn new(level: Level) -> Self {
        Self {
            times: None,
            level,
            dc: Tables(vec![]),
            ac: Tables(vec![]),
            data: vec![],
            groups: [Group::ZERO; GROUPS],
            planes: Default::default(),
            between: Default::default(),
            filters: Default::default(),
            axes: Default::default(),
            line: vec![],
        }
    }

    /// Gives the target's rows in turn: its number and RGB. False if the file is damaged, or is nothing for this decoder
    /// after all; then some rows may have been given, and mean nothing.
    pub(crate) fn decode(
        &mut self,
        photo: &Photo<'_>,
        target: &Target,
        seek: Seek<'_>,
        mut row: impl FnMut(usize, &[u8]),
    ) -> bool {
        let header = &photo.0;
        let region = Region::new(header, target.crop);
        let is_whole = self.prepare(header) && self.samples(header, region, seek);
        let start = self.times.map(|_| Instant::now());
        if is_whole {
            self.resample(header, region, target, &mut row);
        }
        if let (Some(times), Some(start)) = (&mut self.times, start) {
            times.resample += start.elapsed();
        }
        for (plane, between) in self.planes.iter_mut().zip(&mut self.between) {
            if plane.samples.len() > KEPT {
                *plane = Plane::default();
            }
            if between.bytes() > KEPT {
                *between = Between::default();
            }
        }
        is_whole
    }

    /// Notes a photo's points and decodes nothing. None if it is damaged.
    pub(crate) fn note(&mut self, photo: &Photo<'_>) -> Option<Vec<u8>> {
        let header = &photo.0;
        let nothing = Rect {
            x: 0,
            y: 0,
            w: 0,
            h: 0,
        };
        let region = Region {
            x: [0, 0],
            y: [0, 0],
            ..Region::new(header, nothing)
        };
        let mut noted = None;
        let is_whole = self.prepare(header) && self.samples(header, region, Seek::Note(&mut noted));
        noted.filter(|_| is_whole)
    }

    /// Makes the tables that are not there yet and takes the data out of the file.
    fn prepare(&mut self, header: &Header<'_>) -> bool {
        for component in &header.components[..header.count] {
            let (Some(dc), Some(ac)) = (header.dc[component.dc], header.ac[component.ac]) else {
                return false;
            };
            if !self.dc.keep(dc, DcTable::new) || !self.ac.keep(ac, AcTable::new) {
                return false;
            }
        }
        entropy::unstuff(header.data, &mut self.data)
    }

    /// Decodes the region into the planes.
    fn samples(&mut self, header: &Header<'_>, region: Region, mut seek: Seek<'_>) -> bool {
        let units = [region.x[1] - region.x[0], region.y[1] - region.y[0]];
        let mut total = 0;
        let mut layouts = [Layout {
            across: 1,
            down: 1,
            first: 0,
        }; 3];
        for (i, component) in header.components[..header.count].iter().enumerate() {
            layouts[i] = Layout {
                across: component.across,
                down: component.down,
                first: total,
            };
            total += component.across * component.down;
            let plane = &mut self.planes[i];
            plane.pairs = 16 * units[0].div_ceil(TOGETHER) * component.across;
            plane.stride = 2 * (8 * units[1] * component.down).next_multiple_of(ROWS);
            let bytes = plane.pairs * plane.stride;
            plane.samples.resize(bytes.max(plane.samples.len()), 0);
        }
        let components = &header.components[..header.count];
        let mut tables = Vec::with_capacity(3);
        let mut quantisation = [[0; 64]; 3];
        for (i, component) in components.iter().enumerate() {
            let dc = header.dc[component.dc].and_then(|listed| self.dc.get(listed));
            let ac = header.ac[component.ac].and_then(|listed| self.ac.get(listed));
            let (Some(dc), Some(ac), Some(scales)) = (dc, ac, header.quantisation[component.table])
            else {
                return false;
            };
            tables.push((dc, ac));
            quantisation[i] = scales.map(|scale| scale as i16);
        }
        // A unit has as many blocks as there are groups.
        let step = points::step(total);
        let bits = 8 * (self.data.len() - entropy::PADDING);
        let points = match seek {
            Seek::Points(bytes) => Points::of_bytes(bytes, header.count)
                .filter(|points| points.fit(region.all, step, bits)),
            Seek::Start | Seek::Note(_) => None,
        };
        let mut scan = Scan {
            points: &points.unwrap_or_default(),
            step,
            maker: Maker::new(matches!(seek, Seek::Note(_)), step),
            data: &self.data,
            tables: &tables,
            layouts: &layouts[..header.count],
            region,
            groups: &mut self.groups[..total],
            planes: &mut self.planes,
            quantisation: &quantisation,
            idct: self.times.map(|_| Duration::ZERO),
        };
        let is_whole = match self.level {
            Level::Portable => scan.run_portably(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                // SAFETY: `level` is available, by `Level::detect` or the tests' check of it.
                unsafe { scan.run_avx2() }
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                // SAFETY: as above.
                unsafe { scan.run_avx512() }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("no other level is available"),
        };
        if let (Some(times), Some(idct)) = (&mut self.times, scan.idct) {
            times.idct += idct;
        }
        if let Seek::Note(noted) = &mut seek {
            let points = scan.maker.finish().filter(|_| is_whole);
            **noted = points.map(|points| points.to_bytes(header.count));
        }
        is_whole
    }

    fn resample(
        &mut self,
        header: &Header<'_>,
        region: Region,
        target: &Target,
        row: &mut impl FnMut(usize, &[u8]),
    ) {
        match self.level {
            // SAFETY: it needs no instructions but the target's.
            Level::Portable => unsafe {
                self.resample_as::<simd::Portable>(header, region, target, row);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as in `samples`.
            Level::Avx2 => unsafe { self.resample_avx2(header, region, target, row) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { self.resample_avx512(header, region, target, row) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("no other level is available"),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
    fn resample_avx2(
        &mut self,
        header: &Header<'_>,
        region: Region,
        target: &Target,
        row: &mut impl FnMut(usize, &[u8]),
    ) {
        // SAFETY: the instructions are there, as the caller says.
        unsafe { self.resample_as::<simd::x86::Avx2>(header, region, target, row) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,bmi1,bmi2,lzcnt")]
    fn resample_avx512(
        &mut self,
        header: &Header<'_>,
        region: Region,
        target: &Target,
        row: &mut impl FnMut(usize, &[u8]),
    ) {
        // SAFETY: as above.
        unsafe { self.resample_as::<simd::x86::Avx512>(header, region, target, row) }
    }

    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn resample_as<V: Vector>(
        &mut self,
        header: &Header<'_>,
        region: Region,
        target: &Target,
        row: &mut impl FnMut(usize, &[u8]),
    ) {
        let (crop, size) = (target.crop, target.size);
        self.filters[0].set(target.resize, crop.w, size);
        self.filters[1].set(target.resize, crop.h, size);
        let factors = |i: usize| (header.components[i].across, header.components[i].down);
        let kinds = match header.count {
            3 if factors(1) != factors(2) => unreachable!("the header was checked"),
            3 if factors(0) != factors(1) => 2,
            _ => 1,
        };
        for kind in 0..kinds {
            let component = &header.components[kind];
            let (x, y) = (
                header.across / component.across,
                header.down / component.down,
            );
            let samples = |pixels: usize, factor: usize| pixels.div_ceil(factor);
            let (wide, high) = (samples(header.width, x), samples(header.height, y));
            // libjpeg repeats the samples of planes that are one or two wide.
            let is_thin = x == 2 && wide <= 2;
            let spread = |factor: usize| match (factor, is_thin) {
                (1, _) => Spread::One,
                (_, false) => Spread::Triangle,
                (_, true) => Spread::Twice,
            };
            let plane = &self.planes[kind];
            let [across, down] = &mut self.axes[kind];
            let span = Span {
                crop: crop.x,
                length: crop.w,
                samples: wide,
                begin: 8 * region.x[0] * component.across,
                held: 2 * plane.pairs,
            };
            across.set(&self.filters[0], span, spread(x), target.flip);
            let span = Span {
                crop: crop.y,
                length: crop.h,
                samples: high,
                begin: 8 * region.y[0] * component.down,
                held: plane.stride / 2,
            };
            down.set(&self.filters[1], span, spread(y), false);
        }
        self.line.resize(3 * size.next_multiple_of(64), 0);
        let between = &mut self.between[..header.count];
        for (i, (plane, between)) in self.planes.iter().zip(&mut *between).enumerate() {
            let [across, down] = &self.axes[i.min(kinds - 1)];
            // SAFETY: the caller's word.
            unsafe { resample::across::<V>(plane, across, down, between) };
        }
        let down = from_fn(|i| &self.axes[i.min(kinds - 1)][1]);
        for y in 0..size {
            // SAFETY: the same axes made `between`; `line` has room for outputs rounded up to the widest block, 64.
            unsafe { resample::down::<V>(between, down, y, self.line.as_mut_ptr()) };
            row(y, &self.line[..3 * size]);
        }
    }
}

/// From bits to planes.
struct Scan<'a> {
    /// Empty if there are none.
    points: &'a Points,
    /// Units from a point to the next.
    step: usize,
    maker: Maker,
    data: &'a [u8],
    tables: &'a [(&'a DcTable, &'a AcTable)],
    layouts: &'a [Layout],
    region: Region,
    groups: &'a mut [Group],
    planes: &'a mut [Plane; 3],
    quantisation: &'a [[i16; 64]; 3],
    /// What the inverse DCT took, if that is asked for.
    idct: Option<Duration>,
}

impl Scan<'_> {
    fn run_portably(&mut self) -> bool {
        // SAFETY: it needs no instructions but the target's.
        unsafe { self.run::<simd::Portable>() }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
    fn run_avx2(&mut self) -> bool {
        // SAFETY: the instructions are there, as the caller says.
        unsafe { self.run::<simd::x86::Avx2>() }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,bmi1,bmi2,lzcnt")]
    fn run_avx512(&mut self) -> bool {
        // SAFETY: as above.
        unsafe { self.run::<simd::x86::Avx512>() }
    }

    /// False if the data are damaged or cut off.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn run<V: Vector>(&mut self) -> bool {
        let Region { x, y, row, all } = self.region;
        // These stay in registers, which they would not as fields.
        let mut bits = Bits::new(self.data, 0);
        let mut previous = [0; 3];
        // The unit that begins here.
        let mut at = 0;
        for unit_y in 0..y[1] - y[0] {
            let first = (y[0] + unit_y) * row + x[0];
            if let Some((unit, point)) = self.points.before(first, self.step)
                && unit > at
            {
                bits = Bits::new(self.data, point.bit());
                previous = point.previous();
                at = unit;
            }
            if !self.pass(&mut bits, &mut previous, at..first) {
                return false;
            }
            at = first;
            for begin in (x[0]..x[1]).step_by(TOGETHER) {
                self.groups.fill(Group::ZERO);
                for unit in 0..TOGETHER.min(x[1] - begin) {
                    self.maker.see(at, &bits, previous);
                    at += 1;
                    let mut is_good = true;
                    for ((layout, &tables), previous) in
                        self.layouts.iter().zip(self.tables).zip(&mut previous)
                    {
                        for y in 0..layout.down {
                            for x in unit * layout.across..(unit + 1) * layout.across {
                                let group = layout.first + y * layout.across + x / 4;
                                let group = &mut self.groups[group];
                                is_good &=
                                    entropy::block(&mut bits, tables, previous, group, 8 * (x % 4));
                            }
                        }
                    }
                    if !is_good {
                        return false;
                    }
                }
                let start = self.idct.map(|_| Instant::now());
                // SAFETY: the caller's word.
                unsafe { self.render::<V>((begin - x[0]) / TOGETHER, unit_y) };
                if let (Some(idct), Some(start)) = (&mut self.idct, start) {
                    *idct += start.elapsed();
                }
            }
            if bits.is_over() {
                return false;
            }
        }
        if self.maker.is_wanted() {
            let is_good = self.pass(&mut bits, &mut previous, at..all) && !bits.is_over();
            self.maker.keep(is_good);
        }
        true
    }

    /// Reads units that are not needed. False if they are damaged.
    #[inline(always)]
    fn pass(&mut self, bits: &mut Bits<'_>, previous: &mut [i32; 3], units: Range<usize>) -> bool {
        for unit in units {
            self.maker.see(unit, bits, *previous);
            let mut is_good = true;
            for ((layout, &tables), previous) in
                self.layouts.iter().zip(self.tables).zip(&mut *previous)
            {
                for _ in 0..layout.across * layout.down {
                    is_good &= entropy::skip(bits, tables, previous);
                }
            }
            if !is_good {
                return false;
            }
        }
        true
    }

    /// Writes the samples of [`TOGETHER`] units.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn render<V: Vector>(&mut self, begin: usize, unit_y: usize) {
        for ((layout, plane), scales) in self
            .layouts
            .iter()
            .zip(&mut *self.planes)
            .zip(self.quantisation)
        {
            for y in 0..layout.down {
                let top = 2 * 8 * (unit_y * layout.down + y);
                let groups = &self.groups[layout.first + y * layout.across..][..layout.across];
                for (i, group) in groups.iter().enumerate() {
                    // Sixteen pairs of columns a group, as `samples` has made the plane.
                    let column = 16 * (begin * layout.across + i);
                    let out =
                        &mut plane.samples[column * plane.stride..][..16 * plane.stride][top..];
                    assert!(top + 16 <= plane.stride);
                    // SAFETY: each of the 16 columns has 16 bytes from `top` on, as asserted.
                    unsafe { idct::inverse::<V>(group, scales, out.as_mut_ptr(), plane.stride) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jpeg::{self, Like};
    use crate::random::{Purpose, Random};
    use crate::{Resize, resize};

    const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/photos");

    fn photos() -> Vec<(String, Vec<u8>)> {
        let list = include_str!("../../tests/photos/photos.txt");
        let names = list.lines().filter_map(|line| line.split(' ').next());
        let read = |name: &str| {
            (
                name.into(),
                std::fs::read(format!("{FOLDER}/{name}.jpg")).unwrap(),
            )
        };
        names.map(read).collect()
    }

    fn levels() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_available())
    }

    /// The crop at `size` pixels a side, or None if the file is left to the exact decoder.
    fn view(
        decoder: &mut Decoder,
        file: &[u8],
        crop: Rect,
        flip: bool,
        size: usize,
    ) -> Option<Vec<u8>> {
        sought(decoder, file, crop, flip, size, Seek::Start)
    }

    fn sought(
        decoder: &mut Decoder,
        file: &[u8],
        crop: Rect,
        flip: bool,
        size: usize,
        seek: Seek<'_>,
    ) -> Option<Vec<u8>> {
        let photo = Photo::open(file)?;
        let target = Target {
            crop,
            resize: Resize::Pillow,
            size,
            flip,
        };
        let mut pixels = vec![0; 3 * size * size];
        let row = |y: usize, row: &[u8]| pixels[y * row.len()..][..row.len()].copy_from_slice(row);
        decoder.decode(&photo, &target, seek, row).then_some(pixels)
    }

    fn psnr(a: &[u8], b: &[u8]) -> f64 {
        let square = |(&a, &b): (&u8, &u8)| (f64::from(a) - f64::from(b)).powi(2);
        let error = a.iter().zip(b).map(square).sum::<f64>() / a.len() as f64;
        10.0 * (255.0 * 255.0 / error).log10()
    }

    /// What differs is where values are rounded: after upsampling, after colours and after each pass there, once here.
    /// Rounding alone is worth some 52 dB; clamping colours before the crop is resized, not after, costs most where
    /// colours are saturated.
    #[test]
    fn photographs_look_as_the_exact_decoder_has_them() {
        let mut decoder = Decoder::new(Level::detect());
        let mut random = Random::new(3, 0, Purpose::Shards);
        let (mut sum, mut count) = (0.0, 0);
        for (name, file) in photos() {
            let Some(photo) = Photo::open(&file) else {
                continue;
            };
            let (width, height) = photo.size();
            let image = jpeg::decode(&file, Like::Pillow).unwrap();
            for draw in 0..20 {
                let crop = match draw {
                    0 => Rect::whole(width, height),
                    _ => crate::crop::torchvision(
                        width,
                        height,
                        [0.08, 1.0],
                        [0.75, 1.3],
                        &mut random,
                    ),
                };
                let flip = draw % 2 == 1;
                let size = [224, 96, 33][draw % 3];
                let ours = view(&mut decoder, &file, crop, flip, size).unwrap();
                let mut exact = vec![0; ours.len()];
                resize::pillow(&image, crop, size, flip, &mut exact);
                let psnr = psnr(&ours, &exact).min(60.0);
                assert!(psnr > 48.0, "{name} {crop:?} {size}: {psnr:.1} dB");
                sum += psnr;
                count += 1;
            }
        }
        let mean = sum / f64::from(count);
        assert!(
            count > 200 && mean > 52.0,
            "{mean:.1} dB over {count} views"
        );
    }

    /// Files that only the exact decoder takes.
    #[test]
    fn odd_files_are_left_to_the_exact_decoder() {
        let odd = |name: &str| {
            [
                "411",
                "420-restart-rows",
                "422-restart-blocks",
                "cmyk",
                "rgb",
                "ycck-420",
            ]
            .contains(&name)
                || name.contains("progressive")
        };
        for (name, file) in photos() {
            assert_eq!(Photo::open(&file).is_none(), odd(&name), "{name}");
        }
    }

    const COLOUR: &[u8] = include_bytes!("../../tests/goldens/colour420.jpg");

    fn whole(decoder: &mut Decoder, file: &[u8]) -> Option<Vec<u8>> {
        let (width, height) = Photo::open(file)?.size();
        view(decoder, file, Rect::whole(width, height), false, 32)
    }

    #[test]
    fn truncated_anywhere() {
        for level in levels() {
            let mut decoder = Decoder::new(level);
            assert!(whole(&mut decoder, COLOUR).is_some());
            for end in 0..COLOUR.len() - 3 {
                assert!(whole(&mut decoder, &COLOUR[..end]).is_none(), "{end}");
            }
        }
    }

    #[test]
    fn huge_dimensions_are_refused_before_memory_is_asked_for() {
        let frame = COLOUR
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .unwrap();
        let mut bytes = COLOUR.to_vec();
        bytes[frame + 5..frame + 9].fill(0xff);
        assert!(Photo::open(&bytes).is_none());
        bytes[frame + 5..frame + 9].copy_from_slice(&[0, 0, 0, 9]);
        assert!(Photo::open(&bytes).is_none());
    }

    /// More pixels than data: zeros come where the data end, and that is noticed.
    #[test]
    fn more_pixels_than_data() {
        let frame = COLOUR
            .windows(2)
            .position(|pair| pair == [0xff, 0xc0])
            .unwrap();
        let mut bytes = COLOUR.to_vec();
        bytes[frame + 5..frame + 9].copy_from_slice(&[1, 0, 1, 0]);
        for level in levels() {
            assert!(whole(&mut Decoder::new(level), &bytes).is_none());
        }
    }

    /// Whatever the bytes, the same pixels at every level or none, and no panic; one decoder takes all of them, so that
    /// nothing of a bad file stays behind.
    #[test]
    fn any_byte_may_be_wrong() {
        let mut decoders: Vec<Decoder> = levels().map(Decoder::new).collect();
        let expected = whole(&mut decoders[0], COLOUR);
        for at in 0..COLOUR.len() {
            for new in [0, 0xff, COLOUR[at] ^ 1, COLOUR[at] ^ 0x10] {
                let mut bytes = COLOUR.to_vec();
                bytes[at] = new;
                let mut views = decoders.iter_mut().map(|decoder| whole(decoder, &bytes));
                let first = views.next().unwrap();
                assert!(views.all(|view| view == first), "{at} {new}");
            }
        }
        for decoder in &mut decoders {
            assert!(whole(decoder, COLOUR) == expected);
        }
    }

    /// Entropy-coded noise behind a good header.
    #[test]
    fn garbage_scans() {
        let scan = COLOUR
            .windows(2)
            .position(|pair| pair == [0xff, 0xda])
            .unwrap()
            + 14;
        let mut random = Random::new(9, 0, Purpose::Shards);
        let mut decoders: Vec<Decoder> = levels().map(Decoder::new).collect();
        for _ in 0..300 {
            let mut bytes = COLOUR.to_vec();
            random.fill(&mut bytes[scan..COLOUR.len() - 2]);
            let mut views = decoders.iter_mut().map(|decoder| whole(decoder, &bytes));
            let first = views.next().unwrap();
            assert!(views.all(|view| view == first));
        }
    }

    /// A crop sees the same as the same part of the whole image, so nothing is taken from where nothing was decoded.
    #[test]
    fn a_crop_is_a_part_of_the_whole() {
        let file = std::fs::read(format!("{FOLDER}/420-500x375.jpg")).unwrap();
        let fresh = |crop, size| {
            let mut used = Decoder::new(Level::detect());
            let clean = view(&mut used, &file, crop, false, size).unwrap();
            // Memory that another image has left behind changes nothing.
            whole(&mut used, COLOUR);
            assert!(view(&mut used, &file, crop, false, size).unwrap() == clean);
            clean
        };
        // At its own size nothing is resampled: rows and columns of the whole.
        let crop = Rect {
            x: 100,
            y: 60,
            w: 64,
            h: 64,
        };
        let near = Rect {
            x: 99,
            y: 59,
            w: 66,
            h: 66,
        };
        let (small, large) = (fresh(crop, 64), fresh(near, 66));
        for (y, row) in small.chunks(3 * 64).enumerate() {
            assert_eq!(row, &large[3 * 66 * (y + 1) + 3..][..3 * 64]);
        }
    }

    fn noted(file: &[u8]) -> Option<Vec<u8>> {
        let mut noted = None;
        let mut decoder = Decoder::new(Level::detect());
        let (width, height) = Photo::open(file)?.size();
        let corner = Rect {
            x: width / 3,
            y: height / 3,
            w: width.div_ceil(9),
            h: height.div_ceil(9),
        };
        sought(
            &mut decoder,
            file,
            corner,
            false,
            32,
            Seek::Note(&mut noted),
        )?;
        noted
    }

    #[test]
    fn points_change_no_pixel() {
        let mut decoder = Decoder::new(Level::detect());
        let mut random = Random::new(4, 0, Purpose::Shards);
        let mut bytes = 0;
        for (name, file) in photos() {
            let Some((width, height)) = Photo::open(&file).map(|photo| photo.size()) else {
                continue;
            };
            let points = noted(&file).unwrap();
            bytes += points.len();
            for _ in 0..30 {
                let [area, aspect] = [[0.01, 1.0], [0.3, 3.0]];
                let crop = crate::crop::torchvision(width, height, area, aspect, &mut random);
                let mut view = |seek| sought(&mut decoder, &file, crop, false, 48, seek).unwrap();
                let expected = view(Seek::Start);
                assert!(view(Seek::Points(&points)) == expected, "{name} {crop:?}");
                let mut again = None;
                assert!(view(Seek::Note(&mut again)) == expected, "{name} {crop:?}");
                // Where they are does not depend on what is seen meanwhile.
                assert_eq!(again.as_ref(), Some(&points), "{name} {crop:?}");
            }
            assert_eq!(decoder.note(&Photo::open(&file).unwrap()), Some(points));
        }
        assert!(bytes > 5_000, "{bytes}");
    }

    /// A crop at the bottom needs nothing of what is above it, once there are points.
    #[test]
    fn points_lead_past_what_is_not_needed() {
        let file = std::fs::read(format!("{FOLDER}/420-500x375.jpg")).unwrap();
        let points = noted(&file).unwrap();
        let scan = file
            .windows(2)
            .rposition(|pair| pair == [0xff, 0xda])
            .unwrap()
            + 14;
        let mut damaged = file.clone();
        for byte in &mut damaged[scan + 2000..scan + 3000] {
            if *byte != 0xff && *byte != 0 {
                *byte = 0x55;
            }
        }
        let crop = Rect {
            x: 300,
            y: 300,
            w: 100,
            h: 70,
        };
        let mut decoder = Decoder::new(Level::detect());
        let expected = view(&mut decoder, &file, crop, false, 64).unwrap();
        let seek = Seek::Points(&points);
        let found = sought(&mut decoder, &damaged, crop, false, 64, seek).unwrap();
        assert!(found == expected);
        assert!(view(&mut decoder, &damaged, crop, false, 64) != Some(expected));
    }

    /// Points that cannot be right are passed over; of those that could be, the worst that comes is another picture.
    #[test]
    fn nobody_has_to_trust_points() {
        let file = std::fs::read(format!("{FOLDER}/420-500x375.jpg")).unwrap();
        let points = noted(&file).unwrap();
        let mut decoder = Decoder::new(Level::detect());
        let expected = whole(&mut decoder, &file);
        let mut view = |points: &[u8]| {
            let crop = Rect::whole(500, 375);
            sought(&mut decoder, &file, crop, false, 32, Seek::Points(points))
        };
        // A point is ten bytes of a file in colour.
        let last = points.len() - 10;
        assert!(points.len().is_multiple_of(10) && last > 1000);
        assert!(view(&points) == expected);
        for end in [0, 9, 10, 1000, last, last + 9] {
            assert!(view(&points[..end]) == expected, "{end}");
        }
        let reversed: Vec<u8> = points.chunks(10).rev().flatten().copied().collect();
        assert!(view(&reversed) == expected);
        let mut beyond = points.clone();
        beyond[last..last + 4].fill(0xff);
        assert!(view(&beyond) == expected);
        for at in (0..points.len()).step_by(7) {
            let mut points = points.clone();
            points[at] ^= 1 << (at % 8);
            view(&points);
        }
    }

    #[test]
    fn nothing_is_noted_of_damaged_files() {
        assert!(noted(COLOUR).is_some());
        let end = COLOUR.len() - 40;
        let mut cut = COLOUR[..end].to_vec();
        cut.extend([0xff, 0xd9]);
        assert_eq!(noted(&cut), None);
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        for (name, file) in photos() {
            let Some((width, height)) = Photo::open(&file).map(|photo| photo.size()) else {
                continue;
            };
            let crop = Rect {
                x: width / 5,
                y: height / 7,
                w: width.div_ceil(2),
                h: height.div_ceil(2),
            };
            for (crop, size) in [(crop, 224), (Rect::whole(width, height), 65), (crop, 5)] {
                let view = |level| view(&mut Decoder::new(level), &file, crop, true, size).unwrap();
                let expected = view(Level::Portable);
                for level in levels() {
                    assert!(view(level) == expected, "{name} {level:?} {crop:?}");
                }
            }
        }
    }

    /// Of the photographs here, or of those in the directory that the variable names.
    #[test]
    #[ignore = "a measurement"]
    fn rate() {
        let files: Vec<Vec<u8>> = match std::env::var("RUNNER_PHOTOS") {
            Ok(dir) => {
                let entries = std::fs::read_dir(dir).unwrap().take(250);
                let read = |entry: std::io::Result<std::fs::DirEntry>| {
                    std::fs::read(entry.unwrap().path()).unwrap()
                };
                entries.map(read).collect()
            }
            Err(_) => photos().into_iter().map(|(_, file)| file).collect(),
        };
        let files: Vec<&Vec<u8>> = files.iter().filter(|f| Photo::open(f).is_some()).collect();
        let mut decoder = Decoder::new(Level::detect());
        let mut points = vec![];
        let mut best = [f64::INFINITY; 3];
        for _ in 0..7 {
            let start = Instant::now();
            let note = |file: &&Vec<u8>| decoder.note(&Photo::open(file).unwrap()).unwrap();
            points = files.iter().map(note).collect();
            best[0] = best[0].min(start.elapsed().as_secs_f64());
            for is_sought in [false, true] {
                let mut random = Random::new(3, 0, Purpose::Shards);
                let start = Instant::now();
                for (file, points) in files.iter().zip(&points) {
                    let photo = Photo::open(file).unwrap();
                    let (width, height) = photo.size();
                    let [area, aspect] = [[0.08, 1.0], [0.75, 1.3]];
                    let target = Target {
                        crop: crate::crop::torchvision(width, height, area, aspect, &mut random),
                        resize: Resize::Pillow,
                        size: 224,
                        flip: false,
                    };
                    let seek = match is_sought {
                        true => Seek::Points(points),
                        false => Seek::Start,
                    };
                    assert!(decoder.decode(&photo, &target, seek, |_, row| {
                        std::hint::black_box(row);
                    }));
                }
                let best = &mut best[1 + usize::from(is_sought)];
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
        let each = best.map(|best| 1e6 * best / files.len() as f64);
        let bytes: usize = points.iter().map(Vec::len).sum();
        println!(
            "whole files noted: {:.0} us, {} bytes each\ncrops: {:.0} us\ncrops sought: {:.0} us",
            each[0],
            bytes / files.len(),
            each[1],
            each[2]
        );
    }
}
