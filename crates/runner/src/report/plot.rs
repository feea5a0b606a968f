//! Curves over epochs, on any [`Canvas`].

use super::canvas::{Anchor, Canvas, Ink, text_width};

/// A curve of one run.
pub(crate) struct Curve {
    pub(crate) name: String,
    /// Epoch and value, by epoch; what is not finite is a gap.
    pub(crate) points: Vec<(f64, f64)>,
}

/// A diagram.
pub(crate) struct Chart {
    pub(crate) title: &'static str,
    /// The values' unit, or what they are.
    pub(crate) unit: &'static str,
    /// Whether a single value is a mark too, as of evaluations.
    pub(crate) has_marks: bool,
    /// Whether the values are shown by their logarithms, if they differ so much that the small ones would not be seen.
    pub(crate) is_logarithmic: bool,
    /// More points than these become means: they are no longer seen, or are noise.
    pub(crate) points: usize,
    pub(crate) curves: Vec<Curve>,
}

pub(crate) const WIDTH: f32 = 640.0;
const LEGEND: f32 = 18.0;
const PLOT: f32 = 240.0;
const TOP: f32 = 38.0;
const BOTTOM: f32 = 40.0;
const SIZE: f32 = 12.0;
/// More points than these are no longer seen.
pub(crate) const POINTS: usize = 400;
/// Values that differ by more than this factor are shown by their logarithms.
const FACTOR: f64 = 100.0;

impl Chart {
    /// Whether there is anything to see.
    pub(crate) fn has_points(&self) -> bool {
        let finite = |curve: &Curve| curve.points.iter().any(|(_, y)| y.is_finite());
        self.curves.iter().any(finite)
    }

    pub(crate) fn height(&self) -> f32 {
        TOP + LEGEND * self.legend().len() as f32 + PLOT + BOTTOM
    }

    /// The legend: rows of names, as many beside each other as fit.
    fn legend(&self) -> Vec<Vec<(usize, String)>> {
        let mut rows: Vec<Vec<(usize, String)>> = vec![];
        let mut x = f32::MAX;
        for (i, curve) in self.curves.iter().enumerate() {
            let name = shortened(&curve.name, WIDTH - 60.0);
            let width = text_width(&name, SIZE) + 46.0;
            if x + width > WIDTH {
                rows.push(vec![]);
                x = 10.0;
            }
            x += width;
            if let Some(row) = rows.last_mut() {
                row.push((i, name));
            }
        }
        rows
    }

    /// The curves' points, as many as are drawn.
    fn drawn(&self) -> Vec<Vec<(f64, f64)>> {
        let curves = self.curves.iter();
        curves
            .map(|curve| thinned(&curve.points, self.points))
            .collect()
    }

