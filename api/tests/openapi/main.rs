//! Compares the OpenAPI file with the endpoint table and the wire types, in both directions.
//!
//! Users read the file and generate clients from it; the types define what the VMM serves. A test fails if one of them
//! lacks a path, schema, field, `required` mark, default or word of an enumeration that the other has.

#![allow(clippy::unwrap_used)]

mod generate;
mod samples;
mod schema;
mod upstream;

use std::collections::BTreeSet;

use api::Endpoint;
use serde_json::{Value, json};

use samples::samples;
use schema::{Document, REF_PREFIX, schema_name};

#[test]
fn openapi_paths_equal_the_endpoint_table() {
    let document = Document::load();
    let table: BTreeSet<_> = Endpoint::ALL
        .iter()
        .map(|endpoint| {
            (
                format!("/{}", endpoint.name()),
                endpoint.method().as_str().to_lowercase(),
            )
        })
        .collect();
    let mut file = BTreeSet::new();
    for (path, item) in document.object("/paths") {
        for method in item.as_object().unwrap().keys() {
            file.insert((path.clone(), method.clone()));
        }
    }
    assert_eq!(file, table);
}

#[test]
fn openapi_bodies_and_statuses_equal_the_endpoint_table() {
    let document = Document::load();
    for &endpoint in Endpoint::ALL {
        let name = endpoint.name();
        let operation =
            &document.root["paths"][format!("/{name}")][endpoint.method().as_str().to_lowercase()];
        let body_schema = |body: &Value| {
            schema_name(&body["content"]["application/json"]["schema"]).map(str::to_owned)
        };

        assert_eq!(
            body_schema(&operation["requestBody"]).as_deref(),
            endpoint.request(),
            "request of {name}"
        );
        assert_eq!(
            operation["requestBody"]["required"],
            json!(endpoint.request().map(|_| true)),
            "{name}"
        );

        let responses = operation["responses"].as_object().unwrap();
        let successes: Vec<_> = responses
            .iter()
            .filter(|(status, _)| status.starts_with('2'))
            .collect();
        let wanted = 1 + usize::from(endpoint.adds_device());
        assert_eq!(successes.len(), wanted, "{name}");
        if endpoint.adds_device() {
            assert_eq!(*successes[1].0, "204", "{name}");
            assert_eq!(body_schema(successes[1].1), None, "{name}");
        }
        assert_eq!(
            *successes[0].0,
            endpoint.success_status().to_string(),
            "{name}"
        );
        assert_eq!(
            body_schema(successes[0].1).as_deref(),
            endpoint.response(),
            "response of {name}"
        );
        for (status, response) in responses
            .iter()
            .filter(|(status, _)| !status.starts_with('2'))
        {
            let shared = response["$ref"]
                .as_str()
                .unwrap()
                .strip_prefix("#/components/responses/")
                .unwrap();
            let schema = body_schema(&document.root["components"]["responses"][shared]);
            assert_eq!(schema.as_deref(), Some("ErrorBody"), "{name} {status}");
        }
    }
}

#[test]
fn openapi_operation_ids_are_unique() {
    let document = Document::load();
    let mut seen = BTreeSet::new();
    for (path, item) in document.object("/paths") {
        for operation in item.as_object().unwrap().values() {
            let id = operation["operationId"]
                .as_str()
                .unwrap_or_else(|| panic!("{path} has no operationId"));
            assert!(seen.insert(id.to_owned()), "{id} is used twice");
        }
    }
}

#[test]
fn openapi_schemas_are_those_of_the_wire_types() {
    let document = Document::load();
    let file: BTreeSet<_> = document
        .object("/components/schemas")
        .keys()
        .cloned()
        .collect();
    let types: BTreeSet<_> = samples()
        .iter()
        .map(|sample| sample.schema.to_string())
        .collect();
    assert_eq!(file, types);
}

#[test]
fn openapi_every_field_of_every_type_is_described_and_exists() {
    let document = Document::load();
    for sample in samples() {
        document.check(
            &sample.schema,
            document.schema(&sample.schema),
            &sample.full,
        );
    }
}

#[test]
fn openapi_required_marks_are_those_of_the_decoder() {
    let document = Document::load();
    for sample in samples() {
        let Some(fields) = sample.full.as_object() else {
            continue;
        };
        let schema = document.schema(&sample.schema);
        if schema.get("properties").is_none() {
            continue;
        }
        let required: BTreeSet<_> = schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|name| name.as_str().unwrap().to_owned())
            .collect();
        for name in fields.keys() {
            let mut without = sample.full.clone();
            without.as_object_mut().unwrap().remove(name);
            let decodes = (sample.round_trip)(&without).is_ok();
            assert_eq!(
                !decodes,
                required.contains(name),
                "{}.{name}",
                sample.schema
            );
        }
    }
}

