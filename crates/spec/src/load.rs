//! Layers of text become one [`Run`], or the list of everything that is wrong with them.
//!
//! Serde stops at the first error and, once layers are merged, no longer knows lines. So each layer is read by toml
//! into a table that keeps the place of every key; figment merges the layers and remembers which one a value came
//! from; then each key is deserialized by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use figment::error::{Actual, Kind};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Deserialize;
use toml::de::{DeInteger, DeTable, DeValue};

use crate::check::check;
use crate::problem::{Errors, Problem};
use crate::run::Run;

/// Values with a name but no meaning yet, and who does not support them.
const LATER: [(&str, &str, &str); 8] = [
    ("data.source", "bigtable", ""),
    ("train.precision", "bf16", " by the cpu engine"),
    ("train.precision", "f16", " by the cpu engine"),
    ("train.device", "cuda", ""),
    ("optimizer.kind", "lars", ""),
    ("schedule.kind", "polynomial", ""),
    ("track.mlflow", "http", ""),
    ("track.mlflow", "https", ""),
];

/// Reads a run from a file, with `--set` arguments (`section.key=value`) over it.
///
/// # Errors
/// Everything that is wrong with the file and the arguments, at once.
pub fn load(file: &Path, sets: &[String]) -> Result<Run, Errors> {
    let origin = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|error| {
        let hint = (error.kind() == std::io::ErrorKind::NotFound).then(|| {
            "give the path of a spec, relative to the working directory; configs/ has examples"
                .into()
        });
        Errors(vec![Problem {
            origin: origin.clone(),
            key: String::new(),
            what: format!("cannot read the spec: {error}"),
            hint,
        }])
    })?;
    parse(&text, &origin, sets)
}

/// Makes a run of the text of a spec, with `--set` arguments (`section.key=value`; a value that is not TOML is taken
/// as a string) over it; `origin` names the text in messages.
///
/// # Errors
/// Everything that is wrong with the text and the arguments, at once.
pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Run, Errors> {
    let mut reader = Reader::new();
    let is_toml = reader.file(text, origin);
    for set in sets {
        reader.set(set);
    }
    // Without the file's keys, whatever else could be said would be noise.
    let run = if is_toml { reader.merge() } else { None };
    match run {
        Some(run) if reader.found.is_empty() => Ok(run),
        _ => Err(reader.errors()),
    }
}

/// Line and column, from 1.
type Place = (usize, usize);

/// From the span of a key to its place, where keys have one.
type Places<'a> = &'a dyn Fn(Range<usize>) -> Option<Place>;

/// The layer of the file; the defaults come before it, the arguments after.
const FILE: usize = 1;

/// One source of values.
struct Layer {
    /// Empty for the defaults.
    origin: String,
    values: Dict,
    /// Where each dotted key was written; nowhere in a `--set`.
    places: BTreeMap<String, Place>,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// Where something was said, in the order in which it is reported: the layer, then the place in it.
type Order = (usize, Option<Place>);

struct Reader {
    /// Every key there is, with its default.
    known: Dict,
    /// The defaults, the file, then each `--set`.
    layers: Vec<Layer>,
    found: Vec<(Order, Problem)>,
}

impl Reader {
    fn new() -> Self {
        let defaults = Value::serialize(Run::named(String::new()))
            .ok()
            .and_then(Value::into_dict)
            .expect("a run is a table");
        let mut values = defaults.clone();
        values.remove("name");
        Self {
            known: defaults,
            layers: vec![Layer {
                origin: String::new(),
                values,
                places: BTreeMap::new(),
            }],
            found: vec![],
        }
    }

    fn begin(&mut self, origin: &str) {
        self.layers.push(Layer {
            origin: origin.into(),
            values: Dict::new(),
            places: BTreeMap::new(),
        });
    }

    /// The layer being read.
    fn layer(&mut self) -> &mut Layer {
        self.layers.last_mut().expect("the defaults come first")
    }

    /// Something is wrong at a place of the layer being read.
    fn say(&mut self, place: Option<Place>, key: &str, what: String, hint: Option<String>) {
        self.say_in(self.layers.len() - 1, place, key, what, hint);
    }

    fn say_in(
        &mut self,
        layer: usize,
        place: Option<Place>,
        key: &str,
        what: String,
        hint: Option<String>,
    ) {
        let origin = &self.layers[layer].origin;
        let origin = match place {
            Some((line, column)) => format!("{origin}:{line}:{column}"),
            None => origin.clone(),
        };
        let problem = Problem {
            origin,
            key: key.into(),
            what,
            hint,
        };
        self.found.push(((layer, place), problem));
    }

