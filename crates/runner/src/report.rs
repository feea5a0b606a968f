//! `runner report` and `runner runs`: what runs have reached, from their directories alone.

mod canvas;
mod plot;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Map, Value, json};
use spec::Run;
use store::Lease;
use track::{Spent, Summary, read_summary};

use crate::cli::{ReportArgs, RunsArgs};
use crate::failure::Failure;
use crate::output;
use crate::sweep::escaped;
use canvas::{Image, Svg};
use plot::{Chart, Curve, POINTS, WIDTH};

/// Points of a curve of which a single step's value is noise.
const MEANS: usize = 60;

/// By the name of a metric: step, epoch, value.
type Metrics = BTreeMap<String, Vec<(u64, f64, f64)>>;

/// A run as its directory tells it.
struct Told {
    dir: PathBuf,
    name: String,
    spec: Option<Run>,
    summary: Option<Summary>,
    status: &'static str,
    metrics: Metrics,
    /// Lines of metrics.jsonl that are none.
    damaged: usize,
}

impl Told {
    /// Reads a run directory; none if it is none.
    fn read(dir: &Path) -> Option<Self> {
        let spec = std::fs::read_to_string(dir.join("spec.toml")).ok();
        let is_run = spec.is_some() && dir.join("metrics.jsonl").exists();
        if !is_run {
            return None;
        }
        let spec = spec.and_then(|text| spec::parse(&text, "spec.toml", &[]).ok());
        let summary = read_summary(dir);
        let last = dir.file_name().unwrap_or(dir.as_os_str());
        let (metrics, damaged) = metrics(&dir.join("metrics.jsonl"));
        let mut told = Self {
            name: last.to_string_lossy().into_owned(),
            dir: dir.into(),
            spec,
            status: "",
            summary,
            metrics,
            damaged,
        };
        told.status = told.status();
        Some(told)
    }

    /// How it stands. A directory whose lease is held has a process at it.
    fn status(&self) -> &'static str {
        if Lease::is_held(&self.dir) {
            return "running";
        }
        let step = self.step();
        match self.summary.as_ref().map(|s| (s.status.as_str(), s.step)) {
            // A later start was killed, which leaves the summary of the one before.
            Some((_, at)) if at < step => "killed",
            Some(("done", _)) => "done",
            Some(("interrupted", _)) => "interrupted",
            Some(("failed", _)) => "failed",
            _ => "killed",
        }
    }

    fn step(&self) -> u64 {
        let of = |name: &str| self.metrics.get(name)?.last().map(|(step, ..)| *step);
        of("train/loss").unwrap_or(0)
    }

    fn epoch(&self) -> f64 {
        let points = self.metrics.get("train/loss");
        points.and_then(|p| p.last()).map_or(0.0, |p| p.1)
    }

    /// The best evaluation by top1: value and step.
    fn best(&self) -> Option<(f64, u64)> {
        let points = self.metrics.get("eval/top1")?.iter();
        points.filter(|p| p.2.is_finite()).fold(
            None,
            |best: Option<(f64, u64)>, &(step, _, value)| match best {
                Some((known, _)) if known >= value => best,
                _ => Some((value, step)),
            },
        )
    }

    fn last(&self, metric: &str) -> Option<f64> {
        self.metrics.get(metric)?.last().map(|p| p.2)
    }

    /// Where the time of its last start went, by the summary; of a run that has none yet, or was killed since, where
    /// that of its steps went. And whether it is the whole.
    fn spent(&self) -> Option<(Spent, bool)> {
        let time = self.summary.as_ref().and_then(|s| s.time.as_ref());
        let is_left_behind = ["running", "killed"].contains(&self.status);
        if let Some(time) = time.filter(|_| !is_left_behind) {
            return Some((time.seconds, true));
        }
        let (all, waiting) = self.seconds()?;
        let steps = Spent {
            engine: all - waiting,
            decode: waiting,
            ..Spent::default()
        };
        Some((steps, false))
    }

    /// Seconds of all steps, and of those waiting for input.
    fn seconds(&self) -> Option<(f64, f64)> {
        let batch = self.spec.as_ref()?.train.batch_size as f64;
        let rates = self.metrics.get("train/images_per_s")?;
        let waits = self.metrics.get("train/input_wait_fraction")?;
        let (mut all, mut waiting) = (0.0, 0.0);
        for (rate, wait) in rates.iter().zip(waits) {
            let seconds = batch / rate.2;
            if seconds.is_finite() && wait.2.is_finite() {
                all += seconds;
                waiting += seconds * wait.2;
            }
        }
        (all > 0.0).then_some((all, waiting))
    }

    /// The median rate, which a slow first step does not move.
    fn rate(&self) -> Option<f64> {
        let mut rates: Vec<f64> = self
            .metrics
            .get("train/images_per_s")?
            .iter()
            .map(|p| p.2)
            .collect();
        rates.retain(|rate| rate.is_finite());
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied()
    }
}

