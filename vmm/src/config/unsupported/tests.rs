#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

/// The schema of the configuration, whose descriptions are the documentation of the settings.
struct Schema(Value);

impl Schema {
    fn new() -> Self {
        Self(schemars::schema_for!(VmConfig).to_value())
    }

    /// The schema that `schema` refers to.
    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let alternatives = schema["anyOf"].as_array();
        if let Some(present) =
            alternatives.and_then(|all| all.iter().find(|it| it["type"] != "null"))
        {
            return self.resolve(present);
        }
        match schema["$ref"].as_str() {
            Some(path) => self.resolve(self.0.pointer(path.trim_start_matches('#')).unwrap()),
            None => schema,
        }
    }

    /// Values that `schema` allows, among them one that differs from the default.
    fn samples(&self, schema: &Value) -> Vec<Value> {
        let schema = self.resolve(schema);
        let kind = match &schema["type"] {
            Value::Array(kinds) => &kinds[0],
            kind => kind,
        };
        if let Some(words) = schema["enum"].as_array() {
            return words.clone();
        }
        if let Some(variants) = schema["oneOf"].as_array() {
            return variants.iter().map(|it| it["const"].clone()).collect();
        }
        match kind.as_str() {
            Some("boolean") => vec![json!(false), json!(true)],
            Some("integer") => vec![json!(1)],
            Some("array") => {
                let items = self.samples(&schema["items"]).into_iter();
                items.map(|item| json!([item])).collect()
            }
            Some("object") => vec![self.least(schema)],
            // Addresses are strings too. A setting accepts at least one of these.
            Some("string") => vec![json!("12:34:56:78:90:ab"), json!("10.0.0.1")],
            _ => vec![json!({"socket": "/s"})],
        }
    }

    /// An object with only the required settings.
    fn least(&self, schema: &Value) -> Value {
        let required = schema["required"].as_array().into_iter().flatten();
        let required = required.map(|key| key.as_str().unwrap());
        let settings = required.map(|key| {
            let value = self.samples(&schema["properties"][key]).pop().unwrap();
            (key.to_owned(), value)
        });
        Value::Object(settings.collect())
    }
}

/// Whether the VMM rejects `config`; `None` if it is not a configuration.
fn is_rejected(config: Value) -> Option<bool> {
    let config: VmConfig = serde_json::from_value(config).ok()?;
    Some(check(&config).is_err())
}

fn settings(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema["properties"].as_object().into_iter().flatten()
}

fn description(schema: &Value) -> &str {
    schema["description"].as_str().unwrap_or_default()
}

/// The other setting that excludes this one, if its documentation names one.
fn excluded_by(description: &str) -> Option<&str> {
    let (_, behind) = description.split_once("Unsupported with `")?;
    behind.split_once('`').map(|(key, _)| key)
}

fn is_marked(description: &str) -> bool {
    description.to_lowercase().contains("unsupported") && excluded_by(description).is_none()
}

/// Appends every setting of `schema` whose documentation does not match what the VMM rejects. `configure` makes a
/// configuration from a value of `schema`.
fn compare(
    all: &Schema,
    schema: &Value,
    path: &str,
    configure: &dyn Fn(Value) -> Value,
    faults: &mut Vec<String>,
) -> usize {
    let least = all.least(schema);
    let rejects = |given: &[(&str, &Value)]| {
        let mut value = least.clone();
        for (key, setting) in given {
            value[*key] = (*setting).clone();
        }
        is_rejected(configure(value))
    };
    let mut marked = 0;
    for (key, setting) in settings(schema) {
        let here = format!("{path}.{key}");
        let samples = all.samples(setting);
        let outcomes: Vec<bool> = samples
            .iter()
            .filter_map(|sample| rejects(&[(key, sample)]))
            .collect();
        assert!(!outcomes.is_empty(), "{here} accepts none of {samples:?}");
        let rejected = outcomes.contains(&true);
        if rejected != is_marked(description(setting)) {
            faults.push(format!("{here}: rejected: {rejected}"));
        }
        marked += usize::from(rejected);
        for variant in all.resolve(setting)["oneOf"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let word = &variant["const"];
            if is_marked(description(variant)) && rejects(&[(key, word)]) != Some(true) {
                faults.push(format!("{here}: {word} is not rejected"));
            }
        }
        for (other, other_setting) in settings(schema).filter(|_| !rejected) {
            let is_switch = all.resolve(other_setting)["type"] == "boolean";
            if !is_switch || other == key || rejects(&[(other, &json!(true))]) == Some(true) {
                continue;
            }
            let excluded = |by: &str, it: &Value| excluded_by(description(it)) == Some(by);
            let stated = excluded(other, setting) || excluded(key, other_setting);
            let rejected = samples
                .iter()
                .any(|sample| rejects(&[(key, sample), (other, &json!(true))]) == Some(true));
            if rejected != stated {
                faults.push(format!("{here} with {other}: rejected: {rejected}"));
            }
        }
        let inner = all.resolve(setting);
        let is_list = inner["items"].is_object();
        let section = if is_list {
            all.resolve(&inner["items"])
        } else {
            inner
        };
        let nested = |value: Value| {
            let mut outer = least.clone();
            outer[key.as_str()] = if is_list { json!([value]) } else { value };
            configure(outer)
        };
        if section["properties"].is_object() {
            marked += compare(all, section, &here, &nested, faults);
        }
    }
    marked
}

#[test]
fn documentation_marks_exactly_the_settings_that_are_rejected() {
    let schema = Schema::new();
    let mut faults = Vec::new();
    let marked = compare(&schema, &schema.0, "", &|config| config, &mut faults);
    assert!(faults.is_empty(), "{faults:#?}");
    // The comparison would find no fault either if it saw nothing.
    assert!(marked >= 8, "only {marked} settings are rejected");
}
