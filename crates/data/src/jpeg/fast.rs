//! Training crops of ordinary photographs, fast: only what the crop needs is decoded, two images at a time, and planes
//! are resampled to the target size before colours are converted.
//!
//! Nothing here is trusted: lengths are checked, what entropy-coded data can reach is bounded by their tables, and
//! whatever is odd or damaged is left to the exact decoder, which has the last word on errors. The luma samples are
//! libjpeg's `islow` to the bit; the image differs from the exact one by roundings in between (docs/decisions/0009).
//! Every [`Level`] gives the same bits.

#![expect(
    unsafe_code,
    reason = "vector instructions, and the loop that reads entropy-coded data; headers are read by safe code"
)]

mod entropy;
mod header;
mod idct;
mod points;
mod resample;
mod scan;
mod simd;

pub(crate) use scan::Seek;
pub(crate) use simd::{Level, widely};

use std::array::from_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Resize;
use crate::crop::Rect;
use entropy::Pair;
use header::Header;
use resample::{Axis, Between, Filter, Plane, Span, Spread};
use scan::{Region, Scan};
use simd::{Vector, Work};

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
    /// Kept only where it is asked for: a clock is read twice for every four units.
    pub(crate) times: Option<Times>,
    level: Level,
    tables: Tables,
    /// Two images that are read in turn.
    scans: [Scan; 2],
    between: [Between; 3],
    /// Across and down.
    filters: [Filter; 2],
    /// Across and down, for the first and the other components.
    axes: [[Axis; 2]; 2],
    line: Vec<u8>,
}

/// Huffman tables by what a file says of first and other coefficients; the last used is last.
struct Tables(Vec<([Vec<u8>; 2], Arc<Pair>)>);

impl Tables {
    /// Those that are known, or new ones. None if they are damaged.
    fn get(&mut self, listed: [&[u8]; 2]) -> Option<Arc<Pair>> {
        let entry = match self.0.iter().position(|(known, _)| *known == listed) {
            Some(i) => self.0.remove(i),
            None => {
                let pair = Arc::new(Pair::new(listed[0], listed[1])?);
                if self.0.len() == TABLES {
                    self.0.remove(0);
                }
                (listed.map(<[u8]>::to_vec), pair)
            }
        };
        let pair = Arc::clone(&entry.1);
        self.0.push(entry);
        Some(pair)
    }
}

/// A file whose header has been read.
pub(crate) struct Photo<'a>(Header<'a>);

impl<'a> Photo<'a> {
    /// None if it is not for this decoder.
    pub(crate) fn open(bytes: &'a [u8]) -> Option<Self> {
        Header::parse(bytes).map(Self)
    }

    /// Whether there can be points in it.
    fn is_sequential(&self) -> bool {
        !self.0.is_progressive
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

/// A photo that is to be decoded.
pub(crate) struct Job<'a, T> {
    pub(crate) photo: Photo<'a>,
    /// None if no pixels are wanted.
    pub(crate) target: Option<Target>,
    pub(crate) seek: Seek<'a>,
    /// Whatever the caller needs to know of it.
    pub(crate) of: T,
}

/// Where photos come from and their pixels go.
pub(crate) trait Photos<'a> {
    type Of;

    /// The next one, if there is one.
    fn next(&mut self) -> Option<Job<'a, Self::Of>>;

    /// A row of the target, in RGB.
    fn row(&mut self, of: &mut Self::Of, y: usize, row: &[u8]);

    /// All rows have been given, and what was noted where that was asked for; or the file is damaged, or is nothing for
    /// this decoder after all, and rows mean nothing.
    fn done(&mut self, of: Self::Of, is_whole: bool, noted: Option<Vec<u8>>);
}

/// Points of photos, in order; none of what is no photo, or damaged.
struct Noted<I> {
    photos: I,
    points: Vec<Option<Vec<u8>>>,
}

impl<'a, I: Iterator<Item = Option<Photo<'a>>>> Photos<'a> for Noted<I> {
    /// Which one.
    type Of = usize;

    fn next(&mut self) -> Option<Job<'a, usize>> {
        loop {
            let photo = self.photos.next()?;
            let of = self.points.len();
            self.points.push(None);
            if let Some(photo) = photo.filter(Photo::is_sequential) {
                return Some(Job {
                    photo,
                    target: None,
                    seek: Seek::Note,
                    of,
                });
            }
        }
    }

    fn row(&mut self, _: &mut usize, _: usize, _: &[u8]) {}

    fn done(&mut self, of: usize, _: bool, noted: Option<Vec<u8>>) {
        self.points[of] = noted;
    }
}

