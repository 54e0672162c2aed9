//! The syntax of command line options: `key=value,key=value`.
//!
//! - A comma separates settings, except inside quotes and inside square brackets. Quotes are taken off; they protect
//!   commas and brackets, and there is no escape for a quote itself.
//! - `key=` leaves the key unset. A key given twice counts as given last.
//! - A key that the section does not have is an error, so that a typing mistake never starts a VM with a default.
//! - Some sections have bare words (`--console tty`), called flags here.
//!
//! This is Cloud Hypervisor's syntax. Sizes accept `T` in addition, and a size or list that would overflow is refused.

mod split;
#[cfg(test)]
mod tests;
mod value;

pub use value::{INTEGER_LIST_MAX, ValueError, parse_bytes, parse_toggle};

pub(crate) use value::parse_strings;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use thiserror::Error;

/// Most characters of one option. A kernel command line, the longest legitimate value, is below 64 KiB.
pub const OPTION_LENGTH_MAX: usize = 128 << 10;

/// Why an option of the command line was refused.
#[derive(Debug, Error)]
#[error("Error parsing --{option}")]
pub struct OptionError {
    /// The option, without its dashes.
    pub option: &'static str,
    /// What is wrong with it.
    #[source]
    pub fault: OptionFault,
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OptionFault {
    /// The section has no such key.
    #[error("unknown parameter {key:?}; known are {known}")]
    UnknownKey {
        /// The key as given.
        key: String,
        /// The keys there are.
        known: String,
    },
    /// A key without `=`.
    #[error("parameter {key:?} needs a value, as in {key}=<value>")]
    MissingValue {
        /// The key.
        key: String,
    },
    /// A bare word with `=`.
    #[error("parameter {key:?} takes no value, but {value:?} is given")]
    UnexpectedValue {
        /// The bare word.
        key: String,
        /// What stood behind `=`.
        value: String,
    },
    /// A required key is absent.
    #[error("parameter {key:?} is required")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// None, or more than one, of several keys that exclude each other.
    #[error("exactly one of {keys} is required")]
    NotExactlyOne {
        /// The keys.
        keys: &'static str,
    },
    /// A key upstream has and this program does not.
    #[error("parameter {key:?} is not supported")]
    Unsupported {
        /// The key.
        key: &'static str,
    },
    /// The value is not of the key's kind.
    #[error("invalid value {value:?} for parameter {key:?}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// Why it is not.
        #[source]
        cause: ValueError,
    },
    /// An opening bracket or quote without its closing one, or the reverse.
    #[error("unbalanced brackets or quotes in {text:?}")]
    Unbalanced {
        /// The text.
        text: String,
    },
    /// Longer than [`OPTION_LENGTH_MAX`].
    #[error("{length} characters are more than {OPTION_LENGTH_MAX}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

impl OptionFault {
    /// The error of the whole option.
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
    keys: &'static [&'static str],
    flags: &'static [&'static str],
    values: BTreeMap<&'static str, String>,
}

impl Options {
    /// Splits `text` into the settings of `--option`, which has the given `keys` with values and bare `flags`.
    pub(crate) fn parse(
        option: &'static str,
        text: &str,
        keys: &'static [&'static str],
        flags: &'static [&'static str],
    ) -> Result<Self, OptionError> {
        let mut options = Self {
            option,
            keys,
            flags,
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
            let (key, value) = self.classify(key, value)?;
            self.values.insert(key, value);
        }
        Ok(())
    }

    fn classify(
        &self,
        key: &str,
        value: Option<&str>,
    ) -> Result<(&'static str, String), OptionFault> {
        let find = |names: &[&'static str]| names.iter().copied().find(|name| *name == key);
        match (find(self.keys), find(self.flags), value) {
            (Some(key), _, Some(value)) => Ok((key, value.trim().to_owned())),
            (Some(_), _, None) => Err(OptionFault::MissingValue {
                key: key.to_owned(),
            }),
            (None, Some(flag), None) => Ok((flag, String::new())),
            (None, Some(_), Some(value)) => Err(OptionFault::UnexpectedValue {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
            (None, None, _) => {
                let known: Vec<_> = self.keys.iter().chain(self.flags).copied().collect();
                Err(OptionFault::UnknownKey {
                    key: key.to_owned(),
                    known: known.join(", "),
                })
            }
        }
    }

    /// The fault as an error of this option.
    pub(crate) fn refuse(&self, fault: OptionFault) -> OptionError {
        fault.of(self.option)
    }

    /// The text of `key`; `None` when it is absent or empty.
    pub(crate) fn text(&self, key: &'static str) -> Option<&str> {
        debug_assert!(self.keys.contains(&key), "{key} is not declared");
        self.values
            .get(key)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// The text of `key`, owned.
    pub(crate) fn string(&self, key: &'static str) -> Option<String> {
        self.text(key).map(str::to_owned)
    }

    /// True when the bare word `flag` was given.
    pub(crate) fn flag(&self, flag: &'static str) -> bool {
        debug_assert!(self.flags.contains(&flag), "{flag} is not declared");
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

    /// The value of `key` as anything that reads itself from text.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(
        &self,
        key: &'static str,
    ) -> Result<Option<T>, OptionError> {
        self.read(key, value::parse_with)
    }

    /// The value of `key` as an on/off switch.
    pub(crate) fn toggle(&self, key: &'static str) -> Result<Option<bool>, OptionError> {
        self.read(key, value::parse_toggle)
    }

    /// The value of `key` as a size in bytes.
    pub(crate) fn bytes(&self, key: &'static str) -> Result<Option<u64>, OptionError> {
        self.read(key, value::parse_bytes)
    }

    /// The value of `key` as a list of integers, `[0,2-4]`.
    pub(crate) fn integers<T: TryFrom<u64>>(
        &self,
        key: &'static str,
    ) -> Result<Option<Vec<T>>, OptionError> {
        self.read(key, value::parse_integers)
    }

    /// The value of `key` as a list of texts, `[a,b]`.
    pub(crate) fn strings(&self, key: &'static str) -> Option<Vec<String>> {
        self.text(key).map(value::parse_strings)
    }

    /// The value of `key` as a list of an integer with a list of integers, `[0@[1,2],1@[3-5]]`.
    pub(crate) fn integer_map<K, V>(
        &self,
        key: &'static str,
    ) -> Result<Option<value::IntegerMap<K, V>>, OptionError>
    where
        K: TryFrom<u64>,
        V: TryFrom<u64>,
    {
        self.read(key, value::parse_integer_map)
    }

    /// The value of `key` as a list of two integers each, `[0@15,1@20]`.
    pub(crate) fn integer_pairs<A, B>(
        &self,
        key: &'static str,
    ) -> Result<Option<Vec<(A, B)>>, OptionError>
    where
        A: TryFrom<u64>,
        B: TryFrom<u64>,
    {
        self.read(key, value::parse_integer_pairs)
    }

    /// The value of `key` as one of the words of `table`.
    pub(crate) fn word<T: Copy>(
        &self,
        key: &'static str,
        table: &[(&'static str, T)],
    ) -> Result<Option<T>, OptionError> {
        self.read(key, |value| value::parse_word(value, table))
    }

    /// Refuses `key` when it is set.
    pub(crate) fn unsupported(&self, key: &'static str) -> Result<(), OptionError> {
        match self.text(key) {
            Some(_) => Err(self.refuse(OptionFault::Unsupported { key })),
            None => Ok(()),
        }
    }
}
