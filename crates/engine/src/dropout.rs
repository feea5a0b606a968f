//! What training drops: channels before the classifier, branches of blocks, and squares of channels; the same for every
//! engine.

use graph::{DropBlock, DropPath, Plane};

use crate::init::Stream;

/// Each channel that the classifier reads is 0 with probability `rate`, and else 1 / (1 - rate) times itself (Srivastava
/// et al. 2014, section 10, "inverted"); likewise each image's branch of a block with its share of `path_rate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Of channels, from 0 to below 1.
    pub rate: f64,
    /// Of branches, from 0 to below 1, in a network whose blocks have [`graph::Op::DropPath`].
    pub path_rate: f64,
    /// Of values in squares, from 0 to below 1, in a network whose blocks have [`graph::Op::DropBlock`]. It grows with
    /// the run, so it is that of this step.
    pub block_rate: f64,
    /// Of the run.
    pub seed: u64,
    /// Updates made before: each has its own masks.
    pub step: u64,
}

/// The factors of one step.
pub(crate) struct Mask {
    stream: Stream,
    rate: f64,
    channels: u64,
}

impl Dropout {
    fn stream(&self) -> Stream {
        Stream::new(self.seed, &format!("dropout of step {}", self.step))
    }

    /// What tells its generator from others.
    pub(crate) fn key(&self) -> u64 {
        self.stream().key()
    }

    pub(crate) fn mask(&self, channels: usize) -> Mask {
        Mask {
            stream: self.stream(),
            rate: self.rate,
            channels: channels as u64,
        }
    }
}

/// The factors of one block's branch in a step.
pub(crate) struct Paths {
    stream: Stream,
    rate: f64,
}

impl Dropout {
    pub(crate) fn paths(&self, path: DropPath) -> Paths {
        let name = format!("branch of block {} in step {}", path.block, self.step);
        let [share, of] = path.share.map(|v| v as f64);
        Paths {
            stream: Stream::new(self.seed, &name),
            rate: self.path_rate * share / of,
        }
    }
}

/// The squares of one tensor in a step.
pub(crate) struct Squares {
    stream: Stream,
    plane: Plane,
    /// Height and width.
    sides: [usize; 2],
    /// Logarithm of the chance that no square begins at a place where one could.
    none: f64,
}

impl Dropout {
    pub(crate) fn squares(&self, block: DropBlock, plane: Plane) -> Squares {
        let name = format!("squares {} in step {}", block.number, self.step);
        let [share, of] = block.share.map(|v| v as f64);
        let sides = [block.side.min(plane.h), block.side.min(plane.w)];
        let [h, w] = sides;
        let places = (plane.h - h + 1) * (plane.w - w + 1);
        // Ghiasi et al. 2018, equation 1, as the reference has it: squares lie inside of the plane.
        let squares = plane.pixels() as f64 / (h * w) as f64 / places as f64;
        Squares {
            stream: Stream::new(self.seed, &name),
            plane,
            sides,
            none: (-self.block_rate * share / of * squares).ln_1p(),
        }
    }
}

impl Squares {
    /// What a card draws them by: the generator's key, and the logarithm of the chance that no square begins at a place.
    pub(crate) fn draw_by(&self) -> (u64, f64) {
        (self.stream.key(), self.none)
    }

    /// Sets `mask`, H x W x C of one image, to 0 where it is dropped and to 1 elsewhere; returns the number of ones. Images
    /// are counted from the first of the global batch.
    pub(crate) fn draw(&self, image: usize, mask: &mut [u8]) -> usize {
        let Plane { w, c, .. } = self.plane;
        let [rows, columns] = self.sides;
        mask.fill(1);
        if self.none == 0.0 {
            return mask.len();
        }
        let across = w - columns + 1;
        let places = (self.plane.h - rows + 1) * across * c;
        let mut counter = (image as u64) << 32;
        let mut place = 0;
        loop {
            // Places without a square before the next: geometrically distributed, so that only squares are drawn.
            let gap = (self.stream.uniform(counter).ln() / self.none).floor();
            if gap >= (places - place) as f64 {
                break;
            }
            place += gap as usize;
            let (pixel, channel) = (place / c, place % c);
            let (y, x) = (pixel / across, pixel % across);
            for row in y..y + rows {
                for column in x..x + columns {
                    mask[(row * w + column) * c + channel] = 0;
                }
            }
            place += 1;
            counter += 1;
        }
        mask.iter().map(|&kept| usize::from(kept)).sum()
    }
}