impl Decoder {
    pub(crate) fn new(level: Level) -> Self {
        Self {
            times: None,
            level,
            tables: Tables(vec![]),
            scans: [Scan::new(), Scan::new()],
            between: Default::default(),
            filters: Default::default(),
            axes: Default::default(),
            line: vec![],
        }
    }

    /// Decodes photos, two at a time, as they come.
    pub(crate) fn decode<'a>(&mut self, photos: &mut impl Photos<'a>) {
        let mut current = [const { None }; 2];
        loop {
            for (which, current) in current.iter_mut().enumerate() {
                self.advance(which, current, photos);
            }
            let [first, second] = &mut self.scans;
            let (a, b) = match current {
                [Some(_), Some(_)] => (first, Some(second)),
                [Some(_), None] => (first, None),
                [None, Some(_)] => (second, None),
                [None, None] => return,
            };
            let b = b.map(|scan| &mut scan.stream);
            // SAFETY: `level` is available, by `Level::detect` or the tests' check of it.
            unsafe { entropy::read(self.level, &mut a.stream, b) };
        }
    }

    /// Where something that was to be read has been, makes of it what it is, and finds what is to be read next; of
    /// another photo, when one is done. None if there are no more.
    fn advance<'a, P: Photos<'a>>(
        &mut self,
        which: usize,
        current: &mut Option<Job<'a, P::Of>>,
        photos: &mut P,
    ) {
        if current.is_some() && !self.scans[which].stream.is_done() {
            return;
        }
        // SAFETY: the level is available.
        let mut is_good = current.is_none() || unsafe { self.scans[which].finish(self.level) };
        loop {
            if current.is_some() && is_good && self.scans[which].next() {
                return;
            }
            if let Some(mut job) = current.take() {
                if is_good && let Some(target) = &job.target {
                    let start = self.times.map(|_| Instant::now());
                    let work = Resample {
                        which,
                        header: &job.photo.0,
                        target,
                        row: |y: usize, row: &[u8]| photos.row(&mut job.of, y, row),
                        decoder: &mut *self,
                    };
                    // SAFETY: the level is available.
                    unsafe { work.decoder.level.run(work) };
                    if let (Some(times), Some(start)) = (&mut self.times, start) {
                        times.resample += start.elapsed();
                        times.idct += self.scans[which].idct.unwrap_or_default();
                    }
                }
                let noted = self.scans[which].noted().filter(|_| is_good);
                self.tidy(which);
                photos.done(job.of, is_good, noted);
            }
            let Some(job) = photos.next() else { return };
            is_good = self.start(which, &job);
            *current = Some(job);
        }
    }

    /// False if the file is damaged.
    fn start<T>(&mut self, which: usize, job: &Job<'_, T>) -> bool {
        let header = &job.photo.0;
        let region = match &job.target {
            Some(target) => Region::new(header, target.crop),
            None => Region::nothing(header),
        };
        self.scans[which].idct = self.times.map(|_| Duration::ZERO);
        if header.is_progressive {
            let components = super::coefficients(header.data);
            // SAFETY: the level is available.
            return components.is_ok_and(|components| unsafe {
                self.scans[which].fill(self.level, header, region, &components)
            });
        }
        let pairs = self.pairs(header);
        let scan = &mut self.scans[which];
        pairs.is_some_and(|pairs| scan.start(header, &pairs, region, &job.seek))
    }

    /// The tables of each component. None if some are missing or damaged.
    fn pairs(&mut self, header: &Header<'_>) -> Option<Vec<Arc<Pair>>> {
        let components = header.components[..header.count].iter();
        let pair = |component| self.tables.get(header.tables(component)?);
        components.map(pair).collect()
    }

    /// Gives back memory of large images.
    fn tidy(&mut self, which: usize) {
        let planes = &mut self.scans[which].planes;
        for (plane, between) in planes.iter_mut().zip(&mut self.between) {
            if plane.samples.len() > KEPT {
                *plane = Plane::default();
            }
            if between.bytes() > KEPT {
                *between = Between::default();
            }
        }
    }

    /// Notes photos' points and decodes nothing. None for what is no photo, or damaged.
    pub(crate) fn note<'a>(
        &mut self,
        photos: impl Iterator<Item = Option<Photo<'a>>>,
    ) -> Vec<Option<Vec<u8>>> {
        let mut noted = Noted {
            photos,
            points: vec![],
        };
        self.decode(&mut noted);
        noted.points
    }
}

/// An image at its target's size, from planes.
struct Resample<'a, R> {
    decoder: &'a mut Decoder,
    which: usize,
    header: &'a Header<'a>,
    target: &'a Target,
    row: R,
}

