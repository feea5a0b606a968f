//! The JSON Schema says what [`spec::load`] does, as far as a schema can.

use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde_json::Value;

use crate::sets;

fn schema() -> Value {
    serde_json::from_str(&spec::schema()).unwrap()
}

/// Why a value is not what a schema describes; stops at a keyword that it does not know.
fn refusal(root: &Value, schema: &Value, value: &Value, path: &str) -> Option<String> {
    let refused = |what: String| Some(format!("{path}: {what}"));
    let Value::Object(keywords) = schema else {
        return (schema == &Value::Bool(false)).then(|| format!("{path}: unknown key"));
    };
    for (keyword, rule) in keywords {
        let number = || rule.as_f64().unwrap();
        let count = || rule.as_u64().unwrap() as usize;
        let matching = |rules: &Value| {
            let rules = rules.as_array().unwrap().iter();
            rules
                .filter(|rule| refusal(root, rule, value, path).is_none())
                .count()
        };
        let is_right = match keyword.as_str() {
            "$schema" | "title" | "description" | "default" | "examples" => true,
            "$ref" => {
                let target = root.pointer(rule.as_str().unwrap().trim_start_matches('#'));
                let refused = refusal(root, target.unwrap(), value, path);
                if refused.is_some() {
                    return refused;
                }
                true
            }
            "type" => match rule.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "number" => value.is_number(),
                "integer" => value.is_u64() || value.is_i64(),
                other => panic!("type {other}"),
            },
            "enum" => rule.as_array().unwrap().contains(value),
            "const" => rule == value,
            "anyOf" => matching(rule) > 0,
            "oneOf" => matching(rule) == 1,
            "minimum" => value.as_f64().is_none_or(|x| x >= number()),
            "maximum" => value.as_f64().is_none_or(|x| x <= number()),
            "exclusiveMinimum" => value.as_f64().is_none_or(|x| x > number()),
            "exclusiveMaximum" => value.as_f64().is_none_or(|x| x < number()),
            "multipleOf" => value.as_f64().is_none_or(|x| x % number() == 0.0),
            "minLength" => value
                .as_str()
                .is_none_or(|text| text.chars().count() >= count()),
            "maxLength" => value
                .as_str()
                .is_none_or(|text| text.chars().count() <= count()),
            "pattern" => {
                let pattern = Regex::new(rule.as_str().unwrap()).unwrap();
                value.as_str().is_none_or(|text| pattern.is_match(text))
            }
            "minItems" => value.as_array().is_none_or(|items| items.len() >= count()),
            "maxItems" => value.as_array().is_none_or(|items| items.len() <= count()),
            "items" => {
                let items = value.as_array().into_iter().flatten();
                let refused = items
                    .enumerate()
                    .find_map(|(i, item)| refusal(root, rule, item, &format!("{path}.{i}")));
                if refused.is_some() {
                    return refused;
                }
                true
            }
            "required" => value.as_object().is_none_or(|keys| {
                let required = rule.as_array().unwrap().iter();
                required
                    .map(|key| key.as_str().unwrap())
                    .all(|key| keys.contains_key(key))
            }),
            "properties" => continue,
            "additionalProperties" => {
                for (key, value) in value.as_object().into_iter().flatten() {
                    let rule = keywords
                        .get("properties")
                        .and_then(|known| known.get(key))
                        .unwrap_or(rule);
                    let refused = refusal(root, rule, value, &format!("{path}.{key}"));
                    if refused.is_some() {
                        return refused;
                    }
                }
                true
            }
            other => panic!("{path}: the validator does not know {other}"),
        };
        if !is_right {
            return refused(format!("{value} is not {keyword} {rule}"));
        }
    }
    None
}

fn refusal_of_text(text: &str) -> Option<String> {
    let table: toml::Table = text.parse().unwrap();
    let schema = schema();
    refusal(&schema, &schema, &serde_json::to_value(table).unwrap(), "")
}

/// Why a single `--set` over a right spec is refused.
pub(crate) fn refusal_of_set(set: &str) -> Option<String> {
    let (key, value) = set.split_once('=').unwrap();
    let is_toml = format!("x = {value}").parse::<toml::Table>().is_ok();
    let value = if is_toml {
        value.into()
    } else {
        format!("{value:?}")
    };
    let name = if key == "name" { "" } else { "name = 'x'\n" };
    refusal_of_text(&format!("{name}{key} = {value}"))
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

#[test]
fn the_committed_schema_is_this_one() {
    let committed = std::fs::read_to_string(configs().join("runner.schema.json")).unwrap();
    assert!(
        committed == spec::schema(),
        "write it anew: cargo run -p runner -- config --schema > configs/runner.schema.json"
    );
}

#[test]
fn every_config_is_valid_and_names_the_schema() {
    let mut seen = 0;
    for entry in std::fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(refusal_of_text(&text), None, "{}", path.display());
        // Editors (taplo, and what builds on it) look for this comment and start at the file's directory.
        assert_eq!(
            text.lines().next(),
            Some("#:schema runner.schema.json"),
            "{}",
            path.display()
        );
        crate::load(&path, None, &[], &[]).unwrap_or_else(|errors| panic!("{errors}"));
        seen += 1;
    }
    assert!(seen >= 7);
}

