//! Bounds the lists and sections of a request while they are read.
//!
//! A few bytes of JSON can become a large structure: `{}` becomes a disk configuration of some 400 bytes. A list is
//! therefore rejected at the first item beyond its limit, and the rest is never built.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Maximum number of items in a list: the number of CPUs that Linux supports (`NR_CPUS`), because lists of CPUs are the
/// longest useful lists.
pub(crate) const ITEMS_MAX: usize = 8192;
/// Maximum number of values in a section that is stored unparsed.
const SECTION_VALUES_MAX: usize = 1024;

/// A list, for `deserialize_with`.
pub(crate) fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(Items(PhantomData))
}

/// A list that may be `null`, for `deserialize_with`.
pub(crate) fn optional_list<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list = Option::<List<T>>::deserialize(deserializer)?;
    Ok(list.map(|List(items)| items))
}

/// A section without a type, for `deserialize_with`.
pub(crate) fn section<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Value>, D::Error> {
    let mut left = SECTION_VALUES_MAX;
    let value = serde::de::DeserializeSeed::deserialize(AnyValue(&mut left), deserializer)?;
    Ok((!value.is_null()).then_some(value))
}

struct List<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list(deserializer).map(Self)
    }
}

struct Items<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            if items.len() == ITEMS_MAX {
                let text = format_args!("a list must have at most {ITEMS_MAX} items");
                return Err(A::Error::custom(text));
            }
            items.push(item);
        }
        Ok(items)
    }
}

/// Reads any value and decrements the number of values still allowed.
struct AnyValue<'a>(&'a mut usize);

impl AnyValue<'_> {
    fn count<E: Error>(&mut self) -> Result<(), E> {
        let text = "a section that is not supported must have at most";
        *self.0 = self
            .0
            .checked_sub(1)
            .ok_or_else(|| E::custom(format_args!("{text} {SECTION_VALUES_MAX} values")))?;
        Ok(())
    }
}

impl<'de> serde::de::DeserializeSeed<'de> for AnyValue<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(mut self, deserializer: D) -> Result<Value, D::Error> {
        self.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(AnyValue(&mut *self.0))? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(key) = map.next_key()? {
            members.insert(key, map.next_value_seed(AnyValue(&mut *self.0))?);
        }
        Ok(members.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::VmConfig;

    fn read(body: &str) -> Result<VmConfig, String> {
        serde_json::from_str(body).map_err(|error| error.to_string())
    }

    #[test]
    fn list_is_refused_at_its_first_item_too_many() {
        let disks = |count| format!("{{\"disks\":[{}]}}", vec!["{}"; count].join(","));
        let config = read(&disks(ITEMS_MAX)).unwrap();
        assert_eq!(config.disks.unwrap().len(), ITEMS_MAX);
        let error = read(&disks(ITEMS_MAX + 1)).unwrap_err();
        assert!(
            error.starts_with("a list must have at most 8192 items"),
            "{error}"
        );
        // The rest of the body is not parsed.
        let open = disks(ITEMS_MAX + 1).replace("]}", ",nonsense");
        assert!(read(&open).unwrap_err().starts_with("a list must have"));
    }

    #[test]
    fn every_list_of_a_request_is_bounded() {
        let items = |item: &str| vec![item; ITEMS_MAX + 1].join(",");
        let numa = |key: &str, item: &str| {
            format!(
                "{{\"numa\":[{{\"guest_numa_id\":0,\"{key}\":[{}]}}]}}",
                items(item)
            )
        };
        let cpus = format!("{{\"vcpu\":0,\"host_cpus\":[{}]}}", items("0"));
        for body in [
            format!("{{\"net\":[{}]}}", items("{}")),
            format!("{{\"net\":[{{\"fds\":[{}]}}]}}", items("0")),
            format!(
                "{{\"memory\":{{\"size\":0,\"zones\":[{}]}}}}",
                items(r#"{"id":"","size":0}"#)
            ),
            format!("{{\"numa\":[{}]}}", items(r#"{"guest_numa_id":0}"#)),
            numa("cpus", "0"),
            numa("distances", r#"{"destination":0,"distance":10}"#),
            numa("memory_zones", "\"\""),
            numa("pci_segments", "0"),
            format!("{{\"platform\":{{\"oem_strings\":[{}]}}}}", items("\"\"")),
            format!("{{\"platform\":{{\"iommu_segments\":[{}]}}}}", items("0")),
            format!("{{\"cpus\":{{\"boot_vcpus\":1,\"max_vcpus\":1,\"affinity\":[{cpus}]}}}}"),
            format!(
                "{{\"landlock_rules\":[{}]}}",
                items(r#"{"path":"","access":""}"#)
            ),
        ] {
            let error = read(&body).unwrap_err();
            assert!(
                error.starts_with("a list must have"),
                "{error}: {}",
                &body[..60]
            );
        }
        let change = format!("{{\"remove_alerts\":[{}]}}", items("\"\""));
        let change = serde_json::from_str::<crate::ReclaimThresholdsChange>(&change);
        assert!(
            change
                .unwrap_err()
                .to_string()
                .starts_with("a list must have")
        );
    }

    #[test]
    fn section_without_a_type_is_kept_as_it_came_up_to_a_bound() {
        let came = json!([{"tag": "t", "deep": {"a": [1, -1, 0.5, null, true, "ß"]}}]);
        let config = read(&format!("{{\"user_devices\":{came}}}")).unwrap();
        assert_eq!(config.user_devices, Some(came));
        assert_eq!(read("{\"user_devices\":null}").unwrap().user_devices, None);
        let members: Vec<String> = (0..SECTION_VALUES_MAX)
            .map(|key| format!("\"{key}\":1"))
            .collect();
        for section in [
            format!("[{}]", vec!["[]"; SECTION_VALUES_MAX].join(",")),
            format!("{{{}}}", members.join(",")),
        ] {
            let error = read(&format!("{{\"user_devices\":{section}}}")).unwrap_err();
            assert!(error.contains("at most 1024 values"), "{error}");
        }
    }
}
