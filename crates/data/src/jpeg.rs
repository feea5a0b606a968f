//! JPEG files become RGB pixels: sequential and progressive Huffman coding, 8 bits a sample (ITU T.81), to the bit as
//! libjpeg-turbo decodes them (docs/decisions/0005).
//!
//! Not here: arithmetic coding, 12 bits, lossless and hierarchical files, and the smoothing that libjpeg applies to a
//! progressive file whose last bits are missing. They are errors, but for the last.

mod bits;
mod colour;
pub(crate) mod fast;
mod idct;
mod scan;

use bits::{Bits, Huffman};
use colour::{Inks, Plane, Space};
use idct::Dct;
use scan::{Block, Coder, Part, ZIGZAG};

/// No photograph is larger, and a damaged header must not ask for gigabytes.
pub(crate) const MAX_PIXELS: usize = 100_000_000;
/// Encoders make ten or so; each costs a walk over all blocks, however few its bytes.
const MAX_SCANS: usize = 100;

/// Whose pixels to give. Both libraries are libjpeg-turbo underneath, but they ask it for different things, and they
/// turn its CMYK to RGB themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Like {
    /// Pillow's: the accurate inverse DCT; all CMYK files are Adobe's, with inverted inks.
    Pillow,
    /// TensorFlow's by default: the fast inverse DCT; inks are inverted if Adobe's marker is there.
    TensorFlow,
}

/// An image as rows of RGB.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) pixels: Vec<u8>,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// Decodes a whole file; grey and CMYK become RGB. A file that is cut off or damaged is an error rather than half grey.
pub(crate) fn decode(bytes: &[u8], like: Like) -> Result<Image, String> {
    Decoder::read(bytes, like)?.image()
}

/// Whether a file has four components, which are inks.
pub(crate) fn has_inks(bytes: &[u8]) -> bool {
    let mut decoder = Decoder::new(bytes, Like::Pillow);
    while let Some(marker) = decoder.marker()
        && let Some(length) = short(bytes, decoder.at)
    {
        if (0xc0..=0xc2).contains(&marker) {
            return bytes.get(decoder.at + 7) == Some(&4);
        }
        decoder.at += length;
    }
    false
}

/// A component of a progressive file.
pub(crate) struct Coefficients {
    /// As many in a row as there are `across`.
    blocks: Vec<[i16; 64]>,
    across: usize,
    /// Its quantisation table.
    scales: [i32; 64],
}

/// What a progressive file holds, or why [`decode`] would refuse it.
fn coefficients(bytes: &[u8]) -> Result<Vec<Coefficients>, String> {
    let frame = Decoder::read(bytes, Like::Pillow)?.frame;
    let components = frame.into_iter().flat_map(|frame| frame.components);
    let coefficients = |component: Component| {
        Ok(Coefficients {
            across: component.plane.stride / 8,
            scales: component.scales.ok_or("a component is missing")?,
            blocks: component.blocks,
        })
    };
    components.map(coefficients).collect()
}

/// What the segments so far have said.
struct Decoder<'a> {
    bytes: &'a [u8],
    /// Of the next segment.
    at: usize,
    like: Like,
    dct: Dct,
    quantisation: [Option<[u16; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    /// Units between restart markers; 0 for none.
    restart_interval: usize,
    has_jfif: bool,
    /// The transform that Adobe's marker names.
    adobe: Option<u8>,
    frame: Option<Frame>,
    scans: usize,
}

struct Frame {
    width: usize,
    height: usize,
    is_progressive: bool,
    components: Vec<Component>,
    /// The greatest sampling factors.
    across: usize,
    down: usize,
}

struct Component {
    id: u8,
    /// Sampling factors: blocks in a unit of an interleaved scan.
    across: usize,
    down: usize,
    /// Index of its quantisation table.
    table: usize,
    /// The table as it was when the first scan of the component began; none before.
    scales: Option<[i32; 64]>,
    plane: Plane,
    /// Coefficients of a progressive file, block rows as long as the plane's, and which are not zero.
    blocks: Vec<[i16; 64]>,
    seen: Vec<u64>,
}

impl Component {
    /// Writes a block's pixels, if any of them is in the image.
    fn render(&mut self, block: &[i16; 64], x: usize, y: usize, is_flat: bool, dct: Dct) {
        let plane = &mut self.plane;
        let Some(scales) = &self.scales else { return };
        if 8 * x >= plane.width || 8 * y >= plane.height {
            return;
        }
        let out = &mut plane.samples[8 * (y * plane.stride + x)..];
        if is_flat {
            let value = idct::flat(block[0], scales[0], dct);
            for row in out.chunks_mut(plane.stride).take(8) {
                row[..8].fill(value);
            }
        } else {
            idct::inverse(block, scales, dct, out, plane.stride);
        }
    }
}

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    let pair = bytes.get(at..)?.first_chunk()?;
    Some(usize::from(u16::from_be_bytes(*pair)))
}

