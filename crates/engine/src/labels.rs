//! Cross-entropy with label smoothing, and hits: one row at a time, the same for every engine.

/// Target of the true class and of every other class: 1 - s + s / K, and s / K.
pub(crate) fn targets(smoothing: f64, classes: usize) -> (f64, f64) {
    let spread = smoothing / classes as f64;
    (1.0 - smoothing + spread, spread)
}

/// Whether the label scores highest (lowest class wins ties), and whether fewer than five score strictly higher.
/// A score that is not finite is never a hit.
pub(crate) fn hits<T: PartialOrd + Copy + Into<f64>>(logits: &[T], label: usize) -> (bool, bool) {
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
    fn targets_are_the_references() {
        let (on, off) = targets(0.1, 1000);
        assert!((on - 0.9001).abs() < 1e-12 && (off - 0.0001).abs() < 1e-12);
    }
}
