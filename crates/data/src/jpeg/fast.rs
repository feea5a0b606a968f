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
mod resample;
mod simd;

pub(crate) use simd::Level;

use std::array::from_fn;
use std::time::{Duration, Instant};

use crate::Resize;
use crate::crop::Rect;
use entropy::{Bits, Group, Table};
use header::Header;
use resample::{Axis, Between, Filter, Plane, ROWS, Span, Spread};
use simd::Vector;

/// Huffman tables that are remembered: most files have the standard's.
const TABLES: usize = 16;
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
    /// By what the file says and whether it is for first coefficients; the last used is last.
    tables: Vec<(Vec<u8>, bool, Table)>,
    /// The entropy-coded data without stuffing.
    data: Vec<u8>,
    /// A row of units, component by component.
    groups: Vec<Group>,
    planes: [Plane; 3],
    between: [Between; 3],
    /// Across and down.
    filters: [Filter; 2],
    /// Across and down, for the first and the other components.
    axes: [[Axis; 2]; 2],
    line: Vec<u8>,
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

/// Units that the crop needs, from the first to before the last.
#[derive(Clone, Copy)]
struct Region {
    x: [usize; 2],
    y: [usize; 2],
    /// Units in a row of the image.
    row: usize,
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
        Self {
            x: range(crop.x, crop.w, header.width, header.across),
            y: range(crop.y, crop.h, header.height, header.down),
            row: header.width.div_ceil(8 * header.across),
        }
    }
}

/// A component in the region's memory.
#[derive(Clone, Copy)]
struct Layout {
    /// Blocks in a unit.
    across: usize,
    down: usize,
    /// Of its groups in a row of units; `groups` for each of its rows of blocks.
    first: usize,
    groups: usize,
}