    /// Reads the file; false if it is not TOML.
    fn file(&mut self, text: &str, origin: &str) -> bool {
        self.begin(origin);
        let table = match DeTable::parse(text) {
            Ok(table) => table,
            Err(error) => {
                let place = error.span().map(|span| place(text, &span));
                self.say(place, "", format!("not TOML: {}", error.message()), None);
                return false;
            }
        };
        let place = |span| Some(place(text, &span));
        for (key, value) in table.get_ref() {
            self.root_key(key.get_ref(), value.get_ref(), place(key.span()), &place);
        }
        true
    }

    /// Reads one `--set` argument.
    fn set(&mut self, set: &str) {
        self.begin(&format!("--set {set}"));
        let Some((key, text)) = set.split_once('=') else {
            let hint = Some("write section.key=value, such as train.batch_size=512".into());
            self.say(None, "", "no value".into(), hint);
            return;
        };
        let (key, text) = (key.trim(), text.trim());
        let parsed = DeValue::parse(text).ok();
        let value = match parsed {
            Some(value) => value.into_inner(),
            None => DeValue::String(text.into()),
        };
        match key.split_once('.') {
            Some((section, key)) => match self.known.get(section) {
                Some(Value::Dict(..)) => self.section_key(section, key, &value, None),
                _ => self.unknown_section(section, None),
            },
            None => self.root_key(key, &value, None, &|_| None),
        }
    }

    /// A key outside all sections, or a whole section.
    fn root_key(&mut self, key: &str, value: &DeValue<'_>, at: Option<Place>, place: Places<'_>) {
        match (self.known.get(key), value) {
            (Some(Value::Dict(..)), DeValue::Table(section)) => {
                for (name, value) in section {
                    let at = place(name.span());
                    self.section_key(key, name.get_ref(), value.get_ref(), at);
                }
            }
            (Some(Value::Dict(..)), value) => {
                let what = format!("expected the section [{key}], not {}", shown(value));
                let hint = Some(format!("write {key}.x = .., or x = .. below [{key}]"));
                self.say(at, key, what, hint);
            }
            (Some(_), value) => {
                if let Some(value) = self.value(key, value, at) {
                    self.layer().values.insert(key.into(), value);
                }
            }
            (None, DeValue::Table(_)) => self.unknown_section(key, at),
            (None, _) => {
                let hint = match nearest(key, self.known.keys()) {
                    Some(near) => format!("did you mean {near}?"),
                    None => self.elsewhere(key).unwrap_or_else(|| {
                        let keys = self.root_keys(|value| value.as_dict().is_none());
                        format!("the keys outside sections are {keys}")
                    }),
                };
                self.say(at, key, "unknown key".into(), Some(hint));
            }
        }
    }

    fn unknown_section(&mut self, section: &str, at: Option<Place>) {
        let sections = self.known.iter().filter(|(_, v)| v.as_dict().is_some());
        let hint = match nearest(section, sections.map(|(name, _)| name)) {
            Some(near) => format!("did you mean [{near}]?"),
            None => {
                let sections = self.root_keys(|value| value.as_dict().is_some());
                format!("the sections are {sections}")
            }
        };
        self.say(at, section, "unknown section".into(), Some(hint));
    }

    fn section_key(&mut self, section: &str, key: &str, value: &DeValue<'_>, at: Option<Place>) {
        let path = format!("{section}.{key}");
        let known = self.known[section]
            .as_dict()
            .expect("callers name a section");
        if !known.contains_key(key) {
            let hint = match nearest(key, known.keys()) {
                Some(near) => format!("did you mean {section}.{near}?"),
                None => self.elsewhere(key).unwrap_or_else(|| {
                    let keys: Vec<&str> = known.keys().map(String::as_str).collect();
                    format!("the keys of [{section}] are {}", keys.join(", "))
                }),
            };
            self.say(at, &path, "unknown key".into(), Some(hint));
            return;
        }
        let Some(value) = self.value(&path, value, at) else {
            return;
        };
        let values = &mut self.layer().values;
        let entry = values.entry(section.into());
        let entry = entry.or_insert_with(|| Value::from(Dict::new()));
        if let Value::Dict(_, section) = entry {
            section.insert(key.into(), value);
        }
    }

    /// Where a misplaced key belongs.
    fn elsewhere(&self, key: &str) -> Option<String> {
        if self.known.contains_key(key) {
            return Some(format!("did you mean {key}, above all sections?"));
        }
        let mut sections = self.known.iter();
        let (section, _) = sections
            .find(|(_, value)| value.as_dict().is_some_and(|keys| keys.contains_key(key)))?;
        Some(format!("did you mean {section}.{key}?"))
    }

