//! Quantities with their units: bytes, fractions, and amounts that are one or the other.
//!
//! Configuration files contain them in human-readable form (`"256MiB"`, `"15%"`); JSON responses contain plain numbers
//! of bytes.

use std::fmt;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use byte_size::SizeError;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes. Arithmetic saturates, so that a guest's false figure cannot wrap around to a small one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Bytes(pub u64);

impl Bytes {
    /// No memory.
    pub const ZERO: Self = Self(0);

    /// `n` times 2^20 bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` times 2^30 bytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// This part of the bytes, rounded down.
    pub fn part(self, fraction: Fraction) -> Self {
        self.scale(fraction.0)
    }

    /// The bytes times `factor`, rounded down; a negative or undefined factor counts as 0.
    pub fn scale(self, factor: f64) -> Self {
        Self((self.0 as f64 * factor) as u64)
    }

    /// This as a fraction of `whole`; 0 if `whole` is 0.
    pub fn ratio(self, whole: Self) -> f64 {
        if whole.0 == 0 {
            0.0
        } else {
            self.0 as f64 / whole.0 as f64
        }
    }

    /// In at most five characters, for columns.
    fn short(self) -> String {
        let (value, unit) = api::scale_bytes(self.0, &["B", "K", "M", "G", "T", "P", "E"]);
        let decimals = usize::from(value < 9.95 && unit != "B");
        format!("{value:.decimals$}{unit}")
    }

    /// The distance between two amounts.
    pub fn distance(self, other: Self) -> Self {
        Self(self.0.abs_diff(other.0))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::ZERO, Add::add)
    }
}

/// For sentences; with `#`, the short form for columns.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            return f.pad(&self.short());
        }
        f.pad(&api::format_bytes(self.0))
    }
}

/// Reasons why a string is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// The text has no number.
    #[error("{0:?} does not start with a number")]
    NoNumber(String),
    /// Not a size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The unit of a fraction is unknown.
    #[error("unknown unit in {0:?}; use a fraction such as 15% or 0.15")]
    PartUnit(String),
    /// The unit of a time is missing or unknown.
    #[error("{0:?} needs a unit: ms, s, min or h")]
    TimeUnit(String),
}

/// Splits a string into its number and its unit.
pub(crate) fn split_number(text: &str) -> Result<(f64, &str), ParseQuantityError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number = text[..end]
        .parse::<f64>()
        .map_err(|_| ParseQuantityError::NoNumber(text.to_owned()))?;
    Ok((number, text[end..].trim()))
}

impl FromStr for Bytes {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(byte_size::parse_bytes(text)?))
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

/// A quantity in a file: a number, or a string with a unit.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or a text such as \"256MiB\" or \"15%\""
)]
enum NumberOrText {
    Whole(u64),
    Real(f64),
    Text(String),
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Whole(bytes) => Ok(Self(bytes)),
            NumberOrText::Real(real) => Err(de::Error::custom(format!(
                "{real} is not a whole number of bytes"
            ))),
            NumberOrText::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// A fraction: 0.15, written `"15%"` or `0.15`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Fraction(pub f64);

impl FromStr for Fraction {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split_number(text)?;
        match unit {
            "%" => Ok(Self(number / 100.0)),
            "" => Ok(Self(number)),
            _ => Err(ParseQuantityError::PartUnit(text.to_owned())),
        }
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} %", self.0 * 100.0)
    }
}

impl Serialize for Fraction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Fraction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Whole(whole) => Ok(Self(whole as f64)),
            NumberOrText::Real(real) => Ok(Self(real)),
            NumberOrText::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// Bytes, or a fraction of an amount that is known only later: `"2GiB"` or `"50%"`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Amount {
    /// A number of bytes.
    Bytes(Bytes),
    /// A fraction of the whole.
    Part(Fraction),
}

impl Amount {
    /// The bytes, once the whole is known.
    pub fn of(self, whole: Bytes) -> Bytes {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Part(fraction) => whole.part(fraction),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Bytes(bytes) => bytes.serialize(serializer),
            Self::Part(fraction) => serializer.serialize_str(&format!("{}%", fraction.0 * 100.0)),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Whole(bytes) => Ok(Self::Bytes(Bytes(bytes))),
            NumberOrText::Real(real) => Ok(Self::Part(Fraction(real))),
            NumberOrText::Text(text) if text.trim_end().ends_with('%') => {
                text.parse().map(Self::Part).map_err(de::Error::custom)
            }
            NumberOrText::Text(text) => text.parse().map(Self::Bytes).map_err(de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_of_another_quantity_is_rejected_with_the_accepted_ones() {
        let size = "4 apples"
            .parse::<Bytes>()
            .map_err(|error| error.to_string());
        assert!(size.is_err_and(|text| text.contains("512M or 1.5GiB")));
        let part = "4G".parse::<Fraction>().map_err(|error| error.to_string());
        assert!(part.is_err_and(|text| text.contains("15%")));
    }

    #[test]
    fn amount_is_bytes_or_a_part() {
        let amounts: Vec<Amount> = serde_json::from_str(r#"["50%", "1GiB", 4096, 0.25]"#).unwrap();
        let of: Vec<Bytes> = amounts.iter().map(|a| a.of(Bytes::gib(4))).collect();
        assert_eq!(
            of,
            [Bytes::gib(2), Bytes::gib(1), Bytes(4096), Bytes::gib(1)]
        );
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Bytes(1) - Bytes(2), Bytes::ZERO);
        assert_eq!(Bytes(u64::MAX) + Bytes(2), Bytes(u64::MAX));
        assert_eq!(Bytes(100).scale(-1.0), Bytes::ZERO);
        assert_eq!(Bytes(100).scale(f64::NAN), Bytes::ZERO);
    }
}