#[test]
fn what_is_written_resolved_is_valid() {
    assert_eq!(refusal_of_text(&crate::fake(&[]).to_toml()), None);
}

#[test]
fn layers_are_valid() {
    for text in [
        "extends = 'a.toml'",
        "extends = ['a.toml', 'b.toml']\nname = 'x'",
        "name = 'x'\n[profile.small.train]\nbatch_size = 8\n[profile.small]\nseed = 1",
    ] {
        assert_eq!(refusal_of_text(text), None, "{text}");
    }
    for (text, refused) in [
        ("seed = 1", ": "),
        ("name = 'x'\nextends = 3", ".extends: "),
        ("name = 'x'\nprofile = 'p'", ".profile: "),
        ("name = 'x'\nsede = 1", ".sede: unknown key"),
        ("name = 'x'\n[data]\nlane = 1", ".data.lane: unknown key"),
        (
            "name = 'x'\n[profile.p.data]\nlane = 1",
            ".profile.p.data.lane: unknown key",
        ),
        (
            "name = 'x'\n[profile.p]\nextends = 'a'",
            ".profile.p.extends: unknown key",
        ),
    ] {
        let said = refusal_of_text(text).unwrap();
        assert!(said.starts_with(refused), "{text}\n{said}");
    }
}

#[test]
fn lengths_are_valid_if_they_can_be_read() {
    for text in [
        "90 epochs",
        "1 epoch",
        "0.5 epochs",
        ".5 epochs",
        "5. epochs",
        " 2  steps ",
        "2.0 steps",
        "2.5 steps",
        "7%",
        "50 percent",
        "1000 examples",
        "1.5 examples",
        "90",
        "epochs",
        "",
        "-1 epochs",
        "1.2.3 epochs",
        "90 hours",
        ". epochs",
        "1e3 steps",
    ] {
        let is_read = text.parse::<spec::Length>().is_ok();
        let is_valid = refusal_of_set(&format!("schedule.warmup='{text}'")).is_none();
        assert_eq!(is_valid, is_read, "{text:?}");
    }
}

/// Every key of the schema, outside sections and in them, with what it holds.
fn keys(schema: &Value) -> Vec<(Option<String>, String, Value)> {
    let mut keys = vec![];
    for (name, rule) in schema["properties"].as_object().unwrap() {
        match rule["properties"].as_object() {
            Some(section) => keys.extend(
                section
                    .iter()
                    .map(|(key, rule)| (Some(name.clone()), key.clone(), rule.clone())),
            ),
            // What is not a key of a run has its own tests.
            None if name == "extends" || name == "profile" => {}
            None => keys.push((None, name.clone(), rule.clone())),
        }
    }
    keys
}

/// Dotted paths of the keys that hold whole numbers, and what the schema says of them.
pub(crate) fn whole_numbers() -> Vec<(String, Value)> {
    let keys = keys(&schema()).into_iter();
    keys.filter(|(.., rule)| rule["type"] == "integer")
        .map(|(section, key, rule)| match section {
            Some(section) => (format!("{section}.{key}"), rule),
            None => (key, rule),
        })
        .collect()
}

#[test]
fn every_key_with_a_wrong_type_is_located() {
    let keys = keys(&schema());
    assert_eq!(keys.len(), crate::KEYS.len());
    for (section, key, rule) in keys {
        let is_text = rule["type"] == "string" || rule.get("oneOf").is_some();
        let wrong = if is_text { "3" } else { "\"three\"" };
        let name = if key == "name" { "" } else { "name = \"x\"" };
        let (text, path, line) = match section {
            Some(section) => {
                let text = format!("{name}\n\n[{section}]\n  {key} = {wrong}\n");
                (text, format!("{section}.{key}"), 4)
            }
            None => (format!("{name}\n  {key} = {wrong}\n"), key, 2),
        };
        let set = if path == "data.source" {
            vec![]
        } else {
            vec!["data.source=fake"]
        };
        let errors = spec::parse(&text, "x.toml", &sets(&set)).unwrap_err();
        let [problem] = &errors.0[..] else {
            panic!("{text}\n{errors}");
        };
        assert_eq!(
            (&problem.origin, &problem.key),
            (&format!("x.toml:{line}:3"), &path)
        );
        assert!(problem.what.starts_with("expected "), "{errors}");
        assert!(
            problem.what.ends_with(&format!(", not {wrong}")),
            "{errors}"
        );
        assert!(refusal_of_text(&text).is_some(), "{text}");
    }
}
