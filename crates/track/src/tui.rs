//! The dashboard: curves, rates, the machine and the last events, on the whole terminal.
//!
//! It is drawn by the loop's own thread, at most four times a second, to the alternate screen of stderr. No key is read
//! and the terminal stays in its usual mode, so Ctrl-C is what it always is. When it closes, or the program panics, the
//! terminal is as before, and the events are printed below, errors among them.

use std::collections::VecDeque;
use std::io::{self, BufWriter, Stderr, Write};
use std::time::{Duration, Instant};

use indicatif::HumanDuration;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::terminal::{
    BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate, EnterAlternateScreen,
    LeaveAlternateScreen,
};
use ratatui::crossterm::{execute, queue};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, LineGauge, Paragraph, Sparkline};
use ratatui::{Frame, Terminal};

use crate::metrics::{EvalMetrics, Scalar, StepMetrics};

/// Between two pictures.
const PACE: Duration = Duration::from_millis(250);
/// Between two pictures that are drawn wholly: what is typed is echoed into them.
const WHOLE: Duration = Duration::from_secs(5);
/// Points of a curve: more than a terminal has dots.
const POINTS: usize = 512;
/// Events that are kept to be shown.
const EVENTS: usize = 100;
/// Of training and of evaluation: told apart by the colour-blind, legible on dark and on light.
const TRAIN: Color = Color::Indexed(32);
const EVAL: Color = Color::Indexed(166);
/// Of what is still to come.
const FAINT: Color = Color::Indexed(244);

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
    events: VecDeque<Event>,
}

/// What was said.
struct Event {
    text: String,
    kind: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Before the first step.
    Start,
    /// An evaluation, which comes again and again and is in the curves too.
    Eval,
    /// Anything else while it trains: somebody should read it.
    Note,
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

    /// An evaluation, and its line.
    pub(crate) fn eval(&mut self, m: &EvalMetrics, text: &str) {
        self.eval_loss.push((m.epoch, m.loss));
        self.eval_top1.push((m.epoch, m.top1));
        if self.best.is_none_or(|(best, _)| m.top1 > best) {
            self.best = Some((m.top1, m.step));
        }
        self.push(text, Said::Eval);
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
        let kind = match self.last {
            Some(_) => Said::Note,
            None => Said::Start,
        };
        self.push(text, kind);
    }

