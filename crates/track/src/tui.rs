//! The dashboard: curves, rates, the machine and the last events, on the whole terminal.
//!
//! It is drawn by the loop's own thread, at most four times a second, to the alternate screen of stderr. No key is read
//! and the terminal stays in its usual mode, so Ctrl-C is what it always is. When it closes, or the program panics, the
//! terminal is as before, and the events are printed below, errors among them.

use std::collections::VecDeque;
use std::io::{self, Stderr, Write};
use std::time::{Duration, Instant};

use indicatif::HumanDuration;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Sparkline, Wrap};
use ratatui::{Frame, Terminal};

use crate::metrics::{EvalMetrics, Scalar, StepMetrics};

/// Between two pictures.
const PACE: Duration = Duration::from_millis(250);
/// Points of a curve: more than a terminal has dots.
const POINTS: usize = 512;
/// Events that are kept to be shown.
const EVENTS: usize = 100;
/// Of training and of evaluation: told apart by the colour-blind, legible on dark and on light.
const TRAIN: Color = Color::Indexed(32);
const EVAL: Color = Color::Indexed(166);

/// What the dashboard shows.
pub(crate) struct View {
    name: String,
    last: Option<StepMetrics>,
    /// The first step of this process, and when it ended.
    first: Option<(u64, Instant)>,
    loss: Series,
    top1: Series,
    eval_loss: Vec<(f64, f64)>,
    eval_top1: Vec<(f64, f64)>,
    best: Option<(f64, u64)>,
    rates: Series,
    rate: f64,
    wait: f64,
    machine: Vec<(String, f64)>,
    events: VecDeque<String>,
}

/// A curve that halves its resolution when it is full.
#[derive(Default)]
struct Series {
    points: Vec<(f64, f64)>,
    /// Values that make a point.
    every: usize,
    sum: (f64, f64),
    count: usize,
}

impl Series {
    fn add(&mut self, x: f64, y: f64) {
        if !y.is_finite() {
            return;
        }
        self.every = self.every.max(1);
        self.sum = (self.sum.0 + x, self.sum.1 + y);
        self.count += 1;
        if self.count < self.every {
            return;
        }
        let count = self.count as f64;
        self.points.push((self.sum.0 / count, self.sum.1 / count));
        (self.sum, self.count) = ((0.0, 0.0), 0);
        if self.points.len() >= POINTS {
            let pairs = self.points.chunks(2);
            self.points = pairs
                .map(|pair| {
                    let n = pair.len() as f64;
                    let (x, y) = pair.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
                    (x / n, y / n)
                })
                .collect();
            self.every *= 2;
        }
    }
}