#[test]
fn openapi_defaults_are_those_of_the_decoder() {
    let document = Document::load();
    let mut checked = 0;
    for sample in samples() {
        let schema = document.schema(&sample.schema);
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let Some(stated) = document.resolve(property).get("default") else {
                continue;
            };
            let mut without = sample.full.clone();
            without.as_object_mut().unwrap().remove(name);
            let Ok(decoded) = (sample.round_trip)(&without) else {
                continue;
            };
            // A switch that is off may be omitted on output.
            let actual = decoded.get(name).unwrap_or(&Value::Bool(false));
            assert_eq!(actual, stated, "{}.{name}", sample.schema);
            checked += 1;
        }
    }
    assert!(checked > 40, "only {checked} defaults were found");
}

#[test]
fn openapi_enumerations_hold_exactly_the_words_of_the_type() {
    let document = Document::load();
    for sample in samples() {
        let Some(words) = document.schema(&sample.schema).get("enum") else {
            continue;
        };
        let words = words.as_array().unwrap();
        for word in words {
            assert_eq!(
                &(sample.round_trip)(word).unwrap(),
                word,
                "{}",
                sample.schema
            );
        }
        // If a value is not a variant, serde's message lists all variants.
        let message = (sample.round_trip)(&json!("no such word")).unwrap_err();
        let variants = message
            .split("expected")
            .nth(1)
            .unwrap()
            .matches('`')
            .count()
            / 2;
        assert_eq!(variants, words.len(), "{}: {message}", sample.schema);
    }
}

#[test]
fn openapi_examples_round_trip() {
    let document = Document::load();
    let mut checked = 0;
    for sample in samples() {
        let Some(example) = document.schema(&sample.schema).get("example") else {
            continue;
        };
        let back = (sample.round_trip)(example)
            .unwrap_or_else(|error| panic!("{}: {error}", sample.schema));
        assert!(
            holds(&back, example),
            "{}: {example} came back as {back}",
            sample.schema
        );
        checked += 1;
    }
    assert!(checked >= 7, "only {checked} examples were found");
}

#[test]
fn openapi_full_samples_round_trip() {
    for sample in samples() {
        assert_eq!(
            (sample.round_trip)(&sample.full).unwrap(),
            sample.full,
            "{}",
            sample.schema
        );
    }
}

#[test]
fn openapi_generated_schemas_are_those_of_the_file() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi/cloud-hypervisor.yaml");
    let file = std::fs::read_to_string(path).unwrap();
    let (written, generated) = file.split_once(generate::MARKER).unwrap();
    let fresh = generate::yaml(&generate::schemas());
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(path, format!("{written}{}{fresh}", generate::MARKER)).unwrap();
    } else {
        assert!(
            generated == fresh,
            "the schemas are not those of the types; run UPDATE_OPENAPI=1 cargo test -p cloud-hypervisor-balloon-api --test openapi"
        );
    }
}

#[test]
fn openapi_sections_have_the_fields_and_words_of_upstream() {
    let document = Document::load();
    for (name, fields) in upstream::FIELDS {
        let properties = &document.schema(name)["properties"];
        for field in fields.split_whitespace() {
            assert!(properties.get(field).is_some(), "{name}.{field}");
        }
    }
    for (name, fields) in upstream::REQUIRED {
        let required: Vec<_> = fields.split_whitespace().collect();
        assert_eq!(document.schema(name)["required"], json!(required), "{name}");
    }
    for (name, words) in upstream::WORDS {
        let known = document.schema(name)["enum"].as_array().unwrap();
        for word in words.split_whitespace() {
            assert!(known.contains(&json!(word)), "{name}: {word}");
        }
    }
}

#[test]
fn openapi_references_lead_somewhere() {
    fn visit(document: &Document, value: &Value) {
        match value {
            Value::Object(fields) => {
                if let Some(target) = fields.get("$ref").and_then(Value::as_str) {
                    let pointer = target.strip_prefix('#').unwrap();
                    assert!(document.root.pointer(pointer).is_some(), "{target}");
                }
                fields.values().for_each(|field| visit(document, field));
            }
            Value::Array(items) => items.iter().for_each(|item| visit(document, item)),
            _ => {}
        }
    }
    let document = Document::load();
    visit(&document, &document.root);
    assert!(document.root.to_string().contains(REF_PREFIX));
}

/// True if `whole` contains all of `part`.
fn holds(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => part
            .iter()
            .all(|(name, value)| whole.get(name).is_some_and(|own| holds(own, value))),
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len()
                && whole
                    .iter()
                    .zip(part)
                    .all(|(whole, part)| holds(whole, part))
        }
        _ => whole == part,
    }
}
