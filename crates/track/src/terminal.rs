//! The terminal: a bar where there is one, else now and then a line. All of it goes to stderr.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::Spent;
use crate::metrics::{EvalMetrics, Scalar, StepMetrics};
use crate::tui::Tui;

/// What the terminal is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// A bar if stderr is a terminal, else lines.
    Auto,
    /// A dashboard if stderr is a terminal, else lines.
    Tui,
    /// What is noted, and no numbers.
    Notes,
    /// Nothing.
    Quiet,
}

/// Between two lines about steps where there is no bar.
const PACE: Duration = Duration::from_secs(10);
/// Steps over which rates are smoothed.
const SMOOTHING: f64 = 20.0;

/// The terminal and what it shows.
pub(crate) struct Screen {
    kind: Kind,
    images_per_s: Smoothed,
    input_wait_fraction: Smoothed,
}

enum Kind {
    Quiet,
    Notes,
    Lines(Pace),
    /// The bar, from the first step on.
    Bar(Option<Bar>),
    Tui(Box<Tui>),
}

struct Bar {
    bar: ProgressBar,
    /// The first step of this process, and when it ended.
    first: (u64, Instant),
}

impl Screen {
    /// The screen of the run of that name.
    pub(crate) fn new(terminal: Terminal, name: &str) -> Self {
        let is_terminal = io::stderr().is_terminal();
        let kind = match terminal {
            Terminal::Quiet => Kind::Quiet,
            Terminal::Notes => Kind::Notes,
            _ if !is_terminal => Kind::Lines(Pace::default()),
            Terminal::Auto => Kind::Bar(None),
            // A terminal that cannot be taken can still show a bar.
            Terminal::Tui => {
                Tui::open(name).map_or(Kind::Bar(None), |tui| Kind::Tui(Box::new(tui)))
            }
        };
        Self {
            kind,
            images_per_s: Smoothed::default(),
            input_wait_fraction: Smoothed::default(),
        }
    }

    pub(crate) fn step(&mut self, m: &StepMetrics) {
        let images_per_s = self.images_per_s.add(m.images_per_s);
        let input_wait_fraction = self.input_wait_fraction.add(m.input_wait_fraction);
        match &mut self.kind {
            Kind::Quiet | Kind::Notes => {}
            Kind::Lines(pace) => {
                if pace.is_due(Instant::now()) {
                    print(&step_line(m, images_per_s));
                }
            }
            Kind::Tui(tui) => {
                tui.view.step(m, images_per_s, input_wait_fraction);
                tui.draw(false);
            }
            Kind::Bar(bar) => {
                let Bar { bar, first } = bar.get_or_insert_with(|| new_bar(m));
                let steps = m.step.saturating_sub(first.0);
                let left = m.total.saturating_sub(m.step);
                let text = bar_text(m, images_per_s);
                let eta = eta_text(steps, first.1.elapsed(), left);
                bar.set_message(format!("{text}  {eta}"));
                bar.set_position(m.step);
            }
        }
    }

    pub(crate) fn eval(&mut self, m: &EvalMetrics) {
        let text = eval_line(m);
        match &mut self.kind {
            Kind::Tui(tui) => {
                tui.view.eval(m, &text);
                tui.draw(true);
            }
            Kind::Notes => {}
            _ => self.line(&text),
        }
    }

    /// Whether it shows the machine.
    pub(crate) fn shows_machine(&self) -> bool {
        matches!(self.kind, Kind::Tui(_))
    }

    /// A sample of the machine.
    pub(crate) fn machine(&mut self, scalars: &[Scalar]) {
        if let Kind::Tui(tui) = &mut self.kind {
            tui.view.machine(scalars);
        }
    }

    /// Prints a line, above the bar if there is one.
    pub(crate) fn line(&mut self, text: &str) {
        match &mut self.kind {
            Kind::Quiet => {}
            Kind::Tui(tui) => {
                tui.view.event(text);
                tui.draw(true);
            }
            Kind::Bar(Some(Bar { bar, .. })) => bar.println(text),
            Kind::Notes | Kind::Lines(_) | Kind::Bar(None) => print(text),
        }
    }

