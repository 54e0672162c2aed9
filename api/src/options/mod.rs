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

mod fault;
mod keys;
mod option_value;
#[cfg(test)]
mod page;
mod parsed;
mod split;
#[cfg(test)]
mod tests;
mod value;

pub use fault::{INTEGER_LIST_MAX, OPTION_LENGTH_MAX, OptionError, OptionFault, ValueError};
pub use value::{parse_bytes, parse_toggle};

pub(crate) use keys::Keys;
pub(crate) use option_value::{OptionValue, Words};
#[cfg(test)]
pub(crate) use page::{KeyDefault, KeyReference, OptionReference};
pub(crate) use parsed::{KeyGroup, Options};
pub(crate) use value::{
    parse_integer_map, parse_integer_pairs, parse_named_integers, parse_numbered_names,
    parse_strings,
};
