//! An image file becomes RGB pixels, whichever of the formats it is in that datasets hold: JPEG, PNG, WebP. What it is
//! shows in its first bytes; ImageNet's files are all named JPEG, and some are not.
//!
//! PNG and WebP are decoded by `png` and `image-webp`. Transparency is dropped and 16 bits are cut to 8, which is what
//! Pillow's `convert("RGB")` of a PNG with transparency and TensorFlow's `decode_png` do.

use std::io::Cursor;

use image_webp::WebPDecoder;

use crate::jpeg::{self, Image, Like, MAX_PIXELS};

/// Decodes a whole file.
pub(crate) fn decode(bytes: &[u8], like: Like) -> Result<Image, String> {
    match Format::of(bytes) {
        Format::Jpeg => jpeg::decode(bytes, like),
        Format::Png => png(bytes),
        Format::Webp => webp(bytes),
    }
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Or nothing that is known: the JPEG decoder says what is wrong.
    Jpeg,
    Png,
    Webp,
}

impl Format {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
            Self::Png
        } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            Self::Webp
        } else {
            Self::Jpeg
        }
    }

    /// As `image/format` has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::Webp => "WEBP",
        }
    }
}

/// A damaged header must not ask for gigabytes.
fn check_size(width: u32, height: u32) -> Result<(usize, usize), String> {
    let (width, height) = (width as usize, height as usize);
    match width.saturating_mul(height) {
        0 => Err(format!("the header says {width} x {height} pixels")),
        1..=MAX_PIXELS => Ok((width, height)),
        _ => Err(format!(
            "{width} x {height} pixels are more than {MAX_PIXELS}"
        )),
    }
}

fn png(bytes: &[u8]) -> Result<Image, String> {
    let damaged = |e: png::DecodingError| format!("a damaged PNG: {e}");
    let limits = png::Limits {
        bytes: 16 * MAX_PIXELS,
    };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    // Checksums of chunks that do not matter must not lose an image; those of the pixels are checked all the same.
    let header = decoder.read_header_info().map_err(damaged)?;
    let (width, height) = check_size(header.width, header.height)?;
    let mut reader = decoder.read_info().map_err(damaged)?;
    let size = reader
        .output_buffer_size()
        .ok_or("a damaged PNG: its size cannot be")?;
    let mut out = vec![0; size];
    let frame = reader.next_frame(&mut out).map_err(damaged)?;
    out.truncate(frame.buffer_size());
    let pixels = match frame.color_type {
        png::ColorType::Rgb => out,
        png::ColorType::Rgba => out.as_chunks().0.iter().flat_map(rgb_of_rgba).collect(),
        png::ColorType::Grayscale => out.iter().flat_map(|&v| [v; 3]).collect(),
        png::ColorType::GrayscaleAlpha => {
            let pairs = out.as_chunks::<2>().0;
            pairs.iter().flat_map(|&[v, _]| [v; 3]).collect()
        }
        png::ColorType::Indexed => return Err("a damaged PNG: a palette is left".into()),
    };
    finished(pixels, width, height)
}

fn rgb_of_rgba(&[r, g, b, _]: &[u8; 4]) -> [u8; 3] {
    [r, g, b]
}

fn webp(bytes: &[u8]) -> Result<Image, String> {
    let damaged = |e: image_webp::DecodingError| format!("a damaged WebP: {e}");
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = check_size(width, height)?;
    decoder.set_memory_limit(16 * MAX_PIXELS);
    let size = decoder
        .output_buffer_size()
        .ok_or("a damaged WebP: its size cannot be")?;
    let mut out = vec![0; size];
    decoder.read_image(&mut out).map_err(damaged)?;
    let pixels = match decoder.has_alpha() {
        true => out.as_chunks().0.iter().flat_map(rgb_of_rgba).collect(),
        false => out,
    };
    finished(pixels, width, height)
}

