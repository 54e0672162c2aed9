//! Damages a saved state systematically, or any JSON at random; the reader must reject it or keep working.

use serde_json::{Value, json};

use crate::Saved;

/// Values that have broken readers before.
fn nasty() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(-1),
        json!(0x7fff),
        json!(0xffff),
        json!(0x8000_0001_u64),
        json!(u64::from(u32::MAX)),
        json!(u64::MAX),
        json!(u64::MAX - 4095),
        json!(1.5),
        json!(""),
        json!("AAAA"),
        json!("zz"),
        json!([]),
        json!({}),
    ]
}

/// Calls `visit` with every state that differs from `saved` in one place: each value replaced by each problematic value
/// or by its neighbours, each field removed, each list truncated, doubled and reversed. Returns the number of states.
///
/// # Panics
/// `saved` is not JSON, which cannot happen.
pub fn damage(saved: &Saved, mut visit: impl FnMut(&Saved)) -> usize {
    let whole = serde_json::to_value(saved).expect("a saved state is JSON");
    let mut places = Vec::new();
    collect(&whole, String::new(), &mut places);
    let mut count = 0;
    for place in places {
        let old = whole.pointer(&place).expect("collected there").clone();
        for new in replacements(&old) {
            let mut damaged = whole.clone();
            *damaged.pointer_mut(&place).expect("collected there") = new;
            count += show(damaged, &mut visit);
        }
        let mut damaged = whole.clone();
        let (parent, key) = parent_of(&mut damaged, &place);
        if let Value::Object(fields) = parent {
            fields.remove(&key);
            fields.insert("surplus".into(), json!(0));
            count += show(damaged, &mut visit);
        }
    }
    count
}

/// Changes `whole` in one place, as the numbers of `next` decide: removes a field or an item, or replaces a value by any
/// number, by the value of another place, or as [`damage`] does.
///
/// # Panics
/// Never: places are collected first.
pub fn change(whole: &mut Value, mut next: impl FnMut() -> u8) {
    let mut places = Vec::new();
    collect(whole, String::new(), &mut places);
    let mut number = |bytes: u8| (0..bytes).fold(0, |sum, _| sum << 8 | u64::from(next()));
    let count = places.len() as u64;
    if count == 0 {
        return;
    }
    let place = &places[(number(2) % count) as usize];
    let choice = number(1) as u8;
    let new = match choice % 8 {
        0 => {
            match parent_of(whole, place) {
                (Value::Object(fields), key) => drop(fields.remove(&key)),
                (Value::Array(items), key) => {
                    items.remove(key.parse().expect("an index"));
                }
                _ => unreachable!("a place has a parent"),
            }
            return;
        }
        1 | 2 => json!(number((choice >> 3) % 8 + 1)),
        3 => {
            let other = &places[(number(2) % count) as usize];
            whole.pointer(other).expect("collected there").clone()
        }
        _ => {
            let mut new = replacements(whole.pointer(place).expect("collected there"));
            let at = number(1) as usize % new.len();
            new.swap_remove(at)
        }
    };
    *whole.pointer_mut(place).expect("collected there") = new;
}

/// The object or list that has this place, and the field's name or the index there.
fn parent_of<'a>(whole: &'a mut Value, place: &str) -> (&'a mut Value, String) {
    let (parent, key) = place.rsplit_once('/').expect("pointers start with a slash");
    let parent = whole.pointer_mut(parent).expect("collected there");
    (parent, key.replace("~1", "/").replace("~0", "~"))
}

fn show(damaged: Value, visit: &mut impl FnMut(&Saved)) -> usize {
    match serde_json::from_value::<Saved>(damaged) {
        Ok(saved) => {
            visit(&saved);
            1
        }
        Err(_not_an_object) => 0,
    }
}

fn collect(value: &Value, place: String, places: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let key = key.replace('~', "~0").replace('/', "~1");
                collect(value, format!("{place}/{key}"), places);
            }
        }
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                collect(item, format!("{place}/{at}"), places);
            }
        }
        _ => {}
    }
    if !place.is_empty() {
        places.push(place);
    }
}

fn replacements(old: &Value) -> Vec<Value> {
    let mut new = nasty();
    match old {
        Value::Number(number) => {
            if let Some(number) = number.as_u64() {
                new.push(json!(number.wrapping_add(1)));
                new.push(json!(number.wrapping_sub(1)));
                new.push(json!(number ^ 1 << 4));
                new.push(json!(number | 1 << 63));
            }
        }
        Value::Array(items) => {
            let half = &items[..items.len() / 2];
            new.push(json!(half));
            new.push(json!([items.as_slice(), items.as_slice()].concat()));
            new.push(items.iter().rev().cloned().collect());
        }
        Value::String(text) => {
            new.push(json!(format!("{text}{text}")));
            new.push(json!(text.chars().rev().collect::<String>()));
        }
        _ => {}
    }
    new.retain(|new| new != old);
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_decide_about_the_change() {
        let whole = json!({"a": [1, 2], "b~/": {"c": "x"}});
        // Places: the items of `a`, `a`, `c`, `b~/`.
        for (numbers, changed) in [
            (&[0, 3, 0][..], json!({"a": [1, 2], "b~/": {}})),
            (&[0, 4, 0], json!({"a": [1, 2]})),
            (&[0, 0, 0], json!({"a": [2], "b~/": {"c": "x"}})),
            (&[0, 1, 9, 1, 2], json!({"a": [1, 258], "b~/": {"c": "x"}})),
            (&[0, 3, 3, 0, 2], json!({"a": [1, 2], "b~/": {"c": [1, 2]}})),
            (&[0, 0, 4, 0], json!({"a": [null, 2], "b~/": {"c": "x"}})),
        ] {
            let mut value = whole.clone();
            let mut numbers = numbers.iter().copied();
            change(&mut value, || numbers.next().unwrap_or(0));
            assert_eq!(value, changed);
        }
        let mut empty = json!({});
        change(&mut empty, || 0);
        assert_eq!(empty, json!({}));
    }
}
