//! Component planes become rows of RGB, equal to libjpeg-turbo's "fancy" upsampling and its conversions to the bit.

use super::fast::widely;

/// What the components are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Grey,
    Rgb,
    YCbCr,
    Cmyk(Inks),
    /// CMY in the manner of YCbCr, and K.
    Ycck(Inks),
}

/// How inks become light.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inks {
    /// 255 is no ink, as Adobe has it.
    pub(super) are_inverted: bool,
    /// Products are rounded, as Pillow has it; TensorFlow cuts them off.
    pub(super) are_rounded: bool,
}

/// One component's samples, and how many of them stand for one pixel of the image.
pub(super) struct Plane {
    pub(super) samples: Vec<u8>,
    /// Distance of rows: whole blocks.
    pub(super) stride: usize,
    /// Without the padding to whole blocks.
    pub(super) width: usize,
    pub(super) height: usize,
    /// Pixels per sample.
    pub(super) across: usize,
    pub(super) down: usize,
}

impl Plane {
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y * self.stride..][..self.width]
    }

    /// The rows that pixel row `y` lies between: the nearer and the farther.
    fn neighbours(&self, y: usize) -> (&[u8], &[u8]) {
        let near = y / 2;
        let far = if y.is_multiple_of(2) {
            near.saturating_sub(1)
        } else {
            (near + 1).min(self.height - 1)
        };
        (self.row(near), self.row(far))
    }

    /// Writes pixel row `y`, and up to three more values than the image is wide. Where a sample stands for two pixels
    /// they are 3/4 of it and 1/4 of the next one; elsewhere, and in planes of one or two columns, it is repeated.
    #[inline(always)]
    fn upsample(&self, y: usize, sums: &mut Vec<u16>, out: &mut Vec<u8>) {
        out.clear();
        let wide = |&sample: &u8| u16::from(sample);
        match (self.across, self.down) {
            (1, 1) => out.extend(self.row(y)),
            (1, 2) => {
                let (near, far) = self.neighbours(y);
                let bias = 1 + y as u16 % 2;
                let pairs = near.iter().zip(far);
                out.extend(
                    pairs.map(|(near, far)| ((3 * wide(near) + wide(far) + bias) >> 2) as u8),
                );
            }
            (2, 1) if self.width > 2 => {
                sums.clear();
                sums.push(0);
                sums.extend(self.row(y).iter().map(wide));
                between::<1, 2, 2>(sums, out);
            }
            (2, 2) if self.width > 2 => {
                let (near, far) = self.neighbours(y);
                sums.clear();
                sums.push(0);
                let pairs = near.iter().zip(far);
                sums.extend(pairs.map(|(near, far)| 3 * wide(near) + wide(far)));
                between::<8, 7, 4>(sums, out);
            }
            (across, down) => {
                for &sample in self.row(y / down) {
                    out.extend(std::iter::repeat_n(sample, across));
                }
            }
        }
    }
}

/// Two pixels of each sum, its neighbours beyond the ends being itself; `sums` has a free place before the first.
#[inline(always)]
fn between<const LEFT: u16, const RIGHT: u16, const SHIFT: u16>(
    sums: &mut Vec<u16>,
    out: &mut Vec<u8>,
) {
    let count = sums.len();
    sums[0] = sums[1];
    sums.push(sums[count - 1]);
    out.resize(2 * (count - 1), 0);
    for (sums, out) in sums.windows(3).zip(out.chunks_exact_mut(2)) {
        out[0] = ((3 * sums[1] + sums[0] + LEFT) >> SHIFT) as u8;
        out[1] = ((3 * sums[1] + sums[2] + RIGHT) >> SHIFT) as u8;
    }
}

widely! {
    /// The whole image as rows of RGB.
    pub(super) fn rgb(planes: &[Plane], space: Space, width: usize, height: usize) -> Vec<u8> = rgb_here;
}