    pub(crate) fn draw(&self, canvas: &mut dyn Canvas) {
        let height = self.height();
        let curves: Vec<Vec<(f64, f64)>> = self.drawn();
        let is_logarithmic = self.is_logarithmic && is_wide(&curves);
        canvas.text(10.0, 20.0, 15.0, Anchor::Start, Ink::Text, self.title);
        let after = 10.0 + text_width(self.title, 15.0) + 10.0;
        let unit = match is_logarithmic {
            true => format!("{}, logarithmic", self.unit),
            false => self.unit.into(),
        };
        canvas.text(after, 20.0, SIZE, Anchor::Start, Ink::Faint, &unit);
        let mut y = TOP;
        for row in self.legend() {
            let mut x = 10.0;
            for (i, name) in row {
                canvas.line(&[(x, y), (x + 24.0, y)], Ink::Series(i), 2.5);
                canvas.text(x + 30.0, y + 4.0, SIZE, Anchor::Start, Ink::Text, &name);
                x += text_width(&name, SIZE) + 46.0;
            }
            y += LEGEND;
        }

        let scale = |value: f64| match is_logarithmic {
            // What has no logarithm is below all others.
            true => value.log10(),
            false => value,
        };
        let all = || curves.iter().flatten().map(|&(x, y)| (x, scale(y)));
        let finite = || all().filter(|(_, y)| y.is_finite());
        let last = all().map(|(x, _)| x).fold(0.0, f64::max);
        let (low, high) = finite().fold((f64::MAX, f64::MIN), |(low, high), (_, y)| {
            (low.min(y), high.max(y))
        });
        let (low, high) = match low < high {
            true => (low, high),
            // A flat line lies in the middle.
            false => (
                low - low.abs().max(1e-9) * 0.5,
                low + low.abs().max(1e-9) * 0.5,
            ),
        };
        let mut ticks = ticks(low, high, 5);
        if is_logarithmic {
            // Whole powers of ten.
            ticks.retain(|tick| tick.fract() == 0.0);
        }
        let (low, high) = match (ticks.first(), ticks.last()) {
            (Some(&first), Some(&last)) => (low.min(first), high.max(last)),
            _ => (low, high),
        };
        let step = ticks
            .windows(2)
            .next()
            .map_or(1.0, |pair| pair[1] - pair[0]);
        let name = |tick: &f64| match is_logarithmic {
            true => power(*tick),
            false => label(*tick, step),
        };
        let labels: Vec<String> = ticks.iter().map(name).collect();
        let left = labels
            .iter()
            .map(|text| text_width(text, SIZE))
            .fold(0.0, f32::max)
            + 20.0;
        let (right, bottom) = (WIDTH - 20.0, height - BOTTOM);
        let top = bottom - PLOT + 8.0;
        let x = |epoch: f64| left + (right - left) * (epoch / last.max(1e-9)) as f32;
        let y = |value: f64| {
            let share = (value - low) / (high - low);
            bottom - (bottom - top) * share.clamp(0.0, 1.0) as f32
        };
        for (tick, label) in ticks.iter().zip(&labels) {
            let at = y(*tick);
            canvas.line(&[(left, at), (right, at)], Ink::Grid, 1.0);
            canvas.text(left - 8.0, at + 4.0, SIZE, Anchor::End, Ink::Faint, label);
        }
        let epochs = self::ticks(0.0, last, 8);
        let step = epochs
            .windows(2)
            .next()
            .map_or(1.0, |pair| pair[1] - pair[0]);
        for tick in epochs.iter().filter(|tick| **tick <= last * 1.0001) {
            let at = x(*tick);
            canvas.line(&[(at, bottom), (at, bottom + 4.0)], Ink::Faint, 1.0);
            let text = label(*tick, step);
            canvas.text(at, bottom + 18.0, SIZE, Anchor::Middle, Ink::Faint, &text);
        }
        canvas.line(&[(left, bottom), (right, bottom)], Ink::Faint, 1.0);
        let middle = (left + right) / 2.0;
        canvas.text(
            middle,
            bottom + 34.0,
            SIZE,
            Anchor::Middle,
            Ink::Faint,
            "epoch",
        );

        for (i, points) in curves.iter().enumerate() {
            for part in points.split(|(_, value)| !value.is_finite()) {
                let part: Vec<(f32, f32)> =
                    part.iter().map(|&(e, v)| (x(e), y(scale(v)))).collect();
                if part.len() > 1 {
                    canvas.line(&part, Ink::Series(i), 1.8);
                }
                if self.has_marks || part.len() == 1 {
                    for (x, y) in part {
                        canvas.rect(x - 2.5, y - 2.5, 5.0, 5.0, Ink::Series(i));
                    }
                }
            }
        }
    }
}

/// A text that fits, its end cut off where it does not.
fn shortened(text: &str, width: f32) -> String {
    if text_width(text, SIZE) <= width {
        return text.into();
    }
    let mut kept = String::new();
    for c in text.chars() {
        if text_width(&kept, SIZE) > width - 20.0 {
            break;
        }
        kept.push(c);
    }
    kept + "…"
}

/// Whether a linear axis would hide the small values.
fn is_wide(curves: &[Vec<(f64, f64)>]) -> bool {
    let values = curves.iter().flatten().map(|(_, y)| *y);
    let (low, high) = values
        .filter(|y| y.is_finite() && *y > 0.0)
        .fold((f64::MAX, 0.0f64), |(low, high), y| {
            (low.min(y), high.max(y))
        });
    high > FACTOR * low
}

/// A power of ten in digits, or as 1e-5.
fn power(exponent: f64) -> String {
    match exponent {
        0.0..=5.0 => format!("{:.0}", 10f64.powf(exponent)),
        -4.0..0.0 => format!("{:.*}", -exponent as usize, 10f64.powf(exponent)),
        _ => format!("1e{exponent:.0}"),
    }
}

/// At most `count` points, each the mean of as many: what is smoothed is what the eye would smooth.
fn thinned(points: &[(f64, f64)], count: usize) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(count).max(1);
    let mean = |part: &[(f64, f64)]| {
        let count = part.len() as f64;
        let (x, y) = part.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0, y + p.1));
        (x / count, y / count)
    };
    points.chunks(size).map(mean).collect()
}

