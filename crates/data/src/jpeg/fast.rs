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
mod lane;
mod points;
mod resample;
mod simd;

pub(crate) use simd::Level;

use std::array::from_fn;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::Resize;
use crate::crop::Rect;
use entropy::{AcTable, DcTable};
use header::Header;
use lane::Lane;
use resample::{Axis, Between, Filter, Plane, Span, Spread};
use simd::Vector;

/// Huffman tables that are remembered: most files have the standard's.
const TABLES: usize = 8;
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
    /// Kept only where it is asked for: a clock is read twice for every few blocks.
    pub(crate) times: Option<Times>,
    level: Level,
    dc: Tables<DcTable>,
    ac: Tables<AcTable>,
    lanes: [Lane; 2],
    between: [Between; 3],
    /// Across and down.
    filters: [Filter; 2],
    /// Across and down, for the first and the other components.
    axes: [[Axis; 2]; 2],
    line: Vec<u8>,
}

/// Huffman tables by what a file says; the last used is last.
struct Tables<T>(Vec<(Vec<u8>, Rc<T>)>);

impl<T> Tables<T> {
    /// The table, made if it is not here yet. None if it is damaged.
    fn get(&mut self, listed: &[u8], make: fn(&[u8]) -> Option<T>) -> Option<Rc<T>> {
        let known = self.0.iter().position(|(known, _)| known == listed);
        let (listed, table) = match known {
            Some(i) => self.0.remove(i),
            None => (listed.to_vec(), Rc::new(make(listed)?)),
        };
        if self.0.len() == TABLES {
            self.0.remove(0);
        }
        self.0.push((listed, Rc::clone(&table)));
        Some(table)
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

/// A photo, and what to make of it.
pub(crate) struct Job<'a> {
    /// The photo.
    pub(crate) photo: Photo<'a>,
    /// What to make of it.
    pub(crate) target: Target,
    /// Where decoding begins.
    pub(crate) seek: Seek<'a>,
    /// Takes the target's rows.
    pub(crate) row: Row<'a>,
}

/// Takes rows in turn: the number and RGB.
pub(crate) type Row<'a> = Box<dyn FnMut(usize, &[u8]) + 'a>;

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

impl Decoder {
    pub(crate) fn new(level: Level) -> Self {
        Self {
            times: None,
            level,
            dc: Tables(vec![]),
            ac: Tables(vec![]),
            lanes: [Lane::new(), Lane::new()],
            between: Default::default(),
            filters: Default::default(),
            axes: Default::default(),
            line: vec![],
        }
    }

