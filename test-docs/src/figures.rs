//! Checks figures in the documentation against their files in `docs/results`.
//!
//! `<!-- figures of FILE: KEY=VALUE … -->` names them. `KEY` is a path in the file, with slashes. Each value must equal
//! that of the file, rounded to the written precision. It must occur as a whole number in the text below, up to the
//! next heading. With `figures of FILE in "START":`, it must occur in a line there that starts with `START`.
//!
//! `202MiB` refers to a number of bytes, and `6.30s` to one of ms or µs. A unit in brackets, `202(MiB)`, does not
//! follow the number in the text. It is in the heading of a table, or after the last number of a list.
//!
//! A table of measurements without a file has `<!-- no file: REASON -->` in its section.

#![allow(clippy::unwrap_used)]

use std::fs;

use serde_json::Value;

use crate::{documents, root};

/// One `KEY=VALUE` with its file, and the text in which it must occur.
struct Figure<'a> {
    file: &'a str,
    key: &'a str,
    value: &'a str,
    text: String,
}

fn figures(text: &str) -> Vec<Figure<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((_, behind)) = rest.split_once("<!-- figures of ") {
        let (marker, below) = behind.split_once("-->").unwrap();
        let (place, pairs) = marker.split_once(": ").unwrap();
        let (file, start) = match place.split_once(" in ") {
            Some((file, start)) => (file, start.trim_matches('"')),
            None => (place, ""),
        };
        let section = below.split("\n#").next().unwrap_or_default();
        let text: Vec<&str> = section
            .lines()
            .filter(|line| line.starts_with(start) && !line.starts_with("<!--"))
            .collect();
        for pair in pairs.split_whitespace() {
            let (key, value) = pair.split_once('=').unwrap();
            found.push(Figure {
                file,
                key,
                value,
                text: text.join("\n"),
            });
        }
        rest = below;
    }
    found
}

/// How many of the file's units are one of the written units. The last part of the key that ends with a unit names the
/// file's.
fn divisor(key: &str, unit: &str) -> Option<f64> {
    let source = key.split('/').rev().find_map(|part| {
        let (_, unit) = part.rsplit_once('_')?;
        ["bytes", "ms", "us", "percent"]
            .contains(&unit)
            .then_some(unit)
    });
    Some(match (source, unit) {
        (_, "") | (Some("ms"), "ms") | (Some("us"), "µs") | (Some("percent"), "%") => 1.0,
        (_, "thousand") | (Some("ms"), "s") | (Some("us"), "ms") => 1000.0,
        (Some("bytes"), "MiB") => f64::from(1 << 20),
        (Some("bytes"), "GiB") => f64::from(1 << 30),
        _ => return None,
    })
}

/// Whether `written` occurs in `text` and is not a part of a longer number.
fn occurs(text: &str, written: &str) -> bool {
    text.match_indices(written).any(|(at, _)| {
        let is_digit = |it: Option<char>| it.is_some_and(|it| it.is_ascii_digit());
        let mut before = text[..at].chars().rev();
        let mut after = text[at + written.len()..].chars();
        let continues = |next: Option<char>, second: Option<char>| {
            is_digit(next) || (matches!(next, Some('.')) && is_digit(second))
        };
        !continues(before.next(), before.next()) && !continues(after.next(), after.next())
    })
}

/// The error in the figure, if any.
fn fault(figure: &Figure<'_>, results: &Value) -> Option<String> {
    let Figure {
        file,
        key,
        value,
        text,
    } = figure;
    let unit_at = value.find(|it: char| !it.is_ascii_digit() && it != '.' && it != '-');
    let (digits, unit) = value.split_at(unit_at.unwrap_or(value.len()));
    let bare = unit
        .strip_prefix('(')
        .and_then(|unit| unit.strip_suffix(')'));
    let Some(divisor) = divisor(key, bare.unwrap_or(unit)) else {
        return Some(format!("the unit {unit} does not fit"));
    };
    let Some(number) = results.pointer(&format!("/{key}")).and_then(Value::as_f64) else {
        return Some(format!("{file} has no {key}"));
    };
    let decimals = digits.split_once('.').map_or(0, |(_, behind)| behind.len());
    let half = 0.5 / 10_f64.powi(i32::try_from(decimals).unwrap());
    let measured = number / divisor;
    if (measured - digits.parse::<f64>().unwrap()).abs() > half + 1e-9 {
        return Some(format!("{file} has {measured}"));
    }
    let mut written = digits.replace('-', "−");
    if bare.is_none() && !unit.is_empty() {
        written = format!("{written} {unit}");
    }
    (!occurs(text, &written)).then(|| format!("{written} is not in the text below"))
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
    assert!(checked > 180, "only {checked} figures were seen");
}

/// Documents with tables of measurements.
const MEASURED: [&str; 5] = [
    "docs/balloon.md",
    "docs/fleet-simulation.md",
    "docs/fleet.md",
    "docs/promises.md",
    "docs/results/README.md",
];
/// A table with fewer rows that have a measured unit shows settings or limits.
const MEASURED_ROWS_MIN: usize = 3;

