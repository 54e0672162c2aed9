//! Combines figures of several turns and of two VMMs.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// The keys of the figures of each VMM, in the order of the subjects.
const NAMES: [&str; 2] = ["ours", "other"];
const RATIO: &str = "other_to_ours";

/// Combines the turns of each VMM into one value of the same shape.
///
/// With several turns, a number becomes its median with minimum and maximum. With two VMMs, it becomes one of each and
/// their ratio; a figure that only one of them has stays alone.
pub(crate) fn side_by_side(taken: &[Vec<Value>]) -> Value {
    let turns: Vec<Vec<&Value>> = taken.iter().map(|turns| turns.iter().collect()).collect();
    join(&turns)
}

fn join(taken: &[Vec<&Value>]) -> Value {
    let mut keys: Vec<&String> = Vec::new();
    for map in taken.iter().flatten().filter_map(|value| value.as_object()) {
        for key in map.keys() {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    if keys.is_empty() {
        return leaf(taken);
    }
    let part = |key: &String| -> Vec<Vec<&Value>> {
        let of = |turns: &Vec<&'_ Value>| turns.iter().filter_map(|turn| turn.get(key)).count();
        debug_assert!(taken.iter().any(|turns| of(turns) > 0));
        taken
            .iter()
            .map(|turns| turns.iter().filter_map(|turn| turn.get(key)).collect())
            .collect()
    };
    let joined = keys.iter().map(|key| ((*key).clone(), join(&part(key))));
    Value::Object(joined.collect())
}

fn leaf(taken: &[Vec<&Value>]) -> Value {
    if let [ours] = taken {
        return spread(ours);
    }
    let mut row = Map::new();
    for (name, turns) in NAMES.iter().zip(taken) {
        row.insert((*name).into(), spread(turns));
    }
    if let [Some(ours), Some(other)] = [0, 1].map(|index| median(&numbers(&taken[index])))
        && ours != 0.0
    {
        row.insert(RATIO.into(), json!(rounded(other / ours)));
    }
    Value::Object(row)
}

/// Combines the turns of one VMM; with a single turn, numbers are unchanged.
fn spread(turns: &[&Value]) -> Value {
    let values = numbers(turns);
    match (turns, median(&values)) {
        ([], _) => Value::Null,
        ([only], _) => (*only).clone(),
        (_, Some(median)) => json!({
            "median": median,
            "min": values.first(),
            "max": values.last(),
        }),
        // Not a number: the first value represents all.
        ([first, ..], None) => (*first).clone(),
    }
}

/// Sorted.
fn numbers(turns: &[&Value]) -> Vec<f64> {
    let mut values: Vec<f64> = turns.iter().filter_map(|turn| turn.as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of sorted values; the upper one of two in the middle.
fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

/// Rounds to three decimals; more would be noise.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Human-readable: one line per number of a combined value.
pub(crate) fn table(name: &str, joined: &Value) -> String {
    let mut text = String::new();
    rows(&mut text, name, joined);
    text
}

fn rows(text: &mut String, name: &str, value: &Value) {
    let Some(map) = value.as_object() else {
        return;
    };
    if let [Some(ours), Some(other)] = NAMES.map(|name| map.get(name)) {
        let ratio = map.get(RATIO).map_or_else(String::new, Value::to_string);
        let [ours, other] = [ours, other].map(cell);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<48} {ours:>16} {other:>16} {ratio:>8}");
        return;
    }
    for (key, value) in map {
        rows(text, &format!("{name}.{key}"), value);
    }
}

fn cell(value: &Value) -> String {
    match value.get("median").unwrap_or(value) {
        Value::Null => "–".into(),
        Value::Number(number) => number.to_string(),
        _ => "…".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_turn_of_one_vmm_stays_as_it_is() {
        let value = json!({ "bytes": 5, "deep": { "us": 1.5, "list": [1, 2] } });
        assert_eq!(side_by_side(&[vec![value.clone()]]), value);
    }

    #[test]
    fn several_turns_of_one_vmm_give_a_spread() {
        let turns = [3.0, 1.0, 2.0].map(|ms| json!({ "ms": ms, "list": [ms] }));
        assert_eq!(
            side_by_side(&[turns.to_vec()]),
            json!({ "ms": { "median": 2.0, "min": 1.0, "max": 3.0 }, "list": [3.0] })
        );
    }

    #[test]
    fn two_vmms_stand_side_by_side_with_their_ratio() {
        let ours = vec![json!({ "a": { "us": 4 }, "only": 1 })];
        let other = vec![json!({ "a": { "us": 6 } })];
        let joined = side_by_side(&[ours, other]);
        assert_eq!(
            joined,
            json!({
                "a": { "us": { "ours": 4, "other": 6, "other_to_ours": 1.5 } },
                "only": { "ours": 1, "other": null },
            })
        );
        let table = table("x", &joined);
        let first: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
        assert_eq!(first, ["x.a.us", "4", "6", "1.5"]);
    }
}
