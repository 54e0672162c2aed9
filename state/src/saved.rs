//! Wraps the saved state of each part in an envelope with the part's version.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
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

/// The state of a part with its version: `{ "version": n, … }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Saved(Fields);

impl Saved {
    /// Wraps a state, in the newest version of its part.
    ///
    /// # Panics
    /// The type does not serialise to a JSON object, which is a defect in its definition.
    pub fn of<S: State>(state: &S) -> Self {
        let Ok(Value::Object(mut fields)) = serde_json::to_value(state) else {
            panic!("the state of {} is not a plain structure", S::PART.name);
        };
        let before = fields.insert(VERSION.to_owned(), S::PART.newest.into());
        assert!(before.is_none(), "the version belongs to the envelope");
        Self(fields)
    }

    /// The JSON text of [`Saved::of`], without a copy of the parts in it.
    ///
    /// # Panics
    /// As for [`Saved::of`].
    pub fn text_of<S: State>(state: &S) -> String {
        let fields = serde_json::to_string(state).unwrap_or_default();
        let Some(fields) = fields.strip_prefix('{') else {
            panic!("the state of {} is not a plain structure", S::PART.name);
        };
        let separator = if fields == "}" { "" } else { "," };
        format!("{{\"{VERSION}\":{}{separator}{fields}", S::PART.newest)
    }

    /// Reads the state of one part.
    ///
    /// # Errors
    /// [`StateError::UnreadableVersion`] and [`StateError::Malformed`]. The part itself checks the values.
    pub fn read<S: State>(&self) -> Result<S, StateError> {
        self.clone().into_state()
    }

    /// As [`Saved::read`], without a copy.
    ///
    /// # Errors
    /// As for [`Saved::read`].
    pub fn into_state<S: State>(self) -> Result<S, StateError> {
        let part = S::PART;
        let mut fields = self.0;
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
        serde_json::from_value(Value::Object(fields)).map_err(|source| StateError::Malformed {
            part: part.name,
            source,
        })
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
        let text = Saved::text_of(&lamp);
        assert_eq!(serde_json::from_str::<Saved>(&text).unwrap(), envelope);
    }

    #[test]
    fn older_readable_version_is_upgraded() {
        let lamp: LampState = saved(json!({"version": 2, "lit": false, "data": ""}))
            .read()
            .unwrap();
        assert_eq!(lamp.colour, "white");
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
