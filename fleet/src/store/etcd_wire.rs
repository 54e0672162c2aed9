//! etcd's JSON interface: requests and responses.
//!
//! It is the protocol-buffer interface written as JSON: keys and values in base64, and every 64-bit number as a string.
//! Fields with default values are omitted, so a failed comparison is a response without `succeeded`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::{LeaseId, Pair, Revision, StoreError, Txn, Write};

/// gRPC's code for "not found", which is returned for an expired lease.
pub(super) const NOT_FOUND: u32 = 5;
/// Codes that mean that nothing was done: malformed request (3), limit exceeded (8, 11), failed precondition (9), no
/// permission (7, 16), unimplemented (12).
pub(super) const NOT_DONE: [u32; 7] = [3, 7, 8, 9, 11, 12, 16];

/// Whether an error means that etcd does not or no longer accept the token (16), or that it predates a change of users
/// or rights (3, `etcdserver: revision of auth store is old`).
pub(super) fn is_login_over(code: u32, message: &str) -> bool {
    code == 16 || code == 3 && message.contains("auth store is old")
}

/// Requests a token.
pub(super) fn authenticate(user: &str, password: &str) -> Value {
    json!({ "name": user, "password": password })
}

/// A token; etcd also sends a header, which is ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AuthAnswer {
    pub(super) token: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Header {
    #[serde(deserialize_with = "number")]
    pub(super) revision: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RangeAnswer {
    pub(super) header: Header,
    pub(super) kvs: Vec<KeyValue>,
    pub(super) more: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct KeyValue {
    pub(super) key: String,
    pub(super) value: String,
    #[serde(deserialize_with = "number")]
    pub(super) mod_revision: u64,
    #[serde(deserialize_with = "number")]
    pub(super) lease: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TxnAnswer {
    pub(super) header: Header,
    pub(super) succeeded: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LeaseAnswer {
    #[serde(rename = "ID", deserialize_with = "number")]
    pub(super) id: u64,
    /// Absent for an expired lease.
    #[serde(rename = "TTL", deserialize_with = "number")]
    pub(super) ttl: u64,
}

/// Streamed responses are wrapped.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Streamed<T: Default> {
    pub(super) result: T,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchAnswer {
    pub(super) canceled: bool,
    pub(super) events: Vec<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Failure {
    pub(super) message: String,
    pub(super) code: u32,
}

/// A 64-bit number: a string by the rules of protocol buffers, but a number is accepted as well.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Number(i64),
    }
    let signed = match Either::deserialize(deserializer)? {
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom)?,
        Either::Number(number) => number,
    };
    u64::try_from(signed).map_err(serde::de::Error::custom)
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

fn decode(text: &str) -> Result<Vec<u8>, StoreError> {
    STANDARD.decode(text).map_err(|error| StoreError::Form {
        why: format!("{text:?} is not base64: {error}"),
    })
}

/// The end of the range of keys that begin with `prefix`: the prefix with its last byte raised.
fn range_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // UTF-8 has no byte 0xff, so the last one can always be raised; an empty prefix means all keys, in etcd's notation.
    match end.last_mut() {
        Some(last) => *last += 1,
        None => end.push(0),
    }
    end
}

/// `/v3/kv/range`: one page.
pub(super) fn range(prefix: &str, from: Option<&str>, at: Revision, limit: usize) -> Value {
    // The key immediately after the last one of the previous page.
    let start = from.map_or_else(
        || prefix.as_bytes().to_vec(),
        |last| [last.as_bytes(), &[0]].concat(),
    );
    json!({
        "key": encode(start),
        "range_end": encode(range_end(prefix)),
        "limit": limit.to_string(),
        "revision": at.0.to_string(),
    })
}

pub(super) fn pair(found: &KeyValue) -> Result<Pair, StoreError> {
    let key = decode(&found.key)?;
    Ok(Pair {
        key: String::from_utf8(key).map_err(|error| StoreError::Form {
            why: format!("a key is not text: {error}"),
        })?,
        value: decode(&found.value)?,
        changed: Revision(found.mod_revision),
        lease: lease_of(found.lease),
    })
}

pub(super) fn lease_of(id: u64) -> Option<LeaseId> {
    i64::try_from(id).ok().filter(|id| *id != 0).map(LeaseId)
}

/// `/v3/kv/txn`
pub(super) fn txn(txn: &Txn) -> Value {
    let compare: Vec<Value> = txn
        .expect
        .iter()
        .map(|(key, changed)| {
            json!({
                "key": encode(key),
                "target": "MOD",
                "result": "EQUAL",
                "mod_revision": changed.0.to_string(),
            })
        })
        .collect();
    let success: Vec<Value> = txn.writes.iter().map(write).collect();
    json!({ "compare": compare, "success": success })
}

fn write(write: &Write) -> Value {
    match write {
        Write::Put { key, value, lease } => json!({ "request_put": {
            "key": encode(key),
            "value": encode(value),
            "lease": lease.map_or(0, |lease| lease.0).to_string(),
        }}),
        Write::Delete { key } => json!({ "request_delete_range": { "key": encode(key) } }),
    }
}

/// `/v3/lease/grant`
pub(super) fn grant(seconds: u64) -> Value {
    json!({ "TTL": seconds.to_string() })
}

/// `/v3/lease/keepalive` and `/v3/lease/revoke`
pub(super) fn lease(lease: LeaseId) -> Value {
    json!({ "ID": lease.0.to_string() })
}

/// `/v3/watch`
pub(super) fn watch(prefix: &str, after: Revision) -> Value {
    json!({ "create_request": {
        "key": encode(prefix),
        "range_end": encode(range_end(prefix)),
        "start_revision": (after.0 + 1).to_string(),
    }})
}

/// Whether these bytes are a valid response of any kind.
#[cfg(any(test, fuzzing))]
pub(super) fn reads_answer(body: &[u8]) -> bool {
    let range: Option<RangeAnswer> = serde_json::from_slice(body).ok();
    if let Some(range) = &range {
        // A key or value that is not base64 is rejected.
        for found in &range.kvs {
            pair(found).ok();
        }
    }
    range.is_some()
        || serde_json::from_slice::<TxnAnswer>(body).is_ok()
        || serde_json::from_slice::<LeaseAnswer>(body).is_ok()
        || serde_json::from_slice::<Streamed<WatchAnswer>>(body).is_ok()
        || serde_json::from_slice::<Failure>(body).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_are_strings_and_defaults_are_absent() {
        let answer: TxnAnswer =
            serde_json::from_str(r#"{"header":{"revision":"9007199254740993"}}"#).unwrap();
        assert!(!answer.succeeded);
        assert_eq!(answer.header.revision, 9_007_199_254_740_993);
        let over: Streamed<LeaseAnswer> =
            serde_json::from_str(r#"{"result":{"header":{},"ID":"123"}}"#).unwrap();
        assert_eq!((over.result.id, over.result.ttl), (123, 0));
    }

    #[test]
    fn prefix_is_a_range_and_a_page_begins_behind_the_last_key() {
        let first = range("/a/", None, Revision(0), 2);
        assert_eq!(first["key"], encode("/a/"));
        assert_eq!(first["range_end"], encode("/a0"));
        let next = range("/a/", Some("/a/k"), Revision(7), 2);
        assert_eq!(next["key"], encode("/a/k\0"));
        assert_eq!(next["revision"], "7");
    }

    #[test]
    fn key_value_comes_back_as_a_pair() {
        let found: KeyValue = serde_json::from_str(
            r#"{"key":"L2EveA==","create_revision":"2","mod_revision":"3","version":"1","value":"aGk=","lease":"4390624839308028936"}"#,
        )
        .unwrap();
        let pair = pair(&found).unwrap();
        assert_eq!(
            (pair.key.as_str(), pair.value.as_slice()),
            ("/a/x", &b"hi"[..])
        );
        assert_eq!(pair.changed, Revision(3));
        assert_eq!(pair.lease, Some(LeaseId(4_390_624_839_308_028_936)));
    }
}
