//! `[sweep]`: one file that says many runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use toml::Value;
use toml::de::{DeTable, DeValue};

use crate::load::{Layers, load_cell, place};
use crate::problem::{Errors, Problem};
use crate::run::Run;

/// Most runs of a sweep.
const MOST: usize = 10_000;

/// Many runs, and how they compete.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// The spec's `name`: the runs live in `runs/<name>`, or in its `run_dir`.
    pub base: Run,
    /// The runs, in the order of the axes.
    pub cells: Vec<Cell>,
    /// How the worse ones are stopped early, if they are.
    pub halving: Option<Halving>,
}

/// One of the runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// Twelve hexadecimal digits that stand for what is computed and for how long.
    pub hash: String,
    /// The keys that differ between the runs, and their values as TOML.
    pub keys: BTreeMap<String, String>,
    /// The run, its name and directory those of the cell.
    pub run: Run,
}

/// Successive halving (Jamieson and Talwalkar, 2016): every run trains for a short while, the best of them go on for
/// longer, the best of those for longer still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Halving {
    /// How often it is decided, the end included.
    pub rungs: u32,
    /// Of how many runs one goes on, and by how much longer it trains.
    pub factor: u32,
}

impl Halving {
    /// Percent of `train.length` up to the end of a rung, counted from 0.
    pub fn percent(&self, rung: u32) -> f64 {
        let left = self.rungs - 1 - rung.min(self.rungs - 1);
        100.0 / f64::from(self.factor).powi(left as i32)
    }

    /// How many of `runs` go on after a rung: at least one.
    pub fn kept(&self, runs: usize) -> usize {
        runs.div_ceil(self.factor as usize).max(1)
    }
}

/// What a key may be.
enum Axis {
    OneOf(Vec<Value>),
    /// Random only: from, to, and whether the logarithm is uniform.
    Range(f64, f64, bool),
}

/// The `[sweep]` of a file, not yet multiplied out.
#[derive(Default)]
struct Table {
    kind: Option<String>,
    axes: Vec<(String, Axis)>,
    /// Whether there are any, right or wrong.
    has_axes: bool,
    list: Vec<BTreeMap<String, Value>>,
    count: Option<usize>,
    seed: u64,
    halving: Option<Halving>,
}

/// Reads a sweep: a spec with a table `[sweep]`. The layers' arguments and environment hold for all runs; the keys of the
/// sweep lie above them.
///
/// # Errors
/// Everything that is wrong with the table, or with the runs.
pub fn sweep(layers: &Layers<'_>) -> Result<Sweep, Errors> {
    // First the spec by itself, which says whether the file is there and is TOML.
    let base = load_cell(layers)?.run;
    let origin = layers.file.display().to_string();
    let text = std::fs::read_to_string(layers.file).unwrap_or_default();
    let mut reader = Reader {
        origin: &origin,
        text: &text,
        problems: vec![],
    };
    let table = reader.read();
    let sets = reader.cells(&table);
    if !reader.problems.is_empty() {
        return Err(Errors(reader.problems));
    }

    let root = base.run_dir();
    let (mut cells, mut seen, mut problems) = (vec![], BTreeSet::new(), vec![]);
    for keys in sets {
        let own = keys.iter().map(|(key, value)| format!("{key}={value}"));
        let all: Vec<String> = layers.sets.iter().cloned().chain(own).collect();
        let loaded = load_cell(&Layers {
            sets: &all,
            ..*layers
        });
        let mut run = match loaded {
            Ok(loaded) => loaded.run,
            Err(errors) => {
                for problem in errors.0 {
                    // The same is wrong with many runs.
                    if !problems.contains(&problem) {
                        problems.push(problem);
                    }
                }
                continue;
            }
        };
        let hash = hash(&run, &keys);
        run.name = format!("{}-{hash}", base.name);
        run.run_dir = Some(root.join(&hash).display().to_string());
        if seen.insert(hash.clone()) {
            cells.push(Cell { hash, keys, run });
        }
    }
    match problems.is_empty() {
        true => Ok(Sweep {
            base,
            cells,
            halving: table.halving,
        }),
        false => Err(Errors(problems)),
    }
}

/// Stands for everything that decides what a run reaches: its computation, its length, and what the sweep says of it.
fn hash(run: &Run, keys: &BTreeMap<String, String>) -> String {
    let mut text = String::new();
    let mut said = run.computation();
    said.insert("train.length".into(), run.train.length.to_string());
    said.insert("data.train".into(), format!("{:?}", run.data.train));
    for (key, value) in said.iter().chain(keys) {
        let _ = writeln!(text, "{key} = {value}"); // to a string it always succeeds
    }
    // FNV-1a, 64 bits: it has to be the same for ever, and nobody attacks it.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{:012x}", hash >> 16)
}

struct Reader<'a> {
    origin: &'a str,
    text: &'a str,
    problems: Vec<Problem>,
}

const KEYS: &str = "the keys of [sweep] are kind, axes, runs, count, seed, halving";

