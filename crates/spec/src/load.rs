//! Layers of text become one [`Run`], or the list of everything that is wrong with them.
//!
//! Serde stops at the first error and, once layers are merged, no longer knows lines. So each layer is read by toml
//! into a table that keeps the place of every key; figment merges the layers and remembers which one a value came
//! from; then each key is deserialized by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use crate::check::{check, remote, whole};
use crate::explain::{fault, nearest};
use crate::flags;
use crate::problem::{Errors, Problem};
use crate::run::Run;
use crate::value::{convert, shown};

/// What environment variables that belong to a spec begin with.
const PREFIX: &str = "RUNNER__";

/// Where a run is said. Weakest first: the defaults, the files that the file `extends`, the file, the profile, the
/// environment, the arguments.
#[derive(Clone, Copy, Debug)]
pub struct Layers<'a> {
    /// The spec.
    pub file: &'a Path,
    /// Which `[profile.NAME]` to apply, of the file and of those that it extends.
    pub profile: Option<&'a str>,
    /// Names and values of environment variables, in any order. `RUNNER__TRAIN__BATCH_SIZE` is `train.batch_size`;
    /// those with another prefix do not count.
    pub environment: &'a [(String, String)],
    /// `section.key=value`; the last one wins.
    pub sets: &'a [String],
}

/// A run, and where its values were said.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The run.
    pub run: Run,
    /// For every dotted key: `default`, `configs/x.toml:14:1`, `environment variable RUNNER__SEED` or `--set seed=1`.
    pub origins: BTreeMap<String, String>,
}

/// Reads a run. A value in the environment or in an argument that is not TOML is taken as a string.
///
/// # Errors
/// Everything that is wrong with all of the layers, at once.
pub fn load(layers: &Layers<'_>) -> Result<Loaded, Errors> {
    read(layers, Reader::new(layers.profile))
}

/// As [`load`], of a file whose `[sweep]` somebody else reads.
pub(crate) fn load_cell(layers: &Layers<'_>) -> Result<Loaded, Errors> {
    let mut reader = Reader::new(layers.profile);
    reader.is_sweep = true;
    read(layers, reader)
}

fn read(layers: &Layers<'_>, mut reader: Reader<'_>) -> Result<Loaded, Errors> {
    let is_whole = match reader.file(layers.file) {
        Ok(is_whole) => is_whole,
        Err((what, _)) => {
            reader.begin(&layers.file.display().to_string(), Rank::File);
            let examples =
                "give the path of a spec, relative to the working directory; configs/ has examples";
            reader.say(None, "", what, Some(examples.into()));
            false
        }
    };
    if is_whole {
        reader.profile_exists(layers.file);
    }
    reader.environment(layers.environment);
    reader.sets(layers.sets);
    reader.finish(is_whole)
}

/// Makes a run of the text of a spec, with `--set` arguments (`section.key=value`; a value that is not TOML is taken
/// as a string) over it; `origin` names the text in messages. A text extends no files.
///
/// # Errors
/// Everything that is wrong with the text and the arguments, at once.
pub fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Run, Errors> {
    parse_over(text, origin, &[], sets)
}

/// As [`parse`], with the environment (as in [`Layers`]) between the text and the arguments.
///
/// # Errors
/// As [`parse`].
pub fn parse_over(
    text: &str,
    origin: &str,
    environment: &[(String, String)],
    sets: &[String],
) -> Result<Run, Errors> {
    let mut reader = Reader::new(None);
    let is_whole = reader.text(text, origin, None);
    reader.environment(environment);
    reader.sets(sets);
    reader.finish(is_whole).map(|loaded| loaded.run)
}

/// Line and column, from 1.
type Place = (usize, usize);

/// From the span of a key to its place, where keys have one.
type Places<'a> = &'a dyn Fn(Range<usize>) -> Option<Place>;

/// What is wrong, and how to fix it.
type Complaint = (String, Option<String>);

