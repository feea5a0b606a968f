//! What is done to a training image after its crop: a policy of operations, changes of colour, a rectangle that is lost.
//!
//! Operations are those of Pillow to the bit (`ImageOps`, `ImageEnhance`, `Image.transform` with the nearest pixel), on
//! 8 bits a channel. How strong they are, and the grey that comes in at the edges, is as in the TPU models' code for
//! EfficientNet, where distances are in pixels of images of 224; here they grow with the resolution. Images of `tf` and
//! `tf1` are rounded to 8 bits first.
//!
//! Draws depend on the seed, the epoch and the record, and not on those of the crop.

use crate::decode::Slot;
use crate::random::Random;

/// What is done to training images; the default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Augment {
    /// Operations on colours and geometry.
    pub policy: Policy,
    /// Largest changes of brightness, contrast, saturation and hue, as torchvision's `ColorJitter`: factors from
    /// max(0, 1 - x) to 1 + x, the last as a part of the circle of hues; in an order that is drawn.
    pub jitter: [f64; 4],
    /// How many images lose a rectangle, from 0 to 1: torchvision's `RandomErasing` with its defaults (area of 2 to
    /// 33 percent, height over width from 0.3 to 3.3), filled with the mean colour of ImageNet.
    pub erasing: f64,
}

/// Which operations are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// None.
    #[default]
    None,
    /// RandAugment (Cubuk, Zoph, Shlens and Le, 2019): each of so many operations is drawn from sixteen.
    RandAugment {
        /// N.
        ops: usize,
        /// M, from 0 to 30.
        magnitude: usize,
    },
    /// AutoAugment (Cubuk et al., 2018), policy v0: one of 25 pairs of operations is drawn.
    AutoAugment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Cutout,
    SolarizeAdd,
}

use Op::*;

/// What RandAugment draws from.
const OPS: [Op; 16] = [
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Cutout,
    SolarizeAdd,
];

/// AutoAugment's pairs: operation, chance in tenths, strength from 0 to 10.
const V0: [[(Op, u64, usize); 2]; 25] = [
    [(Equalize, 8, 1), (ShearY, 8, 4)],
    [(Color, 4, 9), (Equalize, 6, 3)],
    [(Color, 4, 1), (Rotate, 6, 8)],
    [(Solarize, 8, 3), (Equalize, 4, 7)],
    [(Solarize, 4, 2), (Solarize, 6, 2)],
    [(Color, 2, 0), (Equalize, 8, 8)],
    [(Equalize, 4, 8), (SolarizeAdd, 8, 3)],
    [(ShearX, 2, 9), (Rotate, 6, 8)],
    [(Color, 6, 1), (Equalize, 10, 2)],
    [(Invert, 4, 9), (Rotate, 6, 0)],
    [(Equalize, 10, 9), (ShearY, 6, 3)],
    [(Color, 4, 7), (Equalize, 6, 0)],
    [(Posterize, 4, 6), (AutoContrast, 4, 7)],
    [(Solarize, 6, 8), (Color, 6, 9)],
    [(Solarize, 2, 4), (Rotate, 8, 9)],
    [(Rotate, 10, 7), (TranslateY, 8, 9)],
    [(ShearX, 0, 0), (Solarize, 8, 4)],
    [(ShearY, 8, 0), (Color, 6, 4)],
    [(Color, 10, 0), (Rotate, 6, 2)],
    [(Equalize, 8, 4), (Equalize, 0, 8)],
    [(Equalize, 10, 4), (AutoContrast, 6, 2)],
    [(ShearY, 4, 7), (SolarizeAdd, 6, 7)],
    [(Posterize, 8, 2), (Solarize, 6, 10)],
    [(Solarize, 6, 8), (Equalize, 6, 1)],
    [(Color, 8, 6), (Rotate, 4, 5)],
];

/// Largest distances of the two policies in pixels of an image of 224: translation, and half the side of a cut-out.
const RAND_REACH: [f64; 2] = [100.0, 40.0];
const AUTO_REACH: [f64; 2] = [250.0, 100.0];