fn metrics(path: &Path) -> (Metrics, usize) {
    let mut metrics = Metrics::new();
    let mut damaged = 0;
    let Ok(file) = std::fs::File::open(path) else {
        return (metrics, 0);
    };
    for line in BufReader::new(file).split(b'\n') {
        let Ok(line) = line else { break };
        let Ok(line) = serde_json::from_slice::<Map<String, Value>>(&line) else {
            damaged += 1;
            continue;
        };
        let number = |value: &Value| match value {
            Value::String(text) => match text.as_str() {
                "NaN" => Some(f64::NAN),
                "Infinity" => Some(f64::INFINITY),
                "-Infinity" => Some(f64::NEG_INFINITY),
                _ => None,
            },
            value => value.as_f64(),
        };
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let epoch = line.get("epoch").and_then(number).unwrap_or(0.0);
        for (name, value) in line.iter().filter(|(name, _)| name.contains('/')) {
            if let Some(value) = number(value) {
                let points = metrics.entry(name.clone()).or_default();
                points.push((step, epoch, value));
            }
        }
    }
    (metrics, damaged)
}

/// `runner runs`.
pub(crate) fn runs(args: &RunsArgs) -> Result<ExitCode, Failure> {
    let mut dirs = vec![];
    for root in &args.dirs {
        find(root, 0, &mut dirs);
    }
    dirs.sort();
    let told: Vec<Told> = dirs.iter().filter_map(|dir| Told::read(dir)).collect();
    if args.json {
        let runs: Vec<Value> = told.iter().map(as_json).collect();
        output::print(&format!("{}\n", json!(runs)));
        return Ok(ExitCode::SUCCESS);
    }
    if told.is_empty() {
        let roots: Vec<String> = args.dirs.iter().map(|d| d.display().to_string()).collect();
        eprintln!(
            "no runs in {}\nhint: a run lives in runs/NAME; runner configs/quickstart.toml makes one",
            roots.join(", ")
        );
        return Ok(ExitCode::SUCCESS);
    }
    let header = [
        "run",
        "status",
        "step",
        "epoch",
        "best top1",
        "at step",
        "images/s",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    for run in &told {
        let best = run.best();
        let dash = || "-".to_string();
        rows.push(vec![
            run.dir.display().to_string(),
            run.status.into(),
            run.step().to_string(),
            format!("{:.1}", run.epoch()),
            best.map_or_else(dash, |(value, _)| format!("{value:.4}")),
            best.map_or_else(dash, |(_, step)| step.to_string()),
            run.rate().map_or_else(dash, rate_text),
        ]);
    }
    output::print(&output::columns(&rows));
    Ok(ExitCode::SUCCESS)
}

/// Run directories in a directory, and in those of sweeps there.
fn find(dir: &Path, depth: usize, dirs: &mut Vec<PathBuf>) {
    if dir.join("spec.toml").exists() {
        dirs.push(dir.into());
        return;
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|_| depth < 3) {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            find(&path, depth + 1, dirs);
        }
    }
}

fn as_json(run: &Told) -> Value {
    json!({
        "dir": run.dir,
        "status": run.status,
        "step": run.step(),
        "epoch": run.epoch(),
        "best": run.best().map(|(value, step)| json!({ "metric": "top1", "value": value, "step": step })),
        "images_per_s": run.rate(),
        "summary": run.summary,
    })
}

/// `runner report`.
pub(crate) fn report(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let mut told = vec![];
    for dir in &args.runs {
        let mut dirs = vec![];
        find(dir, 0, &mut dirs);
        dirs.sort();
        let runs: Vec<Told> = dirs.iter().filter_map(|dir| Told::read(dir)).collect();
        if runs.is_empty() {
            return Err(Failure::Spec(format!(
                "{}: no run\nhint: name run directories, such as runs/quickstart, or a sweep's; `runner runs` lists them",
                dir.display()
            )));
        }
        told.extend(runs);
    }
    name(&mut told);
    let charts = charts(&told);
    let text = page(&told, &charts);
    store::write_atomic(&args.out, &[text.as_bytes()])?;
    let mut written = vec![args.out.display().to_string()];
    let stem = args.out.with_extension("");
    for (file, chart) in charts.iter().filter(|(_, chart)| chart.has_points()) {
        let mut image = Image::new(WIDTH, chart.height());
        chart.draw(&mut image);
        let path = PathBuf::from(format!("{}-{file}.png", stem.display()));
        store::write_atomic(&path, &[&image.png()])?;
        written.push(path.display().to_string());
    }
    for run in told.iter().filter(|run| run.damaged > 0) {
        eprintln!(
            "{}: {} lines of metrics.jsonl are damaged and left out",
            run.dir.display(),
            run.damaged
        );
    }
    output::print(&(written.join("\n") + "\n"));
    Ok(ExitCode::SUCCESS)
}