    fn push(&mut self, text: &str, kind: Said) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        let text = text.into();
        self.events.push_back(Event { text, kind });
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
        let Some(m) = &self.last else {
            let name = shortened(&self.name, area.width.into());
            frame.render_widget(Paragraph::new(name).style(bold), first);
            return frame.render_widget(Paragraph::new("no step yet"), second);
        };
        // What matters least is last, and is left out where the room ends.
        let mut words = vec![
            format!("epoch {:.1}", m.epoch),
            format!("loss {:.4}", m.loss),
        ];
        words.extend(
            self.best
                .map(|(best, step)| format!("best top-1 {best:.4} at {step}")),
        );
        words.push(format!("lr {:.2e}", m.lr));
        let width = usize::from(area.width);
        let name = shortened(&self.name, (width / 3).max(10));
        let mut room = width.saturating_sub(name.chars().count());
        let mut line = vec![Span::styled(name, bold)];
        for word in words {
            let word = format!("  {word}");
            if word.len() > room {
                break;
            }
            room -= word.len();
            line.push(word.into());
        }
        frame.render_widget(Paragraph::new(Line::from(line)), first);
        let ratio = m.step as f64 / m.total.max(1) as f64;
        let gauge = LineGauge::default()
            .ratio(ratio.clamp(0.0, 1.0))
            .label(format!("{}/{}  ETA {}", m.step, m.total, self.eta()))
            .filled_symbol("█")
            .unfilled_symbol("─")
            .filled_style(Style::new().fg(TRAIN))
            .unfilled_style(Style::new().fg(FAINT));
        frame.render_widget(gauge, second);
    }

    fn speed(&self, frame: &mut Frame<'_>, area: Rect) {
        let width = area.width.saturating_sub(2) as usize;
        let decimals = if self.rate < 10.0 { 1 } else { 0 };
        let rate = format!(" {:.decimals$} images/s ", self.rate);
        let wait = format!(
            "{}, input wait {:.0} % ",
            rate.trim_end(),
            100.0 * self.wait
        );
        let title = match self.last {
            None => " images/s ".into(),
            Some(_) if wait.len() <= width => wait,
            Some(_) => rate,
        };
        let block = Block::bordered().title(title);
        let points = &self.rates.points;
        let from = points.len().saturating_sub(width);
        let values: Vec<u64> = points[from..]
            .iter()
            .map(|p| (100.0 * p.1.max(0.0)) as u64)
            .collect();
        let line = Sparkline::default()
            .block(block)
            .data(&values)
            .style(Style::new().fg(TRAIN));
        frame.render_widget(line, area);
    }

    fn computer(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" machine ");
        let room = area.height.saturating_sub(2) as usize;
        let width = area.width.saturating_sub(2);
        let mut lines = self.machine_lines(width.into(), room.saturating_sub(1));
        lines.push(match self.last {
            Some(_) => self.shares(width),
            None => String::new(),
        });
        let lines: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }

    /// At most so many lines about the machine.
    fn machine_lines(&self, width: usize, room: usize) -> Vec<String> {
        if self.machine.is_empty() {
            return vec!["not measured".into()];
        }
        let value = |name: &str| {
            let found = self.machine.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| *value)
        };
        let percent = |name: &str| value(name).map_or("-".into(), |v| format!("{v:.0} %"));
        let gigabytes = value("system_memory_usage_megabytes")
            .map_or("-".into(), |v| format!("{:.1} GB", v / 1e3));
        let first = format!(
            "cpu {}  memory {gigabytes}",
            percent("cpu_utilization_percentage")
        );
        let more = format!(" ({})", percent("system_memory_usage_percentage"));
        let mut lines = vec![match first.len() + more.len() <= width {
            true => first + &more,
            false => first,
        }];
        // Two cards more make no room for the disk; more of them are in the trackers.
        for gpu in 0..2 {
            let name = |what: &str| format!("gpu_{gpu}_{what}");
            if value(&name("utilization_percentage")).is_some() {
                lines.push(format!(
                    "gpu {gpu} {}  memory {}",
                    percent(&name("utilization_percentage")),
                    percent(&name("memory_usage_percentage")),
                ));
            }
        }
        lines.push(format!("disk {} used", percent("disk_usage_percentage")));
        lines.truncate(room);
        lines
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
        let lines = self.last_events(area.width.into(), room);
        let style = |kind| match kind {
            Said::Note => Style::new().add_modifier(Modifier::BOLD),
            Said::Start | Said::Eval => Style::new(),
        };
        let lines = lines.into_iter();
        let lines: Vec<Line<'_>> = lines
            .map(|(text, kind)| Line::styled(text, style(kind)))
            .collect();
        let rule = Block::new()
            .borders(ratatui::widgets::Borders::TOP)
            .title(" events ");
        frame.render_widget(Paragraph::new(lines).block(rule), area);
    }

    /// What there is room for: the last evaluation, then what is no evaluation, then more evaluations, and of each the
    /// newest; in the order in which it was said.
    fn last_events(&self, width: usize, room: usize) -> Vec<(String, Said)> {
        let is_eval = |event: &Event| event.kind == Said::Eval;
        let newest = self.events.iter().enumerate().rev();
        let (evals, others): (Vec<_>, Vec<_>) = newest.partition(|(_, event)| is_eval(event));
        let (first, rest) = evals.split_at(evals.len().min(1));
        let mut left = room;
        let mut kept: Vec<(usize, Vec<String>, Said)> = vec![];
        for group in [first, &others, rest] {
            for (i, event) in group {
                let mut lines = wrapped(&event.text, width);
                if lines.len() > left {
                    // Of a long text that is alone the beginning is worth most.
                    let is_alone = kept.iter().all(|(_, _, kind)| *kind == Said::Eval);
                    lines.truncate(if is_alone { left } else { 0 });
                    left = lines.len();
                }
                left -= lines.len();
                kept.push((*i, lines, event.kind));
            }
        }
        kept.sort_by_key(|(i, ..)| *i);
        let lines = kept.into_iter();
        lines
            .flat_map(|(_, lines, kind)| lines.into_iter().map(move |line| (line, kind)))
            .collect()
    }
}