/// What comes in from outside, and what a cut-out leaves.
const GREY: [u8; 3] = [128; 3];
/// The mean of ImageNet, so what is lost becomes 0 by normalisation.
const MEAN: [f32; 3] = [123.675, 116.28, 103.53];

/// Changes the image in the slot.
pub(crate) fn augment(augment: &Augment, size: usize, random: &mut Random, slot: &mut Slot<'_>) {
    if augment.policy != Policy::None || augment.jitter != [0.0; 4] {
        let change = |image: &mut Image| {
            policy(augment.policy, image, random);
            jitter(augment.jitter, image, random);
        };
        match slot {
            Slot::U8(pixels) => in_place(pixels, size, change),
            Slot::F32(pixels) => {
                let mut bytes: Vec<u8> = pixels.iter().map(|&p| (p + 0.5) as u8).collect();
                in_place(&mut bytes, size, change);
                for (pixel, byte) in pixels.iter_mut().zip(bytes) {
                    *pixel = f32::from(byte);
                }
            }
        }
    }
    if augment.erasing > 0.0 && random.between(0.0, 1.0) < augment.erasing {
        erase(size, random, slot);
    }
}

fn in_place(pixels: &mut [u8], size: usize, change: impl FnOnce(&mut Image)) {
    let mut image = Image {
        pixels: pixels.as_chunks::<3>().0.to_vec(),
        size,
    };
    change(&mut image);
    pixels.copy_from_slice(image.pixels.as_flattened());
}

fn policy(policy: Policy, image: &mut Image, random: &mut Random) {
    match policy {
        Policy::None => {}
        Policy::RandAugment { ops, magnitude } => {
            for _ in 0..ops {
                let op = OPS[random.below(OPS.len() as u64) as usize];
                image.apply(op, magnitude, RAND_REACH, random);
            }
        }
        Policy::AutoAugment => {
            for (op, chance, level) in V0[random.below(V0.len() as u64) as usize] {
                if random.below(10) < chance {
                    image.apply(op, level, AUTO_REACH, random);
                }
            }
        }
    }
}

fn jitter(jitter: [f64; 4], image: &mut Image, random: &mut Random) {
    if jitter == [0.0; 4] {
        return;
    }
    let mut order = [0, 1, 2, 3];
    random.shuffle(&mut order);
    for i in order {
        let most = jitter[i];
        if most == 0.0 {
            continue;
        }
        if i == 3 {
            image.turn_hue(random.between(-most, most));
            continue;
        }
        let factor = random.between((1.0 - most).max(0.0), 1.0 + most) as f32;
        match i {
            0 => image.brightness(factor),
            1 => image.contrast(factor),
            _ => image.colour(factor),
        }
    }
}

fn erase(size: usize, random: &mut Random, slot: &mut Slot<'_>) {
    let area = (size * size) as f64;
    for _ in 0..10 {
        let lost = area * random.between(0.02, 0.33);
        let aspect = random.between(0.3_f64.ln(), 3.3_f64.ln()).exp();
        let h = (lost * aspect).sqrt().round_ties_even() as usize;
        let w = (lost / aspect).sqrt().round_ties_even() as usize;
        if h >= size || w >= size {
            continue;
        }
        let y = random.below((size - h + 1) as u64) as usize;
        let x = random.below((size - w + 1) as u64) as usize;
        for row in y..y + h {
            let range = 3 * (row * size + x)..3 * (row * size + x + w);
            match slot {
                Slot::U8(pixels) => {
                    let mean = MEAN.map(|value| value.round() as u8);
                    pixels[range].as_chunks_mut::<3>().0.fill(mean);
                }
                Slot::F32(pixels) => pixels[range].as_chunks_mut::<3>().0.fill(MEAN),
            }
        }
        return;
    }
}

/// A square image.
#[derive(Clone, Debug, PartialEq)]
struct Image {
    pixels: Vec<[u8; 3]>,
    size: usize,
}