/// The kinds of layers, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    Default,
    File,
    Profile,
    Environment,
    Argument,
    /// A profile that was not asked for: its keys are checked, its values mean nothing.
    Unused,
}

/// One source of values.
struct Layer {
    /// In the order in which layers are reported; for figment, the layer's name.
    index: usize,
    rank: Rank,
    /// What problems are located by.
    origin: String,
    values: Dict,
    /// Where each dotted key was written, if it was in a file.
    places: BTreeMap<String, Place>,
}

impl Provider for &Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.index.to_string())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

impl Layer {
    /// Where a key of this layer was said.
    fn origin(&self, place: Option<Place>) -> String {
        match place {
            Some((line, column)) => format!("{}:{line}:{column}", self.origin),
            None => self.origin.clone(),
        }
    }
}

/// Where something was said, in the order in which it is reported: the layer, then the place in it.
type Order = (usize, Option<Place>);

struct Reader<'a> {
    /// The profile that was asked for.
    profile: Option<&'a str>,
    /// Every profile there is.
    profiles: BTreeSet<String>,
    /// Every key there is, with its default.
    known: Dict,
    layers: Vec<Layer>,
    found: Vec<(Order, Problem)>,
    /// The files being read, each extended by the one before: their real path, and as they were written.
    open: Vec<(PathBuf, String)>,
    /// The files that were read.
    read: Vec<PathBuf>,
    /// Whether `[sweep]` is for somebody else to read.
    is_sweep: bool,
}

impl<'a> Reader<'a> {
    fn new(profile: Option<&'a str>) -> Self {
        let known = Value::serialize(Run::named(String::new()))
            .ok()
            .and_then(Value::into_dict)
            .expect("a run is a table");
        let mut reader = Self {
            profile,
            profiles: BTreeSet::new(),
            known: known.clone(),
            layers: vec![],
            found: vec![],
            open: vec![],
            read: vec![],
            is_sweep: false,
        };
        reader.begin("default", Rank::Default);
        reader.layer().values = known;
        reader.layer().values.remove("name");
        reader
    }

    fn begin(&mut self, origin: &str, rank: Rank) {
        self.layers.push(Layer {
            index: self.layers.len(),
            rank,
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
        let problem = Problem {
            origin: self.layers[layer].origin(place),
            key: key.into(),
            what,
            hint,
        };
        self.found.push(((layer, place), problem));
    }

    /// Reads a file after those that it extends; false if one of them is not TOML or not there.
    fn file(&mut self, path: &Path) -> Result<bool, Complaint> {
        if let Some(complaint) = path.to_str().and_then(remote) {
            return Err(complaint);
        }
        let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => (
                format!("there is no file {}", path.display()),
                Some("a path in extends starts at the directory of the file that says it".into()),
            ),
            _ => (format!("cannot read {}: {error}", path.display()), None),
        })?;
        let origin = path.display().to_string();
        let real = path.canonicalize().unwrap_or_else(|_| path.into());
        if let Some(first) = self.open.iter().position(|(open, _)| *open == real) {
            let ring = self.open[first..].iter().map(|(_, name)| name.as_str());
            let ring: Vec<&str> = ring.chain([origin.as_str()]).collect();
            let what = format!("a file cannot extend itself: {}", ring.join(" -> "));
            return Err((what, Some("take one of these out".into())));
        }
        // What two files extend lies below both.
        if self.read.contains(&real) {
            return Ok(true);
        }
        self.open.push((real.clone(), origin.clone()));
        let is_whole = self.text(&text, &origin, path.parent());
        self.open.pop();
        self.read.push(real);
        Ok(is_whole)
    }