/// The decoders are others': what they give is looked at before it is relied on.
fn finished(pixels: Vec<u8>, width: usize, height: usize) -> Result<Image, String> {
    if pixels.len() != 3 * width * height {
        return Err(format!(
            "{} values came for {width} x {height} pixels",
            pixels.len()
        ));
    }
    Ok(Image {
        pixels,
        width,
        height,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Width, height, and the colour at (x, y) of tests/goldens/formats.py.
    const SIZE: (usize, usize) = (23, 14);

    fn colour(x: usize, y: usize) -> [u8; 3] {
        [11 * x, 18 * y, 5 * x + 9 * y].map(|v| v as u8)
    }

    fn check(file: &[u8], tolerance: u8, expected: impl Fn(usize, usize) -> [u8; 3]) {
        let image = decode(file, Like::Pillow).unwrap();
        assert_eq!((image.width, image.height), SIZE);
        for (i, pixel) in image.pixels.as_chunks::<3>().0.iter().enumerate() {
            let (x, y) = (i % SIZE.0, i / SIZE.0);
            let wanted = expected(x, y);
            let is_near = pixel
                .iter()
                .zip(&wanted)
                .all(|(a, b)| a.abs_diff(*b) <= tolerance);
            assert!(is_near, "({x}, {y}): {pixel:?} and {wanted:?}");
        }
    }

    macro_rules! golden {
        ($name:literal) => {
            include_bytes!(concat!("../tests/goldens/", $name))
        };
    }

    #[test]
    fn png_of_every_kind() {
        check(golden!("rgb.png"), 0, colour);
        check(golden!("rgba.png"), 0, colour);
        let grey = |x, y| [colour(x, y)[2]; 3];
        check(golden!("grey.png"), 0, grey);
        check(golden!("grey-alpha.png"), 0, grey);
        // The upper of two bytes.
        check(golden!("grey16.png"), 0, grey);
        let posts = |x: usize, y: usize| [[0, 0, 0], [255, 0, 0], [9, 99, 199]][(x + y) % 3];
        check(golden!("palette.png"), 0, posts);
        check(golden!("palette-clear.png"), 0, posts);
        let bits = |x: usize, y: usize| [if (x + y).is_multiple_of(2) { 255 } else { 0 }; 3];
        check(golden!("bit.png"), 0, bits);
    }

    #[test]
    fn webp_of_every_kind() {
        check(golden!("lossless.webp"), 0, colour);
        check(golden!("lossless-alpha.webp"), 0, colour);
        // What libwebp makes of it, by way of Pillow; its upsampling of colours rounds differently.
        let theirs = golden!("lossy.u8").as_chunks::<3>().0;
        check(golden!("lossy.webp"), 4, |x, y| theirs[y * SIZE.0 + x]);
    }

    #[test]
    fn files_that_are_cut_off_or_changed_are_errors_or_images_and_nothing_else() {
        for file in [
            &golden!("rgb.png")[..],
            golden!("palette.png"),
            golden!("lossless.webp"),
            golden!("lossy.webp"),
        ] {
            let format = Format::of(file);
            assert_ne!(format, Format::Jpeg);
            for end in 0..file.len() - 12 {
                assert!(
                    decode(&file[..end], Like::Pillow).is_err(),
                    "{format:?} {end}"
                );
            }
            for i in 0..8 * file.len() {
                let mut file = file.to_vec();
                file[i / 8] ^= 1 << (i % 8);
                if let Ok(image) = decode(&file, Like::Pillow) {
                    assert_eq!(image.pixels.len(), 3 * image.width * image.height);
                }
            }
        }
    }

    #[test]
    fn huge_dimensions() {
        let mut file = golden!("rgb.png").to_vec();
        // Width and height, and the checksum of their chunk.
        file[16..24].copy_from_slice(&[0, 1, 0x86, 0xa0, 0, 1, 0x86, 0xa0]);
        let crc = crc32(&file[12..29]);
        file[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = decode(&file, Like::Pillow).unwrap_err();
        assert_eq!(error, "100000 x 100000 pixels are more than 100000000");
    }

    /// CRC-32 of PNG's chunks (PNG specification, annex D), bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
            })
        })
    }
}