/// Gives runs the shortest names that tell them apart: the directory's, or its whole path. A sweep's runs are called
/// after what differs between them, for their directories are called after hashes.
fn name(told: &mut [Told]) {
    let keys: Vec<BTreeMap<String, String>> = told
        .iter()
        .map(|run| run.spec.as_ref().map_or_else(BTreeMap::new, flat))
        .collect();
    let names: Vec<Option<String>> = (0..told.len())
        .map(|i| {
            let is_of_sweep = |run: &Told| run.dir.join("cell.toml").exists();
            let own = &told[i].dir;
            let beside = |run: &Told| run.dir.parent() == own.parent() && is_of_sweep(run);
            let beside: Vec<usize> = (0..told.len()).filter(|j| beside(&told[*j])).collect();
            let is_swept = |(key, value): &(&String, &String)| {
                !COSMETIC.contains(&key.as_str())
                    && beside.iter().any(|j| keys[*j].get(*key) != Some(*value))
            };
            let swept: Vec<_> = keys[i].iter().filter(is_swept).collect();
            let is_short = is_of_sweep(&told[i]) && (1..=3).contains(&swept.len());
            let short = |key: &str| key.rsplit('.').next().unwrap_or(key).to_string();
            let texts = swept
                .iter()
                .map(|(key, value)| format!("{}={value}", short(key)));
            is_short.then(|| texts.collect::<Vec<_>>().join(" "))
        })
        .collect();
    for (run, name) in told.iter_mut().zip(names) {
        run.name = name.unwrap_or_else(|| std::mem::take(&mut run.name));
    }
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for run in told.iter() {
        *counts.entry(run.name.clone()).or_default() += 1;
    }
    for run in told {
        if counts[&run.name] > 1 {
            run.name = run.dir.display().to_string();
        }
    }
}

fn charts(told: &[Told]) -> Vec<(&'static str, Chart)> {
    let all = [
        (
            "eval-top1",
            "Top-1 accuracy",
            "evaluation",
            "eval/top1",
            POINTS,
        ),
        ("train-loss", "Loss", "training", "train/loss", 2 * MEANS),
        ("eval-loss", "Loss", "evaluation", "eval/loss", POINTS),
        ("lr", "Learning rate", "", "train/lr", POINTS),
        (
            "images-per-s",
            "Throughput",
            "images/s",
            "train/images_per_s",
            MEANS,
        ),
        (
            "input-wait",
            "Waiting for input",
            "share of a step",
            "train/input_wait_fraction",
            MEANS,
        ),
    ];
    let curve = |run: &Told, metric: &str| Curve {
        name: run.name.clone(),
        points: match run.metrics.get(metric) {
            Some(points) => points
                .iter()
                .map(|&(_, epoch, value)| (epoch, value))
                .collect(),
            None => vec![],
        },
    };
    all.into_iter()
        .map(|(file, title, unit, metric, points)| {
            let chart = Chart {
                title,
                unit,
                has_marks: metric.starts_with("eval/"),
                is_logarithmic: metric.ends_with("/loss"),
                points,
                curves: told.iter().map(|run| curve(run, metric)).collect(),
            };
            (file, chart)
        })
        .collect()
}