impl Reader<'_> {
    fn say(&mut self, at: std::ops::Range<usize>, key: &str, what: String, hint: &str) {
        let (line, column) = place(self.text, &at);
        self.problems.push(Problem {
            origin: format!("{}:{line}:{column}", self.origin),
            key: key.into(),
            what,
            hint: (!hint.is_empty()).then(|| hint.into()),
        });
    }

    fn read(&mut self) -> Table {
        let mut table = Table::default();
        let Ok(root) = DeTable::parse(self.text) else {
            return table; // which has been said
        };
        let Some((name, value)) = root
            .get_ref()
            .iter()
            .find(|(k, _)| &**k.get_ref() == "sweep")
        else {
            let example = "write [sweep.axes] and below it \"schedule.base_lr\" = [0.1, 0.2]";
            self.problems.push(Problem {
                origin: self.origin.into(),
                key: "sweep".into(),
                what: "missing".into(),
                hint: Some(example.into()),
            });
            return table;
        };
        let DeValue::Table(keys) = value.get_ref() else {
            self.say(
                name.span(),
                "sweep",
                "expected a table [sweep]".into(),
                KEYS,
            );
            return table;
        };
        for (key, value) in keys {
            let (at, path) = (key.span(), format!("sweep.{}", key.get_ref()));
            let plain = plain(value.get_ref());
            match (&**key.get_ref(), plain) {
                ("kind", Some(Value::String(kind)))
                    if ["grid", "list", "random"].contains(&&*kind) =>
                {
                    table.kind = Some(kind);
                }
                ("kind", _) => {
                    let what = "expected one of \"grid\", \"list\", \"random\"".into();
                    self.say(at, &path, what, "");
                }
                ("axes", Some(Value::Table(axes))) => {
                    table.has_axes = !axes.is_empty();
                    for (axis, value) in axes {
                        match self::axis(value) {
                            Ok(values) => table.axes.push((axis, values)),
                            Err(what) => self.say(
                                at.clone(),
                                &format!("{path}.{axis:?}"),
                                what,
                                "a list of values, or for kind = \"random\" { min = 1e-5, max = 1e-3, scale = \"log\" }",
                            ),
                        }
                    }
                }
                ("axes", _) => {
                    let hint = "write [sweep.axes] and below it \"schedule.base_lr\" = [0.1, 0.2]";
                    self.say(at, &path, "expected a table".into(), hint);
                }
                ("runs", Some(Value::Array(runs))) if runs.iter().all(Value::is_table) => {
                    let runs = runs.into_iter().filter_map(|run| run.try_into().ok());
                    table.list = runs.collect();
                }
                ("runs", _) => {
                    let hint = "write [[sweep.runs]] for each run, and below it \"schedule.base_lr\" = 0.1";
                    self.say(at, &path, "expected a list of tables".into(), hint);
                }
                ("count", Some(Value::Integer(n))) if (1..=MOST as i64).contains(&n) => {
                    table.count = Some(n as usize);
                }
                ("count", _) => {
                    let what = format!("expected a whole number from 1 to {MOST}");
                    self.say(at, &path, what, "");
                }
                ("seed", Some(Value::Integer(seed))) if seed >= 0 => table.seed = seed as u64,
                ("seed", _) => self.say(at, &path, "expected a whole number from 0".into(), ""),
                ("halving", Some(value)) => match halving(&value) {
                    Some(halving) => table.halving = Some(halving),
                    None => self.say(
                        at,
                        &path,
                        "expected rungs from 2 to 10 and a factor from 2 to 10".into(),
                        "write halving = { rungs = 3, factor = 2 }",
                    ),
                },
                _ => self.say(at, &path, "unknown key".into(), KEYS),
            }
        }
        table
    }

    /// The keys of every run.
    fn cells(&mut self, table: &Table) -> Vec<BTreeMap<String, String>> {
        let kind = table
            .kind
            .as_deref()
            .unwrap_or(match table.list.is_empty() {
                true => "grid",
                false => "list",
            });
        let mut wrong = |key: &str, what: &str, hint: &str| {
            self.problems.push(Problem {
                origin: self.origin.into(),
                key: format!("sweep.{key}"),
                what: what.into(),
                hint: Some(hint.into()),
            });
            vec![]
        };
        match kind {
            "list" if table.list.is_empty() => wrong(
                "runs",
                "missing",
                "write [[sweep.runs]] for each run, and below it \"schedule.base_lr\" = 0.1",
            ),
            "list" => {
                let text = |run: &BTreeMap<String, Value>| {
                    let keys = run.iter();
                    keys.map(|(key, value)| (key.clone(), value.to_string()))
                        .collect()
                };
                table.list.iter().map(text).collect()
            }
            _ if !table.has_axes => wrong(
                "axes",
                "missing",
                "write [sweep.axes] and below it \"schedule.base_lr\" = [0.1, 0.2]",
            ),
            "random" => match table.count {
                Some(count) => random(&table.axes, count, table.seed),
                None => wrong(
                    "count",
                    "missing",
                    "say how many runs are drawn: count = 20",
                ),
            },
            _ => {
                let mut cells = vec![BTreeMap::new()];
                for (key, axis) in &table.axes {
                    let Axis::OneOf(values) = axis else {
                        return wrong(
                            "axes",
                            "a range has no end of values",
                            "list the values, or say kind = \"random\" and count = 20",
                        );
                    };
                    if cells.len() * values.len() > MOST {
                        return wrong(
                            "axes",
                            "more than 10000 runs",
                            "take fewer values, or say kind = \"random\" and count = 20",
                        );
                    }
                    let with = |cell: &BTreeMap<String, String>, value: &Value| {
                        let mut cell = cell.clone();
                        cell.insert(key.clone(), value.to_string());
                        cell
                    };
                    let longer = cells.iter();
                    cells = longer
                        .flat_map(|cell| values.iter().map(move |value| with(cell, value)))
                        .collect();
                }
                cells
            }
        }
    }
}

