//! The JSON Schema of specs, from which editors check and complete them.

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{Schema, json_schema};
use serde_json::{Map, Value, json};

use crate::run::Run;

/// The JSON Schema (draft 2020-12) of spec files, as text: types, ranges, names and what they mean. What depends on
/// several keys is known to [`crate::load`] only.
pub fn schema() -> String {
    let mut settings = SchemaSettings::draft2020_12();
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<Run>();
    RecursiveTransform(plain).transform(&mut schema);

    let root = schema.ensure_object();
    root.insert("title".into(), "A run of runner".into());
    let description = "`runner config FILE` says everything that is wrong with one.";
    root.insert("description".into(), description.into());
    // A name may be said in a file that is extended.
    root.remove("required");
    root.insert(
        "anyOf".into(),
        json!([{ "required": ["name"] }, { "required": ["extends"] }]),
    );
    let keys = properties(root);
    let reference = |key: &String| {
        (
            key.clone(),
            json!({ "$ref": format!("#/properties/{key}") }),
        )
    };
    let profile: Map<String, Value> = keys.keys().map(reference).collect();
    let one_profile = json_schema!({
        "description": "The same keys, stronger than those outside the profile.",
        "type": "object",
        "properties": profile,
        "additionalProperties": false,
    });
    keys.insert(
        "profile".into(),
        json!({
            "description": "Tables `[profile.NAME]`, one of which `--profile NAME` applies.",
            "type": "object",
            "additionalProperties": one_profile,
        }),
    );
    keys.insert(
        "extends".into(),
        json!({
            "description": "Files whose keys hold where this one says nothing else; the last one is the strongest. A path starts at the directory of this file.",
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": { "type": "string" } },
            ],
        }),
    );
    let text = serde_json::to_string_pretty(&schema).expect("keys are strings");
    text + "\n"
}

fn properties(root: &mut Map<String, Value>) -> &mut Map<String, Value> {
    let properties = root.get_mut("properties").and_then(Value::as_object_mut);
    properties.expect("a run is a table")
}

/// TOML has no null; Rust's number formats, the defaults of whole sections and the ends of source lines tell a reader
/// nothing.
fn plain(schema: &mut Schema) {
    let Some(schema) = schema.as_object_mut() else {
        return;
    };
    schema.remove("format");
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.replace('\n', " ");
    }
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| name != "null");
        if let [name] = &types[..] {
            let name = name.clone();
            schema.insert("type".into(), name);
        }
    }
    if let Some(Value::Null | Value::Object(_)) = schema.get("default") {
        schema.remove("default");
    }
}