/// Where the time went: a bar for each run, its parts in words, and what to change.
fn times(told: &[Told]) -> String {
    let spent: Vec<(&Told, Spent, bool)> = told
        .iter()
        .filter_map(|run| run.spent().map(|(spent, is_whole)| (run, spent, is_whole)))
        .collect();
    if spent.is_empty() {
        return String::new();
    }
    let mut text = "<h2>Where the time went</h2><div class=\"scroll\"><table class=\"time\"><thead><tr><th>run</th>\
                    <th>time</th><th class=\"words\">on what</th><th class=\"words\">what to change</th></tr></thead>\
                    <tbody>"
        .to_string();
    for (run, spent, is_whole) in spent {
        let (mut bar, mut words) = (String::new(), String::new());
        // A killed run does not say what its input waited for.
        let called = |name: &'static str| match (name, is_whole) {
            ("decode", false) => "input",
            (name, _) => name,
        };
        for (name, share) in spent.shares().into_iter().filter(|s| s.1 >= 0.0005) {
            let percent = 100.0 * share;
            // Colours are in the order of the names.
            let colour = Spent::PARTS
                .iter()
                .position(|part| *part == name)
                .unwrap_or(0);
            let _ = write!(
                bar,
                "<i class=\"p{colour}\" style=\"width:{percent:.2}%\"></i>"
            );
            let _ = write!(
                words,
                "<span><i class=\"key p{colour}\"></i>{} {percent:.1}&nbsp;%</span> ",
                called(name)
            );
        }
        let change = match spent.time().filter(|_| is_whole) {
            Some(time) => time.change.join(". "),
            None => "a run that ends says it".into(),
        };
        let _ = write!(
            text,
            "<tr><td class=\"name\">{}</td><td>{}</td><td class=\"words\"><div class=\"bar\">{bar}</div>{words}</td>\
             <td class=\"words\">{}</td></tr>",
            escaped(&run.name),
            time(spent.total()),
            escaped(&change),
        );
    }
    text + "</tbody></table></div><p class=\"faint\">Of the last start of each run. A run that is going on, or was killed, \
            shows its steps only.</p>"
}

