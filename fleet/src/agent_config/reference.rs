//! Generates `docs/fleet-settings.md`, the reference of every numeric key. A test checks that the file is up to date.

use std::fmt::Write as _;

use super::{AGENT, AgentSection, StoreSection};
use crate::config::ranges::{self, Entry, POLICY, Quantity};
use crate::config::{Config, Millis, PolicyConfig};
use crate::model::{Bytes, Fraction};

/// The whole page.
pub fn reference() -> String {
    let mut page = String::from(
        "# Settings of ch-fleet\n\n\
         This page lists every numeric key of `agent.toml`, with its default and range. `ch-fleet config check`, the start of\n\
         the agent and a reload reject values outside the range. This page is generated from the table in\n\
         `fleet/src/config/ranges.rs`; a test compares the two. [fleet.md](fleet.md) explains the keys.\n\n\
         | Key | Default | Range |\n| --- | --- | --- |\n",
    );
    rows(&mut page, &entries("policy.NAME."));
    let store = StoreSection::default();
    let (lease_min, lease_max) = StoreSection::LEASE;
    let mut row = |key: &str, value: Millis, range: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "| `store.{key}` | {value} | {range} |");
    };
    row("lease", store.lease, format!("{lease_min} to {lease_max}"));
    row("deadline", store.deadline, "1ms to store.lease".to_owned());
    page
}

/// All keys with their defaults; `policy` is the prefix of a policy's keys.
fn entries(policy: &str) -> Vec<Entry> {
    let mut all = ranges::entries("agent.", AGENT, &AgentSection::default());
    all.extend(ranges::config(&Config::default()));
    all.extend(ranges::entries(policy, POLICY, &PolicyConfig::default()));
    all
}

fn rows(page: &mut String, entries: &[Entry]) {
    // The three pressures form one key.
    for same in entries.chunk_by(|one, next| one.key == next.key) {
        let values: Vec<String> = same.iter().map(|entry| shown(entry.value)).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            page,
            "| `{}` | {} | {} |",
            same[0].key,
            values.join(", "),
            same[0].range
        );
    }
}

fn shown(value: Quantity) -> String {
    match value {
        Quantity::Time(ms) => Millis(ms).to_string(),
        Quantity::Size(0) => "0".to_owned(),
        Quantity::Size(bytes) => Bytes(bytes).to_string(),
        Quantity::Part(part) => Fraction(part).to_string(),
        Quantity::Count(count) => count.to_string(),
        Quantity::Number(number) => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::agent_config::AgentConfig;
    use crate::config::ranges::Range;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/fleet-settings.md");

    #[test]
    fn page_is_that_of_the_table() {
        if std::env::var_os("UPDATE_GENERATED").is_some() {
            std::fs::write(PAGE, reference()).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(PAGE).unwrap(),
            reference(),
            "write it again: UPDATE_GENERATED=1 cargo test -p fleet page_is_that_of_the_table"
        );
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
        let page = reference();
        for key in all_keys() {
            let key = key.replace("policy.default.", "policy.NAME.");
            assert!(page.contains(&format!("`{key}`")), "{key} has no range");
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
            // The values of the list must be ascending.
            if key == "thresholds.pressure" {
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