impl<'a> Decoder<'a> {
    /// Behind the two bytes with which every file begins.
    fn new(bytes: &'a [u8], like: Like) -> Self {
        Self {
            bytes,
            at: 2,
            like,
            dct: match like {
                Like::Pillow => Dct::Accurate,
                Like::TensorFlow => Dct::Fast,
            },
            quantisation: [None; 4],
            dc: [const { None }; 4],
            ac: [const { None }; 4],
            restart_interval: 0,
            has_jfif: false,
            adobe: None,
            frame: None,
            scans: 0,
        }
    }

    /// Reads a file to its end.
    fn read(bytes: &'a [u8], like: Like) -> Result<Self, String> {
        if !bytes.starts_with(&[0xff, 0xd8]) {
            return Err("it does not begin as a JPEG does".into());
        }
        let mut decoder = Self::new(bytes, like);
        while decoder.segment()? {}
        Ok(decoder)
    }

    /// Reads the next segment; false if the image is complete or the file says that it ends.
    fn segment(&mut self) -> Result<bool, String> {
        let marker = self.marker().ok_or("it ends before its image does")?;
        if marker == 0xd9 {
            return Ok(false);
        }
        let body = short(self.bytes, self.at)
            .filter(|&length| length >= 2)
            .and_then(|length| self.bytes.get(self.at + 2..self.at + length))
            .ok_or("a segment is cut off")?;
        self.at += 2 + body.len();
        match marker {
            0xc0..=0xc2 => self.begin_frame(marker == 0xc2, body)?,
            0xc4 => self.huffman(body)?,
            0xc3 | 0xc5..=0xc7 | 0xcb | 0xcd..=0xcf | 0xc8..=0xca => {
                return Err(
                    "arithmetic, lossless and hierarchical coding are not supported".into(),
                );
            }
            0xd8 => return Err("an image begins inside another".into()),
            0xda => {
                self.scan(body)?;
                return Ok(!self.is_complete());
            }
            0xdb => self.quantisation(body)?,
            0xdd => {
                self.restart_interval = short(body, 0).ok_or("a restart interval is cut off")?;
            }
            // What colours are is settled when the first scan begins.
            0xe0 if self.scans == 0 => self.has_jfif |= body.starts_with(b"JFIF\0"),
            0xee if self.scans == 0 && body.starts_with(b"Adobe") => {
                self.adobe = body.get(11).copied();
            }
            _ => {}
        }
        Ok(true)
    }

    /// Steps behind the next marker, over whatever is before it and over stray restart markers.
    fn marker(&mut self) -> Option<u8> {
        loop {
            self.at += self.bytes.get(self.at..)?.iter().position(|&b| b == 0xff)?;
            self.at += 1;
            match *self.bytes.get(self.at)? {
                0xff => {}
                0x00 | 0x01 | 0xd0..=0xd7 => self.at += 1,
                marker => {
                    self.at += 1;
                    return Some(marker);
                }
            }
        }
    }