/// The page: no script, nothing from elsewhere.
fn page(told: &[Told], charts: &[(&'static str, Chart)]) -> String {
    let title = match told {
        [one] => one.name.clone(),
        many => format!("{} runs", many.len()),
    };
    let mut body = String::new();
    let number = |value: Option<f64>, digits: usize| match value {
        Some(value) => format!("{value:.digits$}"),
        None => "–".into(),
    };
    body += "<h2>Results</h2><div class=\"scroll\"><table><thead><tr><th>run</th><th>status</th><th>step</th><th>epoch</th>\
             <th>best top-1</th><th>at step</th><th>last top-1</th><th>last top-5</th><th>last loss</th><th>images/s</th>\
             </tr></thead><tbody>";
    let best = told
        .iter()
        .filter_map(Told::best)
        .map(|(v, _)| v)
        .fold(f64::MIN, f64::max);
    let value = |run: &Told| run.best().map_or(f64::NEG_INFINITY, |(value, _)| value);
    let mut ranked: Vec<&Told> = told.iter().collect();
    ranked.sort_by(|a, b| value(b).total_cmp(&value(a)));
    for run in ranked {
        let mark = match run.best() {
            Some((value, _)) if value == best && told.len() > 1 => " class=\"best\"",
            _ => "",
        };
        let step = run.best().map_or("–".into(), |(_, step)| step.to_string());
        let _ = write!(
            body,
            "<tr><td class=\"name\" title=\"{}\">{}</td><td>{}</td><td>{}</td><td>{:.1}</td><td{mark}>{}</td><td>{step}</td>\
             <td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escaped(&run.dir.display().to_string()),
            escaped(&run.name),
            run.status,
            run.step(),
            run.epoch(),
            number(run.best().map(|(v, _)| v), 4),
            number(run.last("eval/top1"), 4),
            number(run.last("eval/top5"), 4),
            number(run.last("eval/loss"), 4),
            run.rate().map_or_else(|| "–".into(), rate_text),
        );
    }
    body += "</tbody></table></div>";
    for run in told {
        if let Some(reason) = run.summary.as_ref().and_then(|s| s.reason.as_ref()) {
            let _ = write!(
                body,
                "<p>{} ended by {}</p>",
                escaped(&run.name),
                escaped(reason)
            );
        }
    }
    body += "<h2>Curves</h2><div class=\"charts\">";
    for (_, chart) in charts.iter().filter(|(_, chart)| chart.has_points()) {
        let mut svg = Svg::new(WIDTH, chart.height());
        chart.draw(&mut svg);
        let _ = write!(body, "<figure>{}</figure>", svg.finish(chart.title));
    }
    body += "</div>";
    body += &times(told);
    body += &differences(told);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{0}</title><style>{STYLE}{1}</style></head><body><h1>{0}</h1>{body}<footer>runner {2}</footer></body></html>\n",
        escaped(&title),
        series_style(),
        env!("CARGO_PKG_VERSION")
    )
}

/// Keys that say nothing about what is computed, and differ between all runs.
const COSMETIC: [&str; 2] = ["name", "run_dir"];

/// The keys whose values differ between the specs; of a single run, all of them.
fn differences(told: &[Told]) -> String {
    let specs: Vec<(&Told, BTreeMap<String, String>)> = told
        .iter()
        .filter_map(|run| Some((run, flat(run.spec.as_ref()?))))
        .collect();
    let keys: BTreeSet<&String> = specs.iter().flat_map(|(_, keys)| keys.keys()).collect();
    let is_single = specs.len() < 2;
    let is_shown = |key: &&String| {
        let mut values = specs.iter().map(|(_, keys)| keys.get(*key));
        let first = values.next().flatten();
        is_single || !COSMETIC.contains(&key.as_str()) && values.any(|value| value != first)
    };
    let keys: Vec<&String> = keys.into_iter().filter(is_shown).collect();
    let heading = match is_single {
        true => "Spec",
        false => "What differs between the specs",
    };
    if keys.is_empty() {
        return format!("<h2>{heading}</h2><p>Nothing.</p>");
    }
    let mut text =
        format!("<h2>{heading}</h2><div class=\"scroll\"><table><thead><tr><th>key</th>");
    for (run, _) in &specs {
        let _ = write!(text, "<th>{}</th>", escaped(&run.name));
    }
    text += "</tr></thead><tbody>";
    for key in keys {
        let _ = write!(text, "<tr><td class=\"name\">{}</td>", escaped(key));
        for (_, values) in &specs {
            let value = values.get(key).map_or("–", String::as_str);
            let _ = write!(text, "<td>{}</td>", escaped(value));
        }
        text += "</tr>";
    }
    text + "</tbody></table></div>"
}

/// A spec's keys, dotted, and their values as text.
fn flat(run: &Run) -> BTreeMap<String, String> {
    let tree = serde_json::to_value(run).expect("keys are strings");
    let mut keys = BTreeMap::new();
    for (name, value) in tree.as_object().into_iter().flatten() {
        let said = |value: &Value| match value {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        match value.as_object() {
            Some(section) => {
                let section = section.iter();
                keys.extend(section.filter_map(|(k, v)| Some((format!("{name}.{k}"), said(v)?))));
            }
            None => keys.extend(said(value).map(|value| (name.clone(), value))),
        }
    }
    keys
}

fn rate_text(rate: f64) -> String {
    let decimals = if rate < 10.0 { 1 } else { 0 };
    format!("{rate:.decimals$}")
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn series_style() -> String {
    let rules = |colours: [[u8; 3]; 6]| {
        let mut text = String::new();
        for (i, [r, g, b]) in colours.iter().enumerate() {
            let _ = write!(
                text,
                "path.s{i}{{stroke:rgb({r},{g},{b})}}rect.s{i}{{fill:rgb({r},{g},{b})}}.p{i}{{background:rgb({r},{g},{b})}}"
            );
        }
        text
    };
    let (light, dark) = (rules(canvas::SERIES), rules(canvas::DARK));
    format!("{light}@media(prefers-color-scheme:dark){{{dark}}}")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--back:#fff;--text:#1a1d21;--faint:#5a6169;--line:#dee2e6;--card:#f7f8f9;--good:#0072b2}\
@media(prefers-color-scheme:dark){:root{--back:#16181c;--text:#e8eaed;--faint:#a2a9b1;--line:#363b42;--card:#1e2126;--good:#6cb8f0}}\
body{font:15px/1.5 system-ui,sans-serif;background:var(--back);color:var(--text);max-width:1340px;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th{font-weight:600;color:var(--faint)}\
td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}\
td.name,th:first-child{text-align:left}th{white-space:normal;vertical-align:bottom}\
.words{text-align:left}td.words{white-space:normal;min-width:14rem}td.words span{white-space:nowrap;margin-right:.6rem}td.best{color:var(--good);font-weight:700}\
.scroll{overflow-x:auto}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1rem}\
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.5rem}svg{width:100%;height:auto;font-family:'DejaVu Sans',Verdana,sans-serif}\
text.text{fill:var(--text)}text.faint{fill:var(--faint)}path.grid{stroke:var(--line)}path.faint{stroke:var(--faint)}\
.bar{display:flex;gap:1px;min-width:16rem;height:.8rem;border-radius:2px;overflow:hidden;margin:.2rem 0}.bar i{height:100%;min-width:1px}\
i.key{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.3rem}p.faint{color:var(--faint)}\
footer{margin:3rem 0 1rem;color:var(--faint)}";