impl View {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            last: None,
            first: None,
            loss: Series::default(),
            top1: Series::default(),
            eval_loss: vec![],
            eval_top1: vec![],
            best: None,
            rates: Series::default(),
            rate: 0.0,
            wait: 0.0,
            machine: vec![],
            events: VecDeque::new(),
        }
    }

    /// A step, with smoothed rates.
    pub(crate) fn step(&mut self, m: &StepMetrics, rate: f64, wait: f64) {
        self.first.get_or_insert_with(|| (m.step, Instant::now()));
        self.loss.add(m.epoch, m.loss);
        self.top1.add(m.epoch, m.top1);
        self.rates.add(m.epoch, m.images_per_s);
        (self.rate, self.wait) = (rate, wait);
        self.last = Some(m.clone());
    }

    pub(crate) fn eval(&mut self, m: &EvalMetrics) {
        self.eval_loss.push((m.epoch, m.loss));
        self.eval_top1.push((m.epoch, m.top1));
        if self.best.is_none_or(|(best, _)| m.top1 > best) {
            self.best = Some((m.top1, m.step));
        }
    }

    /// A sample of the machine.
    pub(crate) fn machine(&mut self, scalars: &[Scalar]) {
        let short = scalars.iter().map(|(name, value)| {
            let name = name.strip_prefix("system/").unwrap_or(name);
            (name.to_string(), *value)
        });
        self.machine = short.collect();
    }

    pub(crate) fn event(&mut self, text: &str) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(text.into());
    }

    fn eta(&self) -> String {
        let (Some(m), Some((first, began))) = (&self.last, &self.first) else {
            return "?".into();
        };
        let steps = m.step.saturating_sub(*first);
        if steps == 0 {
            return "?".into();
        }
        let left = m.total.saturating_sub(m.step) as f64;
        let seconds = began.elapsed().as_secs_f64() / steps as f64 * left;
        format!(
            "{:#}",
            HumanDuration(Duration::from_secs(seconds.round() as u64))
        )
    }

    /// Draws everything; at 80 x 24 nothing is cut off.
    pub(crate) fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let events = (area.height / 4).clamp(4, 10);
        let rows = Layout::vertical([
            Constraint::Length(2),
            Constraint::Min(8),
            Constraint::Length(5),
            Constraint::Length(events),
        ]);
        let [head, curves, rates, tail] = rows.areas(area);
        self.head(frame, head);
        let [left, right] = Layout::horizontal([Constraint::Percentage(50); 2]).areas(curves);
        curve(frame, left, "loss", &self.loss.points, &self.eval_loss);
        curve(frame, right, "top-1", &self.top1.points, &self.eval_top1);
        let [left, right] = Layout::horizontal([Constraint::Percentage(50); 2]).areas(rates);
        self.speed(frame, left);
        self.computer(frame, right);
        self.tail(frame, tail);
    }

    fn head(&self, frame: &mut Frame<'_>, area: Rect) {
        let [first, second] = Layout::vertical([Constraint::Length(1); 2]).areas(area);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let mut words = vec![Span::styled(self.name.clone(), bold)];
        if let Some(m) = &self.last {
            words.push(
                format!(
                    "  epoch {:.1}  loss {:.4}  lr {:.2e}",
                    m.epoch, m.loss, m.lr
                )
                .into(),
            );
        }
        if let Some((best, step)) = self.best {
            words.push(format!("  best top-1 {best:.4} at {step}").into());
        }
        frame.render_widget(Paragraph::new(Line::from(words)), first);
        let (step, total) = self.last.as_ref().map_or((0, 0), |m| (m.step, m.total));
        let ratio = if total > 0 {
            step as f64 / total as f64
        } else {
            0.0
        };
        let label = format!("{step}/{total}  ETA {}", self.eta());
        let gauge = Gauge::default()
            .ratio(ratio.clamp(0.0, 1.0))
            .label(label)
            .gauge_style(Style::new().fg(TRAIN).bg(Color::Reset));
        frame.render_widget(gauge, second);
    }

    fn speed(&self, frame: &mut Frame<'_>, area: Rect) {
        let title = format!(
            " {:.0} images/s, waiting for input {:.0} % ",
            self.rate,
            100.0 * self.wait
        );
        let block = Block::bordered().title(title);
        let width = area.width.saturating_sub(2) as usize;
        let points = &self.rates.points;
        let from = points.len().saturating_sub(width);
        let values: Vec<u64> = points[from..].iter().map(|p| p.1.max(0.0) as u64).collect();
        let line = Sparkline::default()
            .block(block)
            .data(&values)
            .style(Style::new().fg(TRAIN));
        frame.render_widget(line, area);
    }

    fn computer(&self, frame: &mut Frame<'_>, area: Rect) {
        let value = |name: &str| {
            let found = self.machine.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| *value)
        };
        let percent = |name: &str| value(name).map_or("-".into(), |v| format!("{v:.0} %"));
        let gigabytes = value("system_memory_usage_megabytes")
            .map_or("-".into(), |v| format!("{:.1} GB", v / 1e3));
        let mut lines = vec![Line::from(format!(
            "cpu {}   memory {gigabytes} ({})",
            percent("cpu_utilization_percentage"),
            percent("system_memory_usage_percentage"),
        ))];
        // Two cards more make no room for the disk; more of them are in the trackers.
        for gpu in 0..2 {
            let name = |what: &str| format!("gpu_{gpu}_{what}");
            if value(&name("utilization_percentage")).is_some() {
                lines.push(Line::from(format!(
                    "gpu {gpu} {}   memory {}",
                    percent(&name("utilization_percentage")),
                    percent(&name("memory_usage_percentage")),
                )));
            }
        }
        let room = area.height.saturating_sub(2) as usize;
        if lines.len() + 1 < room {
            lines.push(Line::from(format!(
                "disk {} used",
                percent("disk_usage_percentage")
            )));
        }
        lines.truncate(room.saturating_sub(1));
        lines.push(Line::from(self.shares(area.width.saturating_sub(2))));
        let block = Block::bordered().title(" machine ");
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    /// Where the time went, as much of it as is worth a word and fits.
    fn shares(&self, width: u16) -> String {
        let mut text = "time".to_string();
        let shares = self.last.iter().flat_map(|m| m.spent.shares());
        for (name, share) in shares.filter(|(_, share)| *share >= 0.005) {
            let word = format!("  {name} {:.0} %", 100.0 * share);
            if text.len() + word.len() > usize::from(width) {
                break;
            }
            text += &word;
        }
        text
    }

    fn tail(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = area.height.saturating_sub(1) as usize;
        let lines: Vec<&str> = self.events.iter().flat_map(|text| text.lines()).collect();
        let from = lines.len().saturating_sub(room);
        let lines: Vec<Line<'_>> = lines[from..].iter().map(|line| Line::from(*line)).collect();
        let rule = Block::new()
            .borders(ratatui::widgets::Borders::TOP)
            .title(" events ");
        frame.render_widget(
            Paragraph::new(lines).wrap(Wrap { trim: false }).block(rule),
            area,
        );
    }
}