    fn quantisation(&mut self, mut body: &[u8]) -> Result<(), String> {
        while let Some((&head, rest)) = body.split_first() {
            let (is_wide, index) = (head >> 4 != 0, usize::from(head & 15));
            let size = if is_wide { 128 } else { 64 };
            if index > 3 || rest.len() < size {
                return Err("a quantisation table is damaged".into());
            }
            let mut table = [0; 64];
            for (k, &place) in ZIGZAG.iter().enumerate() {
                table[usize::from(place)] = if is_wide {
                    u16::from_be_bytes([rest[2 * k], rest[2 * k + 1]])
                } else {
                    u16::from(rest[k])
                };
            }
            self.quantisation[index] = Some(table);
            body = &rest[size..];
        }
        Ok(())
    }

    fn huffman(&mut self, mut body: &[u8]) -> Result<(), String> {
        while let Some((&head, rest)) = body.split_first() {
            let (class, index) = (head >> 4, usize::from(head & 15));
            let (counts, rest) = rest
                .split_first_chunk()
                .filter(|_| class < 2 && index < 4)
                .ok_or("a Huffman table is damaged")?;
            let total = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest
                .split_at_checked(total)
                .filter(|_| total <= 256)
                .ok_or("a Huffman table is damaged")?;
            let tables = if class == 0 {
                &mut self.dc
            } else {
                &mut self.ac
            };
            tables[index] = Some(Huffman::new(counts, symbols)?);
            body = rest;
        }
        Ok(())
    }

    fn begin_frame(&mut self, is_progressive: bool, body: &[u8]) -> Result<(), String> {
        if self.frame.is_some() {
            return Err("it holds two images".into());
        }
        let (Some(&precision), Some(height), Some(width), Some(&count)) =
            (body.first(), short(body, 1), short(body, 3), body.get(5))
        else {
            return Err("the frame's header is cut off".into());
        };
        if precision != 8 {
            return Err(format!("{precision} bits a sample are not supported"));
        }
        if width == 0 || height == 0 {
            return Err(format!("the header says {width} x {height} pixels"));
        }
        if width * height > MAX_PIXELS {
            return Err(format!(
                "{width} x {height} pixels are more than {MAX_PIXELS}"
            ));
        }
        if !matches!(count, 1 | 3 | 4) {
            return Err(format!("{count} components are not supported"));
        }
        let described = body[6..].as_chunks::<3>().0;
        let described = described
            .get(..usize::from(count))
            .ok_or("the frame's header is cut off")?;
        let factors =
            |&[_, factors, _]: &[u8; 3]| (usize::from(factors >> 4), usize::from(factors & 15));
        let across = described.iter().map(|c| factors(c).0).max().unwrap_or(0);
        let down = described.iter().map(|c| factors(c).1).max().unwrap_or(0);
        let mut components = Vec::new();
        for component in described {
            let (h, v) = factors(component);
            if h == 0 || v == 0 || across > 4 || down > 4 || table_index(component[2]).is_none() {
                return Err("a component's description is damaged".into());
            }
            if !across.is_multiple_of(h) || !down.is_multiple_of(v) {
                return Err("fractional subsampling is not supported".into());
            }
            let (blocks_across, blocks_down) = (
                width.div_ceil(8 * across) * h,
                height.div_ceil(8 * down) * v,
            );
            let coefficients = if is_progressive {
                blocks_across * blocks_down
            } else {
                0
            };
            components.push(Component {
                id: component[0],
                across: h,
                down: v,
                table: usize::from(component[2]),
                scales: None,
                plane: Plane {
                    samples: vec![0; 64 * blocks_across * blocks_down],
                    stride: 8 * blocks_across,
                    width: (width * h).div_ceil(across),
                    height: (height * v).div_ceil(down),
                    across: across / h,
                    down: down / v,
                },
                blocks: vec![[0; 64]; coefficients],
                seen: vec![0; coefficients],
            });
        }
        self.frame = Some(Frame {
            width,
            height,
            is_progressive,
            components,
            across,
            down,
        });
        Ok(())
    }