fn axis(value: Value) -> Result<Axis, String> {
    match value {
        Value::Array(values) if !values.is_empty() => Ok(Axis::OneOf(values)),
        Value::Table(range) => {
            let number = |key: &str| match range.get(key) {
                Some(Value::Float(x)) => Ok(*x),
                Some(Value::Integer(x)) => Ok(*x as f64),
                _ => Err(format!("expected a number {key}")),
            };
            let (low, high) = (number("min")?, number("max")?);
            let is_log = match range.get("scale").map(Value::as_str) {
                None | Some(Some("linear")) => false,
                Some(Some("log")) => true,
                _ => return Err("expected a scale \"linear\" or \"log\"".into()),
            };
            let known = ["min", "max", "scale"];
            if let Some(key) = range.keys().find(|key| !known.contains(&key.as_str())) {
                return Err(format!("unknown key {key}"));
            }
            let is_range = low < high && low.is_finite() && high.is_finite();
            match is_range && (!is_log || low > 0.0) {
                true => Ok(Axis::Range(low, high, is_log)),
                false => Err("expected min below max, both above 0 for a logarithm".into()),
            }
        }
        _ => Err("expected a list of values".into()),
    }
}

fn halving(value: &Value) -> Option<Halving> {
    let table = value.as_table()?;
    let is_known = table
        .keys()
        .all(|key| ["rungs", "factor"].contains(&&**key));
    let number = |key: &str, default: i64| match table.get(key) {
        Some(value) => value.as_integer().filter(|n| (2..=10).contains(n)),
        None => Some(default),
    };
    let halving = Halving {
        rungs: number("rungs", 3)? as u32,
        factor: number("factor", 2)? as u32,
    };
    is_known.then_some(halving)
}

/// Runs drawn by (seed, run, axis) alone, so that a longer sweep begins with the runs of a shorter one.
fn random(axes: &[(String, Axis)], count: usize, seed: u64) -> Vec<BTreeMap<String, String>> {
    let draw = |run: usize, axis: usize| {
        let index = (run as u64) << 16 | axis as u64;
        // Twice: neighbouring seeds must not give neighbouring streams.
        let bits = mix(mix(seed).wrapping_add(index));
        (bits >> 11) as f64 / (1u64 << 53) as f64
    };
    let value = |axis: &Axis, at: f64| match axis {
        Axis::OneOf(values) => {
            values[((at * values.len() as f64) as usize).min(values.len() - 1)].to_string()
        }
        Axis::Range(low, high, is_log) => {
            let value = match is_log {
                true => (low.ln() + at * (high.ln() - low.ln())).exp(),
                false => low + at * (high - low),
            };
            // Four digits are read more easily, and nobody needs more.
            format!("{value:.3e}")
        }
    };
    let cell = |run: usize| {
        let keys = axes.iter().enumerate();
        keys.map(|(i, (key, axis))| (key.clone(), value(axis, draw(run, i))))
            .collect()
    };
    (0..count).map(cell).collect()
}

/// SplitMix64 (Steele, Lea and Flood, 2014): the output for a counter.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A value without its places; none where it is nothing that TOML writes.
fn plain(value: &DeValue<'_>) -> Option<Value> {
    Some(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => {
            let digits = number.as_str();
            Value::Integer(i64::from_str_radix(digits, number.radix()).ok()?)
        }
        DeValue::Float(number) => Value::Float(number.as_str().parse().ok()?),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Array(values) => {
            let values = values.iter().map(|value| plain(value.get_ref()));
            Value::Array(values.collect::<Option<_>>()?)
        }
        DeValue::Table(table) => {
            let entries = table
                .iter()
                .map(|(key, value)| Some((key.get_ref().to_string(), plain(value.get_ref())?)));
            Value::Table(entries.collect::<Option<_>>()?)
        }
        DeValue::Datetime(_) => return None,
    })
}
