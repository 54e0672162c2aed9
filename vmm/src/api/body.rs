//! Reads request bodies. A body is bounded before it is parsed, because a few bytes of JSON can become a large
//! structure. Unknown keys are rejected or logged.

use api::{Endpoint, JsonSchema, Origin};
use serde::de::DeserializeOwned;

/// Maximum number of objects and arrays in a body. The largest useful configuration has 128 NUMA nodes with 128
/// distances each and a few lists. The largest structure that parses from `{}` takes less than 400 bytes, so all of
/// them together take less than 8 MiB.
const CONTAINERS_MAX: usize = 20_000;
/// Maximum number of values in a body, for long lists of numbers: 1024 vCPUs with 256 host CPUs each.
const VALUES_MAX: usize = 1 << 18;
/// Maximum number of unknown keys in a message.
const KEYS_NAMED_MAX: usize = 8;
/// Maximum length of a key in a message.
const KEY_CHARS_MAX: usize = 80;

/// Reasons for rejecting a body.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// More values than any configuration needs.
    #[error("the body has more than {CONTAINERS_MAX} objects and arrays or {VALUES_MAX} values")]
    TooManyValues,
    /// An array, which the parser would accept as an object without keys.
    #[error("the body must be a JSON object")]
    NotAnObject,
    /// Keys that this endpoint does not know.
    #[error("unknown key {keys}")]
    UnknownKeys {
        /// The first of them.
        keys: String,
    },
    /// Not JSON, or values of a wrong type.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Reads the body of a request to `endpoint`.
pub(super) fn read<T: DeserializeOwned + JsonSchema>(
    endpoint: Endpoint,
    body: &[u8],
) -> Result<T, BodyError> {
    check_amount(body)?;
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(BodyError::NotAnObject);
    }
    let mut unknown = Vec::new();
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_ignored::deserialize(&mut json, |path| {
        if unknown.len() < KEYS_NAMED_MAX {
            // A question mark stands for an optional value in the path.
            let key = path.to_string().replace(".?", "");
            unknown.push(key.chars().take(KEY_CHARS_MAX).collect::<String>());
        }
    })?;
    json.end()?;
    if unknown.is_empty() {
        return Ok(value);
    }
    let keys = list::<T>(&unknown);
    match endpoint.origin() {
        Origin::Ours => Err(BodyError::UnknownKeys { keys }),
        Origin::Upstream => {
            log::warn!("{} ignores the unknown key {keys}", endpoint.name());
            Ok(value)
        }
    }
}

/// Paths of keys that `T` does not have, each with the known key that it resembles.
fn list<T: JsonSchema>(keys: &[String]) -> String {
    let shown: Vec<_> = keys
        .iter()
        .map(|key| {
            let name = key.rsplit('.').next().unwrap_or(key);
            format!("{key:?}{}", api::suggestion_for::<T>(name))
        })
        .collect();
    shown.join(", ")
}

/// Counts values without allocating them. Invalid JSON is left to the parser.
fn check_amount(body: &[u8]) -> Result<(), BodyError> {
    let (mut containers, mut values) = (0, 1);
    let (mut in_string, mut escaped) = (false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => containers += 1,
            b',' if !in_string => values += 1,
            _ => {}
        }
    }
    if containers > CONTAINERS_MAX || values > VALUES_MAX {
        return Err(BodyError::TooManyValues);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
