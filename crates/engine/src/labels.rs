//! Cross-entropy with label smoothing and mixed labels, and hits: one row at a time, the same for every engine.

use crate::Batch;

/// Target of the true class and of every other class: 1 - s + s / K, and s / K.
pub(crate) fn targets(smoothing: f64, classes: usize) -> (f64, f64) {
    let spread = smoothing / classes as f64;
    (1.0 - smoothing + spread, spread)
}

/// The target of one image: every class has `off`, but for two, which may be the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) off: f64,
    /// A class and its target.
    pub(crate) first: (usize, f64),
    pub(crate) second: (usize, f64),
    /// The class of the larger share, which hits are counted for.
    pub(crate) label: usize,
}

impl Target {
    /// Of image `i` of a batch; `on` and `off` are those of an image of one class.
    pub(crate) fn new(batch: &Batch<'_>, i: usize, (on, off): (f64, f64)) -> Self {
        let label = batch.labels[i] as usize;
        let single = Self {
            off,
            first: (label, on),
            second: (label, on),
            label,
        };
        let Some(mixed) = batch.mixed else {
            return single;
        };
        let (other, share) = (mixed.labels[i] as usize, mixed.share);
        if other == label {
            return single;
        }
        Self {
            off,
            first: (label, off + share * (on - off)),
            second: (other, off + (1.0 - share) * (on - off)),
            label: if share >= 0.5 { label } else { other },
        }
    }

    /// Of a class.
    pub(crate) fn of(&self, class: usize) -> f64 {
        match class {
            class if class == self.first.0 => self.first.1,
            class if class == self.second.0 => self.second.1,
            _ => self.off,
        }
    }
}

/// Whether the label scores highest (lowest class wins ties), and whether fewer than five score strictly higher.
/// A score that is not finite is never a hit.
pub fn hits<T: PartialOrd + Copy + Into<f64>>(logits: &[T], label: usize) -> (bool, bool) {
    let score = logits[label];
    if !score.into().is_finite() {
        return (false, false);
    }
    let above = logits.iter().filter(|&&v| v > score).count();
    let tie_before = logits[..label].contains(&score);
    (above == 0 && !tie_before, above < 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_class() {
        assert_eq!(hits(&[1.0, 1.0], 0), (true, true));
        assert_eq!(hits(&[1.0, 1.0], 1), (false, true));
        assert_eq!(hits(&[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 5), (false, false));
        assert_eq!(hits(&[5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 4), (false, true));
        assert_eq!(hits(&[f32::NAN, 0.0], 0), (false, false));
    }

    #[test]
    fn mixed_targets_are_the_mean_of_both() {
        let (labels, others) = ([1, 2, 0], [2, 2, 1]);
        let batch = Batch {
            pixels: crate::Pixels::U8(&[]),
            labels: &labels,
            mixed: Some(crate::Mixed {
                labels: &others,
                share: 0.25,
            }),
        };
        let all = |i| {
            let target = Target::new(&batch, i, targets(0.3, 3));
            (target.label, [0, 1, 2].map(|class| target.of(class)))
        };
        let close = |(label, ours): (usize, [f64; 3]), (expected, theirs): (usize, [f64; 3])| {
            assert_eq!(label, expected);
            for (a, b) in ours.iter().zip(theirs) {
                assert!((a - b).abs() < 1e-12, "{ours:?} is not {theirs:?}");
            }
        };
        // 0.1 for each class, and 0.7 in the proportion of 1 to 3.
        close(all(0), (2, [0.1, 0.275, 0.625]));
        close(all(1), (2, [0.1, 0.1, 0.8]));
        close(all(2), (1, [0.275, 0.625, 0.1]));
    }

    #[test]
    fn targets_are_the_references() {
        let (on, off) = targets(0.1, 1000);
        assert!((on - 0.9001).abs() < 1e-12 && (off - 0.0001).abs() < 1e-12);
    }
}