#[inline(always)]
fn rgb_here(planes: &[Plane], space: Space, width: usize, height: usize) -> Vec<u8> {
    let mut rows = vec![Vec::new(); planes.len()];
    let mut sums = Vec::new();
    let mut pixels = vec![0; 3 * width * height];
    for (y, out) in pixels.chunks_exact_mut(3 * width).enumerate() {
        for (plane, row) in planes.iter().zip(&mut rows) {
            plane.upsample(y, &mut sums, row);
        }
        if let (Space::YCbCr | Space::Ycck(_), [y, cb, cr, ..]) = (space, &mut rows[..]) {
            // In place, so that the compiler can do many at a time.
            for ((y, cb), cr) in y.iter_mut().zip(cb).zip(cr) {
                [*y, *cb, *cr] = convert(*y, *cb, *cr);
            }
        }
        let out = out.as_chunks_mut().0;
        match (space, &rows[..]) {
            (_, [grey]) => {
                for (out, &grey) in out.iter_mut().zip(grey) {
                    *out = [grey; 3];
                }
            }
            (Space::Cmyk(inks), [c, m, y, k]) => {
                for ((((out, &c), &m), &y), &k) in out.iter_mut().zip(c).zip(m).zip(y).zip(k) {
                    *out = inks.print([c, m, y], k);
                }
            }
            (Space::Ycck(inks), [r, g, b, k]) => {
                for ((((out, &r), &g), &b), &k) in out.iter_mut().zip(r).zip(g).zip(b).zip(k) {
                    *out = inks.print([255 - r, 255 - g, 255 - b], k);
                }
            }
            (_, [r, g, b]) => {
                for (((out, &r), &g), &b) in out.iter_mut().zip(r).zip(g).zip(b) {
                    *out = [r, g, b];
                }
            }
            _ => unreachable!("the space was chosen by the number of components"),
        }
    }
    pixels
}

/// ITU-R BT.601 at full range, in 16 bits of fraction.
#[inline(always)]
fn convert(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let [y, cb, cr] = [i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128];
    // 1.402, 0.344 14, 0.714 14 and 1.772, less their whole parts, times 2^16: products of 16 bits are cheaper.
    let r = y + cr + ((26_345 * cr + 32_768) >> 16);
    let g = y - cr + ((18_734 * cr - 22_554 * cb + 32_768) >> 16);
    let b = y + 2 * cb + ((32_768 - 14_942 * cb) >> 16);
    [r, g, b].map(|x| x.clamp(0, 255) as u8)
}

impl Inks {
    /// Cyan, magenta, yellow and black on white paper.
    fn print(self, colours: [u8; 3], black: u8) -> [u8; 3] {
        let light = |ink: u8| u32::from(if self.are_inverted { ink } else { 255 - ink });
        let black = light(black);
        colours.map(|ink| {
            let value = if self.are_rounded {
                black - ((255 - light(ink)) * black + 127) / 255
            } else {
                light(ink) * black / 255
            };
            value as u8
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inks(are_inverted: bool, are_rounded: bool) -> Inks {
        Inks {
            are_inverted,
            are_rounded,
        }
    }

    #[test]
    fn inks_either_way_round() {
        // No ink, one ink, black, and a half of each.
        for are_rounded in [false, true] {
            let print = |colours: [u8; 3], black| {
                let straight = inks(false, are_rounded).print(colours, black);
                let inverted = inks(true, are_rounded).print(colours.map(|c| 255 - c), 255 - black);
                assert_eq!(straight, inverted);
                straight
            };
            assert_eq!(print([0, 0, 0], 0), [255; 3]);
            assert_eq!(print([255, 0, 0], 0), [0, 255, 255]);
            assert_eq!(print([9, 99, 199], 255), [0; 3]);
        }
        // 127 * 127 / 255 is 63.25; 127 * 128 / 255 is 63.75.
        assert_eq!(inks(true, false).print([127, 128, 0], 127), [63, 63, 0]);
        assert_eq!(inks(true, true).print([127, 128, 0], 127), [63, 64, 0]);
    }

    /// T.871, section 7, in f64.
    #[test]
    fn every_colour_is_within_a_level_of_the_definition() {
        for (y, cb, cr) in (0..=255u8).step_by(5).flat_map(|y| {
            (0..=255)
                .step_by(3)
                .flat_map(move |cb| (0..=255).step_by(3).map(move |cr| (y, cb, cr)))
        }) {
            let [l, b, r] = [f64::from(y), f64::from(cb) - 128.0, f64::from(cr) - 128.0];
            let exact = [
                l + 1.402 * r,
                l - 0.344_136 * b - 0.714_136 * r,
                l + 1.772 * b,
            ];
            for (ours, exact) in convert(y, cb, cr).into_iter().zip(exact) {
                let off = (f64::from(ours) - exact.clamp(0.0, 255.0)).abs();
                assert!(off < 0.6, "{y} {cb} {cr}: {off}");
            }
        }
    }
}