fn curve(
    frame: &mut Frame<'_>,
    area: Rect,
    title: &str,
    train: &[(f64, f64)],
    eval: &[(f64, f64)],
) {
    let finite = || train.iter().chain(eval).filter(|p| p.1.is_finite());
    let (mut low, mut high) = finite().fold((f64::MAX, f64::MIN), |(low, high), p| {
        (low.min(p.1), high.max(p.1))
    });
    // A run that resumes shows what this process has seen.
    let first = finite().map(|p| p.0).fold(f64::MAX, f64::min);
    let last = finite().map(|p| p.0).fold(0.0, f64::max);
    let first = first.min(last);
    if low >= high {
        (low, high) = if low == high {
            (low - 0.5, high + 0.5)
        } else {
            (0.0, 1.0)
        };
    }
    let style = |color| Style::new().fg(color);
    let line = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(style(TRAIN))
        .data(train);
    let dots = Dataset::default()
        .marker(Marker::Dot)
        .graph_type(GraphType::Scatter)
        .style(style(EVAL))
        .data(eval);
    let title = Line::from(vec![
        Span::from(format!(" {title}: ")),
        Span::styled("train", style(TRAIN)),
        Span::from(" "),
        Span::styled("• eval ", style(EVAL)),
    ]);
    let digits = if high - low < 0.05 { 4 } else { 2 };
    let label = |value: f64| format!("{value:.digits$}");
    let chart = Chart::new(vec![line, dots])
        .block(Block::bordered().title(title))
        .legend_position(None)
        .x_axis(
            Axis::default()
                .bounds([first, last.max(first + 1e-9)])
                .labels([format!("{first:.1}"), format!("epoch {last:.1}")])
                .labels_alignment(Alignment::Right),
        )
        .y_axis(Axis::default().bounds([low, high]).labels([
            label(low),
            label((low + high) / 2.0),
            label(high),
        ]));
    frame.render_widget(chart, area);
}

/// The dashboard on the terminal.
pub(crate) struct Tui {
    pub(crate) view: View,
    terminal: Terminal<CrosstermBackend<Stderr>>,
    drawn: Option<Instant>,
}

impl Tui {
    /// Takes the terminal.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let terminal = Terminal::new(CrosstermBackend::new(io::stderr()))?;
        execute!(io::stderr(), EnterAlternateScreen, Hide)?;
        // A panic's message belongs to the usual screen.
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            leave();
            before(info);
        }));
        Ok(Self {
            view: View::new(name),
            terminal,
            drawn: None,
        })
    }

    /// Draws, if it is time to or there is something to say.
    pub(crate) fn draw(&mut self, is_urgent: bool) {
        let is_due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= PACE);
        if is_due || is_urgent {
            // A terminal that went away is nobody's failure.
            let _ = self.terminal.draw(|frame| self.view.draw(frame));
            self.drawn = Some(Instant::now());
        }
    }
}