    fn root_keys(&self, wanted: impl Fn(&Value) -> bool) -> String {
        let keys = self.known.iter().filter(|(_, value)| wanted(value));
        let keys: Vec<&str> = keys.map(|(key, _)| key.as_str()).collect();
        keys.join(", ")
    }

    /// A value of the layer being read; none, and a problem, if it is nothing that a spec can hold.
    fn value(&mut self, path: &str, value: &DeValue<'_>, at: Option<Place>) -> Option<Value> {
        if let Some(place) = at {
            self.layer().places.insert(path.into(), place);
        }
        match convert(value) {
            Ok(value) => Some(value),
            Err(what) => {
                self.say(at, path, what, None);
                None
            }
        }
    }

    /// Merges the layers and checks every value; the run means something only if nothing was found.
    fn merge(&mut self) -> Option<Run> {
        let figment = self.layers.iter().fold(Figment::new(), Figment::merge);
        let merged = figment.find_value("").ok().and_then(Value::into_dict);
        let merged = merged.expect("no layer fails, and all are tables");

        let mut origins: BTreeMap<String, usize> = BTreeMap::new();
        // What is wrong in itself is left out of the rest, so that the rest can be checked as well.
        let mut wrong: BTreeSet<String> = self
            .found
            .iter()
            .map(|(_, problem)| problem.key.clone())
            .collect();
        let mut sound = merged.clone();
        let known = self.known.clone();
        for (section, key, path, value) in leaves(&known, &merged) {
            let origin = figment.get_metadata(value.tag()).map(|m| m.name.as_ref());
            let layer = self
                .layers
                .iter()
                .rposition(|layer| Some(layer.origin.as_str()) == origin)
                .expect("every value comes from a layer");
            origins.insert(path.clone(), layer);
            if let Err(error) = alone(section, key, value) {
                remove(&mut sound, section, key);
                let place = self.layers[layer].places.get(&path).copied();
                let (what, hint) = explain(&error, section, key, &path, value, layer > FILE);
                self.say_in(layer, place, &path, what, hint);
                wrong.insert(path);
            }
        }
        if !sound.contains_key("name") {
            if !wrong.contains("name") {
                let hint = "write name = \"..\"; the run then lives in runs/<name>";
                self.say_in(FILE, None, "name", "missing".into(), Some(hint.into()));
            }
            sound.insert("name".into(), "unnamed".into());
        }

        let run = match Run::deserialize(&Value::from(sound)) {
            Ok(run) => run,
            Err(error) => {
                self.say_in(
                    FILE,
                    None,
                    &error.path.join("."),
                    error.kind.to_string(),
                    None,
                );
                return None;
            }
        };
        for finding in check(&run) {
            let mut read = finding.others.iter().chain([&finding.key]);
            if read.any(|key| wrong.contains(*key)) {
                continue;
            }
            // A default is never wrong by itself; what nobody said is the file's to say.
            let layer = origins.get(finding.key).copied().unwrap_or(FILE).max(FILE);
            let place = self.layers[layer].places.get(finding.key).copied();
            self.say_in(layer, place, finding.key, finding.what, finding.hint);
        }
        Some(run)
    }

    fn errors(mut self) -> Errors {
        self.found.sort_by_key(|(order, _)| *order);
        Errors(self.found.into_iter().map(|(_, problem)| problem).collect())
    }
}

/// Line and column of the start of a span.
fn place(text: &str, span: &Range<usize>) -> Place {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    (line, column)
}

/// The most similar of several names, if one is similar.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    known
        .map(|known| (strsim::jaro_winkler(known, name), known.as_str()))
        .filter(|(similarity, _)| *similarity >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

/// A TOML value as figment's, or why a spec cannot hold it.
fn convert(value: &DeValue<'_>) -> Result<Value, String> {
    let too_large = || format!("{} is too large", shown(value));
    Ok(match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => integer(number).ok_or_else(too_large)?,
        DeValue::Float(number) => {
            let text = number.as_str();
            let value: f64 = text.parse().map_err(|_| too_large())?;
            if value.is_infinite() && !text.contains("inf") {
                return Err(too_large());
            }
            value.into()
        }
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(date) => return Err(format!("no key is a date such as {date}")),
        DeValue::Array(array) => {
            let values = array.iter().map(|value| convert(value.get_ref()));
            values.collect::<Result<Vec<Value>, String>>()?.into()
        }
        DeValue::Table(table) => {
            let entries = table.iter().map(|(key, value)| {
                let value = convert(value.get_ref())?;
                Ok((key.get_ref().to_string(), value))
            });
            entries.collect::<Result<Dict, String>>()?.into()
        }
    })
}

fn integer(number: &DeInteger<'_>) -> Option<Value> {
    let (text, radix) = (number.as_str(), number.radix());
    let signed = i64::from_str_radix(text, radix).map(Value::from);
    // Seeds use all 64 bits.
    let unsigned = || u64::from_str_radix(text, radix).map(Value::from);
    signed.or_else(|_| unsigned()).ok()
}

/// A TOML value for a message.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(date) => date.to_string(),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

/// Section (empty outside all sections), key, dotted path and value of everything that is not a section.
fn leaves<'a>(known: &'a Dict, merged: &'a Dict) -> Vec<(&'a str, &'a str, String, &'a Value)> {
    let mut leaves = vec![];
    for (name, value) in merged {
        match (known.get(name), value) {
            (Some(Value::Dict(..)), Value::Dict(_, section)) => {
                leaves.extend(section.iter().map(|(key, value)| {
                    (name.as_str(), key.as_str(), format!("{name}.{key}"), value)
                }));
            }
            _ => leaves.push(("", name.as_str(), name.clone(), value)),
        }
    }
    leaves
}

