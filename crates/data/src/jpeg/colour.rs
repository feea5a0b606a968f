//! Component planes become rows of RGB, equal to libjpeg-turbo's "fancy" upsampling and its conversions to the bit.

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

/// The whole image as rows of RGB.
pub(super) fn rgb(planes: &[Plane], space: Space, width: usize, height: usize) -> Vec<u8> {
    let mut rows = vec![Vec::new(); planes.len()];
    let mut sums = Vec::new();
    let mut pixels = vec![0; 3 * width * height];
    for (y, out) in pixels.chunks_exact_mut(3 * width).enumerate() {
        for (plane, row) in planes.iter().zip(&mut rows) {
            plane.upsample(y, &mut sums, row);
        }
        let out = out.as_chunks_mut().0;
        match (space, &rows[..]) {
            (Space::Grey, [grey]) => {
                for (out, &grey) in out.iter_mut().zip(grey) {
                    *out = [grey; 3];
                }
            }
            (Space::Rgb, [r, g, b]) => {
                for (((out, &r), &g), &b) in out.iter_mut().zip(r).zip(g).zip(b) {
                    *out = [r, g, b];
                }
            }
            (Space::YCbCr, [y, cb, cr]) => {
                for (((out, &y), &cb), &cr) in out.iter_mut().zip(y).zip(cb).zip(cr) {
                    *out = convert(y, cb, cr);
                }
            }
            (Space::Cmyk(inks), [c, m, y, k]) => {
                for ((((out, &c), &m), &y), &k) in out.iter_mut().zip(c).zip(m).zip(y).zip(k) {
                    *out = inks.print([c, m, y], k);
                }
            }
            (Space::Ycck(inks), [y, cb, cr, k]) => {
                for ((((out, &y), &cb), &cr), &k) in out.iter_mut().zip(y).zip(cb).zip(cr).zip(k) {
                    *out = inks.print(convert(y, cb, cr).map(|x| 255 - x), k);
                }
            }
            _ => unreachable!("the space was chosen by the number of components"),
        }
    }
    pixels
}

/// ITU-R BT.601 at full range, in 16 bits of fraction.
#[inline]
fn convert(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let [y, cb, cr] = [i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128];
    // 1.402, 0.344 14, 0.714 14 and 1.772 times 2^16, and a half.
    let r = y + ((91_881 * cr + 32_768) >> 16);
    let g = y + ((32_768 - 22_554 * cb - 46_802 * cr) >> 16);
    let b = y + ((116_130 * cb + 32_768) >> 16);
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
