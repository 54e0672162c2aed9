//! Generates `docs/fleet-settings.md`, the reference of every key. A test checks that the file is up to date.
//!
//! Key, value and meaning come from the declaration of the section, range and default from the table of ranges, or from
//! the default section. The page itself records the first version of each key.

use std::fmt::Write as _;

use api::ReportingPolicy;
use schemars::{JsonSchema, SchemaGenerator};
use serde::Serialize;
use serde_json::Value;
use test_docs::{FirstVersions, Meanings};

use super::{AGENT, AgentConfig, AgentSection, DiscoverySection, StoreSection, VmRule};
use crate::config::ranges::{self, Entry, POLICY, Range};
use crate::config::{
    AdmissionConfig, Config, ControlConfig, HostConfig, LastResortConfig, Millis, PolicyConfig,
    Thresholds,
};

const START: &str = "# Settings of ch-fleet

This page lists every key of `agent.toml`. It is generated from the declarations of the sections in `fleet/src/`; a test
compares the two. [fleet.md](fleet.md) describes files and reloads. `ch-fleet config check`, the start of the agent and
a reload reject values out of the range. \"–\" in the column Default means that the key has no default. The column Since
has the version that introduced the key.

- A size is a number of bytes, or a text with a unit, such as `\"512MiB\"` or `\"1.5G\"` ([options.md](options.md)).
- A time is a text with the unit `ms`, `s`, `min` or `h`, such as `\"1.5s\"`.
- A fraction is a number or a percentage, such as `0.15` or `\"15%\"`.
";

/// A key of one section.
struct Row {
    key: String,
    value: String,
    unit: &'static str,
    default: String,
    range: String,
    meaning: String,
}

/// A section with its rows.
struct Section {
    heading: &'static str,
    rows: Vec<Row>,
}

/// The whole page, with the versions of the keys that `old` has.
pub(super) fn page(old: &str) -> String {
    let versions = FirstVersions::of(old);
    let mut page = START.to_owned();
    for Section { heading, rows } in sections() {
        let mut meanings = Meanings::default();
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "\n## {heading}\n\n| Key | Value | Unit | Default | Range | Since | Meaning |\n\
             | --- | --- | --- | --- | --- | --- | --- |\n"
        );
        for row in rows {
            let name = format!("`{}`", row.key);
            let since = versions.get(heading, &[&name]);
            let meaning = meanings.cell(&name, &row.meaning);
            let (value, unit, default, range) = (row.value, row.unit, row.default, row.range);
            let _ = writeln!(
                page,
                "| {name} | {value} | {unit} | {default} | {range} | {since} | {meaning} |"
            );
        }
        page.push_str(&meanings.below());
    }
    page
}

fn sections() -> Vec<Section> {
    let entries = entries("policy.NAME.");
    let rows = |prefix: &str, schema: Value, defaults: Value| {
        let mut rows = Vec::new();
        collect(prefix, "", &schema, &schema, &defaults, &entries, &mut rows);
        rows
    };
    let section = |heading, prefix, (schema, defaults)| Section {
        heading,
        rows: rows(prefix, schema, defaults),
    };
    vec![
        section("[agent]", "agent.", of::<AgentSection>()),
        section("[discovery]", "discovery.", of::<DiscoverySection>()),
        section("[host]", "host.", of::<HostConfig>()),
        section("[thresholds]", "thresholds.", of::<Thresholds>()),
        Section {
            heading: "[reporting]",
            rows: reporting(&entries),
        },
        section("[control]", "control.", of::<ControlConfig>()),
        section("[admission]", "admission.", of::<AdmissionConfig>()),
        section("[last_resort]", "last_resort.", of::<LastResortConfig>()),
        section("[policy.NAME]", "policy.NAME.", of::<PolicyConfig>()),
        Section {
            heading: "[[vm]]",
            rows: rows("vm.", schema::<VmRule>(), Value::Null),
        },
        section("[store]", "store.", of::<StoreSection>()),
    ]
}

/// The schema and the defaults of a section.
fn of<T: JsonSchema + Default + Serialize>() -> (Value, Value) {
    let defaults = serde_json::to_value(T::default()).expect("sections are JSON");
    (schema::<T>(), defaults)
}

fn schema<T: JsonSchema>() -> Value {
    let schema = SchemaGenerator::default().into_root_schema_for::<T>();
    schema.as_value().clone()
}