/// Round numbers from below `low` to above `high`, about `count` of them: 1, 2 or 5 times a power of ten apart.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let raw = (high - low) / count as f64;
    if !(raw.is_finite() && raw > 0.0) {
        return vec![low];
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= raw * 0.999)
        .unwrap_or(10.0 * power);
    let first = (low / step + 1e-9).floor() as i64;
    let last = (high / step - 1e-9).ceil() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A tick's number, with the digits that its distance to the next needs.
fn label(value: f64, step: f64) -> String {
    if value != 0.0 && !(1e-4..1e6).contains(&value.abs()) {
        return format!("{value:.1e}");
    }
    let digits = (-(step.log10() + 1e-9).floor()).clamp(0.0, 8.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(
            ticks(0.0, 1.0, 5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(
            ticks(0.0, 15.0, 8),
            [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]
        );
        assert_eq!(ticks(812.0, 988.0, 5), [800.0, 850.0, 900.0, 950.0, 1000.0]);
        assert_eq!(ticks(3.0, 3.0, 5), [3.0]);
        let texts: Vec<String> = ticks(0.0, 1.0, 5).iter().map(|t| label(*t, 0.2)).collect();
        assert_eq!(texts, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(label(800.0, 50.0), "800");
        assert_eq!(label(2.5e-7, 1e-7), "2.5e-7");
        assert_eq!(label(0.05, 0.01), "0.05");
    }

    #[test]
    fn many_points_become_few() {
        let points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), 2.0)).collect();
        let thin = thinned(&points, POINTS);
        assert!(thin.len() <= POINTS);
        assert_eq!(thin[0], (1.0, 2.0));
        assert_eq!(thinned(&points[..5], POINTS), points[..5]);
    }

    /// What is written and where, and the lines.
    #[derive(Default)]
    struct Told(Vec<(f32, String)>, Vec<Vec<(f32, f32)>>);

    impl Canvas for Told {
        fn line(&mut self, points: &[(f32, f32)], ink: Ink, _: f32) {
            if matches!(ink, Ink::Series(_)) {
                self.1.push(points.to_vec());
            }
        }
        fn rect(&mut self, _: f32, _: f32, _: f32, _: f32, _: Ink) {}
        fn text(&mut self, _: f32, y: f32, _: f32, _: Anchor, _: Ink, text: &str) {
            self.0.push((y, text.into()));
        }
    }

    #[test]
    fn a_loss_that_was_huge_does_not_flatten_the_rest() {
        let points = [600.0, 3.0, 0.02, 0.0, f64::NAN, 0.01];
        let points = points.iter().enumerate().map(|(i, y)| (i as f64, *y));
        let mut chart = Chart {
            title: "Loss",
            unit: "evaluation",
            has_marks: false,
            is_logarithmic: true,
            points: POINTS,
            curves: vec![Curve {
                name: "a".into(),
                points: points.collect(),
            }],
        };
        let mut told = Told::default();
        chart.draw(&mut told);
        let texts: Vec<&str> = told.0.iter().map(|(_, text)| text.as_str()).collect();
        for text in [
            "evaluation, logarithmic",
            "0.01",
            "0.1",
            "1",
            "10",
            "100",
            "1000",
        ] {
            assert!(texts.contains(&text), "{text}: {texts:?}");
        }
        // The legend's, and up to the gap; what has no logarithm lies on the axis.
        let line = &told.1[1];
        assert_eq!(line.len(), 4);
        let height = |i: usize| line[3].1 - line[i].1;
        assert!(
            height(0) > 200.0 && (100.0..150.0).contains(&height(1)),
            "{line:?}"
        );
        assert!(line.iter().all(|(_, y)| y.is_finite()));
        chart.curves[0].points.truncate(1);
        let mut told = Told::default();
        chart.draw(&mut told);
        assert!(told.0.iter().any(|(_, text)| text == "evaluation"));
    }

    #[test]
    fn a_legend_stays_inside() {
        let curve = |name: String| Curve {
            name,
            points: vec![],
        };
        let names = ["a", "b", "c"].map(|c| c.repeat(30));
        let mut curves: Vec<Curve> = names.into_iter().map(curve).collect();
        curves.push(curve("long ".repeat(100)));
        let chart = Chart {
            title: "t",
            unit: "",
            has_marks: false,
            is_logarithmic: false,
            points: POINTS,
            curves,
        };
        let rows = chart.legend();
        assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), 4);
        for row in rows {
            let width: f32 = row.iter().map(|(_, n)| text_width(n, SIZE) + 46.0).sum();
            assert!(width + 10.0 <= WIDTH, "{row:?}");
        }
    }
}
