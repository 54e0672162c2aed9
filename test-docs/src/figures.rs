//! Checks figures in the documentation against their files in `docs/results`.
//!
//! `<!-- figures of FILE: KEY=VALUE … -->` names them. Each value must equal that of the file, rounded to the written
//! precision, and must occur in the text below, up to the next heading. `202MiB` refers to a number of bytes, `6.30s`
//! to one of milliseconds.

#![allow(clippy::unwrap_used)]

use std::fs;

use serde_json::Value;

use crate::{documents, root};

/// One `KEY=VALUE` with its file, and the text in which it must occur.
struct Figure<'a> {
    file: &'a str,
    key: &'a str,
    value: &'a str,
    section: &'a str,
}

fn figures(text: &str) -> Vec<Figure<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((_, behind)) = rest.split_once("<!-- figures of ") {
        let (marker, below) = behind.split_once("-->").unwrap();
        let (file, pairs) = marker.split_once(':').unwrap();
        let section = below.split("\n#").next().unwrap_or_default();
        for pair in pairs.split_whitespace() {
            let (key, value) = pair.split_once('=').unwrap();
            found.push(Figure {
                file,
                key,
                value,
                section,
            });
        }
        rest = below;
    }
    found
}

/// The error in the figure, if any.
fn fault(figure: &Figure<'_>, results: &Value) -> Option<String> {
    let unit_at = figure.value.find(|it: char| it.is_ascii_alphabetic());
    let (digits, unit) = figure.value.split_at(unit_at.unwrap_or(figure.value.len()));
    let (divisor, written) = match unit {
        "MiB" => (f64::from(1 << 20), format!("{digits} MiB")),
        "s" => (1000.0, format!("{digits} s")),
        "" => (1.0, digits.to_owned()),
        _ => return Some(format!("the unit {unit} is unknown")),
    };
    let pointer = format!("/{}", figure.key.replace('.', "/"));
    let Some(number) = results.pointer(&pointer).and_then(Value::as_f64) else {
        return Some(format!("{} has no {}", figure.file, figure.key));
    };
    let decimals = digits.split_once('.').map_or(0, |(_, behind)| behind.len());
    let measured = format!("{:.decimals$}", number / divisor);
    if measured != digits {
        return Some(format!("{} has {measured}", figure.file));
    }
    (!figure.section.contains(&written)).then(|| format!("{written} is not in the text below"))
}

#[test]
fn every_figure_is_that_of_its_file() {
    let mut faults = Vec::new();
    let mut checked = 0;
    for document in documents() {
        let text = fs::read_to_string(root().join(&document)).unwrap();
        for figure in figures(&text) {
            let file = root().join("docs/results").join(figure.file);
            let results = fs::read_to_string(&file).unwrap_or_default();
            let results = serde_json::from_str(&results).unwrap_or_default();
            checked += 1;
            if let Some(fault) = fault(&figure, &results) {
                let Figure { key, value, .. } = figure;
                faults.push(format!("{}: {key}={value}: {fault}", document.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    assert!(checked > 15, "only {checked} figures were seen");
}

#[test]
fn figure_that_differs_is_found() {
    let results = serde_json::json!({"best": {"ms": 6304.9}, "bytes": 212_099_072, "guests": 50});
    let text = "<!-- figures of f.json: guests=50 guests=51 bytes=202MiB best.ms=6.30s best.ms=6.31s none=1 \
                guests=50.0 -->\n50 guests of 202 MiB, 6.30 s\n## Next\n50.0";
    let faults: Vec<_> = figures(text)
        .iter()
        .map(|figure| fault(figure, &results).is_some())
        .collect();
    assert_eq!(faults, [false, true, false, false, true, true, true]);
}