    fn scan(&mut self, body: &[u8]) -> Result<(), String> {
        self.scans += 1;
        if self.scans > MAX_SCANS {
            return Err(format!("there are more than {MAX_SCANS} scans"));
        }
        let damaged = || String::from("a scan's header is damaged");
        let frame = self.frame.as_mut().ok_or("a scan comes before its frame")?;
        let (&count, rest) = body.split_first().ok_or_else(damaged)?;
        let (described, rest) = rest
            .split_at_checked(2 * usize::from(count))
            .ok_or_else(damaged)?;
        let &[first, last, bits] = rest.first_chunk().ok_or_else(damaged)?;
        let part = Part {
            first: usize::from(first),
            last: usize::from(last),
            high: u32::from(bits >> 4),
            low: u32::from(bits & 15),
        };
        let fits = if part.first == 0 {
            part.last == 0
        } else {
            part.last >= part.first && count == 1
        };
        let follows = part.high == 0 || part.high == part.low + 1;
        if frame.is_progressive && !(fits && follows && part.last < 64 && part.low < 14) {
            return Err(damaged());
        }

        let mut coders = Vec::new();
        for &[id, tables] in described.as_chunks().0 {
            let index = frame.components.iter().position(|c| c.id == id);
            let index = index.ok_or_else(damaged)?;
            let component = &mut frame.components[index];
            if coders.iter().any(|(other, _)| *other == index)
                || (!frame.is_progressive && component.scales.is_some())
            {
                return Err("a component comes twice".into());
            }
            if component.scales.is_none() {
                let table = self.quantisation[component.table].as_ref();
                let table = table.ok_or("a quantisation table is missing")?;
                component.scales = Some(idct::scaled(table, self.dct));
            }
            let (dc, ac) = (table_index(tables >> 4), table_index(tables & 15));
            let coder = Coder {
                dc: dc.and_then(|i| self.dc[i].as_ref()),
                ac: ac.and_then(|i| self.ac[i].as_ref()),
                previous: 0,
            };
            coders.push((index, coder));
        }
        let mut bits = Bits::new(self.bytes, self.at);
        frame.scan(
            &mut coders,
            part,
            &mut bits,
            self.restart_interval,
            self.dct,
        )?;
        self.at = bits.position();
        Ok(())
    }

    /// Whether nothing can follow that matters.
    fn is_complete(&self) -> bool {
        self.frame.as_ref().is_some_and(|frame| {
            !frame.is_progressive && frame.components.iter().all(|c| c.scales.is_some())
        })
    }

    fn image(self) -> Result<Image, String> {
        let space = self.space()?;
        let frame = self.frame.ok_or("there is no image in it")?;
        let mut planes = Vec::new();
        for mut component in frame.components {
            if component.scales.is_none() {
                return Err("a component is missing".into());
            }
            let across = component.plane.stride / 8;
            for (i, block) in std::mem::take(&mut component.blocks).iter().enumerate() {
                let (x, y) = (i % across, i / across);
                component.render(block, x, y, false, self.dct);
            }
            planes.push(component.plane);
        }
        Ok(Image {
            pixels: colour::rgb(&planes, space, frame.width, frame.height),
            width: frame.width,
            height: frame.height,
        })
    }

    /// What the components are, by libjpeg's rules: JFIF is YCbCr, else Adobe's marker says it, else the names do.
    fn space(&self) -> Result<Space, String> {
        let components = self.frame.as_ref().map_or(&[][..], |f| &f.components);
        let ids: Vec<u8> = components.iter().map(|c| c.id).collect();
        let inks = Inks {
            are_inverted: self.adobe.is_some() || self.like == Like::Pillow,
            are_rounded: self.like == Like::Pillow,
        };
        Ok(match (&ids[..], self.adobe) {
            ([_], _) => Space::Grey,
            ([_, _, _], _) if self.has_jfif => Space::YCbCr,
            ([_, _, _], Some(0)) => Space::Rgb,
            (b"RGB", None) => Space::Rgb,
            ([_, _, _], _) => Space::YCbCr,
            (_, None | Some(0)) => Space::Cmyk(inks),
            _ => Space::Ycck(inks),
        })
    }
}

fn table_index(index: u8) -> Option<usize> {
    Some(usize::from(index)).filter(|&index| index < 4)
}

