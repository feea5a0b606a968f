//! Which part of an image is seen.

use crate::random::Random;

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rect {
    pub(crate) x: usize,
    pub(crate) y: usize,
    pub(crate) w: usize,
    pub(crate) h: usize,
}

impl Rect {
    pub(crate) fn whole(w: usize, h: usize) -> Self {
        Self { x: 0, y: 0, w, h }
    }

    fn centred(width: usize, height: usize, w: usize, h: usize) -> Self {
        Self {
            x: (width - w) / 2,
            y: (height - h) / 2,
            w,
            h,
        }
    }
}

/// The square in the middle whose side is `ratio` times the shorter side, at least one pixel.
///
/// The arithmetic is the reference's: the product is truncated in f32, and an odd rest leaves the larger half
/// above and to the left. (The reference fails where the side is 0.)
pub(crate) fn centre(width: usize, height: usize, ratio: f64) -> Rect {
    let shorter = width.min(height);
    let side = (ratio as f32 * shorter as f32) as usize;
    let side = side.clamp(1, shorter);
    Rect {
        x: (width - side).div_ceil(2),
        y: (height - side).div_ceil(2),
        w: side,
        h: side,
    }
}

/// TensorFlow's `sample_distorted_bounding_box` as the reference calls it: the only box is the whole image, of which
/// a crop must cover a tenth, in ten attempts; the whole image if all fail.
///
/// Height, not area, is uniform, the aspect (width / height) is uniform rather than log-uniform, and the least area
/// is in effect 0.1 whatever `area` says. Integers are rounded half to even, positions leave out their upper end;
/// all of it in f32, as the kernel has it.
pub(crate) fn tf(
    width: usize,
    height: usize,
    area: [f64; 2],
    aspect: [f64; 2],
    random: &mut Random,
) -> Rect {
    let (low, high) = (aspect[0] as f32, aspect[1] as f32);
    for _ in 0..10 {
        let aspect = random.unit_f32() * (high - low) + low;
        if let Some(rect) = tf_attempt(width as i64, height as i64, area, aspect, random)
            && (rect.w * rect.h) as f32 / (width * height) as f32 >= 0.1
        {
            return rect;
        }
    }
    Rect::whole(width, height)
}

fn tf_attempt(
    width: i64,
    height: i64,
    area: [f64; 2],
    aspect: f32,
    random: &mut Random,
) -> Option<Rect> {
    let least = area[0] as f32 * width as f32 * height as f32;
    let most = area[1] as f32 * width as f32 * height as f32;
    let side = |area: f32| (area / aspect).sqrt().round_ties_even() as i64;
    let wide = |h: i64| (h as f32 * aspect).round_ties_even() as i64;
    let pixels = |w: i64, h: i64| (w * h) as f32;

    let mut highest = side(most);
    if wide(highest) > width {
        // The highest crop that is no wider than the image; the kernel adds its constants in f64.
        highest = ((width as f64 + 0.5 - f64::from(1e-7_f32)) / f64::from(aspect)) as i64;
        if wide(highest) > width {
            highest -= 1;
        }
    }
    highest = highest.min(height);
    let mut h = side(least).min(highest);
    if h < highest {
        h += random.below((highest - h + 1) as u64) as i64;
    }
    let mut w = wide(h);
    // Rounding may have left the range by a little.
    if pixels(w, h) < least {
        h += 1;
        w = wide(h);
    }
    if pixels(w, h) > most {
        h -= 1;
        w = wide(h);
    }
    if pixels(w, h) < least || pixels(w, h) > most || w > width || h > height || w <= 0 || h <= 0 {
        return None;
    }
    let y = random.below((height - h) as u64);
    let x = random.below((width - w) as u64);
    Some(Rect {
        x: x as usize,
        y: y as usize,
        w: w as usize,
        h: h as usize,
    })
}