    /// Decodes photos, two at a time, and says of each whether it was done. If not, the file is damaged, or is nothing for
    /// this decoder after all; then some rows may have been given, and mean nothing.
    pub(crate) fn decode(&mut self, jobs: Vec<Job<'_>>) -> Vec<bool> {
        let mut done = vec![false; jobs.len()];
        let mut waiting = jobs.into_iter().enumerate();
        let mut running: [Option<(usize, Job<'_>)>; 2] = [None, None];
        loop {
            for (lane, running) in running.iter_mut().enumerate() {
                while running.is_none()
                    && let Some((number, job)) = waiting.next()
                {
                    let region = Region::new(&job.photo.0, job.target.crop);
                    if self.begin(lane, &job.photo.0, region, &job.seek) {
                        *running = Some((number, job));
                    }
                }
            }
            let are_busy = running.each_ref().map(Option::is_some);
            if are_busy == [false; 2] {
                return done;
            }
            let (lane, is_whole) = lane::run(self.level, &mut self.lanes, are_busy);
            let Some((number, mut job)) = running[lane].take() else {
                unreachable!("a busy lane was done");
            };
            if is_whole {
                self.finish(lane, &mut job);
            }
            done[number] = is_whole;
        }
    }

    /// Gives a lane a photo. False if it is damaged.
    fn begin(&mut self, lane: usize, header: &Header<'_>, region: Region, seek: &Seek<'_>) -> bool {
        let components = &header.components[..header.count];
        let tables: Option<Vec<_>> = components
            .iter()
            .map(|component| {
                let dc = self.dc.get(header.dc[component.dc]?, DcTable::new)?;
                let ac = self.ac.get(header.ac[component.ac]?, AcTable::new)?;
                Some((dc, ac))
            })
            .collect();
        let lane = &mut self.lanes[lane];
        lane.idct = self.times.map(|_| Duration::ZERO);
        tables.is_some_and(|tables| lane.begin(header, tables, region, seek))
    }

    /// Makes rows of a lane's samples.
    fn finish(&mut self, lane: usize, job: &mut Job<'_>) {
        let header = &job.photo.0;
        if let Seek::Note(noted) = &mut job.seek {
            let points = self.lanes[lane].points();
            **noted = points.map(|points| points.to_bytes(header.count));
        }
        let start = self.times.map(|_| Instant::now());
        let region = Region::new(header, job.target.crop);
        self.resample(lane, header, region, &job.target, &mut job.row);
        if let (Some(times), Some(start)) = (&mut self.times, start) {
            times.resample += start.elapsed();
            times.idct += self.lanes[lane].idct.unwrap_or_default();
        }
        for (plane, between) in self.lanes[lane].planes.iter_mut().zip(&mut self.between) {
            if plane.samples.len() > KEPT {
                *plane = Plane::default();
            }
            if between.bytes() > KEPT {
                *between = Between::default();
            }
        }
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
        if !self.begin(0, header, region, &Seek::Note(&mut noted)) {
            return None;
        }
        lane::run(self.level, &mut self.lanes, [true, false]);
        let points = self.lanes[0].points();
        points.map(|points| points.to_bytes(header.count))
    }

    fn resample(
        &mut self,
        lane: usize,
        header: &Header<'_>,
        region: Region,
        target: &Target,
        row: &mut impl FnMut(usize, &[u8]),
    ) {
        let planes = &self.lanes[lane].planes;
        let (crop, size) = (target.crop, target.size);
        self.filters[0].set(target.resize, crop.w, size);
        self.filters[1].set(target.resize, crop.h, size);
        let factors = |i: usize| (header.components[i].across, header.components[i].down);
        let kinds = match header.count {
            3 if factors(1) != factors(2) => unreachable!("the header was checked"),
            3 if factors(0) != factors(1) => 2,
            _ => 1,
        };
        for (kind, plane) in planes.iter().enumerate().take(kinds) {
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
            planes: &planes[..header.count],
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
                // SAFETY: `level` is available, by `Level::detect` or the tests' check of it.
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
        let rows = &mut pixels[..];
        let job = Job {
            photo,
            target,
            seek,
            row: Box::new(move |y, row| rows[y * row.len()..][..row.len()].copy_from_slice(row)),
        };
        let done = decoder.decode(vec![job]);
        done[0].then_some(pixels)
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

    /// Whatever else is decoded meanwhile, damaged files among it.
    #[test]
    fn together_as_alone() {
        let mut files: Vec<Vec<u8>> = photos().into_iter().map(|(_, file)| file).collect();
        files.retain(|file| Photo::open(file).is_some());
        let mut damaged = files[0].clone();
        let at = damaged.len() * 3 / 4;
        damaged[at..at + 200].fill(0x55);
        files.insert(3, damaged);
        files.push(COLOUR.to_vec());
        for level in levels() {
            let mut random = Random::new(6, 0, Purpose::Shards);
            let mut targets = vec![];
            for file in &files {
                let (width, height) = Photo::open(file).unwrap().size();
                let [area, aspect] = [[0.05, 1.0], [0.5, 2.0]];
                targets.push(Target {
                    crop: crate::crop::torchvision(width, height, area, aspect, &mut random),
                    resize: Resize::Pillow,
                    size: 40,
                    flip: true,
                });
            }
            let mut together = vec![vec![0; 3 * 40 * 40]; files.len()];
            let mut noted: Vec<Option<Vec<u8>>> = vec![None; files.len()];
            let slots = together.iter_mut().zip(&mut noted);
            let jobs =
                files
                    .iter()
                    .zip(&targets)
                    .zip(slots)
                    .map(|((file, target), (out, noted))| Job {
                        photo: Photo::open(file).unwrap(),
                        target: *target,
                        seek: Seek::Note(noted),
                        row: Box::new(|y, row| {
                            out[y * row.len()..][..row.len()].copy_from_slice(row)
                        }),
                    });
            let mut decoder = Decoder::new(level);
            let done = decoder.decode(jobs.collect());
            for (i, (file, target)) in files.iter().zip(&targets).enumerate() {
                let mut alone = None;
                let seek = Seek::Note(&mut alone);
                let found = sought(&mut decoder, file, target.crop, true, 40, seek);
                assert_eq!(found.is_some(), done[i], "{i}");
                assert!(found.is_none_or(|found| found == together[i]), "{i}");
                assert_eq!(alone, noted[i], "{i}");
            }
            let notes = noted.iter().filter(|noted| noted.is_some()).count();
            assert_eq!(notes, files.len() - 1);
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
        let note = |file: &&Vec<u8>| decoder.note(&Photo::open(file).unwrap()).unwrap();
        let points: Vec<Vec<u8>> = files.iter().map(note).collect();
        let bytes: usize = points.iter().map(Vec::len).sum();
        println!("points: {} bytes a file", bytes / files.len());
        for (is_sought, together) in [(false, 1), (true, 1), (false, 8), (true, 8)] {
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                let mut random = Random::new(3, 0, Purpose::Shards);
                let start = Instant::now();
                let pairs: Vec<_> = files.iter().zip(&points).collect();
                for pairs in pairs.chunks(together) {
                    let jobs = pairs.iter().map(|(file, points)| {
                        let photo = Photo::open(file).unwrap();
                        let (width, height) = photo.size();
                        let [area, aspect] = [[0.08, 1.0], [0.75, 1.3]];
                        let target = Target {
                            crop: crate::crop::torchvision(
                                width,
                                height,
                                area,
                                aspect,
                                &mut random,
                            ),
                            resize: Resize::Pillow,
                            size: 224,
                            flip: false,
                        };
                        Job {
                            photo,
                            target,
                            seek: match is_sought {
                                true => Seek::Points(points),
                                false => Seek::Start,
                            },
                            row: Box::new(|_, row| {
                                std::hint::black_box(row);
                            }),
                        }
                    });
                    assert!(decoder.decode(jobs.collect()).iter().all(|done| *done));
                }
                best = best.min(start.elapsed().as_secs_f64());
            }
            let each = 1e6 * best / files.len() as f64;
            println!("{together} together, sought {is_sought}: {each:.0} us");
        }
    }
}