    /// Reads the text of a spec, after the files that it extends, which are found from `dir`.
    fn text(&mut self, text: &str, origin: &str, dir: Option<&Path>) -> bool {
        let table = match DeTable::parse(text) {
            Ok(table) => table,
            Err(error) => {
                let place = error.span().map(|span| place(text, &span));
                self.begin(origin, Rank::File);
                let what = error.message();
                let hint = match what.contains("duplicate") {
                    true => "take one of the two out",
                    false => "text is written in quotes, lists as [a, b], sections as [name]",
                };
                self.say(place, "", format!("not TOML: {what}"), Some(hint.into()));
                return false;
            }
        };
        let table = table.get_ref();
        let place = |span| Some(place(text, &span));

        let mut is_whole = true;
        let mut complaints = vec![];
        if let Some(extends) = table.get("extends") {
            let at = place(extends.span());
            for (at, base) in bases(extends.get_ref(), at, &place) {
                let read = base.and_then(|base| match (remote(base), dir) {
                    (Some(complaint), _) => Err(complaint),
                    (None, Some(dir)) => {
                        self.file(&dir.join(base).components().collect::<PathBuf>())
                    }
                    (None, None) => Err(("only a file can extend another".into(), None)),
                });
                match read {
                    Ok(is_base_whole) => is_whole &= is_base_whole,
                    Err((what, hint)) => {
                        complaints.push((at, what, hint));
                        is_whole = false;
                    }
                }
            }
        }

        self.begin(origin, Rank::File);
        for (at, what, hint) in complaints {
            self.say(at, "extends", what, hint);
        }
        for (key, value) in table {
            let (name, value, at) = (key.get_ref(), value.get_ref(), place(key.span()));
            match &**name {
                "extends" => {}
                "profile" if !matches!(value, DeValue::Table(_)) => {
                    let what = format!("expected tables [profile.NAME], not {}", shown(value));
                    let hint = Some("which one is applied is said by --profile NAME".into());
                    self.say(at, name, what, hint);
                }
                "profile" => {}
                "sweep" if self.is_sweep => {}
                name => self.root_key(name, value, at, &place),
            }
        }
        if let Some(DeValue::Table(profiles)) = table.get("profile").map(|table| table.get_ref()) {
            for (name, keys) in profiles {
                let at = place(name.span());
                self.one_profile(name.get_ref(), keys.get_ref(), origin, at, &place);
            }
        }
        is_whole
    }

    /// Reads a `[profile.NAME]`.
    fn one_profile(
        &mut self,
        name: &str,
        keys: &DeValue<'_>,
        origin: &str,
        at: Option<Place>,
        place: Places<'_>,
    ) {
        let is_used = self.profile == Some(name);
        let rank = if is_used { Rank::Profile } else { Rank::Unused };
        self.begin(origin, rank);
        self.profiles.insert(name.into());
        let DeValue::Table(keys) = keys else {
            let what = format!("expected a table [profile.{name}], not {}", shown(keys));
            self.say(at, &format!("profile.{name}"), what, None);
            return;
        };
        for (key, value) in keys {
            self.root_key(key.get_ref(), value.get_ref(), place(key.span()), place);
        }
    }

    /// Complains about a profile that no file has.
    fn profile_exists(&mut self, file: &Path) {
        let Some(name) = self.profile.filter(|name| !self.profiles.contains(*name)) else {
            return;
        };
        let file = file.display();
        let hint = match self.profiles.is_empty() {
            true => format!("{file} has no [profile.NAME]"),
            false => {
                let names: Vec<&str> = self.profiles.iter().map(String::as_str).collect();
                format!("the profiles of {file} are {}", names.join(", "))
            }
        };
        self.begin(&format!("--profile {name}"), Rank::Profile);
        self.say(None, "", "unknown profile".into(), Some(hint));
    }