impl Decoder {
    pub(crate) fn new(level: Level) -> Self {
        Self {
            times: None,
            level,
            tables: vec![],
            data: vec![],
            groups: vec![],
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
        mut row: impl FnMut(usize, &[u8]),
    ) -> bool {
        let header = &photo.0;
        let region = Region::new(header, target.crop);
        let is_whole = self.prepare(header) && self.samples(header, region);
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

    /// Makes the tables that are not there yet and takes the data out of the file.
    fn prepare(&mut self, header: &Header<'_>) -> bool {
        for component in &header.components[..header.count] {
            for (listed, is_dc) in [
                (header.dc[component.dc], true),
                (header.ac[component.ac], false),
            ] {
                let Some(listed) = listed else { return false };
                let known = self
                    .tables
                    .iter()
                    .position(|(l, d, _)| *d == is_dc && l == listed);
                let entry = match known {
                    // Six at most are in use at a time.
                    Some(i) => self.tables.remove(i),
                    None => {
                        let Some(table) = Table::new(listed, is_dc) else {
                            return false;
                        };
                        if self.tables.len() == TABLES {
                            self.tables.remove(0);
                        }
                        (listed.to_vec(), is_dc, table)
                    }
                };
                self.tables.push(entry);
            }
        }
        entropy::unstuff(header.data, &mut self.data)
    }

    /// Decodes the region into the planes.
    fn samples(&mut self, header: &Header<'_>, region: Region) -> bool {
        let units = [region.x[1] - region.x[0], region.y[1] - region.y[0]];
        let mut total = 0;
        let mut layouts = [Layout {
            across: 1,
            down: 1,
            first: 0,
            groups: 0,
        }; 3];
        for (i, component) in header.components[..header.count].iter().enumerate() {
            let groups = (units[0] * component.across).div_ceil(4);
            layouts[i] = Layout {
                across: component.across,
                down: component.down,
                first: total,
                groups,
            };
            total += groups * component.down;
            let plane = &mut self.planes[i];
            plane.pairs = 16 * groups;
            plane.stride = 2 * (8 * units[1] * component.down).next_multiple_of(ROWS);
            let bytes = plane.pairs * plane.stride;
            plane.samples.resize(bytes.max(plane.samples.len()), 0);
        }
        self.groups
            .resize(total.max(self.groups.len()), Group::ZERO);

        let table = |listed: Option<&[u8]>, is_dc: bool| {
            let known = self
                .tables
                .iter()
                .find(|(l, d, _)| *d == is_dc && Some(&l[..]) == listed);
            known.map(|(_, _, table)| table)
        };
        let components = &header.components[..header.count];
        let mut tables = Vec::with_capacity(3);
        let mut quantisation = [[0; 64]; 3];
        for (i, component) in components.iter().enumerate() {
            let dc = table(header.dc[component.dc], true);
            let ac = table(header.ac[component.ac], false);
            let (Some(dc), Some(ac), Some(scales)) = (dc, ac, header.quantisation[component.table])
            else {
                return false;
            };
            tables.push((dc, ac));
            quantisation[i] = scales.map(|scale| scale as i16);
        }
        let mut scan = Scan {
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
        is_whole
    }

    fn resample(
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
        let mut work = Resample {
            planes: &self.planes[..header.count],
            between: &mut self.between[..header.count],
            axes: from_fn(|i| &self.axes[i.min(kinds - 1)]),
            line: &mut self.line,
            width: size,
            height: size,
        };
        match self.level {
            Level::Portable => work.run_portably(row),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                // SAFETY: as in `samples`.
                unsafe { work.run_avx2(row) }
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                // SAFETY: as above.
                unsafe { work.run_avx512(row) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("no other level is available"),
        }
    }
}

/// From bits to planes.
struct Scan<'a> {
    data: &'a [u8],
    tables: &'a [(&'a Table, &'a Table)],
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
        let Region { x, y, row } = self.region;
        // These stay in registers, which they would not as fields.
        let mut bits = Bits::new(self.data, 0);
        let mut previous = [0; 3];
        let mut before = y[0] * row + x[0];
        for unit_y in 0..y[1] - y[0] {
            for _ in 0..before {
                let mut is_good = true;
                for ((layout, &tables), previous) in
                    self.layouts.iter().zip(self.tables).zip(&mut previous)
                {
                    for _ in 0..layout.across * layout.down {
                        is_good &= entropy::skip(&mut bits, tables, previous);
                    }
                }
                if !is_good {
                    return false;
                }
            }
            self.groups.fill(Group::ZERO);
            for unit in 0..x[1] - x[0] {
                let mut is_good = true;
                for ((layout, &tables), previous) in
                    self.layouts.iter().zip(self.tables).zip(&mut previous)
                {
                    for y in 0..layout.down {
                        for x in unit * layout.across..(unit + 1) * layout.across {
                            let group = &mut self.groups[layout.first + y * layout.groups + x / 4];
                            is_good &=
                                entropy::block(&mut bits, tables, previous, group, 8 * (x % 4));
                        }
                    }
                }
                if !is_good {
                    return false;
                }
            }
            if bits.is_over() {
                return false;
            }
            let start = self.idct.map(|_| Instant::now());
            // SAFETY: the caller's word.
            unsafe { self.render::<V>(unit_y) };
            if let (Some(idct), Some(start)) = (&mut self.idct, start) {
                *idct += start.elapsed();
            }
            before = row - (x[1] - x[0]);
        }
        true
    }

    /// Writes the samples of a row of units.
    ///
    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn render<V: Vector>(&mut self, unit_y: usize) {
        for ((layout, plane), scales) in self
            .layouts
            .iter()
            .zip(&mut *self.planes)
            .zip(self.quantisation)
        {
            for y in 0..layout.down {
                let top = 2 * 8 * (unit_y * layout.down + y);
                let groups = &self.groups[layout.first + y * layout.groups..][..layout.groups];
                for (i, group) in groups.iter().enumerate() {
                    // Sixteen pairs of columns a group, as `samples` has made the plane.
                    let out =
                        &mut plane.samples[16 * i * plane.stride..][..16 * plane.stride][top..];
                    assert!(top + 16 <= plane.stride);
                    // SAFETY: each of the 16 columns has 16 bytes from `top` on, as asserted.
                    unsafe { idct::inverse::<V>(group, scales, out.as_mut_ptr(), plane.stride) };
                }
            }
        }
    }
}

/// From planes to rows.
struct Resample<'a> {
    planes: &'a [Plane],
    between: &'a mut [Between],
    axes: [&'a [Axis; 2]; 3],
    line: &'a mut [u8],
    width: usize,
    height: usize,
}

impl Resample<'_> {
    fn run_portably(&mut self, row: &mut impl FnMut(usize, &[u8])) {
        // SAFETY: it needs no instructions but the target's.
        unsafe { self.run::<simd::Portable>(row) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
    fn run_avx2(&mut self, row: &mut impl FnMut(usize, &[u8])) {
        // SAFETY: the instructions are there, as the caller says.
        unsafe { self.run::<simd::x86::Avx2>(row) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,bmi1,bmi2,lzcnt")]
    fn run_avx512(&mut self, row: &mut impl FnMut(usize, &[u8])) {
        // SAFETY: as above.
        unsafe { self.run::<simd::x86::Avx512>(row) }
    }

    /// # Safety
    /// The CPU has the vector's instructions.
    #[inline(always)]
    unsafe fn run<V: Vector>(&mut self, row: &mut impl FnMut(usize, &[u8])) {
        for ((plane, between), [across, down]) in
            self.planes.iter().zip(&mut *self.between).zip(self.axes)
        {
            // SAFETY: the caller's word.
            unsafe { resample::across::<V>(plane, across, down, between) };
        }
        let down = self.axes.map(|[_, down]| down);
        for y in 0..self.height {
            // SAFETY: the same axes made `between`; `line` has room for outputs rounded up to the widest block, 64.
            unsafe { resample::down::<V>(self.between, down, y, self.line.as_mut_ptr()) };
            row(y, &self.line[..3 * self.width]);
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
        let photo = Photo::open(file)?;
        let target = Target {
            crop,
            resize: Resize::Pillow,
            size,
            flip,
        };
        let mut pixels = vec![0; 3 * size * size];
        let row = |y: usize, row: &[u8]| pixels[y * row.len()..][..row.len()].copy_from_slice(row);
        decoder.decode(&photo, &target, row).then_some(pixels)
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

    #[test]
    #[ignore = "a measurement"]
    fn rate() {
        let file = std::fs::read(format!("{FOLDER}/420-500x375.jpg")).unwrap();
        for level in levels() {
            let mut decoder = Decoder::new(level);
            let mut random = Random::new(3, 0, Purpose::Shards);
            let start = std::time::Instant::now();
            for _ in 0..500 {
                let crop =
                    crate::crop::torchvision(500, 375, [0.08, 1.0], [0.75, 1.3], &mut random);
                view(&mut decoder, &file, crop, false, 224).unwrap();
            }
            println!(
                "{level:?}: {:.0} us",
                start.elapsed().as_secs_f64() * 2000.0
            );
        }
    }
}
