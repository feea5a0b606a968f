//! What is wrong with a value, in the words of a spec.

use figment::error::{Actual, Kind};
use figment::value::{Dict, Value};
use serde::Deserialize;

use crate::check::whole;
use crate::load::Rank;
use crate::run::Run;

/// What is wrong with a value in itself, and how to fix it; none if it is right.
pub(crate) fn fault(
    section: &str,
    key: &str,
    path: &str,
    value: &Value,
    rank: Rank,
) -> Option<(String, Option<String>)> {
    let error = alone(section, key, value).err()?;
    // An element of a list adds its index to the key.
    let depth = path.split('.').count();
    let element = error.path.get(depth).and_then(|i| i.parse::<usize>().ok());
    let element = element.map_or(String::new(), |i| format!("element {}: ", i + 1));

    // What a key says in its own words stands: it may have reasons not to repeat the value.
    if let Kind::Message(said) = &error.kind {
        return Some((format!("{element}{said}"), None));
    }
    // A key that knows some names and not the empty one is a choice, whatever was wrong with its value.
    let probe = alone(section, key, &"".into());
    if let Err(Kind::UnknownVariant(_, names)) = probe.map_err(|error| error.kind) {
        return Some(not_a_name(value, names));
    }
    match &error.kind {
        Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
            let what = format!(
                "{element}expected {}, not {}",
                worded(expected, path),
                told(actual)
            );
            if is_quoted(actual, expected) {
                return Some((what, Some("write it without quotes".into())));
            }
            let is_bare = expected == "a string" && !matches!(actual, Actual::Seq | Actual::Map);
            let hint = is_bare.then(|| match rank {
                Rank::Argument => {
                    format!("quote it for TOML and for the shell: --set '{path}=\"..\"'")
                }
                Rank::Environment => "quote it for TOML and for the shell: '\"..\"'".into(),
                _ => "text is written in quotes".into(),
            });
            Some((what, hint))
        }
        kind => Some((format!("{element}{kind}"), None)),
    }
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

fn not_a_name(value: &Value, names: &[&str]) -> (String, Option<String>) {
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
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let near = nearest(text, names.iter()).map(|near| format!("did you mean {near:?}?"));
    (format!("expected {one_of}{quoted}, not {text:?}"), near)
}

/// Serde's names of types, as a spec's reader would say them.
fn worded(expected: &str, path: &str) -> String {
    match expected {
        "u64" | "usize" => return whole(path).unwrap_or_else(|| "a whole number from 0".into()),
        "i64" => "a whole number",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other => other,
    }
    .into()
}

/// Whether a text holds what was expected instead of it.
fn is_quoted(actual: &Actual, expected: &str) -> bool {
    let Actual::Str(text) = actual else {
        return false;
    };
    match expected {
        "u64" | "usize" => text.parse::<u64>().is_ok(),
        "i64" => text.parse::<i64>().is_ok(),
        "f64" => text.parse().is_ok_and(f64::is_finite),
        "a boolean" => text == "true" || text == "false",
        _ => false,
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

/// The most similar of several names, if one is similar.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    known
        .map(|known| (strsim::jaro_winkler(known, name), known.as_str()))
        .filter(|(similarity, _)| *similarity >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