/// A text that fits, its end cut off where it does not.
fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.into();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    kept + "…"
}

/// The lines of a text, broken between words where it can be.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![];
    for line in text.lines() {
        let mut rest: Vec<char> = line.chars().collect();
        while width > 0 && rest.len() > width {
            let gap = rest[..=width].iter().rposition(|c| *c == ' ');
            let at = gap.filter(|at| 2 * at > width).unwrap_or(width);
            let tail = rest.split_off(at);
            lines.push(rest.into_iter().collect());
            rest = tail.into_iter().skip_while(|c| *c == ' ').collect();
        }
        lines.push(rest.into_iter().collect());
    }
    lines
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
        Span::styled("─ train", style(TRAIN)),
        Span::from("  "),
        Span::styled("• eval ", style(EVAL)),
    ]);
    if train.is_empty() && eval.is_empty() {
        return frame.render_widget(Block::bordered().title(title), area);
    }
    let digits = if high - low < 0.05 { 4 } else { 2 };
    let label = |value: f64| format!("{value:.digits$}");
    let digits = if last - first < 0.5 { 3 } else { 1 };
    let epoch = |value: f64| format!("{value:.digits$}");
    let chart = Chart::new(vec![line, dots])
        .block(Block::bordered().title(title))
        .legend_position(None)
        .x_axis(
            Axis::default()
                .bounds([first, last.max(first + 1e-9)])
                .labels([epoch(first), format!("epoch {}", epoch(last))])
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
    terminal: Terminal<CrosstermBackend<BufWriter<Stderr>>>,
    drawn: Option<Instant>,
    /// When all of it was drawn last, not what changed alone.
    whole: Instant,
}

impl Tui {
    /// Takes the terminal.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        // A picture is thousands of small writes.
        let out = BufWriter::with_capacity(64 << 10, io::stderr());
        let terminal = Terminal::new(CrosstermBackend::new(out))?;
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
            whole: Instant::now(),
        })
    }

    /// Draws, if it is time to or there is something to say.
    pub(crate) fn draw(&mut self, is_urgent: bool) {
        let is_due = self.drawn.is_none_or(|drawn| drawn.elapsed() >= PACE);
        if is_due || is_urgent {
            // A terminal that went away is nobody's failure.
            let is_whole = self.whole.elapsed() >= WHOLE;
            let _ = show(&mut self.terminal, &self.view, is_whole);
            if is_whole {
                self.whole = Instant::now();
            }
            self.drawn = Some(Instant::now());
        }
    }
}

/// Draws what has changed, or all of it.
fn show<W: Write>(
    terminal: &mut Terminal<CrosstermBackend<W>>,
    view: &View,
    is_whole: bool,
) -> io::Result<()> {
    if is_whole {
        // Shown at once, so that nothing flickers. `Terminal::clear` would ask where the cursor is, and wait two seconds
        // for a terminal that does not answer.
        let out = terminal.backend_mut();
        queue!(out, BeginSynchronizedUpdate, Clear(ClearType::All))?;
        terminal.swap_buffers();
    }
    terminal.draw(|frame| view.draw(frame))?;
    if is_whole {
        execute!(terminal.backend_mut(), EndSynchronizedUpdate)?;
    }
    Ok(())
}