    /// Leaves the bar as it is, or the dashboard, and prints below it from now on.
    pub(crate) fn finish(&mut self) {
        if let Kind::Tui(_) = self.kind {
            // It gives the terminal back, and what follows is printed there.
            self.kind = Kind::Lines(Pace::default());
        }
        if let Kind::Bar(bar) = &mut self.kind
            && let Some(Bar { bar, .. }) = bar.take()
        {
            bar.abandon();
            // The cursor stays behind the bar.
            print("");
        }
    }
}

fn new_bar(m: &StepMetrics) -> Bar {
    let style = ProgressStyle::with_template("{wide_bar} {msg}")
        .expect("the template has only known fields");
    let bar = ProgressBar::with_draw_target(Some(m.total), ProgressDrawTarget::stderr());
    Bar {
        bar: bar.with_style(style).with_position(m.step),
        first: (m.step, Instant::now()),
    }
}

/// Time to the end at the pace so far, evaluations and checkpoints included. indicatif's own estimate would take the
/// steps before a resume for steps that took no time.
fn eta_text(steps: u64, elapsed: Duration, left: u64) -> String {
    if steps == 0 {
        return "ETA ?".into();
    }
    let seconds = elapsed.as_secs_f64() / steps as f64 * left as f64;
    // A Duration holds any whole number of seconds, and the cast stops at the largest.
    let eta = HumanDuration(Duration::from_secs(seconds.round() as u64));
    format!("ETA {eta:#}")
}

/// Prints a line; a terminal that went away is nobody's failure, and must not panic as `eprintln!` does.
fn print(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A step in one line, with smoothed rates.
fn step_line(m: &StepMetrics, images_per_s: f64) -> String {
    let lr_digits = m.lr == 0.0 || m.lr >= 0.001;
    let lr = match lr_digits {
        true => format!("{:.4}", m.lr),
        false => format!("{:.2e}", m.lr),
    };
    format!(
        "step {}/{}  epoch {:.1}  loss {:.4}  top1 {:.3}  lr {lr}  {}",
        m.step,
        m.total,
        m.epoch,
        m.loss,
        m.top1,
        rates_text(images_per_s, &m.spent),
    )
}

/// What stands beside the bar: short, so that a terminal of 80 columns has room for the bar.
fn bar_text(m: &StepMetrics, images_per_s: f64) -> String {
    format!(
        "{}/{}  loss {:.4}  top1 {:.3}  {}",
        m.step,
        m.total,
        m.loss,
        m.top1,
        rates_text(images_per_s, &m.spent),
    )
}

/// The rate, and what limits it.
fn rates_text(images_per_s: f64, spent: &Spent) -> String {
    let decimals = if images_per_s < 10.0 { 1 } else { 0 };
    let limit = match spent.limit().as_str() {
        "" => String::new(),
        limit => format!("  limit {limit}"),
    };
    format!("{images_per_s:.decimals$} images/s{limit}")
}

/// An evaluation in one line.
fn eval_line(m: &EvalMetrics) -> String {
    let average = match (m.ema_top1, m.ema_top5) {
        (Some(top1), Some(top5)) => format!("  ema top1 {top1:.4}  top5 {top5:.4}"),
        _ => String::new(),
    };
    format!(
        "eval at step {}  top1 {:.4}  top5 {:.4}  loss {:.4}{average}  {} images in {:.1} s",
        m.step, m.top1, m.top5, m.loss, m.images, m.seconds
    )
}

/// Due at first, then at most every [`PACE`].
#[derive(Default)]
struct Pace {
    last: Option<Instant>,
}

impl Pace {
    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.last.is_none_or(|last| now - last >= PACE);
        if is_due {
            self.last = Some(now);
        }
        is_due
    }
}

/// An exponential mean.
#[derive(Default)]
struct Smoothed {
    mean: Option<f64>,
}

