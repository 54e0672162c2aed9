//! Generates the schemas of the OpenAPI file from the wire types.
//!
//! schemars derives JSON Schema from the fields, the serde attributes and the doc comments. This module converts the
//! result to the older dialect of OpenAPI 3.0.

use std::collections::BTreeMap;

use api::*;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use yaml_rust2::{Yaml, YamlEmitter};

use crate::schema::REF_PREFIX;

/// The line above the generated part of the file.
pub(crate) const MARKER: &str = "    # From here on generated: UPDATE_OPENAPI=1 cargo test -p cloud-hypervisor-balloon-api --test openapi\n";

/// The schemas of bodies and of everything they refer to, by name.
pub(crate) fn schemas() -> BTreeMap<String, Value> {
    let mut settings = SchemaSettings::default();
    settings.definitions_path = "/components/schemas".into();
    let mut generator = settings.into_generator();
    generator.subschema_for::<ErrorBody>();
    generator.subschema_for::<VmmPingResponse>();
    generator.subschema_for::<VmInfo>();
    generator.subschema_for::<VmResize>();
    generator.subschema_for::<VmResizeZone>();
    generator.subschema_for::<VmResizeDisk>();
    generator.subschema_for::<VmUpdateRateLimiter>();
    generator.subschema_for::<VmRemoveDevice>();
    generator.subschema_for::<VmSnapshotConfig>();
    generator.subschema_for::<VmSnapshotMergeConfig>();
    generator.subschema_for::<VmCoredumpData>();
    generator.subschema_for::<RestoreConfig>();
    generator.subschema_for::<VmSendMigrationData>();
    generator.subschema_for::<VmReceiveMigrationData>();
    generator.subschema_for::<PciDeviceInfo>();
    generator.subschema_for::<VmBalloonHinting>();
    generator.subschema_for::<VmBalloonReporting>();
    generator.subschema_for::<BalloonStatsResponse>();
    generator.subschema_for::<ReclaimStats>();
    generator.subschema_for::<ReclaimThresholds>();
    generator.subschema_for::<ReclaimThresholdsChange>();
    // A type alias, which schemars does not name.
    let mut counters = generator.subschema_for::<VmCounters>();
    counters.insert(
        "description".to_owned(),
        json!(
            "Device id, then counter name, then value. A virtio device has the counters of its transport in addition to \
             its own."
        ),
    );
    counters.insert(
        "example".to_owned(),
        json!({"_disk0": {"read_bytes": 4096, "read_ops": 1}}),
    );
    let mut enum_defaults = BTreeMap::new();
    let mut schemas: BTreeMap<_, _> = generator
        .take_definitions(true)
        .into_iter()
        .chain([("VmCounters".to_owned(), counters.to_value())])
        .map(|(name, mut schema)| {
            simplify(&mut schema, &mut enum_defaults);
            (name, schema)
        })
        .collect();
    // OpenAPI ignores keys next to a reference, so the default of an enumeration is part of the enumeration's schema.
    for (name, default) in enum_defaults {
        let schema = schemas.get_mut(&name).unwrap();
        if schema.get("enum").is_some() {
            schema["default"] = default;
        }
    }
    schemas
}

/// The part of the file below [`MARKER`].
pub(crate) fn yaml(schemas: &BTreeMap<String, Value>) -> String {
    let nested = json!({"components": {"schemas": schemas}});
    let mut text = String::new();
    YamlEmitter::new(&mut text).dump(&to_yaml(&nested)).unwrap();
    let (_, schemas) = text.split_once("  schemas:\n").unwrap();
    format!("{schemas}\n")
}

/// Converts `schema` to OpenAPI 3.0, and collects the defaults of the enumerations that it refers to.
fn simplify(schema: &mut Value, enum_defaults: &mut BTreeMap<String, Value>) {
    let Value::Object(fields) = schema else {
        return;
    };
    // An absent field and `null` are equivalent, and upstream's schemas do not mention `null`.
    if let Some(Value::Array(choices)) = fields.get_mut("anyOf") {
        choices.retain(|choice| choice["type"] != "null");
        if let [Value::Object(only)] = &choices[..] {
            *fields = only.clone();
        }
    }
    if let Some(Value::Array(types)) = fields.get("type") {
        fields["type"] = types[0].clone();
    }
    if let Some(target) = fields.get("$ref").cloned() {
        if let Some(default) = fields.remove("default") {
            let name = target.as_str().unwrap().trim_start_matches(REF_PREFIX);
            enum_defaults.insert(name.to_owned(), default);
        }
        fields.retain(|name, _| name == "$ref");
        return;
    }
    if let Some(Value::Array(variants)) = fields.remove("oneOf") {
        join_variants(fields, &variants);
    }
    if fields.get("default") == Some(&Value::Null) {
        fields.remove("default");
    }
    if fields.get("additionalProperties") == Some(&json!(true)) {
        fields.remove("additionalProperties");
    }
    if fields.get("minimum") == Some(&json!(0)) {
        fields.remove("minimum");
    }
    match fields.get("format").and_then(Value::as_str) {
        // The signed format that can hold the numbers, because client generators support no unsigned one.
        Some("uint64" | "uint32") => fields["format"] = json!("int64"),
        Some("uint16") => fields["format"] = json!("int32"),
        Some("uint") => drop(fields.remove("format")),
        _ => {}
    }
    if let Some(Value::String(text)) = fields.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    for (name, part) in fields {
        match (name.as_str(), part) {
            ("properties", Value::Object(properties)) => properties
                .values_mut()
                .for_each(|property| simplify(property, enum_defaults)),
            ("items" | "additionalProperties", part) => simplify(part, enum_defaults),
            _ => {}
        }
    }
}

/// Merges the variants of an enumeration, which are described one by one, into one list of words.
fn join_variants(fields: &mut Map<String, Value>, variants: &[Value]) {
    let mut words = Vec::new();
    let mut description = fields["description"].as_str().unwrap().to_owned();
    for variant in variants {
        match &variant["const"] {
            Value::String(word) => {
                words.push(json!(word));
                let text = variant["description"].as_str().unwrap();
                description.push_str(&format!(" `{word}`: {text}"));
            }
            _ => words.extend(variant["enum"].as_array().unwrap().iter().cloned()),
        }
    }
    fields.insert("type".to_owned(), json!("string"));
    fields.insert("enum".to_owned(), json!(words));
    fields.insert("description".to_owned(), json!(description));
}

fn to_yaml(value: &Value) -> Yaml {
    match value {
        Value::Null => Yaml::Null,
        Value::Bool(switch) => Yaml::Boolean(*switch),
        Value::Number(number) => Yaml::Integer(number.as_i64().unwrap()),
        Value::String(text) => Yaml::String(text.clone()),
        Value::Array(items) => Yaml::Array(items.iter().map(to_yaml).collect()),
        Value::Object(fields) => {
            // serde_json keeps the order or sorts, depending on features that other crates enable.
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| (rank(name), *name));
            let pairs = fields
                .into_iter()
                .map(|(name, field)| (Yaml::String(name.clone()), to_yaml(field)));
            Yaml::Hash(pairs.collect())
        }
    }
}

/// The position of a schema's part in the file, chosen for readability.
fn rank(name: &str) -> usize {
    let order = ["description", "type", "format", "required", "enum"];
    let found = order.iter().position(|part| *part == name);
    found.unwrap_or(order.len() + usize::from(name == "properties"))
}