/// torchvision's `RandomResizedCrop`: area uniform, aspect (width / height) log-uniform, ten attempts, then the
/// largest crop in the middle whose aspect is in range.
pub(crate) fn torchvision(
    width: usize,
    height: usize,
    area: [f64; 2],
    aspect: [f64; 2],
    random: &mut Random,
) -> Rect {
    let whole = (width * height) as f64;
    let round = |x: f64| x.round_ties_even() as usize;
    for _ in 0..10 {
        let target = whole * random.between(area[0], area[1]);
        let ratio = random.between(aspect[0].ln(), aspect[1].ln()).exp();
        let (w, h) = (
            round((target * ratio).sqrt()),
            round((target / ratio).sqrt()),
        );
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let y = random.below((height - h + 1) as u64) as usize;
            let x = random.below((width - w + 1) as u64) as usize;
            return Rect { x, y, w, h };
        }
    }
    let ratio = width as f64 / height as f64;
    // Only a very thin image could round to nothing.
    if ratio < aspect[0] {
        let h = round(width as f64 / aspect[0]).clamp(1, height);
        Rect::centred(width, height, width, h)
    } else if ratio > aspect[1] {
        let w = round(height as f64 * aspect[1]).clamp(1, width);
        Rect::centred(width, height, w, height)
    } else {
        Rect::whole(width, height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    const AREA: [f64; 2] = [0.08, 1.0];
    const ASPECT: [f64; 2] = [0.75, 4.0 / 3.0];
    const DRAWS: u64 = 100_000;

    type Sampler = fn(usize, usize, [f64; 2], [f64; 2], &mut Random) -> Rect;

    fn draws(sampler: Sampler, width: usize, height: usize) -> impl Iterator<Item = Rect> {
        (0..DRAWS).map(move |record| {
            let mut random = Random::new(0, 0, Purpose::Augment { shard: 0, record });
            let rect = sampler(width, height, AREA, ASPECT, &mut random);
            assert!(rect.w > 0 && rect.x + rect.w <= width, "{rect:?}");
            assert!(rect.h > 0 && rect.y + rect.h <= height, "{rect:?}");
            rect
        })
    }

    /// notes/reference-vectors.json, `center_crop_pad32` at 224: height, width, side, y, x.
    #[test]
    fn centre_crop_is_the_reference_table() {
        for [h, w, side, y, x] in [
            [375, 500, 328, 24, 86],
            [500, 375, 328, 86, 24],
            [224, 224, 196, 14, 14],
            [256, 256, 224, 16, 16],
            [300, 401, 262, 19, 70],
            [333, 500, 291, 21, 105],
            [480, 640, 420, 30, 110],
            [500, 500, 437, 32, 32],
            [257, 256, 224, 17, 16],
        ] {
            let expected = Rect {
                x,
                y,
                w: side,
                h: side,
            };
            assert_eq!(centre(w, h, 0.875), expected, "{h}x{w}");
        }
    }

    #[test]
    fn centre_crop_has_at_least_one_pixel_and_at_most_all() {
        assert_eq!(centre(1, 1, 0.875), Rect::whole(1, 1));
        assert_eq!(centre(3, 1, 0.5).w, 1);
        assert_eq!(centre(7, 7, 1.0), Rect::whole(7, 7));
    }

    /// notes/reference-spec.md §11.7.
    #[test]
    fn tf_crops_keep_their_promises() {
        for (width, height) in [(500, 375), (375, 500), (32, 32)] {
            for rect in draws(tf, width, height) {
                let whole = (width * height) as f64;
                assert!((rect.w * rect.h) as f64 >= 0.1 * whole * (1.0 - 1e-6));
                if rect == Rect::whole(width, height) {
                    continue;
                }
                // The width is the rounded product of height and aspect.
                let (w, h) = (rect.w as f64, rect.h as f64);
                assert!(
                    w + 0.5 >= h * ASPECT[0] && w - 0.5 <= h * ASPECT[1],
                    "{rect:?}"
                );
                // The upper end of a position is left out.
                assert!(rect.w == width || rect.x + rect.w < width, "{rect:?}");
                assert!(rect.h == height || rect.y + rect.h < height, "{rect:?}");
            }
        }
    }

    /// Means and deviations of x, y, w, h and area share against TensorFlow's own sampler (tests/goldens/goldens.py).
    #[test]
    fn tf_crops_are_distributed_as_tensorflows() {
        for line in include_str!("../tests/goldens/sampler.txt").lines() {
            let numbers: Vec<f64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
            let (height, width) = (numbers[0] as usize, numbers[1] as usize);
            let mut sums = [[0.0; 2]; 5];
            for Rect { x, y, w, h } in draws(tf, width, height) {
                let share = (w * h) as f64 / (width * height) as f64;
                for (sum, value) in sums
                    .iter_mut()
                    .zip([x as f64, y as f64, w as f64, h as f64, share])
                {
                    sum[0] += value;
                    sum[1] += value * value;
                }
            }
            for (i, [sum, squares]) in sums.into_iter().enumerate() {
                let (mean, std) = (numbers[2 + 2 * i], numbers[3 + 2 * i]);
                let n = DRAWS as f64;
                let ours = sum / n;
                let our_std = (squares / n - ours * ours).sqrt();
                // Both sides are means of n draws: five standard errors of their difference.
                let error = std * (2.0 / n).sqrt();
                assert!(
                    (ours - mean).abs() < 5.0 * error,
                    "{height}x{width} {i}: mean {ours} {mean}"
                );
                // The kurtosis stays below 6 here, so the deviation's error is below 1.2 of the mean's.
                assert!(
                    (our_std - std).abs() < 6.0 * error,
                    "{height}x{width} {i}: std {our_std} {std}"
                );
            }
        }
    }

    #[test]
    fn torchvision_crops_keep_their_promises() {
        let (width, height) = (500, 375);
        let mut share = 0.0;
        let mut logarithm = 0.0;
        for rect in draws(torchvision, width, height) {
            let (w, h) = (rect.w as f64, rect.h as f64);
            assert!((w + 0.5) / (h - 0.5) >= ASPECT[0] && (w - 0.5) / (h + 0.5) <= ASPECT[1]);
            let area = w * h / (width * height) as f64;
            assert!((0.079..=1.0).contains(&area), "{rect:?}");
            share += area;
            logarithm += (w / h).ln();
        }
        // Crops that do not fit are drawn again, so the mean lies below that of [0.08, 1].
        assert!((0.4..0.54).contains(&(share / DRAWS as f64)));
        assert!((logarithm / DRAWS as f64).abs() < 0.05);
    }

    #[test]
    fn torchvision_falls_back_to_the_middle() {
        let mut random = Random::new(0, 0, Purpose::Shards);
        let full = [1.0, 1.0];
        let thin = torchvision(10, 1000, full, ASPECT, &mut random);
        assert_eq!((thin.x, thin.y, thin.w, thin.h), (0, 493, 10, 13));
        let flat = torchvision(1000, 12, full, ASPECT, &mut random);
        assert_eq!((flat.x, flat.y, flat.w, flat.h), (492, 0, 16, 12));
    }
}
