//! The syntax of command line options: `key=value,key=value`.
//!
//! - A comma separates settings, except inside quotes and inside square brackets. Quotes are removed; they protect
//!   commas and brackets. A quote itself cannot be escaped.
//! - `key=` leaves the key unset. If a key occurs twice, the last value applies.
//! - An unknown key is an error, so that a typing error never starts a VM with a default.
//! - Some sections accept bare words (`--console tty`), called flags here.
//!
//! This is Cloud Hypervisor's syntax. In addition, sizes accept `T`, `KiB` to `TiB` and lower case. Sizes and lists
//! that would overflow are rejected.

mod keys;
mod option_value;
#[cfg(test)]
mod page;
mod split;
#[cfg(test)]
mod tests;
mod value;

pub use value::{INTEGER_LIST_MAX, ValueError, parse_bytes, parse_toggle};

pub(crate) use keys::{KeyGroup, Keys};
pub(crate) use option_value::{OptionValue, Words};
#[cfg(test)]
pub(crate) use page::{KeyDefault, KeyReference, OptionReference};
pub(crate) use value::{
    parse_integer_map, parse_integer_pairs, parse_named_integers, parse_strings,
};

use std::collections::BTreeMap;

use thiserror::Error;

use crate::similar::{did_you_mean, similar};

/// Maximum length of an option. A kernel command line, the longest legitimate value, is below 64 KiB.
pub const OPTION_LENGTH_MAX: usize = 128 << 10;

/// Reason why an option of the command line was rejected.
#[derive(Debug, Error)]
#[error("Error parsing --{option}")]
pub struct OptionError {
    /// The option, without its dashes.
    pub option: &'static str,
    /// The fault.
    #[source]
    pub fault: OptionFault,
}

/// Faults in an option.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionFault {
    /// The section has no such key.
    #[error("unknown parameter {key:?}{}; known are {known}", did_you_mean(similar.as_deref()))]
    UnknownKey {
        /// The key.
        key: String,
        /// The known key that it resembles most, if one does.
        similar: Option<String>,
        /// The known keys.
        known: String,
    },
    /// A key without `=`.
    #[error("parameter {key:?} needs a value, as in {key}=<value>")]
    MissingValue {
        /// The key.
        key: String,
    },
    /// A bare word with `=`.
    #[error("parameter {key:?} accepts no value; got {value:?}")]
    UnexpectedValue {
        /// The bare word.
        key: String,
        /// The text after `=`.
        value: String,
    },
    /// A required key is absent.
    #[error("parameter {key:?} is required")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// None, or more than one, of several mutually exclusive keys.
    #[error("exactly one of {keys} is required")]
    NotExactlyOne {
        /// The keys.
        keys: String,
    },
    /// A key of upstream that this program does not support.
    #[error("parameter {key:?} is not supported")]
    Unsupported {
        /// The key.
        key: &'static str,
    },
    /// The value has the wrong type.
    #[error("invalid value {value:?} for parameter {key:?}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// The reason.
        #[source]
        cause: ValueError,
    },
    /// An unmatched bracket or quote.
    #[error("unbalanced brackets or quotes in {text:?}")]
    Unbalanced {
        /// The text.
        text: String,
    },
    /// Longer than [`OPTION_LENGTH_MAX`].
    #[error("the option has {length} characters; the limit is {OPTION_LENGTH_MAX}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

impl OptionFault {
    /// A key that is not in `known`.
    pub(crate) fn unknown_key(key: &str, known: &[&str]) -> Self {
        let similar = similar(key, known.iter().copied());
        Self::UnknownKey {
            key: key.to_owned(),
            similar: similar.map(str::to_owned),
            known: known.join(", "),
        }
    }

    /// Converts the fault to an error of the option.
    pub(crate) fn of(self, option: &'static str) -> OptionError {
        OptionError {
            option,
            fault: self,
        }
    }
}

/// The settings of one option, by key.
#[derive(Debug)]
pub(crate) struct Options {
    option: &'static str,
    keys: Keys,
    values: BTreeMap<&'static str, String>,
}

impl Options {
    /// Splits `text` into the settings of `--option`.
    pub(crate) fn parse(option: &'static str, text: &str, keys: Keys) -> Result<Self, OptionError> {
        let mut options = Self {
            option,
            keys,
            values: BTreeMap::new(),
        };
        options.fill(text).map_err(|fault| fault.of(option))?;
        Ok(options)
    }

    fn fill(&mut self, text: &str) -> Result<(), OptionFault> {
        if text.len() > OPTION_LENGTH_MAX {
            return Err(OptionFault::TooLong { length: text.len() });
        }
        if text.trim().is_empty() {
            return Ok(());
        }
        for setting in split::settings(text.trim())? {
            let (key, value) = match setting.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (setting.as_str(), None),
            };
            let (key, value) = self.keys.classify(key, value)?;
            self.values.insert(key, value);
        }
        Ok(())
    }

    /// The fault as an error of this option.
    pub(crate) fn refuse(&self, fault: OptionFault) -> OptionError {
        fault.of(self.option)
    }

    /// The error for an absent required `key`.
    pub(crate) fn missing(&self, key: &'static str) -> OptionError {
        self.refuse(OptionFault::MissingKey { key })
    }

    /// The text of `key`; `None` when it is absent or empty.
    pub(crate) fn text(&self, key: &'static str) -> Option<&str> {
        debug_assert!(self.keys.has_key(key), "{key} is not declared");
        self.values
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// True when the bare word `flag` was given.
    pub(crate) fn flag(&self, flag: &'static str) -> bool {
        debug_assert!(self.keys.has_flag(flag), "{flag} is not declared");
        self.values.contains_key(flag)
    }

    /// The value of `key`, read by `read`.
    pub(crate) fn read<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        read(value).map(Some).map_err(|cause| {
            self.refuse(OptionFault::BadValue {
                key,
                value: value.to_owned(),
                cause,
            })
        })
    }

    /// The value of `key`, read by its type.
    pub(crate) fn get<T: OptionValue>(&self, key: &'static str) -> Result<Option<T>, OptionError> {
        self.read(key, T::read)
    }

    /// Rejects `key` if it is set.
    pub(crate) fn unsupported(&self, key: &'static str) -> Result<(), OptionError> {
        match self.text(key) {
            Some(_) => Err(self.refuse(OptionFault::Unsupported { key })),
            None => Ok(()),
        }
    }
}
