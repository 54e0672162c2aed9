//! Wraps the saved state of each part in an envelope with the part's version.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Error as _, IntoDeserializer, MapAccess, Visitor,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::{Part, StateError};

const VERSION: &str = "version";

/// The fields of a state, by name.
pub type Fields = Map<String, Value>;

/// Moves the fields `names` into the only element of a new list `list`: the upgrade of a part that a machine had once
/// and can now have several times.
pub fn wrap_in_list(fields: &mut Fields, names: &[&str], list: &str) {
    let element = names.iter().filter_map(|name| fields.remove_entry(*name));
    let element: Fields = element.collect();
    fields.insert(list.to_owned(), vec![element].into());
}

/// A state type: plain data, in the newest version's shape.
///
/// Derive the serde traits with `deny_unknown_fields`: a field this version does not have belongs to another version,
/// and dropping it silently would lose state that the guest relies on. Every type must serialise to a JSON object
/// without a field `version`.
pub trait State: Serialize + DeserializeOwned {
    /// The part's row in the table of versions.
    const PART: Part;

    /// Converts the fields of version `from` into those of version `from + 1`. Called for each step from a readable
    /// older version to the newest.
    ///
    /// # Errors
    /// A field has a value that the older version cannot have had.
    fn upgrade(from: u32, _fields: &mut Fields) -> Result<(), StateError> {
        // A part with more than one readable version overrides this.
        Err(unreadable(Self::PART, u64::from(from)))
    }
}

/// The state of a part with its version: `{ "version": n, … }`. Kept as text, which is copied as it is into the state of
/// the part that contains this one.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Saved(Box<RawValue>);

impl<'de> Deserialize<'de> for Saved {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        match text.get().starts_with('{') {
            true => Ok(Self(text)),
            false => Err(D::Error::custom("a saved state is an object")),
        }
    }
}

/// Equal content; the order of fields does not matter.
impl PartialEq for Saved {
    fn eq(&self, other: &Self) -> bool {
        let fields = |saved: &Self| serde_json::from_str::<Fields>(saved.0.get()).ok();
        self.0.get() == other.0.get() || fields(self).is_some_and(|own| fields(other) == Some(own))
    }
}

impl Eq for Saved {}

#[derive(Serialize)]
struct Envelope<'a, S> {
    version: u32,
    #[serde(flatten)]
    state: &'a S,
}

impl Saved {
    /// Wraps a state, in the newest version of its part.
    ///
    /// # Panics
    /// The type does not serialise to a JSON object, which is a defect in its definition.
    pub fn of<S: State>(state: &S) -> Self {
        let version = S::PART.newest;
        match serde_json::value::to_raw_value(&Envelope { version, state }) {
            Ok(text) => Self(text),
            Err(error) => panic!("the state of {} cannot be saved: {error}", S::PART.name),
        }
    }

    /// The JSON text.
    pub fn into_text(self) -> String {
        Box::<str>::from(self.0).into_string()
    }

    /// Reads the state of one part.
    ///
    /// # Errors
    /// [`StateError::UnreadableVersion`] and [`StateError::Malformed`]. The part itself checks the values.
    pub fn read<S: State>(&self) -> Result<S, StateError> {
        match read_newest(self.0.get()) {
            Some(state) => Ok(state),
            None => self.upgrade(),
        }
    }

    /// As [`Saved::read`], for every readable version, and with the reason for which the state is not readable.
    fn upgrade<S: State>(&self) -> Result<S, StateError> {
        let part = S::PART;
        let malformed = |source| StateError::Malformed {
            part: part.name,
            source,
        };
        let mut fields: Fields = serde_json::from_str(self.0.get()).map_err(malformed)?;
        // A missing or non-numeric version was never written by this program.
        let found = fields.remove(VERSION);
        let found = found.as_ref().and_then(Value::as_u64).unwrap_or(0);
        let version = u32::try_from(found)
            .ok()
            .filter(|version| (part.oldest..=part.newest).contains(version))
            .ok_or_else(|| unreadable(part, found))?;
        for from in version..part.newest {
            S::upgrade(from, &mut fields)?;
        }
        serde_json::from_value(Value::Object(fields)).map_err(malformed)
    }
}

/// Reads a state of the newest version without a tree of its values, which would take several times as long.
fn read_newest<S: State>(text: &str) -> Option<S> {
    let mut text = serde_json::Deserializer::from_str(text);
    text.deserialize_map(EnvelopeVisitor(PhantomData)).ok()
}

struct EnvelopeVisitor<S>(PhantomData<S>);

