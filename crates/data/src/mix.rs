//! Training images that are mixtures of two: mixup and CutMix, a whole batch at a time.

use std::f64::consts::PI;

use crate::random::{Purpose, Random};
use crate::{Batch, Pixels};

/// How the images of a batch are mixed, each with the one after it and the last with the first.
///
/// The proportion is drawn once for a batch, from a beta distribution whose two parameters are equal.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mix {
    /// Parameter of mixup (Zhang et al. 2018, "mixup: beyond empirical risk minimization"), which averages pixels; 0
    /// is never.
    pub mixup: f64,
    /// Parameter of CutMix (Yun et al. 2019, section 3.1), which pastes a rectangle of the other image; 0 is never. If
    /// both are above 0, a batch has either, with equal chance.
    pub cutmix: f64,
}

/// What the images of a mixed batch show besides their own classes.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// Class of the other image.
    pub labels: Vec<u32>,
    /// How much of each image is of its own class, from 0 to 1.
    pub share: f64,
}

/// Steps of the proportion in which pixels are averaged.
const STEPS: u32 = 1 << 16;

impl Mix {
    /// Mixes the images of the batch of update `step`, counted from 0; none if this mixes nothing. What comes out
    /// depends on the batch, the seed and the step alone.
    ///
    /// Whole levels stay whole: averages are rounded to the nearest one, halves up, with the share a multiple of
    /// 2^-16. The share of CutMix is exact.
    pub fn apply(&self, batch: &mut Batch, seed: u64, step: u64) -> Option<Mixed> {
        let images = batch.labels.len();
        if (self.mixup <= 0.0 && self.cutmix <= 0.0) || images < 2 {
            return None;
        }
        let mut random = Random::new(seed, step, Purpose::Mix);
        let is_pasted = match (self.mixup > 0.0, self.cutmix > 0.0) {
            (true, true) => random.below(2) == 1,
            (_, cutmix) => cutmix,
        };
        let share = if is_pasted {
            let share = beta(&mut random, self.cutmix);
            paste(&mut batch.pixels, images, share, &mut random)
        } else {
            let share = beta(&mut random, self.mixup);
            average(&mut batch.pixels, images, share)
        };
        let mut labels = batch.labels.clone();
        labels.rotate_left(1);
        Some(Mixed { labels, share })
    }
}

/// Averages pixels; the share that the own image has.
fn average(pixels: &mut Pixels, images: usize, share: f64) -> f64 {
    let own = (share * f64::from(STEPS)).round() as u32;
    let share = f64::from(own) / f64::from(STEPS);
    match pixels {
        Pixels::U8(pixels) => each_pair(pixels, images, |image, next| {
            for (a, b) in image.iter_mut().zip(next) {
                let sum = own * u32::from(*a) + (STEPS - own) * u32::from(*b);
                *a = ((sum + STEPS / 2) / STEPS) as u8;
            }
        }),
        Pixels::F32(pixels) => each_pair(pixels, images, |image, next| {
            let (own, other) = (share as f32, (1.0 - share) as f32);
            for (a, b) in image.iter_mut().zip(next) {
                *a = own * *a + other * b;
            }
        }),
    }
    share
}

/// Pastes a rectangle whose sides are sqrt(1 - share) of the image's, around a uniform centre, as far as it lies in the
/// image; the share that the own image keeps.
fn paste(pixels: &mut Pixels, images: usize, share: f64, random: &mut Random) -> f64 {
    let values = match pixels {
        Pixels::U8(pixels) => pixels.len(),
        Pixels::F32(pixels) => pixels.len(),
    };
    let side = (values / images / 3).isqrt();
    let half = (side as f64 * (1.0 - share).sqrt()) as usize / 2;
    let mut range = || {
        let centre = random.below(side as u64) as usize;
        centre.saturating_sub(half)..(centre + half).min(side)
    };
    let (rows, columns) = (range(), range());
    let line = |row: usize| 3 * (row * side + columns.start)..3 * (row * side + columns.end);
    match pixels {
        Pixels::U8(pixels) => each_pair(pixels, images, |image, next| {
            for row in rows.clone() {
                image[line(row)].copy_from_slice(&next[line(row)]);
            }
        }),
        Pixels::F32(pixels) => each_pair(pixels, images, |image, next| {
            for row in rows.clone() {
                image[line(row)].copy_from_slice(&next[line(row)]);
            }
        }),
    }
    1.0 - (rows.len() * columns.len()) as f64 / (side * side) as f64
}

/// Calls `mix` with every image and the one after it, as that was before.
fn each_pair<T: Copy>(pixels: &mut [T], images: usize, mut mix: impl FnMut(&mut [T], &[T])) {
    let length = pixels.len() / images;
    let first = pixels[..length].to_vec();
    for i in 0..images {
        let (image, rest) = pixels[i * length..].split_at_mut(length);
        let next = rest.get(..length).unwrap_or(&first);
        mix(image, next);
    }
}

/// A number from the beta distribution with both parameters `alpha`: the first of two gamma variates over their sum.
/// In logarithms, since those of a small alpha are too small for a double.
fn beta(random: &mut Random, alpha: f64) -> f64 {
    let (a, b) = (ln_gamma(random, alpha), ln_gamma(random, alpha));
    1.0 / (1.0 + (b - a).exp())
}

