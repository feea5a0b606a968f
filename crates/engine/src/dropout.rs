//! Dropout before the classifier: which channels of an image are dropped, the same for every engine.

use crate::init::Stream;

/// Each channel that the classifier reads is 0 with probability `rate`, and else 1 / (1 - rate) times itself (Srivastava
/// et al. 2014, section 10, "inverted").
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// From 0 to below 1.
    pub rate: f64,
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

impl Mask {
    /// What a channel of an image is multiplied by; images are counted from the first of the global batch.
    pub(crate) fn factor(&self, image: usize, channel: usize) -> f64 {
        let counter = image as u64 * self.channels + channel as u64;
        match self.stream.uniform(counter) < self.rate {
            true => 0.0,
            false => 1.0 / (1.0 - self.rate),
        }
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
}
