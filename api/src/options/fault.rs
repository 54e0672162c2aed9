//! Faults in command-line options.

use byte_size::SizeError;
use thiserror::Error;

use crate::similar::{did_you_mean, similar, suggestion_among};

/// Maximum length of an option. A kernel command line, the longest legitimate value, is below 64 KiB.
pub const OPTION_LENGTH_MAX: usize = 128 << 10;

/// Maximum number of integers in an expanded list, as in JSON: a configuration that an option accepts can be sent and
/// saved. No host has more CPUs, and `[0-18446744073709551615]` must not exhaust memory.
pub const INTEGER_LIST_MAX: usize = crate::bounded::ITEMS_MAX;

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

/// Reasons why a string is not a value of the required type.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ValueError {
    /// Not a switch.
    #[error("{0:?} is not on, off, true or false")]
    Toggle(String),
    /// Not a size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Not an integer in range.
    #[error("{0:?} is not a number, or out of range")]
    Integer(String),
    /// A range that ends before it begins.
    #[error("the range {0:?} ends before it begins")]
    RangeBackwards(String),
    /// More than [`INTEGER_LIST_MAX`] integers.
    #[error("the list has more than {INTEGER_LIST_MAX} entries")]
    ListTooLong,
    /// Brackets or quotes that do not match.
    #[error("{0:?} is not a list")]
    List(String),
    /// Not `key@list`.
    #[error("{0:?} is not of the form <number>@[<list>]")]
    Pair(String),
    /// Not `number@number`.
    #[error("{0:?} is not of the form <number>@<number>")]
    Tuple(String),
    /// Not `threads:cores:dies:packages`.
    #[error(
        "{0:?} is not of the form <threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>"
    )]
    Topology(String),
    /// Not one of a few words.
    #[error("{word:?} is not one of {known}{}", suggestion_among(word, known.split(", ")))]
    Word {
        /// The word.
        word: String,
        /// The known words, separated by a comma and a space.
        known: String,
    },
    /// Not a number that the key can hold.
    #[error("{text:?} is not a whole number from 0 to {max}")]
    Number {
        /// The text.
        text: String,
        /// The largest number.
        max: String,
    },
    /// The type's own parser rejected the text.
    #[error("{0}")]
    Refused(String),
}