/// Units in which this project measures.
const UNITS: [&str; 6] = ["µs", "ms", "s", "MiB", "MB", "%"];

/// Whether a row of a table has a number with a unit, or any number if the heading has the unit.
fn is_measured(row: &str, heading: &str) -> bool {
    let has_unit = heading
        .split(['|', ','])
        .any(|it| UNITS.contains(&it.trim()));
    let words: Vec<&str> = row.split_whitespace().collect();
    words.windows(2).any(|pair| {
        let unit = pair[1].trim_end_matches([',', ';']);
        pair[0].parse::<f64>().is_ok() && (has_unit || UNITS.contains(&unit))
    })
}

/// Lines at which tables of measurements begin whose section has neither a file nor a reason.
fn unmarked_tables(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut is_marked = false;
    let mut at = 0;
    while at < lines.len() {
        let table = lines[at..]
            .iter()
            .take_while(|it| it.starts_with('|'))
            .count();
        let rows = lines[at..at + table].iter();
        let measured = rows.filter(|it| is_measured(it, lines[at])).count();
        if measured >= MEASURED_ROWS_MIN && !is_marked {
            found.push(at + 1);
        }
        is_marked &= !lines[at].starts_with('#');
        is_marked |= ["<!-- figures of ", "<!-- no file: "]
            .iter()
            .any(|it| lines[at].starts_with(it));
        at += table.max(1);
    }
    found
}

#[test]
fn every_table_of_measurements_has_a_file_or_a_reason() {
    let unmarked: Vec<_> = MEASURED
        .iter()
        .map(|name| {
            let text = fs::read_to_string(root().join(name)).unwrap();
            (*name, unmarked_tables(&text))
        })
        .filter(|it| !it.1.is_empty())
        .collect();
    assert!(unmarked.is_empty(), "{unmarked:?}");
}

#[test]
fn table_of_measurements_without_a_marker_is_found() {
    let table = "| | |\n| --- | --- |\n| a | 1.5 µs |\n| b | 2 ms; more |\n| c | 3 MiB |\n";
    assert_eq!(unmarked_tables(&format!("## A\n\n{table}")), [3]);
    let marked = "## A\n\n<!-- no file: by hand -->\n\n";
    assert!(unmarked_tables(&format!("{marked}{table}")).is_empty());
    assert_eq!(
        unmarked_tables(&format!("{marked}text\n\n## B\n\n{table}")),
        [9]
    );
    assert!(unmarked_tables("| a | 1 ms |\n| b | 2 |\n").is_empty());
    let rows = "| a | 1 |\n| b | 2 |\n| c | 3 |\n";
    assert_eq!(unmarked_tables(&format!("| Size, MiB | |\n{rows}")), [1]);
    assert!(unmarked_tables(&format!("| Size | |\n{rows}")).is_empty());
}

#[test]
fn figure_that_differs_is_found() {
    let results = serde_json::json!({
        "best": {"wait_ms": 6304.9}, "x_bytes": 212_099_072, "guests": 50, "loss_percent": -0.012,
        "info_us": {"p50": 352}, "rate": 10105.1, "exits": 56.5,
    });
    let right = "guests=50 x_bytes=202MiB x_bytes=202(MiB) best/wait_ms=6.30s loss_percent=-0.01% info_us/p50=0.35(ms) \
                 rate=10.1(thousand) exits=57";
    let wrong = "guests=51 guests=5 best/wait_ms=6.31s best/wait_ms=6304 none=1 guests=50.0 x_bytes=202s exits=58 \
                 info_us/p50=352";
    let text = "50 guests of 202 MiB\n6.30 s, −0.01 %\n0.35, 0.41 ms; 10.1, 57\n## Next\n352 50.0";
    let faults = |pairs: &str, place: &str| -> Vec<String> {
        let text = format!("<!-- figures of f.json{place}: {pairs} -->\n{text}");
        let found = figures(&text);
        let faults = found.iter().map(|figure| fault(figure, &results).is_some());
        let wrong = found.iter().zip(faults).filter(|(_, is_wrong)| *is_wrong);
        wrong
            .map(|(figure, _)| format!("{}={}", figure.key, figure.value))
            .collect()
    };
    assert_eq!(faults(right, ""), Vec::<String>::new());
    let expected: Vec<&str> = wrong.split_whitespace().collect();
    assert_eq!(faults(wrong, ""), expected);
    assert_eq!(
        faults("guests=50 x_bytes=202MiB", " in \"50 guests\""),
        Vec::<String>::new()
    );
    assert_eq!(faults("guests=50", " in \"6.30\""), ["guests=50"]);
}

#[test]
fn figure_within_a_longer_number_is_not_found() {
    for (text, expected) in [
        ("3 guests", true),
        ("of 3", true),
        ("3.", true),
        ("36", false),
        ("13", false),
        ("3.5", false),
        ("0.3", false),
    ] {
        assert_eq!(occurs(text, "3"), expected, "{text}");
    }
}