impl Image {
    /// Does the operation with this strength, where 10 is AutoAugment's most.
    fn apply(&mut self, op: Op, level: usize, reach: [f64; 2], random: &mut Random) {
        let level = level as f64 / 10.0;
        let scale = self.size as f64 / 224.0;
        let enhance = (level * 1.8 + 0.1) as f32;
        let [translate, cut] = reach.map(|pixels| level * pixels * scale);
        let mut either = |value: f64| if random.below(2) == 0 { value } else { -value };
        match op {
            AutoContrast => self.auto_contrast(),
            Equalize => self.equalize(),
            Invert => self.map(|v| 255 - v),
            Rotate => self.rotate(either(level * 30.0)),
            Posterize => self.posterize((level * 4.0) as u32),
            Solarize => self.solarize((level * 256.0) as u32),
            Color => self.colour(enhance),
            Contrast => self.contrast(enhance),
            Brightness => self.brightness(enhance),
            Sharpness => self.sharpness(enhance),
            ShearX => self.affine([1.0, either(level * 0.3), 0.0, 0.0, 1.0, 0.0]),
            ShearY => self.affine([1.0, 0.0, 0.0, either(level * 0.3), 1.0, 0.0]),
            TranslateX => self.affine([1.0, 0.0, either(translate), 0.0, 1.0, 0.0]),
            TranslateY => self.affine([1.0, 0.0, 0.0, 0.0, 1.0, either(translate)]),
            Cutout => {
                let centre = [0; 2].map(|_| random.below(self.size as u64) as usize);
                self.cut_out(centre, cut as usize);
            }
            SolarizeAdd => self.solarize_add((level * 110.0) as u8),
        }
    }

    fn map(&mut self, change: impl Fn(u8) -> u8) {
        for value in self.pixels.as_flattened_mut() {
            *value = change(*value);
        }
    }

    /// Replaces each channel's values by a table that is made of its histogram.
    fn by_histogram(&mut self, table: impl Fn(&[u64; 256]) -> Option<[u8; 256]>) {
        for channel in 0..3 {
            let mut histogram = [0; 256];
            for pixel in &self.pixels {
                histogram[usize::from(pixel[channel])] += 1;
            }
            if let Some(table) = table(&histogram) {
                for pixel in &mut self.pixels {
                    pixel[channel] = table[usize::from(pixel[channel])];
                }
            }
        }
    }

    /// The least value of a channel becomes 0, the greatest 255.
    fn auto_contrast(&mut self) {
        self.by_histogram(|histogram| {
            let low = histogram.iter().position(|&n| n > 0)?;
            let high = histogram.iter().rposition(|&n| n > 0)?;
            if high <= low {
                return None;
            }
            let scale = 255.0 / (high - low) as f64;
            let offset = -(low as f64) * scale;
            Some(std::array::from_fn(|i| (i as f64 * scale + offset) as u8))
        });
    }

    /// Values of a channel are spread so that each range of them is about as frequent.
    fn equalize(&mut self) {
        self.by_histogram(|histogram| {
            let last = *histogram.iter().rfind(|&&n| n > 0)?;
            let step = (histogram.iter().sum::<u64>() - last) / 255;
            if step == 0 {
                return None;
            }
            let mut below = step / 2;
            Some(std::array::from_fn(|i| {
                let value = (below / step).min(255) as u8;
                below += histogram[i];
                value
            }))
        });
    }

    /// Keeps the upper bits; no bits leave black.
    fn posterize(&mut self, bits: u32) {
        let lost = 8_u32.saturating_sub(bits);
        let mask = u8::MAX.checked_shl(lost).unwrap_or(0);
        self.map(|v| v & mask);
    }

    fn solarize(&mut self, threshold: u32) {
        self.map(|v| if u32::from(v) < threshold { v } else { 255 - v });
    }

    /// The darker half becomes lighter.
    fn solarize_add(&mut self, addition: u8) {
        self.map(|v| {
            if v < 128 {
                v.saturating_add(addition)
            } else {
                v
            }
        });
    }

    /// From a degenerate image (0) over this one (1) and beyond.
    fn blend(&mut self, factor: f32, degenerate: impl Fn(usize) -> [u8; 3]) {
        let pixels = (0..self.pixels.len())
            .map(|i| {
                let (from, to) = (degenerate(i), self.pixels[i]);
                std::array::from_fn(|c| {
                    let (from, to) = (i32::from(from[c]), i32::from(to[c]));
                    // Truncated, and saturated where the factor is above 1.
                    (from as f32 + factor * (to - from) as f32) as u8
                })
            })
            .collect();
        self.pixels = pixels;
    }