/// Logarithm of a gamma variate (Marsaglia and Tsang 2000, "A simple method for generating gamma variables"): d v with
/// v = (1 + c x)^3 and x normal, by rejection. Below 1, that of alpha + 1 times u^(1 / alpha) (their section 6).
fn ln_gamma(random: &mut Random, alpha: f64) -> f64 {
    // From (0, 1].
    let unit = |random: &mut Random| 1.0 - random.between(0.0, 1.0);
    let (alpha, ln_factor) = match alpha < 1.0 {
        true => (alpha + 1.0, unit(random).ln() / alpha),
        false => (alpha, 0.0),
    };
    let d = alpha - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        // Box and Muller 1958.
        let x = (-2.0 * unit(random).ln()).sqrt() * (2.0 * PI * unit(random)).cos();
        let v = (1.0 + c * x).powi(3);
        let u = unit(random);
        if v > 0.0 && u.ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
            return (d * v).ln() + ln_factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cursor;

    const SIDE: usize = 8;

    /// Four images of one level each.
    fn batch() -> Batch {
        let levels = [0u8, 100, 201, 255];
        let pixels = levels.iter().flat_map(|&v| [v; 3 * SIDE * SIDE]).collect();
        Batch {
            notes: vec![],
            samples: vec![],
            pixels: Pixels::U8(pixels),
            labels: vec![3, 1, 4, 1],
            cursor: Cursor::default(),
            bad_records: vec![],
        }
    }

    fn mixed(mix: Mix, step: u64) -> (Batch, Mixed) {
        let mut batch = batch();
        let mixed = mix.apply(&mut batch, 7, step).expect("something is mixed");
        (batch, mixed)
    }

    fn levels(batch: &Batch) -> Vec<Vec<u8>> {
        let Pixels::U8(pixels) = &batch.pixels else {
            panic!("levels stay levels")
        };
        pixels.chunks(3 * SIDE * SIDE).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn averages_are_rounded_and_labels_go_along() {
        let mix = Mix {
            mixup: 1.0,
            cutmix: 0.0,
        };
        for step in 0..20 {
            let (batch, mixed) = mixed(mix, step);
            assert_eq!(mixed.labels, [1, 4, 1, 3]);
            let s = mixed.share;
            assert_eq!((s * 65536.0).fract(), 0.0);
            let pairs = [(0.0, 100.0), (100.0, 201.0), (201.0, 255.0), (255.0, 0.0)];
            for (image, (a, b)) in levels(&batch).iter().zip(pairs) {
                let level = (s * a + (1.0 - s) * b + 0.5).floor() as u8;
                assert!(
                    image.iter().all(|&v| v == level),
                    "{image:?} is not {level}"
                );
            }
        }
    }

    #[test]
    fn a_pasted_rectangle_has_the_share_that_is_said() {
        let mix = Mix {
            mixup: 0.0,
            cutmix: 1.0,
        };
        let mut areas = vec![];
        for step in 0..50 {
            let (batch, mixed) = mixed(mix, step);
            let own = [0, 100, 201, 255];
            for (i, image) in levels(&batch).iter().enumerate() {
                let next = own[(i + 1) % 4];
                assert!(image.iter().all(|&v| v == own[i] || v == next));
                let kept = image.iter().filter(|&&v| v == own[i]).count();
                assert_eq!(kept as f64 / image.len() as f64, mixed.share);
                let pasted = |y: usize, x: usize| image[3 * (y * SIDE + x)] == next;
                let in_row = |y: usize| (0..SIDE).filter(|&x| pasted(y, x)).count();
                let rows: Vec<usize> = (0..SIDE).map(in_row).filter(|&n| n > 0).collect();
                assert!(
                    rows.windows(2).all(|pair| pair[0] == pair[1]),
                    "a rectangle"
                );
            }
            areas.push((mixed.share * 64.0) as usize);
        }
        areas.sort_unstable();
        areas.dedup();
        assert!(areas.len() > 5, "{areas:?}");
    }

    #[test]
    fn a_batch_depends_on_its_step_alone() {
        let both = Mix {
            mixup: 0.2,
            cutmix: 1.0,
        };
        let all: Vec<_> = (0..8).map(|step| mixed(both, step)).collect();
        for step in (0..8).rev() {
            assert_eq!(mixed(both, step), all[step as usize]);
        }
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(Mix::default().apply(&mut batch(), 7, 0), None);
    }

    /// Mean 1/2 and variance 1 / (4 (2 alpha + 1)).
    #[test]
    fn proportions_have_the_moments_of_their_distribution() {
        for alpha in [0.01, 0.2, 1.0, 8.0] {
            let mut random = Random::new(1, 2, Purpose::Mix);
            let n = 40_000;
            let draws: Vec<f64> = (0..n).map(|_| beta(&mut random, alpha)).collect();
            assert!(draws.iter().all(|v| (0.0..=1.0).contains(v)));
            let mean = draws.iter().sum::<f64>() / n as f64;
            let var = draws.iter().map(|v| (v - 0.5).powi(2)).sum::<f64>() / n as f64;
            let expected = 0.25 / (2.0 * alpha + 1.0);
            // Five standard deviations of the mean.
            let off = 5.0 * (expected / n as f64).sqrt();
            assert!((mean - 0.5).abs() < off, "alpha {alpha}: mean {mean}");
            assert!(
                (var / expected - 1.0).abs() < 0.05,
                "alpha {alpha}: variance {var}"
            );
        }
    }
}
