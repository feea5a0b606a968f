//! Records that are made: `tf.Example` from an image file, and photographs that nobody took.
//!
//! A made-up photograph is a pile of discs whose sizes follow a power law, each with a colour and a slope of
//! brightness ("dead leaves": Lee, Mumford and Huang, "Occlusion models for natural images", 2001), with fine structure
//! and sensor noise on top. So its edges, its spectrum and the length of its code are those of a photograph, which
//! those of noise or of a gradient are not. Sizes and qualities follow what ImageNet has.

use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

use crate::Reason;
use crate::jpeg::{self, Like};
use crate::picture::{self, Format};
use crate::random::{Purpose, Random};

/// An image file and what is known of it, as the reference's converter stores it.
#[derive(Clone, Copy, Debug)]
pub struct Labelled<'a> {
    /// The image file: JPEG, PNG or WebP.
    pub encoded: &'a [u8],
    /// The label to store.
    pub label: i64,
    /// Name of the file.
    pub filename: &'a str,
    /// Name of the class, as a folder has it.
    pub synset: &'a str,
    /// The class in words.
    pub text: &'a str,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Boxes of objects: left, top, right and bottom as fractions of width and height.
    pub boxes: &'a [[f32; 4]],
}

impl Labelled<'_> {
    /// The `tf.Example`, with the features of the reference's `build_imagenet_data.py`.
    pub fn to_example(&self) -> Vec<u8> {
        let mut features = Vec::with_capacity(self.encoded.len() + 512);
        let mut put = |name: &str, kind: u8, list: &[u8]| {
            // An entry of the map: the name, and a feature of one list.
            let mut entry = Vec::with_capacity(list.len() + name.len() + 32);
            message(&mut entry, 1, name.as_bytes());
            let mut feature = Vec::with_capacity(list.len() + 16);
            message(&mut feature, kind, list);
            message(&mut entry, 2, &feature);
            message(&mut features, 1, &entry);
        };
        let bytes = |value: &[u8]| {
            let mut list = Vec::with_capacity(value.len() + 16);
            message(&mut list, 1, value);
            list
        };
        let int64 = |value: i64| {
            let mut packed = Vec::new();
            varint(&mut packed, value as u64);
            bytes(&packed)
        };
        const BYTES: u8 = 1;
        const FLOAT: u8 = 2;
        const INT64: u8 = 3;
        put("image/height", INT64, &int64(self.height as i64));
        put("image/width", INT64, &int64(self.width as i64));
        put("image/colorspace", BYTES, &bytes(b"RGB"));
        put("image/channels", INT64, &int64(3));
        put("image/class/label", INT64, &int64(self.label));
        put("image/class/synset", BYTES, &bytes(self.synset.as_bytes()));
        put("image/class/text", BYTES, &bytes(self.text.as_bytes()));
        // A list of nothing is left out.
        let packed = |values: Vec<u8>| match values.is_empty() {
            true => values,
            false => bytes(&values),
        };
        for (side, at) in [("xmin", 0), ("xmax", 2), ("ymin", 1), ("ymax", 3)] {
            let values = self
                .boxes
                .iter()
                .flat_map(|corners| corners[at].to_le_bytes());
            put(
                &format!("image/object/bbox/{side}"),
                FLOAT,
                &packed(values.collect()),
            );
        }
        let mut labels = Vec::new();
        for _ in self.boxes {
            varint(&mut labels, self.label as u64);
        }
        put("image/object/bbox/label", INT64, &packed(labels));
        let format = Format::of(self.encoded).name();
        put("image/format", BYTES, &bytes(format.as_bytes()));
        put("image/filename", BYTES, &bytes(self.filename.as_bytes()));
        put("image/encoded", BYTES, &bytes(self.encoded));
        let mut example = Vec::with_capacity(features.len() + 16);
        message(&mut example, 1, &features);
        example
    }
}

/// The image of a PNG, WebP or CMYK file as JPEG of quality 100; None for a JPEG that is grey or RGB already, which is best
/// left as it is.
///
/// # Errors
/// It cannot be decoded.
pub fn rgb_jpeg(file: &[u8]) -> Result<Option<Vec<u8>>, Reason> {
    if Format::of(file) == Format::Jpeg && !jpeg::has_inks(file) {
        return Ok(None);
    }
    let image = picture::decode(file, Like::Pillow).map_err(Reason::Image)?;
    let side = |pixels: usize| {
        let what = format!("{pixels} pixels are more than a JPEG can have");
        u16::try_from(pixels).map_err(|_| Reason::Image(what))
    };
    let (width, height) = (side(image.width)?, side(image.height)?);
    let mut out = Vec::new();
    let mut encoder = Encoder::new(&mut out, 100);
    encoder.set_sampling_factor(SamplingFactor::F_1_1);
    encoder
        .encode(&image.pixels, width, height, ColorType::Rgb)
        .map_err(|e| Reason::Image(e.to_string()))?;
    Ok(Some(out))
}