/// Gives the terminal back and prints what was said.
impl Drop for Tui {
    fn drop(&mut self) {
        leave();
        let mut out = io::stderr();
        for event in &self.view.events {
            let _ = writeln!(out, "{}", event.text);
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

    /// What a terminal would get.
    #[derive(Clone, Default)]
    struct Out(std::rc::Rc<std::cell::RefCell<Vec<u8>>>);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The first picture, one of what has changed, and a whole one: that has all the text again, and asks the terminal
    /// for nothing, which a terminal that is none would never answer.
    #[test]
    fn a_whole_picture_asks_for_no_answer() {
        let viewport = ratatui::Viewport::Fixed(Rect::new(0, 0, 100, 28));
        let options = ratatui::TerminalOptions { viewport };
        let out = Out::default();
        let backend = CrosstermBackend::new(out.clone());
        let mut terminal = Terminal::with_options(backend, options).unwrap();
        let view = view();
        let mut lengths = vec![];
        for is_whole in [false, false, true] {
            show(&mut terminal, &view, is_whole).unwrap();
            let text = String::from_utf8(out.0.take()).unwrap();
            assert!(!text.contains("\u{1b}[6n"), "{text:?}");
            assert_eq!(text.contains("\u{1b}[2J"), is_whole);
            assert_eq!(text.contains("\u{1b}[?2026h"), is_whole);
            assert_eq!(text.contains("\u{1b}[?2026l"), is_whole);
            lengths.push(text.len());
        }
        assert!(
            lengths[1] < lengths[0] / 10 && lengths[2] > lengths[0] / 2,
            "{lengths:?}"
        );
    }

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
                view.eval(
                    &EvalMetrics {
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
                    },
                    &format!("eval at step {step}  top1 {:.4}", m.top1),
                );
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
            "quickstart  epoch 8.9  loss 0.1183  best top-1 0.9225 at 184  lr 1.00e-1",
            "200/338  ETA ?",
            "loss: ─ train  • eval",
            "top-1: ─ train  • eval",
            "epoch 8.9",
            "812 images/s, input wait 1 %",
            "cpu 97 %  memory 4.3 GB (18 %)",
            "disk 40 % used",
            "time  engine 91 %  evaluation 8 %",
            "quickstart: resnet18 (tpu2018), 32 px, 10 classes, 11181642 parameters",
            "eval at step 184  top1 0.9413",
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
    fn a_narrow_one_leaves_out_whole_words() {
        let mut view = view();
        view.name = "a-very-long-name-that-somebody-gave-to-a-run".into();
        let text = picture(&view, 60, 20).join("\n");
        for words in [
            "a-very-long-name-th…  epoch 8.9  loss 0.1183\n",
            "┌ 812 images/s ─",
            "cpu 97 %  memory 4.3 GB",
            "time  engine 91 %",
        ] {
            assert!(text.contains(words), "{words} is missing in\n{text}");
        }
        view.rate = 12_345.0;
        view.wait = 1.0;
        let text = picture(&view, 80, 24).join("\n");
        let words = "12345 images/s, input wait 100 % ";
        assert!(text.contains(words), "{words} is missing in\n{text}");
    }

    #[test]
    fn evaluations_do_not_push_out_what_went_wrong() {
        let mut view = view();
        let away = "http://127.0.0.1:5000: no connection; the run goes on, and what it is to be told is kept in a file";
        view.event(away);
        for step in 0..50 {
            view.push(&format!("eval at step {step}"), Said::Eval);
        }
        let rows = picture(&view, 80, 24);
        let tail = &rows[rows.len() - 5..];
        assert_eq!(
            tail[1..],
            [
                "http://127.0.0.1:5000: no connection; the run goes on, and what it is to be told",
                "is kept in a file",
                "eval at step 48",
                "eval at step 49",
            ],
            "{tail:#?}"
        );
        // What is longer than its room shows its beginning, and the last evaluation.
        view.event(&"word ".repeat(200));
        let lines = view.last_events(80, 4);
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], ("eval at step 49".into(), Said::Eval));
        assert!(lines[1].0.starts_with("word word"), "{lines:?}");
    }

    #[test]
    fn before_the_first_step_nothing_is_made_up() {
        let text = picture(&View::new("quickstart"), 80, 24).join("\n");
        assert!(text.contains("no step yet") && text.contains("not measured"));
        assert!(!text.contains("0/0") && !text.contains("0.50"), "{text}");
    }

    #[test]
    fn texts_are_broken_between_words() {
        let check = |text, expected: &[&str]| assert_eq!(wrapped(text, 10), expected);
        check("one two three four", &["one two", "three four"]);
        check("0123456789abcdef", &["0123456789", "abcdef"]);
        check("a\n\nb", &["a", "", "b"]);
        check("a 0123456789", &["a 01234567", "89"]);
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