impl Smoothed {
    /// Adds a value; the mean so far. A value that is no number would stay in the mean for ever and is left out.
    fn add(&mut self, value: f64) -> f64 {
        let mean = match self.mean {
            Some(mean) if value.is_finite() => mean + (value - mean) / SMOOTHING,
            Some(mean) => mean,
            None => value,
        };
        if mean.is_finite() {
            self.mean = Some(mean);
        }
        mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> StepMetrics {
        StepMetrics {
            step: 120,
            total: 345,
            epoch: 5.34,
            loss: 0.42131,
            top1: 0.9123,
            lr: 0.025,
            images_per_s: 812.4,
            input_wait_fraction: 0.012,
            spent: Spent {
                engine: 97.0,
                decode: 3.0,
                ..Spent::default()
            },
        }
    }

    #[test]
    fn a_step_in_one_line() {
        assert_eq!(
            step_line(&step(), 812.4),
            "step 120/345  epoch 5.3  loss 0.4213  top1 0.912  lr 0.0250  812 images/s  limit engine 97%"
        );
    }

    #[test]
    fn a_step_beside_the_bar() {
        let text = bar_text(&step(), 812.4);
        assert_eq!(
            text,
            "120/345  loss 0.4213  top1 0.912  812 images/s  limit engine 97%"
        );
    }

    #[test]
    fn the_time_left_follows_the_pace_of_this_process() {
        let check = |steps, seconds, left, expected| {
            let elapsed = Duration::from_secs(seconds);
            assert_eq!(eta_text(steps, elapsed, left), expected);
        };
        check(0, 0, 100, "ETA ?");
        check(20, 4, 40, "ETA 8s");
        check(1000, 600, 10_000, "ETA 2h");
        check(10, 100, 0, "ETA 0s");
        check(1, 1_000_000, 1000, "ETA 32y");
        assert!(eta_text(1, Duration::MAX, u64::MAX).ends_with('y'));
    }

    #[test]
    fn small_numbers_keep_their_digits() {
        let m = StepMetrics {
            lr: 0.000_012_3,
            spent: Spent {
                read: 6.0,
                engine: 4.0,
                ..Spent::default()
            },
            ..step()
        };
        assert_eq!(
            step_line(&m, 3.12),
            "step 120/345  epoch 5.3  loss 0.4213  top1 0.912  lr 1.23e-5  3.1 images/s  limit input read 60%, engine 40%"
        );
        let m = StepMetrics { lr: 0.0, ..step() };
        assert!(step_line(&m, 3.0).contains("  lr 0.0000  "));
    }

    #[test]
    fn a_step_that_diverged_is_shown() {
        let m = StepMetrics {
            loss: f64::NAN,
            ..step()
        };
        assert!(step_line(&m, 812.4).contains("  loss NaN  "));
    }

    #[test]
    fn an_evaluation_in_one_line() {
        let m = EvalMetrics {
            step: 120,
            epoch: 5.0,
            loss: 0.1203,
            top1: 0.9611,
            top5: 0.9972,
            ema_loss: None,
            ema_top1: None,
            ema_top5: None,
            images: 359,
            seconds: 0.41,
        };
        assert_eq!(
            eval_line(&m),
            "eval at step 120  top1 0.9611  top5 0.9972  loss 0.1203  359 images in 0.4 s"
        );
    }

    #[test]
    fn lines_keep_their_pace() {
        let begin = Instant::now();
        let mut pace = Pace::default();
        let seconds = [0.0, 0.1, 9.9, 10.0, 19.9, 35.0, 44.0];
        let due = seconds.map(|s| pace.is_due(begin + Duration::from_secs_f64(s)));
        assert_eq!(due, [true, false, false, true, false, true, false]);
    }

    #[test]
    fn rates_are_smoothed() {
        let mut rate = Smoothed::default();
        assert_eq!(rate.add(100.0), 100.0);
        assert_eq!(rate.add(200.0), 105.0);
        assert_eq!(rate.add(f64::INFINITY), 105.0);
        let mut late = 0.0;
        for _ in 0..20 {
            late = rate.add(200.0);
        }
        assert!((160.0..170.0).contains(&late), "{late}");
    }

    #[test]
    fn a_rate_begins_with_the_first_number() {
        let mut rate = Smoothed::default();
        assert!(rate.add(f64::NAN).is_nan());
        assert_eq!(rate.add(100.0), 100.0);
    }
}