impl<R: FnMut(usize, &[u8])> Work for Resample<'_, R> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self {
            decoder,
            which,
            header,
            target,
            mut row,
        } = self;
        let (crop, size) = (target.crop, target.size);
        let Scan { region, planes, .. } = &mut decoder.scans[which];
        decoder.filters[0].set(target.resize, crop.w, size);
        decoder.filters[1].set(target.resize, crop.h, size);
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
            let [across, down] = &mut decoder.axes[kind];
            let span = Span {
                crop: crop.x,
                samples: wide,
                begin: 8 * region.x[0] * component.across,
            };
            across.set(&decoder.filters[0], span, spread(x), target.flip);
            let span = Span {
                crop: crop.y,
                samples: high,
                begin: 8 * region.y[0] * component.down,
            };
            down.set(&decoder.filters[1], span, spread(y), false);
        }
        decoder.line.resize(3 * size.next_multiple_of(64), 0);
        let between = &mut decoder.between[..header.count];
        for (i, (plane, between)) in planes.iter_mut().zip(&mut *between).enumerate() {
            let [across, down] = &decoder.axes[i.min(kinds - 1)];
            // SAFETY: the caller's word.
            unsafe { resample::across::<V>(plane, across, down, between) };
        }
        let down = from_fn(|i| &decoder.axes[i.min(kinds - 1)][1]);
        for y in 0..size {
            // SAFETY: the same axes made `between`; `line` has room for outputs rounded up to the widest block, 64.
            unsafe { resample::down::<V>(between, down, y, decoder.line.as_mut_ptr()) };
            row(y, &decoder.line[..3 * size]);
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
        views(decoder, vec![(file, target(crop, flip, size), seek)])
            .pop()?
            .map(|(pixels, _)| pixels)
    }

    fn target(crop: Rect, flip: bool, size: usize) -> Target {
        Target {
            crop,
            resize: Resize::Pillow,
            size,
            flip,
        }
    }

    /// Pixels, and what was noted.
    type View = Option<(Vec<u8>, Option<Vec<u8>>)>;

    struct Views<'a> {
        next: std::vec::IntoIter<(&'a [u8], Target, Seek<'a>)>,
        taken: usize,
        done: Vec<(usize, View)>,
    }

    impl<'a> Photos<'a> for Views<'a> {
        type Of = (usize, Vec<u8>);

        fn next(&mut self) -> Option<Job<'a, Self::Of>> {
            loop {
                let (file, target, seek) = self.next.next()?;
                let number = self.taken;
                self.taken += 1;
                let Some(photo) = Photo::open(file) else {
                    self.done.push((number, None));
                    continue;
                };
                return Some(Job {
                    photo,
                    target: Some(target),
                    seek,
                    of: (number, vec![0; 3 * target.size * target.size]),
                });
            }
        }

        fn row(&mut self, (_, pixels): &mut Self::Of, y: usize, row: &[u8]) {
            pixels[y * row.len()..][..row.len()].copy_from_slice(row);
        }

        fn done(&mut self, (i, pixels): Self::Of, is_whole: bool, noted: Option<Vec<u8>>) {
            self.done.push((i, is_whole.then_some((pixels, noted))));
        }
    }

    /// All of them side by side, in order.
    fn views(decoder: &mut Decoder, of: Vec<(&[u8], Target, Seek<'_>)>) -> Vec<View> {
        let mut views = Views {
            next: of.into_iter(),
            taken: 0,
            done: vec![],
        };
        decoder.decode(&mut views);
        views.done.sort_by_key(|&(i, _)| i);
        views.done.into_iter().map(|(_, view)| view).collect()
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

    /// The exact decoder puts their coefficients together, and says what is damaged.
    #[test]
    fn progressive_files_are_whole_where_the_exact_decoder_says_so() {
        let file = include_bytes!("../../tests/goldens/progressive.jpg");
        let mut decoder = Decoder::new(Level::detect());
        for end in 0..=file.len() {
            let file = &file[..end];
            let is_good = Photo::open(file).is_some() && jpeg::decode(file, Like::Pillow).is_ok();
            assert_eq!(whole(&mut decoder, file).is_some(), is_good, "{end}");
        }
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
        let mut decoder = Decoder::new(Level::detect());
        let (width, height) = Photo::open(file)?.size();
        let corner = Rect {
            x: width / 3,
            y: height / 3,
            w: width.div_ceil(9),
            h: height.div_ceil(9),
        };
        let view = (file, target(corner, false, 32), Seek::Note);
        views(&mut decoder, vec![view]).pop()??.1
    }

    #[test]
    fn points_change_no_pixel() {
        let mut decoder = Decoder::new(Level::detect());
        let mut random = Random::new(4, 0, Purpose::Shards);
        let mut bytes = 0;
        for (name, file) in photos() {
            let photo = Photo::open(&file).filter(Photo::is_sequential);
            let Some((width, height)) = photo.map(|photo| photo.size()) else {
                assert_eq!(noted(&file), None);
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
                let note = (&file[..], target(crop, false, 48), Seek::Note);
                let (pixels, again) = views(&mut decoder, vec![note]).pop().unwrap().unwrap();
                assert!(pixels == expected, "{name} {crop:?}");
                // Where they are does not depend on what is seen meanwhile.
                assert_eq!(again.as_ref(), Some(&points), "{name} {crop:?}");
            }
            let file = [Photo::open(&file)].into_iter();
            assert_eq!(decoder.note(file), [Some(points)]);
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

    /// Whatever is read beside it, and however much longer that takes, an image is the same; and so is what is noted.
    #[test]
    fn two_at_a_time_change_nothing() {
        let photos = photos();
        let mut random = Random::new(5, 0, Purpose::Shards);
        let mut damaged: Vec<Vec<u8>> = vec![];
        for (_, file) in &photos {
            let mut file = file.clone();
            let end = file.len();
            random.fill(&mut file[end / 2..end - 2]);
            damaged.push(file);
        }
        let files = photos.iter().map(|(_, file)| file).chain(&damaged);
        let files: Vec<&Vec<u8>> = files.filter(|f| Photo::open(f).is_some()).collect();
        for level in levels() {
            let mut decoder = Decoder::new(level);
            let mut jobs = vec![];
            for i in 0..3 * files.len() {
                let file = &files[random.below(files.len() as u64) as usize][..];
                let (width, height) = Photo::open(file).unwrap().size();
                let [area, aspect] = [[0.01, 1.0], [0.3, 3.0]];
                let crop = crate::crop::torchvision(width, height, area, aspect, &mut random);
                jobs.push((file, target(crop, i % 2 == 0, [48, 9][i % 2]), i % 3 == 0));
            }
            let job = |&(file, target, notes): &(_, _, _)| match notes {
                true => (file, target, Seek::Note),
                false => (file, target, Seek::Start),
            };
            let alone = jobs
                .iter()
                .map(|of| views(&mut decoder, vec![job(of)]).remove(0));
            let alone: Vec<View> = alone.collect();
            let together = views(&mut decoder, jobs.iter().map(job).collect());
            assert!(together == alone, "{level:?}");
            let whole = alone.iter().filter(|view| view.is_some()).count();
            assert!(whole > jobs.len() / 4 && whole < jobs.len(), "{whole}");
        }
    }

    /// Photos whose pixels nobody keeps.
    struct Unseen<'a>(std::vec::IntoIter<Job<'a, ()>>);

    impl<'a> Photos<'a> for Unseen<'a> {
        type Of = ();

        fn next(&mut self) -> Option<Job<'a, ()>> {
            self.0.next()
        }

        fn row(&mut self, (): &mut (), _: usize, row: &[u8]) {
            std::hint::black_box(row);
        }

        fn done(&mut self, (): (), is_whole: bool, _: Option<Vec<u8>>) {
            assert!(is_whole);
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
        let is_fast = |f: &&Vec<u8>| Photo::open(f).is_some_and(|photo| photo.is_sequential());
        let files: Vec<&Vec<u8>> = files.iter().filter(is_fast).collect();
        let mut decoder = Decoder::new(Level::detect());
        let mut points = vec![];
        let mut best = [f64::INFINITY; 3];
        for _ in 0..7 {
            let start = Instant::now();
            let noted = decoder.note(files.iter().map(|file| Photo::open(file)));
            points = noted.into_iter().map(Option::unwrap).collect();
            best[0] = best[0].min(start.elapsed().as_secs_f64());
            for is_sought in [false, true] {
                let mut random = Random::new(3, 0, Purpose::Shards);
                let jobs = files.iter().zip(&points).map(|(file, points)| {
                    let (width, height) = Photo::open(file).unwrap().size();
                    let [area, aspect] = [[0.08, 1.0], [0.75, 1.3]];
                    let crop = crate::crop::torchvision(width, height, area, aspect, &mut random);
                    let seek = match is_sought {
                        true => Seek::Points(points),
                        false => Seek::Start,
                    };
                    Job {
                        photo: Photo::open(file).unwrap(),
                        target: Some(target(crop, false, 224)),
                        seek,
                        of: (),
                    }
                });
                let jobs = jobs.collect::<Vec<_>>().into_iter();
                let start = Instant::now();
                decoder.decode(&mut Unseen(jobs));
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