    /// Reads the variables that belong to a spec.
    fn environment(&mut self, variables: &[(String, String)]) {
        let mut variables: Vec<_> = variables.iter().collect();
        variables.sort();
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix(PREFIX) {
                self.begin(&format!("environment variable {name}"), Rank::Environment);
                self.assign(&key.to_lowercase().replace("__", "."), value);
            }
        }
    }

    /// Reads the `--set` arguments.
    fn sets(&mut self, sets: &[String]) {
        for set in sets {
            self.begin(&format!("--set {set}"), Rank::Argument);
            match set.split_once('=') {
                Some((key, text)) => self.assign(key, text),
                None => {
                    let hint = "write section.key=value, such as train.batch_size=512";
                    self.say(None, "", "no value".into(), Some(hint.into()));
                }
            }
        }
    }

    /// Reads a dotted key and the text of its value.
    fn assign(&mut self, key: &str, text: &str) {
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
                let hint =
                    self.meant(key)
                        .unwrap_or_else(|| match nearest(key, self.known.keys()) {
                            Some(near) => format!("did you mean {near}?"),
                            None => {
                                let keys = self.root_keys(|value| value.as_dict().is_none());
                                format!("the keys outside sections are {keys}")
                            }
                        });
                self.say(at, key, "unknown key".into(), Some(hint));
            }
        }
    }

    fn unknown_section(&mut self, section: &str, at: Option<Place>) {
        let hint = self.meant(section).unwrap_or_else(|| {
            let sections = self.known.iter().filter(|(_, v)| v.as_dict().is_some());
            match nearest(section, sections.map(|(name, _)| name)) {
                Some(near) => format!("did you mean [{near}]?"),
                None => {
                    let sections = self.root_keys(|value| value.as_dict().is_some());
                    format!("the sections are {sections}")
                }
            }
        });
        self.say(at, section, "unknown section".into(), Some(hint));
    }

    fn section_key(&mut self, section: &str, key: &str, value: &DeValue<'_>, at: Option<Place>) {
        let path = format!("{section}.{key}");
        let known = self.known[section]
            .as_dict()
            .expect("callers name a section");
        if !known.contains_key(key) {
            let hint = self
                .meant(key)
                .unwrap_or_else(|| match nearest(key, known.keys()) {
                    Some(near) => format!("did you mean {section}.{near}?"),
                    None => {
                        let keys: Vec<&str> = known.keys().map(String::as_str).collect();
                        format!("the keys of [{section}] are {}", keys.join(", "))
                    }
                });
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

    /// What somebody means who writes the exact name of something that is not a key here.
    fn meant(&self, key: &str) -> Option<String> {
        match key {
            "extends" => return Some("extends stands at the top of a file".into()),
            "sweep" => return Some("a file with [sweep] says many runs: runner sweep FILE".into()),
            "profile" => return Some("which profile is applied is said by --profile NAME".into()),
            _ => {}
        }
        if self
            .known
            .get(key)
            .is_some_and(|value| value.as_dict().is_none())
        {
            return Some(format!("did you mean {key}, above all sections?"));
        }
        let sections = self.known.iter();
        let has_key = |value: &Value| value.as_dict().is_some_and(|keys| keys.contains_key(key));
        let paths: Vec<String> = sections
            .filter(|(_, value)| has_key(value))
            .map(|(section, _)| format!("{section}.{key}"))
            .collect();
        if !paths.is_empty() {
            return Some(format!("did you mean {}?", paths.join(" or ")));
        }
        flags::hint(key)
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
                let range = match value {
                    DeValue::Integer(_) => whole(path),
                    _ => None,
                };
                let what = range.map_or(what, |range| {
                    format!("expected {range}, not {}", shown(value))
                });
                self.say(at, path, what, None);
                None
            }
        }
    }

    fn finish(mut self, is_whole: bool) -> Result<Loaded, Errors> {
        // Without a file's keys, whatever else could be said would be noise.
        let loaded = if is_whole { self.merge() } else { None };
        match loaded {
            Some(loaded) if self.found.is_empty() => Ok(loaded),
            _ => {
                self.found.sort_by_key(|(order, _)| *order);
                let problems = self.found.into_iter().map(|(_, problem)| problem);
                Err(Errors(problems.collect()))
            }
        }
    }

    /// Merges the layers and checks every value; the run means something only if nothing was found.
    fn merge(&mut self) -> Option<Loaded> {
        let mut layers: Vec<&Layer> = self.layers.iter().collect();
        layers.retain(|layer| layer.rank != Rank::Unused);
        layers.sort_by_key(|layer| layer.rank);
        let figment = layers.into_iter().fold(Figment::new(), Figment::merge);
        let merged = figment.find_value("").ok().and_then(Value::into_dict);
        let merged = merged.expect("no layer fails, and all are tables");
        let is_file = |layer: &Layer| layer.rank == Rank::File;
        let file = self.layers.iter().rposition(is_file);
        let file = file.expect("a spec is read from a text");

        // The layer of every key, and the place there.
        let mut said: BTreeMap<String, Order> = BTreeMap::new();
        // What is wrong in itself is left out of the rest, so that the rest can be checked as well.
        let mut wrong: BTreeSet<String> = self
            .found
            .iter()
            .map(|(_, problem)| problem.key.clone())
            .collect();
        let mut sound = merged.clone();
        let known = self.known.clone();
        for (section, key, path, value) in leaves(&known, &merged) {
            let layer: usize = figment
                .get_metadata(value.tag())
                .and_then(|metadata| metadata.name.parse().ok())
                .expect("every value comes from a layer, whose name is its number");
            let layer = &self.layers[layer];
            let (index, place) = (layer.index, layer.places.get(&path).copied());
            if let Some((what, hint)) = fault(section, key, &path, value, layer.rank) {
                remove(&mut sound, section, key);
                self.say_in(index, place, &path, what, hint);
                wrong.insert(path.clone());
            }
            said.insert(path, (index, place));
        }
        if !sound.contains_key("name") {
            if !wrong.contains("name") {
                let hint = "write name = \"..\"; the run then lives in runs/<name>";
                self.say_in(file, None, "name", "missing".into(), Some(hint.into()));
            }
            sound.insert("name".into(), "unnamed".into());
        }

        let run = match Run::deserialize(&Value::from(sound)) {
            Ok(run) => run,
            Err(error) => {
                let key = error.path.join(".");
                self.say_in(file, None, &key, error.kind.to_string(), None);
                return None;
            }
        };
        for finding in check(&run) {
            let mut read = finding.others.iter().chain([&finding.key]);
            if read.any(|key| wrong.contains(*key)) {
                continue;
            }
            // A default is never wrong by itself; what nobody said is the file's to say.
            let (layer, place) = match said.get(finding.key) {
                Some((layer, place)) if self.layers[*layer].rank != Rank::Default => {
                    (*layer, *place)
                }
                _ => (file, None),
            };
            self.say_in(layer, place, finding.key, finding.what, finding.hint);
        }
        let origins = said.into_iter().map(|(path, (layer, place))| {
            let origin = self.layers[layer].origin(place);
            (path, origin)
        });
        Some(Loaded {
            run,
            origins: origins.collect(),
        })
    }
}

/// What an `extends` names, each with its place, or what is wrong with it.
fn bases<'t>(
    extends: &'t DeValue<'_>,
    at: Option<Place>,
    place: Places<'_>,
) -> Vec<(Option<Place>, Result<&'t str, Complaint>)> {
    let path = |value: &'t DeValue<'_>| match value {
        DeValue::String(path) => Ok(&**path),
        other => {
            let what = format!("expected a path or a list of paths, not {}", shown(other));
            Err((what, None))
        }
    };
    match extends {
        DeValue::Array(paths) => paths
            .iter()
            .map(|value| (place(value.span()), path(value.get_ref())))
            .collect(),
        single => vec![(at, path(single))],
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

fn remove(values: &mut Dict, section: &str, key: &str) {
    if section.is_empty() {
        values.remove(key);
    } else if let Some(Value::Dict(_, keys)) = values.get_mut(section) {
        keys.remove(key);
    }
}

/// Line and column of the start of a span.
pub(crate) fn place(text: &str, span: &Range<usize>) -> Place {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
    (line, column)
}