/// Adds the rows of a structure. `prefix` is the section in the table of ranges, `path` the part of the key in front of
/// the names of fields.
fn collect(
    prefix: &str,
    path: &str,
    object: &Value,
    root: &Value,
    defaults: &Value,
    entries: &[Entry],
    rows: &mut Vec<Row>,
) {
    for (name, field) in object["properties"].as_object().into_iter().flatten() {
        let key = format!("{path}{name}");
        let default = &defaults[name];
        let target = target(field, root);
        if target["properties"].is_object() {
            let inner = format!("{key}.");
            collect(prefix, &inner, target, root, default, entries, rows);
            continue;
        }
        let entries: Vec<&Entry> = entries
            .iter()
            .filter(|entry| entry.key == format!("{prefix}{key}"))
            .collect();
        let is_required = object["required"]
            .as_array()
            .is_some_and(|required| required.contains(&Value::from(name.as_str())));
        rows.push(Row {
            value: value(field, target),
            unit: unit(&key, type_name(field)),
            default: match is_required && default.is_null() {
                true => "required".to_owned(),
                false => shown_default(&entries, default),
            },
            range: entries
                .first()
                .map(|entry| entry.range.to_string())
                .unwrap_or_default(),
            meaning: text(&field["description"]),
            key,
        });
    }
}

/// The referenced definition, or the field itself.
fn target<'a>(field: &'a Value, root: &'a Value) -> &'a Value {
    type_name(field).map_or(field, |name| &root["$defs"][name])
}

/// The name of the field's type, if it is one of ours.
fn type_name(field: &Value) -> Option<&str> {
    field["$ref"].as_str()?.rsplit('/').next()
}

fn value(field: &Value, target: &Value) -> String {
    match type_name(field) {
        Some("Millis") => return "time".to_owned(),
        Some("Bytes") => return "size".to_owned(),
        Some("Fraction") => return "fraction".to_owned(),
        Some("Amount") => return "size or fraction".to_owned(),
        _ => {}
    }
    let variants = target["oneOf"].as_array().into_iter().flatten();
    let words: Vec<&str> = variants.filter_map(|it| it["const"].as_str()).collect();
    if !words.is_empty() {
        return format!("`{}`", words.join("\\|"));
    }
    // The type of an optional field is a list with `null`.
    let kind = match &target["type"] {
        Value::Array(kinds) => kinds[0].as_str(),
        kind => kind.as_str(),
    };
    match kind {
        Some("boolean") => "`true\\|false`",
        Some("string") => "text",
        Some("array") if target["items"]["type"] == "string" => "list of texts",
        Some("array") => "list of fractions",
        _ => "number",
    }
    .to_owned()
}

fn unit(key: &str, type_name: Option<&str>) -> &'static str {
    match type_name {
        Some("Bytes") if is_rate(key) => "bytes/s",
        Some("Bytes" | "Amount") => "bytes",
        _ if key.contains("_us_") => "µs",
        _ if key.ends_with("_percent") => "%",
        _ => "",
    }
}

fn is_rate(key: &str) -> bool {
    key.contains("per_second") || key.ends_with("_rate") || key.ends_with("_io")
}

fn shown_default(entries: &[&Entry], default: &Value) -> String {
    if !entries.is_empty() {
        // The three pressures form one key.
        let values: Vec<String> = entries.iter().map(|it| it.value.to_string()).collect();
        return values.join(", ");
    }
    match default {
        Value::String(text) => format!("`{text}`"),
        Value::Bool(on) => on.to_string(),
        Value::Array(items) if !items.is_empty() => {
            let texts: Vec<String> = items.iter().map(|it| format!("`{}`", text(it))).collect();
            texts.join(", ")
        }
        _ => "–".to_owned(),
    }
}