/// Deserializes a single key over the defaults.
fn alone(section: &str, key: &str, value: &Value) -> Result<Run, Box<figment::Error>> {
    let mut keys = Dict::from([(key.to_string(), value.clone())]);
    if !section.is_empty() {
        keys = Dict::from([(section.to_string(), keys.into())]);
    }
    keys.entry("name".into())
        .or_insert_with(|| "unnamed".into());
    Run::deserialize(&Value::from(keys)).map_err(Box::new)
}

fn remove(values: &mut Dict, section: &str, key: &str) {
    if section.is_empty() {
        values.remove(key);
    } else if let Some(Value::Dict(_, keys)) = values.get_mut(section) {
        keys.remove(key);
    }
}

/// What is wrong with a value in the words of a spec, and how to fix it.
fn explain(
    error: &figment::Error,
    section: &str,
    key: &str,
    path: &str,
    value: &Value,
    is_set: bool,
) -> (String, Option<String>) {
    // An element of a list adds its index to the key.
    let depth = path.split('.').count();
    let element = error.path.get(depth).and_then(|i| i.parse::<usize>().ok());
    let element = element.map_or(String::new(), |i| format!("element {}: ", i + 1));

    // A key that knows some names and not the empty one is a choice, whatever was wrong with its value.
    let probe = alone(section, key, &"".into());
    if let Err(Kind::UnknownVariant(_, names)) = probe.map_err(|error| error.kind) {
        return not_a_name(path, value, names);
    }
    match &error.kind {
        Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
            let what = format!(
                "{element}expected {}, not {}",
                worded(expected),
                told(actual)
            );
            let is_bare = expected == "a string" && !matches!(actual, Actual::Seq | Actual::Map);
            let hint = is_bare.then(|| match is_set {
                true => format!("quote it for TOML and for the shell: --set '{path}=\"..\"'"),
                false => "text is written in quotes".into(),
            });
            (what, hint)
        }
        kind => (format!("{element}{kind}"), None),
    }
}

fn not_a_name(path: &str, value: &Value, names: &[&str]) -> (String, Option<String>) {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    let quoted = quoted.join(", ");
    let one_of = if names.len() == 1 { "" } else { "one of " };
    let Some(text) = value.as_str() else {
        let what = format!(
            "expected {one_of}{quoted}, not {}",
            told(&value.to_actual())
        );
        return (what, None);
    };
    let later = LATER.iter().find(|(key, name, _)| {
        // cuda:1 is cuda as well, and http://host is http.
        *key == path && text.split(':').next() == Some(*name)
    });
    if let Some((_, _, whom)) = later {
        let what = format!("{text:?} is not supported yet{whom}");
        return (what, Some(format!("supported: {quoted}")));
    }
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let near = nearest(text, names.iter()).map(|near| format!("did you mean {near:?}?"));
    (format!("expected {one_of}{quoted}, not {text:?}"), near)
}

/// Serde's names of types, as a spec's reader would say them.
fn worded(expected: &str) -> &str {
    match expected {
        "u64" | "usize" => "a whole number from 0",
        "i64" => "a whole number",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other => other,
    }
}

fn told(actual: &Actual) -> String {
    match actual {
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => format!("{value:?}"),
        Actual::Str(text) => format!("{text:?}"),
        Actual::Seq => "a list".into(),
        Actual::Map => "a table".into(),
        other => other.to_string(),
    }
}