impl Frame {
    /// Decodes the units of a scan: blocks of one component, or as many of each as the sampling factors say.
    fn scan(
        &mut self,
        coders: &mut [(usize, Coder<'_>)],
        part: Part,
        bits: &mut Bits<'_>,
        restart_interval: usize,
        dct: Dct,
    ) -> Result<(), String> {
        let is_interleaved = coders.len() > 1;
        let (units_across, units_down) = match coders {
            [(index, _)] => {
                let plane = &self.components[*index].plane;
                (plane.width.div_ceil(8), plane.height.div_ceil(8))
            }
            _ => (
                self.width.div_ceil(8 * self.across),
                self.height.div_ceil(8 * self.down),
            ),
        };
        let (mut skip, mut unit) = (0, 0);
        for unit_y in 0..units_down {
            for unit_x in 0..units_across {
                if restart_interval > 0 && unit > 0 && unit % restart_interval == 0 {
                    bits.restart(((unit / restart_interval - 1) % 8) as u8)?;
                    coders.iter_mut().for_each(|(_, coder)| coder.previous = 0);
                    skip = 0;
                }
                unit += 1;
                for (index, coder) in &mut *coders {
                    let component = &mut self.components[*index];
                    let (across, down) = match is_interleaved {
                        true => (component.across, component.down),
                        false => (1, 1),
                    };
                    for y in unit_y * down..(unit_y + 1) * down {
                        for x in unit_x * across..(unit_x + 1) * across {
                            if self.is_progressive {
                                let place = y * (component.plane.stride / 8) + x;
                                let mut block = Block {
                                    coefficients: &mut component.blocks[place],
                                    seen: &mut component.seen[place],
                                };
                                coder.progressive(bits, part, &mut skip, &mut block)?;
                            } else {
                                let mut block = [0; 64];
                                let is_flat = !coder.sequential(bits, &mut block)?;
                                component.render(&block, x, y, is_flat, dct);
                            }
                        }
                    }
                }
                bits.check()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOUR: &[u8] = include_bytes!("../tests/goldens/colour420.jpg");
    const PROGRESSIVE: &[u8] = include_bytes!("../tests/goldens/progressive.jpg");
    const RESTARTS: &[u8] = include_bytes!("../tests/photos/422-restart-blocks.jpg");

    /// Pixels are libjpeg-turbo's, by way of Pillow (tests/goldens/goldens.py); the photographs in tests/photos do more.
    fn check(file: &[u8], golden: &[u8], size: (usize, usize)) {
        let image = decode(file, Like::Pillow).unwrap();
        assert_eq!((image.width, image.height), size);
        assert!(image.pixels == golden);
    }

    #[test]
    fn colour() {
        check(
            COLOUR,
            include_bytes!("../tests/goldens/colour420.u8"),
            (41, 30),
        );
    }

    #[test]
    fn progressive() {
        check(
            PROGRESSIVE,
            include_bytes!("../tests/goldens/progressive.u8"),
            (41, 30),
        );
    }

    #[test]
    fn grey_becomes_rgb() {
        check(
            include_bytes!("../tests/goldens/grey.jpg"),
            include_bytes!("../tests/goldens/grey.u8"),
            (21, 14),
        );
    }

    /// Every photograph, by its hash (tests/photos/goldens.py).
    #[test]
    fn photographs_are_pillows_and_tensorflows_to_the_bit() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/photos");
        for line in include_str!("../tests/photos/photos.txt").lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let file = std::fs::read(format!("{folder}/{}.jpg", words[0])).unwrap();
            for (like, hash) in [(Like::Pillow, words[3]), (Like::TensorFlow, words[4])] {
                let image = decode(&file, like).unwrap();
                assert_eq!(image.width.to_string(), words[1]);
                assert_eq!(image.height.to_string(), words[2]);
                let fnv1a = |hash: u64, &byte: &u8| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
                };
                let ours = image.pixels.iter().fold(0xcbf2_9ce4_8422_2325, fnv1a);
                assert_eq!(format!("{ours:016x}"), hash, "{} {like:?}", words[0]);
            }
        }
    }

    fn error(bytes: &[u8]) -> String {
        decode(bytes, Like::Pillow).unwrap_err()
    }

    /// Where the segment of this marker starts, its marker included.
    fn find(bytes: &[u8], marker: u8) -> usize {
        let place = bytes.windows(2).position(|pair| pair == [0xff, marker]);
        place.unwrap()
    }

    /// A copy with the bytes at some places after a marker replaced.
    fn spoilt(bytes: &[u8], marker: u8, at: usize, new: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let start = find(&bytes, marker) + at;
        bytes[start..start + new.len()].copy_from_slice(new);
        bytes
    }

    #[test]
    fn empty() {
        assert_eq!(error(b""), "it does not begin as a JPEG does");
        assert_eq!(error(b"\xff\xd8"), "it ends before its image does");
        assert_eq!(error(b"\xff\xd8\xff\xd9"), "there is no image in it");
    }

    #[test]
    fn not_a_jpeg() {
        assert_eq!(error(b"\x89PNG\r\n"), "it does not begin as a JPEG does");
    }

    #[test]
    fn truncated_anywhere() {
        for (file, step) in [(COLOUR, 1), (PROGRESSIVE, 1), (RESTARTS, 23)] {
            // What a decoder needs ends where the marker of the end begins, or a byte of padding earlier.
            for end in (0..file.len() - 3).step_by(step) {
                assert!(decode(&file[..end], Like::Pillow).is_err(), "{end}");
            }
        }
    }

    #[test]
    fn huge_dimensions() {
        let bytes = spoilt(COLOUR, 0xc0, 5, &[0xff; 4]);
        assert_eq!(
            error(&bytes),
            "65535 x 65535 pixels are more than 100000000"
        );
    }

    #[test]
    fn no_dimensions() {
        let bytes = spoilt(COLOUR, 0xc0, 5, &[0, 0]);
        assert_eq!(error(&bytes), "the header says 41 x 0 pixels");
    }

    #[test]
    fn more_pixels_than_data() {
        assert_eq!(
            error(&spoilt(COLOUR, 0xc0, 5, &[1, 0, 1, 0])),
            "the image data are cut off"
        );
    }

    #[test]
    fn unsupported_coding() {
        for marker in [0xc3, 0xc5, 0xc9, 0xcf] {
            let bytes = spoilt(COLOUR, 0xc0, 1, &[marker]);
            assert!(error(&bytes).ends_with("are not supported"), "{marker:x}");
        }
        let bytes = spoilt(COLOUR, 0xc0, 4, &[12]);
        assert_eq!(error(&bytes), "12 bits a sample are not supported");
    }

    #[test]
    fn bad_components() {
        let bytes = |at, new| error(&spoilt(COLOUR, 0xc0, at, &[new]));
        assert_eq!(bytes(9, 2), "2 components are not supported");
        assert_eq!(bytes(9, 4), "the frame's header is cut off");
        for factors in [0x00, 0x02, 0x51, 0x15] {
            assert_eq!(bytes(11, factors), "a component's description is damaged");
        }
        assert_eq!(bytes(12, 4), "a component's description is damaged");
        assert_eq!(bytes(14, 0x31), "fractional subsampling is not supported");
        // The first component becomes the second, which a scan then names twice.
        assert_eq!(bytes(10, 9), "a scan's header is damaged");
    }

    #[test]
    fn bad_marker() {
        // Ones and any number may stand between segments, as libjpeg has it; a length may not be 1.
        assert_eq!(
            error(&spoilt(COLOUR, 0xdb, 2, &[0, 1])),
            "a segment is cut off"
        );
        assert_eq!(
            error(&spoilt(COLOUR, 0xdb, 2, &[0xff; 2])),
            "a segment is cut off"
        );
        assert_eq!(
            error(&spoilt(COLOUR, 0xc0, 1, &[0xd8])),
            "an image begins inside another"
        );
        let twice = [&COLOUR[..find(COLOUR, 0xda)], &COLOUR[find(COLOUR, 0xc0)..]].concat();
        assert_eq!(error(&twice), "it holds two images");
    }

    #[test]
    fn bad_huffman_table() {
        let table = |at, new: &[u8]| error(&spoilt(COLOUR, 0xc4, at, new));
        assert_eq!(table(4, &[0x20]), "a Huffman table is damaged");
        assert_eq!(table(4, &[0x04]), "a Huffman table is damaged");
        assert_eq!(table(5, &[0xff; 16]), "a Huffman table is damaged");
        assert_eq!(
            table(5, &[3, 1, 2]),
            "a Huffman table has more codes than there are"
        );
        // Another number: the scan asks for the one that is not there.
        assert_eq!(table(4, &[0x03]), "a Huffman table is missing");
    }

    #[test]
    fn bad_quantisation_table() {
        assert_eq!(
            error(&spoilt(COLOUR, 0xdb, 4, &[4])),
            "a quantisation table is damaged"
        );
        assert_eq!(
            error(&spoilt(COLOUR, 0xdb, 4, &[0x10])),
            "a quantisation table is damaged"
        );
        assert_eq!(
            error(&spoilt(COLOUR, 0xdb, 4, &[3])),
            "a quantisation table is missing"
        );
    }

    #[test]
    fn bad_code() {
        // Ones without end are in no table.
        let start = find(COLOUR, 0xda) + 14;
        let mut bytes = COLOUR.to_vec();
        for pair in bytes[start + 20..start + 60].as_chunks_mut().0 {
            *pair = [0xff, 0];
        }
        assert_eq!(error(&bytes), "a code is in no Huffman table");
    }

    #[test]
    fn bad_scan_header() {
        let scan = |file, at, new: u8| error(&spoilt(file, 0xda, at, &[new]));
        for count in [9, 255] {
            assert_eq!(scan(COLOUR, 4, count), "a scan's header is damaged");
        }
        assert_eq!(scan(COLOUR, 5, 77), "a scan's header is damaged");
        let same = spoilt(COLOUR, 0xda, 7, &[1]);
        assert_eq!(error(&same), "a component comes twice");
        // The first scan of a progressive file is of the first coefficients alone.
        assert_eq!(scan(PROGRESSIVE, 12, 9), "a scan's header is damaged");
        assert_eq!(scan(PROGRESSIVE, 13, 0x0e), "a scan's header is damaged");
        let early = [&COLOUR[..2], &COLOUR[find(COLOUR, 0xda)..]].concat();
        assert_eq!(error(&early), "a scan comes before its frame");
    }

    #[test]
    fn bad_restart_marker() {
        let missing = "a restart marker is missing";
        assert_eq!(error(&spoilt(RESTARTS, 0xd0, 1, &[0xd5])), missing);
        assert_eq!(error(&spoilt(RESTARTS, 0xd3, 0, &[0, 0])), missing);
    }

    #[test]
    fn too_many_scans() {
        let (scan, end) = (find(PROGRESSIVE, 0xda), PROGRESSIVE.len() - 2);
        let next = scan + 2 + find(&PROGRESSIVE[scan + 2..], 0xc4);
        let repeated = PROGRESSIVE[scan..next].repeat(MAX_SCANS + 1);
        let bytes = [&PROGRESSIVE[..scan], &repeated, &PROGRESSIVE[end..]].concat();
        assert_eq!(error(&bytes), "there are more than 100 scans");
    }

    #[test]
    fn a_component_without_a_scan() {
        // A scan of the first component alone, and the end.
        let start = find(COLOUR, 0xda);
        let alone = [0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0];
        let zeros = [0; 600];
        let bytes = [&COLOUR[..start], &alone, &zeros, b"\xff\xd9"].concat();
        assert_eq!(error(&bytes), "a component is missing");
    }

    /// Whatever the bytes, an image or an error, no panic.
    #[test]
    fn any_byte_may_be_wrong() {
        let files: [&[u8]; 4] = [
            COLOUR,
            PROGRESSIVE,
            include_bytes!("../tests/goldens/grey.jpg"),
            include_bytes!("../tests/photos/422-3x40.jpg"),
        ];
        for file in files {
            for at in 0..file.len() {
                for new in [0, 0xff, file[at] ^ 1, file[at] ^ 0x10] {
                    let mut bytes = file.to_vec();
                    bytes[at] = new;
                    let like = [Like::Pillow, Like::TensorFlow][at % 2];
                    if let Ok(image) = decode(&bytes, like) {
                        assert_eq!(image.pixels.len(), 3 * image.width * image.height);
                    }
                }
            }
        }
    }
}
