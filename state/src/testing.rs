//! Damages a saved state systematically; the reader must reject it or keep working.

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
        let (parent, key) = place.rsplit_once('/').expect("pointers start with a slash");
        let mut damaged = whole.clone();
        if let Some(Value::Object(fields)) = damaged.pointer_mut(parent) {
            fields.remove(&key.replace("~1", "/").replace("~0", "~"));
            fields.insert("surplus".into(), json!(0));
            count += show(damaged, &mut visit);
        }
    }
    count
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