    fn colour(&mut self, factor: f32) {
        let grey: Vec<u8> = self.pixels.iter().map(luma).collect();
        self.blend(factor, |i| [grey[i]; 3]);
    }

    fn contrast(&mut self, factor: f32) {
        let sum: u64 = self.pixels.iter().map(|p| u64::from(luma(p))).sum();
        let mean = (sum as f64 / self.pixels.len() as f64 + 0.5) as u8;
        self.blend(factor, |_| [mean; 3]);
    }

    fn brightness(&mut self, factor: f32) {
        self.blend(factor, |_| [0; 3]);
    }

    fn sharpness(&mut self, factor: f32) {
        let original = self.clone();
        let size = self.size;
        self.blend(factor, |i| {
            let (x, y) = (i % size, i / size);
            if x == 0 || y == 0 || x + 1 == size || y + 1 == size {
                return original.pixels[i];
            }
            std::array::from_fn(|c| {
                let mut sum = 4 * u32::from(original.pixels[i][c]);
                for row in y - 1..=y + 1 {
                    for pixel in &original.pixels[row * size + x - 1..=row * size + x + 1] {
                        sum += u32::from(pixel[c]);
                    }
                }
                // A thirteenth, to the nearest; ties do not occur.
                ((2 * sum + 13) / 26) as u8
            })
        });
    }

    /// Counter-clockwise about the middle.
    fn rotate(&mut self, degrees: f64) {
        if degrees == 0.0 {
            return;
        }
        let angle = -degrees.to_radians();
        let round = |value: f64| (value * 1e15).round() / 1e15;
        let (cos, sin) = (round(angle.cos()), round(angle.sin()));
        let centre = self.size as f64 / 2.0;
        let x = cos * -centre + sin * -centre + centre;
        let y = -sin * -centre + cos * -centre + centre;
        self.affine([cos, sin, x, -sin, cos, y]);
    }

    /// The pixel at (x, y) comes from (ax + by + c, dx + ey + f): the nearest one, or grey where there is none. In
    /// steps of 2^-16 of a pixel, except where nothing is turned or sheared.
    fn affine(&mut self, [a, b, c, d, e, f]: [f64; 6]) {
        let (old, size) = (self.clone(), self.size as i64);
        let at = |x: i64, y: i64| {
            let is_inside = (0..size).contains(&x) && (0..size).contains(&y);
            if is_inside {
                old.pixels[(y * size + x) as usize]
            } else {
                GREY
            }
        };
        let is_straight = b == 0.0 && d == 0.0;
        let fix = |value: f64| (value * 65536.0 + 0.5).floor() as i64;
        let (fa, fb, fd, fe) = (fix(a), fix(b), fix(d), fix(e));
        let (fc, ff) = (fix(c + 0.5 * a + 0.5 * b), fix(f + 0.5 * d + 0.5 * e));
        for (i, pixel) in self.pixels.iter_mut().enumerate() {
            let (x, y) = (i as i64 % size, i as i64 / size);
            *pixel = if is_straight {
                let (x, y) = (x as f64, y as f64);
                at(
                    (a * (x + 0.5) + c).floor() as i64,
                    (e * (y + 0.5) + f).floor() as i64,
                )
            } else {
                at((fa * x + fb * y + fc) >> 16, (fd * x + fe * y + ff) >> 16)
            };
        }
    }

    /// A grey square of twice the reach about the centre, as far as it lies within.
    fn cut_out(&mut self, [x, y]: [usize; 2], reach: usize) {
        let within = |at: usize| at.saturating_sub(reach)..(at + reach).min(self.size);
        for row in within(y) {
            let range = within(x);
            self.pixels[row * self.size..][range].fill(GREY);
        }
    }

    /// Turns hues by a part of their circle, in Pillow's HSV of 8 bits.
    fn turn_hue(&mut self, part: f64) {
        let turn = (part * 255.0) as i64 as u8;
        for pixel in &mut self.pixels {
            let [h, s, v] = to_hsv(*pixel);
            *pixel = to_rgb([h.wrapping_add(turn), s, v]);
        }
    }
}