/// A field of bytes.
fn message(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Widths and heights, and how many of a hundred have them.
const SHAPES: [(usize, usize, u64); 12] = [
    (500, 375, 42),
    (375, 500, 14),
    (500, 333, 16),
    (333, 500, 5),
    (500, 400, 3),
    (500, 500, 3),
    (400, 300, 3),
    (300, 250, 3),
    (640, 480, 5),
    (800, 600, 3),
    (1024, 768, 2),
    (1600, 1200, 1),
];

/// A photograph that nobody took, as a JPEG file; the same for the same seed and index.
pub fn photo(seed: u64, index: u64) -> Vec<u8> {
    let purpose = Purpose::Fake {
        index,
        is_eval: false,
    };
    let mut random = Random::new(seed, 0, purpose);
    let mut draw = random.below(100);
    let (mut width, mut height) = (500, 375);
    for (w, h, share) in SHAPES {
        (width, height) = (w, h);
        if draw < share {
            break;
        }
        draw -= share;
    }
    if random.below(3) == 0 {
        width += random.below(13) as usize;
        height += random.below(13) as usize;
    }
    let pixels = leaves(width, height, &mut random);
    let quality = 90 + random.below(7) as u8;
    let sampling = match random.below(100) {
        0..80 => SamplingFactor::F_2_2,
        80..95 => SamplingFactor::F_1_1,
        _ => SamplingFactor::F_2_1,
    };
    let mut file = Vec::with_capacity(pixels.len() / 4);
    let mut encoder = Encoder::new(&mut file, quality);
    encoder.set_sampling_factor(sampling);
    encoder
        .encode(&pixels, width as u16, height as u16, ColorType::Rgb)
        .expect("memory takes every byte, and the sides are within a JPEG's");
    file
}

/// Red, green and blue of a pile of discs.
fn leaves(width: usize, height: usize, random: &mut Random) -> Vec<u8> {
    let mut pixels = vec![[0f32; 3]; width * height];
    let longer = width.max(height) as f64;
    let colour = |random: &mut Random| {
        let luma = random.between(20.0, 235.0);
        [0; 3].map(|_| (luma + random.between(-45.0, 45.0)) as f32)
    };
    pixels.fill(colour(random));
    // The chance of a radius is as its third power's reciprocal, so each scale covers as much as any other.
    let (least, most) = (3.0, 0.5 * longer);
    let weave: Vec<f32> = (0..width * height)
        .map(|i| weave(i % width, i / width))
        .collect();
    for _ in 0..400 {
        let share = random.between(1.0 / (most * most), 1.0 / (least * least));
        // A part of them large, so that the ground is covered.
        let radius = if random.below(5) == 0 {
            random.between(0.08, 0.5) * longer
        } else {
            (1.0 / share).sqrt().max(least) * random.between(1.0, 4.0)
        };
        let (x, y) = (
            random.between(0.0, width as f64),
            random.between(0.0, height as f64),
        );
        let base = colour(random);
        // Light falls from one side.
        let slope = [
            random.between(-60.0, 60.0) / radius,
            random.between(-60.0, 60.0) / radius,
        ];
        let stretch = random.between(0.5, 2.0);
        let grain = random.between(0.0, 25.0) as f32;
        let rows = (y - radius).max(0.0) as usize..((y + radius) as usize + 1).min(height);
        for row in rows {
            let dy = row as f64 - y;
            let half = (radius * radius - dy * dy).max(0.0).sqrt() * stretch;
            let from = (x - half).max(0.0) as usize;
            let to = ((x + half).max(0.0) as usize).min(width);
            for column in from..to.max(from) {
                let light = slope[0] * (column as f64 - x) + slope[1] * dy;
                let at = row * width + column;
                let light = light as f32 + grain * weave[at];
                pixels[at] = base.map(|value| value + light);
            }
        }
    }
    let noise = random.between(1.0, 8.0) as f32;
    let mut bytes = vec![0u8; 3 * width * height];
    random.fill(&mut bytes);
    for (out, pixel) in bytes.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
        // Uniform bytes as noise: most of it in brightness.
        let centred = out.map(|byte| (f32::from(byte) - 127.5) / 74.0);
        let shared = noise * centred[0];
        for ((out, value), own) in out.iter_mut().zip(pixel).zip(centred) {
            *out = (value + shared + 0.4 * noise * own + 0.5).clamp(0.0, 255.0) as u8;
        }
    }
    bytes
}

/// Fine structure between -1 and 1, the same everywhere: two waves and a lattice.
fn weave(x: usize, y: usize) -> f32 {
    let (x, y) = (x as f32, y as f32);
    let near = (0.9 * x + 0.31 * y).sin() * (0.53 * y - 0.2 * x).cos();
    let far = (0.11 * x).sin() * (0.13 * y).cos();
    0.5 * near + 0.5 * far
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example;

    #[test]
    fn an_example_reads_back() {
        let labelled = Labelled {
            encoded: &[7; 300],
            label: 1000,
            filename: "a.jpg",
            synset: "n01",
            text: "a class",
            width: 40,
            height: 30,
            boxes: &[[0.0, 0.25, 0.5, 1.0], [0.125, 0.0, 0.25, 0.5]],
        };
        let bytes = labelled.to_example();
        let parsed = example::parse(&bytes).unwrap();
        assert_eq!((parsed.encoded, parsed.label), (&[7; 300][..], 1000));
    }

    /// Mean size and bits for each pixel as ImageNet has them: about 110 kB and 4.
    #[test]
    fn made_up_photographs_have_the_statistics_of_photographs() {
        let (mut bytes, mut pixels) = (0, 0);
        let count = 40;
        for index in 0..count {
            let file = photo(1, index);
            assert_eq!(file, photo(1, index));
            let image = jpeg::decode(&file, Like::Pillow).unwrap();
            bytes += file.len();
            pixels += image.width * image.height;
        }
        let mean = bytes as f64 / count as f64;
        let bits = 8.0 * bytes as f64 / pixels as f64;
        println!("{mean:.0} bytes, {bits:.2} bits a pixel");
        assert!((60e3..160e3).contains(&mean), "{mean}");
        assert!((2.5..5.0).contains(&bits), "{bits}");
    }
}