fn text(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The ratio of churning guests, and the settings of each reporting policy, which are declared in `device-facts`.
fn reporting(entries: &[Entry]) -> Vec<Row> {
    let entry = |key: &str| {
        let key = format!("reporting.{key}");
        let entry = entries.iter().find(|entry| entry.key == key);
        entry.expect("every number has a range")
    };
    let row = |key: String, value: &str, unit, meaning: &str| Row {
        value: value.to_owned(),
        unit,
        default: entry(&key).value.to_string(),
        range: entry(&key).range.to_string(),
        meaning: meaning.to_owned(),
        key,
    };
    let churn = "Ratio of repopulated to discarded memory above which a guest counts as churning";
    let mut rows = vec![row("churn_percent".to_owned(), "number", "%", churn)];
    for policy in ["relaxed", "calm", "eager"] {
        rows.extend(ReportingPolicy::TABLE.iter().map(|setting| {
            let (value, unit) = match setting.unit.name() {
                "bytes" if is_rate(setting.name) => ("size", "bytes/s"),
                "bytes" => ("size", "bytes"),
                unit => ("number", unit),
            };
            let meaning = setting.meaning.replace(", milliseconds", "");
            row(format!("{policy}.{}", setting.name), value, unit, &meaning)
        }));
    }
    rows
}

/// All numeric keys with their defaults; `policy` is the prefix of a policy's keys.
fn entries(policy: &str) -> Vec<Entry> {
    let mut all = ranges::entries("agent.", AGENT, &AgentSection::default());
    all.extend(ranges::config(&Config::default()));
    all.extend(ranges::entries(policy, POLICY, &PolicyConfig::default()));
    let store = StoreSection::default();
    let (Millis(min), Millis(max)) = StoreSection::LEASE;
    let time = |key: &str, Millis(value), range| Entry {
        key: format!("store.{key}"),
        range,
        value: ranges::Quantity::Time(value),
    };
    all.push(time("lease", store.lease, Range::Time(min, max)));
    all.push(time("deadline", store.deadline, Range::Time(1, max)));
    all
}

mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::ranges::Quantity;

    #[test]
    fn page_is_that_of_the_table() {
        let update = "cargo test -p fleet page_is_that_of_the_table";
        test_docs::expect_page("docs/fleet-settings.md", update, page);
    }

    /// Every key, prefixed with its sections.
    fn all_leaves(table: &toml::Table, path: &str, keys: &mut BTreeSet<String>) {
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => all_leaves(inner, &format!("{path}{key}."), keys),
                _ => drop(keys.insert(format!("{path}{key}"))),
            }
        }
    }

    /// A file with have every key that a file may have.
    fn of_file() -> toml::Table {
        let mut config = AgentConfig::default();
        let agent = &mut config.agent;
        agent.listen = Some(([127, 0, 0, 1], 1).into());
        agent.token_file = Some("/t".into());
        agent.standby_dir = Some("/s".into());
        agent.move_address = Some([127, 0, 0, 1].into());
        agent.move_tls_dir = Some("/m".into());
        agent.tls_certificate = Some("/c".into());
        agent.tls_key = Some("/k".into());
        let store = &mut config.store;
        let files = [
            &mut store.ca_file,
            &mut store.certificate,
            &mut store.key,
            &mut store.password_file,
        ];
        files.into_iter().for_each(|file| *file = Some("/f".into()));
        store.user = Some("u".to_owned());
        store.host = Some("h".to_owned());
        config.planning.host.cgroup = Some("/g".to_owned());
        config
            .planning
            .policy
            .insert("NAME".to_owned(), PolicyConfig::default());
        config.to_toml().parse().unwrap()
    }

    #[test]
    fn page_has_every_key_of_every_section() {
        let table = of_file();
        let mut keys = BTreeSet::new();
        for Section { heading, rows } in sections() {
            let section = heading.trim_matches(['[', ']']);
            keys.extend(rows.into_iter().map(|row| format!("{section}.{}", row.key)));
        }
        let mut expected = BTreeSet::from(["vm.name".to_owned(), "vm.policy".to_owned()]);
        all_leaves(&table, "", &mut expected);
        assert_eq!(keys, expected);
    }

    #[test]
    fn page_shows_values_units_and_defaults_in_the_syntax_of_the_file() {
        let page = page("");
        for row in [
            "| `scan` | time |  | 2s | 100ms to 1h | 0.1.0 | Time between two scans for sockets |",
            "| `dead_band` | size | bytes | 16MiB | 1MiB to 64TiB | 0.1.0 |",
            "| `stuck_rate` | size | bytes/s | 15MiB | 0 to 1TiB | 0.1.0 |",
            "| `reserve` | size or fraction | bytes | 3% | 0 to 64TiB, or 0% to 90% | 0.1.0 |",
            "| `on_stop` | `keep\\|restore` |  | `keep` |  | 0.1.0 |",
            "| `pressure` | list of fractions |  | 1%, 5%, 20% | 0.01% to 100% | 0.1.0 |",
            "| `calm.age_ms_min` | number | ms | 10000 | 0 to 3600000 | 0.1.0 |",
            "| `yellow.enter` | fraction |  | 20% | 0% to 100% | 0.1.0 |",
            "| `token_file` | text |  | – |  | 0.1.0 |",
            "| `policy` | text |  | required |  | 0.1.0 |",
        ] {
            assert!(page.contains(row), "{row} is missing:\n{page}");
        }
        let unexplained = |line: &&str| line.starts_with("| `") && line.ends_with("|  |");
        assert_eq!(page.lines().find(unexplained), None);
    }

    /// Keys of numbers and of quantities, prefixed with their sections.
    fn leaves(table: &toml::Table, section: &str, keys: &mut BTreeSet<String>) {
        for (key, value) in table {
            let path = format!("{section}{key}");
            match value {
                toml::Value::Table(inner) => leaves(inner, &format!("{path}."), keys),
                toml::Value::String(text) if !text.starts_with(|c: char| c.is_ascii_digit()) => {}
                toml::Value::Boolean(_) => {}
                toml::Value::Array(values) if values.iter().all(toml::Value::is_str) => {}
                _ => {
                    keys.insert(path);
                }
            }
        }
    }

    /// All settings with their defaults, and one policy, as a file.
    fn defaults() -> String {
        let mut config = AgentConfig::default();
        let policy = PolicyConfig::default();
        config.planning.policy.insert("default".to_owned(), policy);
        config.to_toml()
    }

    fn all_keys() -> BTreeSet<String> {
        let table: toml::Table = defaults().parse().unwrap();
        let mut keys = BTreeSet::new();
        leaves(&table, "", &mut keys);
        keys
    }

    #[test]
    fn every_numeric_key_has_a_range() {
        let ranges = entries("policy.default.");
        for key in all_keys() {
            assert!(ranges.iter().any(|it| it.key == key), "{key} has no range");
        }
        assert!(all_keys().len() > 60);
    }

    /// The defaults with one key changed, as a file.
    fn with(key: &str, value: &str) -> String {
        let (section, name) = key.rsplit_once('.').unwrap();
        let mut here = String::new();
        let mut changed = false;
        let lines: Vec<String> = defaults()
            .lines()
            .map(|line| {
                if let Some(header) = line.strip_prefix('[') {
                    header.trim_end_matches(']').clone_into(&mut here);
                }
                if here == section && line.starts_with(&format!("{name} = ")) {
                    changed = true;
                    format!("{name} = {value}")
                } else {
                    line.to_owned()
                }
            })
            .collect();
        assert!(changed, "{key} is not in the defaults");
        lines.join("\n")
    }

    fn load(text: &str) -> Result<(), String> {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("agent.toml");
        std::fs::write(&file, text).unwrap();
        crate::agent_config::load(&file, true)
            .map(drop)
            .map_err(|error| api::error_line(&error))
    }

    #[test]
    fn no_key_takes_what_makes_no_sense() {
        for key in all_keys() {
            for value in [
                "-1",
                "nan",
                "inf",
                "\"\"",
                "\"5 parsecs\"",
                "18446744073709551615",
                "\"18446744073709551615ms\"",
                "\"99999999TiB\"",
                "true",
                "[]",
            ] {
                let text = with(&key, value);
                let refusal = load(&text).expect_err(&format!("{key} = {value}"));
                let name = key.rsplit('.').next().unwrap();
                assert!(
                    refusal.contains(name),
                    "{text} is refused without its name: {refusal}"
                );
            }
        }
    }

    #[test]
    fn zero_is_taken_exactly_where_the_range_says() {
        for Entry { key, range, .. } in entries("policy.default.") {
            // The values of the list must be ascending, and the store has its own messages.
            if key == "thresholds.pressure" || key.starts_with("store.") {
                continue;
            }
            let (text, zero) = match range {
                Range::Time(..) => ("\"0ms\"", Quantity::Time(0)),
                Range::Size(..) | Range::Amount(..) => ("0", Quantity::Size(0)),
                Range::Part(..) => ("0.0", Quantity::Part(0.0)),
                Range::Count(..) => ("0", Quantity::Count(0)),
                Range::Number(..) => ("0.0", Quantity::Number(0.0)),
            };
            let refusal = load(&with(&key, text)).err();
            let named = format!("{key} must be {range}");
            let ranged = refusal.as_ref().is_some_and(|text| text.contains(&named));
            assert_eq!(ranged, !range.allows(zero), "{key}: {refusal:?}");
        }
    }
}