/// ITU-R 601 in 16 bits.
fn luma(pixel: &[u8; 3]) -> u8 {
    let [r, g, b] = pixel.map(u32::from);
    ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16) as u8
}

fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let saturation = range / f32::from(most);
    let [rc, gc, bc] = [r, g, b].map(|value| f32::from(most - value) / range);
    let sector = if r == most {
        bc - gc
    } else if g == most {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    let hue = ((f64::from(sector) / 6.0 + 1.0) % 1.0) as f32;
    [
        (f64::from(hue) * 255.0) as u8,
        (f64::from(saturation) * 255.0) as u8,
        most,
    ]
}

fn to_rgb([h, s, v]: [u8; 3]) -> [u8; 3] {
    if s == 0 {
        return [v; 3];
    }
    let sector = (f64::from(h) * 6.0 / 255.0) as f32;
    let saturation = (f64::from(s) / 255.0) as f32;
    let whole = sector.floor();
    let part = f64::from(sector - whole);
    let (value, saturation) = (f64::from(v), f64::from(saturation));
    let p = (value * (1.0 - saturation)).round() as u8;
    let q = (value * (1.0 - saturation * part)).round() as u8;
    let t = (value * (1.0 - saturation * (1.0 - part))).round() as u8;
    match whole as u32 % 6 {
        0 => [v, t, p],
        1 => [q, v, p],
        2 => [p, v, t],
        3 => [p, q, v],
        4 => [t, p, v],
        _ => [v, p, q],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    const SIDE: usize = 17;

    fn image(pixels: &[u8], size: usize) -> Image {
        Image {
            pixels: pixels.as_chunks::<3>().0.to_vec(),
            size,
        }
    }

    fn random(record: u64) -> Random {
        Random::new(0, 0, Purpose::Change { shard: 0, record })
    }

    type Case = fn(&mut Image);

    /// The cases of tests/goldens/augment.py.
    const CASES: [Case; 35] = [
        |i| i.auto_contrast(),
        |i| i.equalize(),
        |i| i.map(|v| 255 - v),
        |i| i.rotate(12.0),
        |i| i.rotate(-27.0),
        |i| i.rotate(90.0),
        |i| i.posterize(1),
        |i| i.posterize(4),
        |i| i.posterize(8),
        |i| i.solarize(0),
        |i| i.solarize(77),
        |i| i.solarize(256),
        |i| i.colour(0.1),
        |i| i.colour(0.64),
        |i| i.colour(1.0),
        |i| i.colour(1.9),
        |i| i.contrast(0.1),
        |i| i.contrast(0.64),
        |i| i.contrast(1.0),
        |i| i.contrast(1.9),
        |i| i.brightness(0.1),
        |i| i.brightness(0.64),
        |i| i.brightness(1.0),
        |i| i.brightness(1.9),
        |i| i.sharpness(0.1),
        |i| i.sharpness(0.64),
        |i| i.sharpness(1.0),
        |i| i.sharpness(1.9),
        |i| i.affine([1.0, 0.12, 0.0, 0.0, 1.0, 0.0]),
        |i| i.affine([1.0, -0.3, 0.0, 0.0, 1.0, 0.0]),
        |i| i.affine([1.0, 0.0, 0.0, 0.27, 1.0, 0.0]),
        |i| i.affine([1.0, 0.0, 3.7, 0.0, 1.0, 0.0]),
        |i| i.affine([1.0, 0.0, -2.2, 0.0, 1.0, 0.0]),
        |i| i.affine([1.0, 0.0, 0.0, 0.0, 1.0, 5.0]),
        |i| i.affine([1.0, 0.0, 0.0, 0.0, 1.0, -40.0]),
    ];

    #[test]
    fn operations_are_pillows() {
        let golden = include_bytes!("../tests/goldens/augment.u8");
        let (images, rest) = golden.split_at(3 * 3 * SIDE * SIDE);
        let mut expected = rest.chunks(3 * SIDE * SIDE);
        for (i, pixels) in images.chunks(3 * SIDE * SIDE).enumerate() {
            for (c, case) in CASES.iter().enumerate() {
                let mut ours = image(pixels, SIDE);
                case(&mut ours);
                let theirs = image(expected.next().unwrap(), SIDE);
                let differ = ours
                    .pixels
                    .iter()
                    .zip(&theirs.pixels)
                    .filter(|(a, b)| a != b);
                assert_eq!(differ.count(), 0, "image {i}, case {c}");
            }
        }
        let colours = &rest[3 * CASES.len() * 3 * SIDE * SIDE..];
        let [colours, turned, back] =
            [0, 1, 2].map(|i| image(&colours[i * 3 * 4096..][..3 * 4096], 64));
        for (turn, theirs) in [(0.3, turned), (-0.45, back)] {
            let mut ours = colours.clone();
            ours.turn_hue(turn);
            for (i, (ours, theirs)) in ours.pixels.iter().zip(&theirs.pixels).enumerate() {
                assert_eq!(ours, theirs, "{:?} turned by {turn}", colours.pixels[i]);
            }
        }
    }

    fn grey_pixels(image: &Image) -> usize {
        image.pixels.iter().filter(|&&p| p == GREY).count()
    }

    #[test]
    fn strengths_are_the_references() {
        let white = Image {
            pixels: vec![[255; 3]; 224 * 224],
            size: 224,
        };
        let after = |op, level, reach, size: usize| {
            let mut image = Image {
                pixels: vec![[255; 3]; size * size],
                size,
            };
            image.apply(op, level, reach, &mut random(0));
            grey_pixels(&image)
        };
        // 100 pixels of 224, 250 for AutoAugment, which is all; in proportion at other sizes.
        assert_eq!(after(TranslateX, 10, RAND_REACH, 224), 100 * 224);
        assert_eq!(after(TranslateY, 9, RAND_REACH, 224), 90 * 224);
        assert_eq!(after(TranslateY, 9, AUTO_REACH, 224), 224 * 224);
        assert_eq!(after(TranslateX, 10, RAND_REACH, 112), 50 * 112);
        assert_eq!(after(ShearX, 0, RAND_REACH, 32), 0);
        // A cut-out is 80 pixels wide, less what lies outside; somewhere all of it lies within.
        let cut = |record| {
            let mut image = white.clone();
            image.apply(Cutout, 10, RAND_REACH, &mut random(record));
            grey_pixels(&image)
        };
        let cuts: Vec<usize> = (0..40).map(cut).collect();
        assert_eq!(cuts.iter().max(), Some(&(80 * 80)));
        assert!(cuts.iter().all(|&n| n >= 40 * 40), "{cuts:?}");
        let changed = |op, level, value: u8| {
            let mut image = Image {
                pixels: vec![[value; 3]; 4],
                size: 2,
            };
            image.apply(op, level, RAND_REACH, &mut random(0));
            image.pixels[0][0]
        };
        assert_eq!(changed(Posterize, 5, 0xff), 0b1100_0000);
        assert_eq!(changed(Posterize, 0, 0xff), 0);
        assert_eq!(changed(Posterize, 30, 0x5a), 0x5a);
        assert_eq!(changed(Solarize, 5, 127), 127);
        assert_eq!(changed(Solarize, 5, 128), 127);
        assert_eq!(changed(Solarize, 10, 255), 255);
        assert_eq!(changed(SolarizeAdd, 10, 10), 120);
        assert_eq!(changed(SolarizeAdd, 20, 100), 255);
        assert_eq!(changed(SolarizeAdd, 10, 128), 128);
        assert_eq!(changed(Brightness, 10, 100), 190);
        assert_eq!(changed(Brightness, 0, 100), 10);
        assert_eq!(changed(Invert, 3, 100), 155);
    }

    fn run(what: &Augment, record: u64, pixels: &[u8], size: usize) -> Vec<u8> {
        let mut out = pixels.to_vec();
        augment(what, size, &mut random(record), &mut Slot::U8(&mut out));
        let mut floats: Vec<f32> = pixels.iter().map(|&p| f32::from(p) + 0.3).collect();
        augment(what, size, &mut random(record), &mut Slot::F32(&mut floats));
        // Both kinds of slot give the same, but for what is not changed and for the mean.
        if what.erasing == 0.0 && *what != Augment::default() {
            assert!(out.iter().zip(&floats).all(|(&a, &b)| f32::from(a) == b));
        }
        out
    }

    #[test]
    fn nothing_is_done_by_default() {
        let pixels: Vec<u8> = (0..3 * 16 * 16).map(|i| i as u8).collect();
        assert_eq!(run(&Augment::default(), 0, &pixels, 16), pixels);
    }

    #[test]
    fn draws_depend_on_the_record_and_reach_every_operation() {
        let golden = include_bytes!("../tests/goldens/augment.u8");
        let pixels = &golden[..3 * SIDE * SIDE];
        let all = |policy| {
            let what = Augment {
                policy,
                ..Augment::default()
            };
            let outcomes: Vec<_> = (0..2000).map(|r| run(&what, r, pixels, SIDE)).collect();
            assert_eq!(run(&what, 7, pixels, SIDE), outcomes[7]);
            outcomes
        };
        let ops = 1;
        let one = all(Policy::RandAugment { ops, magnitude: 9 });
        for op in OPS {
            let mut expected = image(pixels, SIDE);
            // Either direction, any centre: compare those without a choice of their own.
            if [Rotate, ShearX, ShearY, TranslateX, TranslateY, Cutout].contains(&op) {
                continue;
            }
            expected.apply(op, 9, RAND_REACH, &mut random(0));
            let share = one
                .iter()
                .filter(|pixels| **pixels == expected.pixels.as_flattened())
                .count();
            // Six deviations of a binomial with n = 2000 and p = 1/16.
            assert!((60..=190).contains(&share), "{op:?}: {share}");
        }
        let distinct: std::collections::HashSet<_> = all(Policy::AutoAugment).into_iter().collect();
        // 25 pairs, most of them with chances below 1 and two directions.
        assert!((60..=150).contains(&distinct.len()), "{}", distinct.len());
    }

    #[test]
    fn jitter_changes_in_a_random_order_within_its_range() {
        let pixels = [200, 100, 50].repeat(16);
        let what = Augment {
            jitter: [0.4, 0.0, 0.0, 0.0],
            ..Augment::default()
        };
        let firsts: Vec<u8> = (0..500).map(|r| run(&what, r, &pixels, 4)[1]).collect();
        let (least, most) = (firsts.iter().min(), firsts.iter().max());
        assert!((60..=62).contains(least.unwrap()) && (137..=140).contains(most.unwrap()));
        let everything = Augment {
            jitter: [0.4, 0.4, 0.4, 0.1],
            ..Augment::default()
        };
        let outcomes: std::collections::HashSet<_> =
            (0..500).map(|r| run(&everything, r, &pixels, 4)).collect();
        assert!(outcomes.len() > 400, "{}", outcomes.len());
    }

    #[test]
    fn erasing_takes_a_rectangle_from_its_share_of_images() {
        let size = 32;
        let pixels = vec![255; 3 * size * size];
        let what = Augment {
            erasing: 0.25,
            ..Augment::default()
        };
        let mut erased = 0;
        for record in 0..1000 {
            let out = image(&run(&what, record, &pixels, size), size);
            let lost: Vec<usize> = (0..size * size)
                .filter(|&i| out.pixels[i] == [124, 116, 104])
                .collect();
            let kept = out.pixels.iter().filter(|&&p| p == [255; 3]).count();
            assert_eq!(lost.len() + kept, size * size);
            let (Some(first), Some(last)) = (lost.first(), lost.last()) else {
                continue;
            };
            erased += 1;
            let (w, h) = (
                last % size - first % size + 1,
                last / size - first / size + 1,
            );
            assert_eq!(lost.len(), w * h, "a rectangle");
            let share = (w * h) as f64 / (size * size) as f64;
            // Sides are rounded.
            assert!((0.01..0.36).contains(&share), "{share}");
        }
        // Six deviations.
        assert!((168..=332).contains(&erased), "{erased}");
    }
}