/// By what is multiplied what is left of a tensor, so that its sum stays as large; 0 where nothing is left.
pub(crate) fn make_up(all: usize, kept: usize) -> f64 {
    match kept {
        0 => 0.0,
        _ => all as f64 / kept as f64,
    }
}

impl Paths {
    /// What a card drops branches by: the generator's key, and the chance.
    pub(crate) fn draw_by(&self) -> (u64, f64) {
        (self.stream.key(), self.rate)
    }

    /// What the branch of an image is multiplied by; images are counted from the first of the global batch.
    pub(crate) fn factor(&self, image: usize) -> f64 {
        factor(&self.stream, image as u64, self.rate)
    }
}

fn factor(stream: &Stream, counter: u64, rate: f64) -> f64 {
    match stream.uniform(counter) < rate {
        true => 0.0,
        false => 1.0 / (1.0 - rate),
    }
}

impl Mask {
    /// What a channel of an image is multiplied by; images are counted from the first of the global batch.
    pub(crate) fn factor(&self, image: usize, channel: usize) -> f64 {
        let counter = image as u64 * self.channels + channel as u64;
        factor(&self.stream, counter, self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_drop_as_many_as_asked_and_differ_by_step() {
        let dropped = |seed, step| {
            let dropout = Dropout {
                rate: 0.25,
                path_rate: 0.0,
                block_rate: 0.0,
                seed,
                step,
            };
            let mask = dropout.mask(500);
            let all = (0..100_000).map(|i| mask.factor(i / 500, i % 500));
            all.map(|factor| {
                assert!(factor == 0.0 || factor == 1.0 / 0.75);
                factor == 0.0
            })
            .collect::<Vec<_>>()
        };
        let first = dropped(1, 2);
        // Five standard deviations of a binomial with n = 100,000 and p = 1/4.
        let count = first.iter().filter(|&&is| is).count();
        assert!(count.abs_diff(25_000) < 685, "{count}");
        assert!(first == dropped(1, 2));
        for other in [dropped(1, 3), dropped(2, 2)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            // Independent masks agree in 10 of 16.
            assert!(same.abs_diff(62_500) < 770, "{same}");
        }
    }

    fn squares(rate: f64, share: [usize; 2], plane: Plane, number: usize) -> Squares {
        let dropout = Dropout {
            rate: 0.0,
            path_rate: 0.0,
            block_rate: rate,
            seed: 5,
            step: 11,
        };
        let block = DropBlock {
            number,
            side: 7,
            share,
        };
        dropout.squares(block, plane)
    }

    /// docs/reference/vectors.json: `dropblock_keep_0.9_by_group`. Squares that overlap drop less than the rate, by half of
    /// its square at most.
    #[test]
    fn squares_drop_what_the_reference_drops_by_group() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value =
            serde_json::from_str(vectors).unwrap_or_else(|e| panic!("{e}"));
        let plane = Plane {
            h: 14,
            w: 14,
            c: 1024,
        };
        for (progress, of) in [("1.0", 1.0), ("0.5", 0.5)] {
            let keeps = vectors["dropblock_keep_0.9_by_group"][progress].as_array();
            for (group, keep) in keeps.expect("a list").iter().enumerate() {
                let rate = 1.0 - keep.as_f64().expect("a number");
                let squares = squares(0.1 * of, [1, 4usize.pow(3 - group as u32)], plane, 2);
                let mut mask = vec![0; plane.elements()];
                let all = 20 * mask.len();
                let kept: usize = (0..20).map(|image| squares.draw(image, &mut mask)).sum();
                let dropped = 1.0 - kept as f64 / all as f64;
                // Six standard deviations of a count of squares of 49.
                let slack = 6.0 * (rate * 49.0 / all as f64).sqrt();
                assert!(dropped < rate + slack, "{group}: {dropped} {rate}");
                let least = rate - rate * rate - slack;
                assert!(dropped > least, "{group}: {dropped} {rate}");
            }
        }
    }

    /// The reference draws a number for every element and takes the minimum over windows; where each of them that begins a
    /// square is seen alone, the zeros are that square.
    #[test]
    fn squares_lie_inside_of_the_plane_and_each_channel_has_its_own() {
        let plane = Plane { h: 9, w: 11, c: 3 };
        let squares = squares(0.02, [1, 1], plane, 0);
        let mut seen = std::collections::BTreeSet::new();
        let mut mask = vec![0; plane.elements()];
        for image in 0..4000 {
            let kept = squares.draw(image, &mut mask);
            assert_eq!(kept, mask.iter().filter(|&&m| m == 1).count());
            let dropped: Vec<usize> = (0..mask.len()).filter(|&i| mask[i] == 0).collect();
            if dropped.len() != 49 {
                continue;
            }
            let (first, channel) = (dropped[0] / 3, dropped[0] % 3);
            let (y, x) = (first / 11, first % 11);
            let square = (0..49).map(|i| ((y + i / 7) * 11 + x + i % 7) * 3 + channel);
            assert!(dropped.iter().copied().eq(square));
            seen.insert((y, x, channel));
        }
        // Every place at which a square can begin, and no other.
        assert_eq!(seen.len(), 3 * 5 * 3, "{seen:?}");
    }

    /// A plane that is no larger than a square loses whole channels.
    #[test]
    fn squares_on_small_planes_are_channels() {
        let plane = Plane { h: 7, w: 7, c: 64 };
        let drawn = |number, image| {
            let mut mask = vec![0; plane.elements()];
            squares(0.1, [1, 1], plane, number).draw(image, &mut mask);
            mask
        };
        let mask = drawn(0, 0);
        assert!(mask.chunks(64).all(|pixel| pixel == &mask[..64]));
        let dropped = mask[..64].iter().filter(|&&kept| kept == 0).count();
        assert!((1..20).contains(&dropped), "{dropped}");
        for other in [drawn(1, 0), drawn(0, 1)] {
            assert!(other != mask, "each tensor and each image draws on its own");
        }
    }

    /// docs/reference/vectors.json: `drop_connect_0.1_by_group`, of the reference's resnet_layers.
    #[test]
    fn branches_are_dropped_by_group() {
        let vectors = include_str!("../../../docs/reference/vectors.json");
        let vectors: serde_json::Value =
            serde_json::from_str(vectors).unwrap_or_else(|e| panic!("{e}"));
        let rates = vectors["drop_connect_0.1_by_group"].as_array();
        for (group, rate) in rates.expect("a list").iter().enumerate() {
            let rate = rate.as_f64().expect("a number");
            let dropout = Dropout {
                rate: 0.0,
                path_rate: 0.1,
                block_rate: 0.0,
                seed: 1,
                step: 7,
            };
            let paths = |block| {
                let share = [group + 2, 5];
                let paths = dropout.paths(DropPath { block, share });
                (0..100_000).map(move |i| paths.factor(i))
            };
            let left = 1.0 / (1.0 - rate);
            let dropped = paths(3).filter(|&f| f == 0.0).count();
            assert!(paths(3).all(|f| f == 0.0 || (f - left).abs() < 1e-12));
            // Five standard deviations of the binomial.
            let slack = 5.0 * (1e5 * rate * (1.0 - rate)).sqrt();
            assert!(
                (dropped as f64 - 1e5 * rate).abs() < slack,
                "{group}: {dropped}"
            );
            assert!(paths(3).ne(paths(4)), "each block draws on its own");
        }
    }
}