impl<'de, S: State> Visitor<'de> for EnvelopeVisitor<S> {
    type Value = S;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the state of {}", S::PART.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<S, A::Error> {
        let mut version = None;
        let fields = WithoutVersion {
            fields,
            version: &mut version,
        };
        let state = S::deserialize(MapAccessDeserializer::new(fields))?;
        match version == Some(S::PART.newest) {
            true => Ok(state),
            false => Err(A::Error::custom("it has another version")),
        }
    }
}

/// The fields of an envelope, from which the version is taken out.
struct WithoutVersion<'a, A> {
    fields: A,
    version: &'a mut Option<u32>,
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for WithoutVersion<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        while let Some(Key(key)) = self.fields.next_key()? {
            if key != VERSION {
                return seed.deserialize(key.into_deserializer()).map(Some);
            }
            *self.version = Some(self.fields.next_value()?);
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.fields.next_value_seed(seed)
    }
}

fn unreadable(part: Part, found: u64) -> StateError {
    StateError::UnreadableVersion {
        part: part.name,
        found,
        oldest: part.oldest,
        newest: part.newest,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::Bytes;

    /// Version 1 is no longer readable, version 2 had no `colour`, version 3 is current.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct LampState {
        lit: bool,
        colour: String,
        data: Bytes,
    }

    impl State for LampState {
        const PART: Part = Part {
            name: "lamp",
            oldest: 2,
            newest: 3,
        };

        fn upgrade(from: u32, fields: &mut Fields) -> Result<(), StateError> {
            assert_eq!(from, 2);
            fields.insert("colour".into(), "white".into());
            Ok(())
        }
    }

    fn saved(value: Value) -> Saved {
        serde_json::from_value(value).unwrap()
    }

    fn saved_of_lamp() -> Saved {
        Saved::of(&LampState {
            lit: true,
            colour: "red".into(),
            data: Bytes::default(),
        })
    }

    #[test]
    fn state_survives_its_envelope() {
        let lamp = LampState {
            lit: true,
            colour: "red".into(),
            data: Bytes(vec![0, 255, 7]),
        };
        let envelope = Saved::of(&lamp);
        let text = serde_json::to_string(&envelope).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            json!({"version": 3, "lit": true, "colour": "red", "data": "AP8H"})
        );
        let back: Saved = serde_json::from_str(&text).unwrap();
        assert_eq!(back.read::<LampState>().unwrap(), lamp);
        assert_eq!(Saved::of(&lamp).into_text(), text);
    }

    #[test]
    fn older_readable_version_is_upgraded() {
        let lamp: LampState = saved(json!({"version": 2, "lit": false, "data": ""}))
            .read()
            .unwrap();
        assert_eq!(lamp.colour, "white");
    }

    #[test]
    fn fields_come_in_any_order() {
        for text in [
            r#"{"lit":true,"version":3,"colour":"red","data":""}"#,
            r#"{"col\u006fur":"red","lit":true,"data":"","version":3}"#,
        ] {
            let saved: Saved = serde_json::from_str(text).unwrap();
            assert_eq!(saved.read::<LampState>().unwrap().colour, "red", "{text}");
            assert_eq!(saved, saved_of_lamp(), "{text}");
        }
    }

    #[test]
    fn saved_state_is_an_object() {
        for text in ["3", "[]", "null", "\"{\"", "{\"version\":3"] {
            assert!(serde_json::from_str::<Saved>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn unreadable_versions_are_refused_by_name() {
        for version in [json!(1), json!(4), json!(u64::MAX), json!(-1), json!("3")] {
            let error = saved(json!({"version": version, "lit": true}))
                .read::<LampState>()
                .unwrap_err();
            assert!(
                matches!(error, StateError::UnreadableVersion { part: "lamp", .. }),
                "{error:?}"
            );
        }
        let error = saved(json!({"version": 4}))
            .read::<LampState>()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "state of lamp has version 4, readable versions are 2 to 3"
        );
    }

    #[test]
    fn missing_unknown_and_wrong_fields_are_refused_by_name() {
        for fields in [
            json!({"version": 3, "lit": true, "colour": "red"}),
            json!({"version": 3, "lit": true, "colour": "red", "data": "", "size": 1}),
            json!({"version": 3, "lit": 1, "colour": "red", "data": ""}),
            json!({"version": 3, "lit": true, "colour": "red", "data": "?"}),
        ] {
            let error = saved(fields).read::<LampState>().unwrap_err();
            assert!(
                matches!(error, StateError::Malformed { part: "lamp", .. }),
                "{error:?}"
            );
        }
    }
}
