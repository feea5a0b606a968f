//! JPEG files become RGB pixels, by zune-jpeg.

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// No photograph is larger, and a damaged header must not ask for gigabytes. A side has at most 65,535 pixels, which
/// is all that a JPEG header can say.
const MAX_PIXELS: usize = 100_000_000;
const MAX_SIDE: usize = 65_535;

/// An image as rows of RGB.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) pixels: Vec<u8>,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

/// Decodes a whole file; grey becomes RGB. A file that is cut off or damaged is an error rather than half grey.
pub(crate) fn decode(bytes: &[u8]) -> Result<Image, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let info = decoder.info().ok_or("the header says no size")?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    if width * height > MAX_PIXELS {
        return Err(format!(
            "{width} x {height} pixels are more than {MAX_PIXELS}"
        ));
    }
    let pixels = decoder.decode().map_err(|e| e.to_string())?;
    if pixels.len() != 3 * width * height {
        return Err(format!("{} components are not supported", info.components));
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

    const COLOUR: &[u8] = include_bytes!("../tests/goldens/colour420.jpg");

    /// Pixels against libjpeg-turbo by way of Pillow (tests/goldens/goldens.py). The inverse DCT, the conversion to
    /// RGB and the chroma filter each round differently, so a value may be off by two or three; with subsampling,
    /// zune-jpeg's bottom row also sees a little of the padding below it.
    fn check(file: &[u8], golden: &[u8], size: (usize, usize), worst: u8) {
        let image = decode(file).unwrap();
        assert_eq!((image.width, image.height), size);
        let off = image.pixels.iter().zip(golden).map(|(a, b)| a.abs_diff(*b));
        assert_eq!(image.pixels.len(), golden.len());
        assert!(off.clone().max() <= Some(worst), "{:?}", off.max());
    }

    #[test]
    fn colour() {
        check(
            COLOUR,
            include_bytes!("../tests/goldens/colour420.u8"),
            (41, 30),
            8,
        );
    }

    #[test]
    fn progressive() {
        check(
            include_bytes!("../tests/goldens/progressive.jpg"),
            include_bytes!("../tests/goldens/progressive.u8"),
            (41, 30),
            3,
        );
    }

    #[test]
    fn grey_becomes_rgb() {
        check(
            include_bytes!("../tests/goldens/grey.jpg"),
            include_bytes!("../tests/goldens/grey.u8"),
            (21, 14),
            2,
        );
    }

    #[test]
    fn not_a_jpeg() {
        assert!(decode(b"").is_err());
        assert!(decode(b"\x89PNG\r\n").is_err());
    }

    #[test]
    fn cut_off() {
        for end in [2, 100, 700, COLOUR.len() / 2 + 300] {
            assert!(decode(&COLOUR[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn absurd_size() {
        let mut bytes = COLOUR.to_vec();
        let frame = bytes.windows(2).position(|m| m == [0xff, 0xc0]).unwrap();
        bytes[frame + 5..frame + 9].fill(0xff);
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error, "65535 x 65535 pixels are more than 100000000");
    }
}
