//! Ethernet addresses.

use std::borrow::Cow;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// Reason why a string is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not an Ethernet address like 12:34:56:78:90:ab")]
pub struct MacAddrError {
    /// The text.
    pub text: String,
}

/// An Ethernet address, written as six lower-case pairs of hexadecimal digits with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A new locally administered unicast address.
    ///
    /// The address only needs to be unique on one network. The random keys that the standard library generates for its
    /// hash maps suffice for that.
    pub fn random_local() -> Self {
        let [a, b, c, d, e, f, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
        Self([(a & 0b1111_1100) | 0b10, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || MacAddrError {
            text: text.to_owned(),
        };
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs
                .next()
                .filter(|pair| pair.len() == 2)
                .ok_or_else(malformed)?;
            // `from_str_radix` would accept a sign in place of the first digit.
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| malformed())?;
        }
        if pairs.next().is_some() {
            return Err(malformed());
        }
        Ok(Self(bytes))
    }
}

impl JsonSchema for MacAddr {
    fn schema_name() -> Cow<'static, str> {
        "MacAddr".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "mac"})
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mac_text_is_read_and_written_back_in_lower_case() {
        let mac: MacAddr = "12:34:56:78:90:AB".parse().unwrap();
        assert_eq!(mac.0, [0x12, 0x34, 0x56, 0x78, 0x90, 0xab]);
        assert_eq!(mac.to_string(), "12:34:56:78:90:ab");
    }

    #[test]
    fn mac_malformed_text_is_refused() {
        for text in [
            "",
            "12",
            "12:34:56:78:90",
            "12:34:56:78:90:ab:cd",
            "12:34:56:78:90:+b",
            "1:2:3:4:5:6",
            "12-34-56-78-90-ab",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn mac_random_is_local_unicast() {
        for _ in 0..64 {
            assert_eq!(MacAddr::random_local().0[0] & 0b11, 0b10);
        }
    }
}
