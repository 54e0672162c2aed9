//! Reads the OpenAPI file and compares values with its schemas.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use yaml_rust2::{Yaml, YamlLoader};

pub(crate) const REF_PREFIX: &str = "#/components/schemas/";

/// The OpenAPI file as JSON.
pub(crate) struct Document {
    pub(crate) root: Value,
}

impl Document {
    pub(crate) fn load() -> Self {
        let documents = YamlLoader::load_from_str(api::OPENAPI_YAML).unwrap();
        assert_eq!(documents.len(), 1);
        Self {
            root: to_json(&documents[0]),
        }
    }

    pub(crate) fn object(&self, pointer: &str) -> &Map<String, Value> {
        self.root
            .pointer(pointer)
            .and_then(Value::as_object)
            .unwrap_or_else(|| panic!("no object at {pointer}"))
    }

    pub(crate) fn schema(&self, name: &str) -> &Value {
        self.object("/components/schemas")
            .get(name)
            .unwrap_or_else(|| panic!("there is no schema {name}"))
    }

    /// Follows a reference, if `schema` is one.
    pub(crate) fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        schema_name(schema).map_or(schema, |name| self.schema(name))
    }

    /// Compares `value` with `schema`: the same fields, the same kinds, recursively.
    pub(crate) fn check(&self, place: &str, schema: &Value, value: &Value) {
        let schema = self.resolve(schema);
        // A schema without a type accepts any value.
        let Some(kind) = schema.get("type") else {
            assert!(
                schema.get("description").is_some(),
                "{place} has neither type nor description"
            );
            return;
        };
        match (kind.as_str().unwrap(), value) {
            ("object", Value::Object(fields)) => self.check_object(place, schema, fields),
            ("array", Value::Array(items)) => {
                assert!(!items.is_empty(), "the sample of {place} is empty");
                items
                    .iter()
                    .for_each(|item| self.check(&format!("{place}[]"), &schema["items"], item));
            }
            ("string", Value::String(text)) => {
                if let Some(words) = schema.get("enum") {
                    assert!(
                        words
                            .as_array()
                            .unwrap()
                            .contains(&Value::from(text.as_str())),
                        "{place}: {text}"
                    );
                }
            }
            ("integer", Value::Number(number)) => {
                assert!(number.is_u64() || number.is_i64(), "{place}: {number}");
            }
            ("boolean", Value::Bool(_)) => {}
            (kind, value) => panic!("{place} is described as {kind} and is {value}"),
        }
    }

    /// A value with every field of `schema`, each different from its default.
    pub(crate) fn fill(&self, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        if let Some(words) = schema["enum"].as_array() {
            return words.last().unwrap().clone();
        }
        let Some(kind) = schema["type"].as_str() else {
            return json!([{"anything": 1}]);
        };
        match (kind, schema["format"].as_str()) {
            ("object", _) => match (&schema["properties"], &schema["additionalProperties"]) {
                (Value::Object(properties), _) => properties
                    .iter()
                    .map(|(name, property)| (name.clone(), self.fill(property)))
                    .collect(),
                (_, Value::Bool(_) | Value::Null) => json!({"anything": 1}),
                (_, entry) => json!({"name": self.fill(entry)}),
            },
            ("array", _) => json!([self.fill(&schema["items"])]),
            ("string", Some("ip")) => json!("10.0.0.1"),
            ("string", Some("mac")) => json!("02:00:00:00:00:01"),
            ("string", _) => json!("text"),
            ("integer", _) => json!(3),
            ("boolean", _) => json!(schema["default"] != true),
            (kind, _) => panic!("no sample of a {kind}"),
        }
    }

    fn check_object(&self, place: &str, schema: &Value, fields: &Map<String, Value>) {
        if let Some(properties) = schema.get("properties") {
            let described: BTreeSet<_> = properties.as_object().unwrap().keys().collect();
            let existing: BTreeSet<_> = fields.keys().collect();
            assert_eq!(
                described, existing,
                "fields of {place}: described on the left, existing on the right"
            );
            for (name, field) in fields {
                self.check(&format!("{place}.{name}"), &properties[name], field);
            }
        } else if let Some(entry) = schema.get("additionalProperties") {
            assert!(!fields.is_empty(), "the sample of {place} is empty");
            fields
                .values()
                .for_each(|field| self.check(&format!("{place}.*"), entry, field));
        }
    }
}

/// The name of the schema that `schema` refers to.
pub(crate) fn schema_name(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix(REF_PREFIX)
}

fn to_json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::String(text) => Value::from(text.as_str()),
        Yaml::Integer(number) => Value::from(*number),
        Yaml::Boolean(switch) => Value::from(*switch),
        Yaml::Null => Value::Null,
        Yaml::Array(items) => items.iter().map(to_json).collect(),
        Yaml::Hash(fields) => Value::Object(
            fields
                .iter()
                .map(|(key, value)| (key_of(key), to_json(value)))
                .collect(),
        ),
        other => panic!("{other:?} has no place in this file"),
    }
}

/// Client generators reject a status that is parsed as a number.
fn key_of(yaml: &Yaml) -> String {
    match yaml {
        Yaml::String(text) => text.clone(),
        other => panic!("a key must be a string, such as \"200\"; got {other:?}"),
    }
}
