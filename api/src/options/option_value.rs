//! The types of option values: parsing and help text.

use std::net::IpAddr;
use std::path::PathBuf;

use super::fault::ValueError;
use super::value;
use crate::config::MacAddr;

/// A type of option values.
pub(crate) trait OptionValue: Sized {
    /// The text after `key=` in the help.
    fn values() -> String;
    /// Reads a non-empty value.
    fn read(text: &str) -> Result<Self, ValueError>;
}

/// An enumeration whose variants are words on the command line.
pub(crate) trait Words: Copy + 'static {
    /// The words, in the order of the help. A value may have none.
    const WORDS: &'static [(&'static str, Self)];
}

impl<T: Words> OptionValue for T {
    fn values() -> String {
        let words: Vec<_> = T::WORDS.iter().map(|(word, _)| *word).collect();
        words.join("|")
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        value::parse_word(text, T::WORDS)
    }
}

impl<T: OptionValue> OptionValue for Option<T> {
    fn values() -> String {
        T::values()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        T::read(text).map(Some)
    }
}

impl OptionValue for bool {
    fn values() -> String {
        "on|off".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        value::parse_toggle(text)
    }
}

impl OptionValue for PathBuf {
    fn values() -> String {
        "<path>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        Ok(Self::from(text))
    }
}

impl OptionValue for Vec<String> {
    fn values() -> String {
        "<list_of_texts>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        Ok(value::parse_strings(text))
    }
}

macro_rules! read_by_from_str {
    ($values:literal: $($name:ty),*) => {
        $(
            impl OptionValue for $name {
                fn values() -> String {
                    $values.to_owned()
                }

                fn read(text: &str) -> Result<Self, ValueError> {
                    value::parse_with(text)
                }
            }
        )*
    };
}

read_by_from_str!("<text>": String);
read_by_from_str!("<ip_addr>": IpAddr);
read_by_from_str!("<mac_addr>": MacAddr);

macro_rules! numbers {
    ($($name:ty),*) => {
        $(
            impl OptionValue for $name {
                fn values() -> String {
                    "<number>".to_owned()
                }

                fn read(text: &str) -> Result<Self, ValueError> {
                    text.parse().map_err(|_| ValueError::Number {
                        text: text.to_owned(),
                        max: Self::MAX.to_string(),
                    })
                }
            }
        )*
    };
}

numbers!(u8, u16, u32, u64, usize);

macro_rules! lists_of_integers {
    ($($name:ty),*) => {
        $(
            impl OptionValue for Vec<$name> {
                fn values() -> String {
                    "<list_of_numbers>".to_owned()
                }

                fn read(text: &str) -> Result<Self, ValueError> {
                    value::parse_integers(text)
                }
            }
        )*
    };
}

lists_of_integers!(u8, u16, u32, u64, i32);