/// Gives the terminal back and prints what was said.
impl Drop for Tui {
    fn drop(&mut self) {
        leave();
        let mut out = io::stderr();
        for event in &self.view.events {
            let _ = writeln!(out, "{event}");
        }
    }
}

fn leave() {
    let _ = execute!(io::stderr(), LeaveAlternateScreen, Show);
}

#[cfg(test)]
mod tests {
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::Spent;

    fn view() -> View {
        let mut view = View::new("quickstart");
        for step in 1..=200u64 {
            let epoch = step as f64 * 64.0 / 1438.0;
            let m = StepMetrics {
                step,
                total: 338,
                epoch,
                loss: 2.3 * (-epoch / 3.0).exp(),
                top1: 1.0 - 0.9 * (-epoch / 3.0).exp(),
                lr: 0.1,
                images_per_s: 800.0 + (step % 7) as f64 * 10.0,
                input_wait_fraction: 0.01,
                spent: Spent {
                    engine: 91.0,
                    decode: 1.0,
                    evaluation: 8.0,
                    ..Spent::default()
                },
            };
            view.step(&m, 812.4, 0.012);
            if step % 23 == 0 {
                view.eval(&EvalMetrics {
                    step,
                    epoch,
                    loss: m.loss * 1.1,
                    top1: m.top1 * 0.98,
                    top5: 1.0,
                    ema_loss: None,
                    ema_top1: None,
                    ema_top5: None,
                    images: 359,
                    seconds: 0.4,
                });
            }
        }
        // The time is no part of the picture.
        view.first = None;
        view.machine(&[
            ("system/cpu_utilization_percentage".into(), 97.4),
            ("system/system_memory_usage_megabytes".into(), 4321.0),
            ("system/system_memory_usage_percentage".into(), 18.2),
            ("system/disk_usage_percentage".into(), 40.0),
        ]);
        view.event("quickstart: resnet18 (tpu2018), 32 px, 10 classes, 11181642 parameters");
        view.event("eval at step 184  top1 0.9213  top5 1.0000  loss 0.2103  359 images in 0.4 s");
        view
    }

    fn picture(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y: u16| {
            let cells = (0..width).map(|x| buffer[(x, y)].symbol());
            cells.collect::<String>().trim_end().to_string()
        };
        (0..height).map(row).collect()
    }

    #[test]
    fn all_of_it_is_legible_at_80_by_24() {
        let rows = picture(&view(), 80, 24);
        let text = rows.join("\n");
        eprintln!("{text}");
        for words in [
            "quickstart  epoch 8.9  loss 0.1183  lr 1.00e-1  best top-1 0.9",
            "200/338  ETA ?",
            "loss: train • eval",
            "top-1: train • eval",
            "epoch 8.9",
            "812 images/s, waiting for input 1 %",
            "cpu 97 %   memory 4.3 GB (18 %)",
            "disk 40 % used",
            "time  engine 91 %  evaluation 8 %",
            "quickstart: resnet18 (tpu2018), 32 px, 10 classes, 11181642 parameters",
            "eval at step 184  top1 0.9213",
        ] {
            assert!(text.contains(words), "{words} is missing in\n{text}");
        }
        assert!(
            text.contains('⣀') || text.contains('⠉') || text.contains('⢄'),
            "a curve"
        );
        assert!(
            text.matches('•').count() >= 8 + 2,
            "a dot for every evaluation"
        );
    }

    #[test]
    fn no_size_is_too_small_to_draw() {
        for (width, height) in [(1, 1), (10, 5), (40, 12), (300, 100)] {
            picture(&view(), width, height);
            picture(&View::new(""), width, height);
        }
    }

    #[test]
    fn a_long_curve_keeps_few_points() {
        let mut series = Series::default();
        for step in 0..100_000 {
            series.add(f64::from(step), if step == 5 { f64::NAN } else { 2.0 });
        }
        assert!((POINTS / 2..POINTS).contains(&series.points.len()));
        assert!(series.points.iter().all(|p| p.1 == 2.0));
        assert!(series.points.windows(2).all(|p| p[0].0 < p[1].0));
    }
}
