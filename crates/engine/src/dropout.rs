//! What training drops: channels before the classifier, and branches of blocks; the same for every engine.

use graph::DropPath;

use crate::init::Stream;

/// Each channel that the classifier reads is 0 with probability `rate`, and else 1 / (1 - rate) times itself (Srivastava
/// et al. 2014, section 10, "inverted"); likewise each image's branch of a block with its share of `path_rate`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Of channels, from 0 to below 1.
    pub rate: f64,
    /// Of branches, from 0 to below 1, in a network whose blocks have [`graph::Op::DropPath`].
    pub path_rate: f64,
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
    pub(crate) fn mask(&self, channels: usize) -> Mask {
        Mask {
            stream: Stream::new(self.seed, &format!("dropout of step {}", self.step)),
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

impl Paths {
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
