//! The values of `--api-socket` and `--event-monitor`.
//!
//! Both name a path or an inherited descriptor. They are not part of the VM's configuration.

use std::path::PathBuf;

#[cfg(test)]
use crate::options::{KeyDefault, KeyReference, OptionReference};
use crate::options::{Keys, OptionError, OptionFault, Options};
use crate::similar::similar;

const KEYS: [&str; 2] = ["path", "fd"];

/// A path, or an inherited descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathOrFd {
    /// A path in the file system.
    Path(PathBuf),
    /// The number of a descriptor of this process.
    Fd(i32),
}

impl PathOrFd {
    /// Syntax of `--api-socket`.
    pub const API_SOCKET_SYNTAX: &str =
        "HTTP API socket (UNIX domain socket): path=</path/to/a/file> or fd=<fd>.";
    /// Syntax of `--event-monitor`.
    pub const EVENT_MONITOR_SYNTAX: &str =
        "File to report events on: path=</path/to/a/file> or fd=<fd>";

    /// Reads the value of `--api-socket`, which may be a bare path.
    ///
    /// # Errors
    /// An unknown key, a malformed descriptor, or not exactly one of the two.
    pub fn parse_api_socket(text: &str) -> Result<Self, OptionError> {
        let key = text.split_once('=').map(|(key, _)| key);
        // A misspelt key is an error. Any other text is a path, which may contain `=`.
        let is_key = key.is_some_and(|key| similar(key, KEYS).is_some());
        if !text.is_empty() && !is_key {
            return Ok(Self::Path(PathBuf::from(text)));
        }
        Self::parse("api-socket", text)
    }

    /// Reads the value of `--event-monitor`.
    ///
    /// # Errors
    /// An unknown key, a malformed descriptor, or not exactly one of the two.
    pub fn parse_event_monitor(text: &str) -> Result<Self, OptionError> {
        Self::parse("event-monitor", text)
    }

    /// The keys of `--api-socket`, for the page of all keys.
    #[cfg(test)]
    pub(crate) fn api_socket_reference() -> OptionReference {
        let meanings = [
            "Path of the socket, which the VMM creates. A path alone is enough.",
            "Number of an inherited descriptor: a listening UNIX socket.",
        ];
        reference("api-socket", meanings)
    }

    /// The keys of `--event-monitor`, for the page of all keys.
    #[cfg(test)]
    pub(crate) fn event_monitor_reference() -> OptionReference {
        let meanings = [
            "Path of the file, created if it does not exist.",
            "Number of an inherited descriptor that can be written to.",
        ];
        reference("event-monitor", meanings)
    }

    fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(option, text, Keys::default().and(&KEYS))?;
        match (options.text("path"), options.get::<u16>("fd")?) {
            (Some(path), None) => Ok(Self::Path(PathBuf::from(path))),
            (None, Some(fd)) => Ok(Self::Fd(fd.into())),
            _ => Err(options.refuse(OptionFault::NotExactlyOne {
                keys: "path=<path>, fd=<fd>".to_owned(),
            })),
        }
    }
}

#[cfg(test)]
fn reference(option: &'static str, meanings: [&'static str; 2]) -> OptionReference {
    let syntax = ["path=</path/to/a/file>", "fd=<fd>"];
    let key = |(syntax, doc): (&str, _)| KeyReference {
        syntax: vec![syntax.to_owned()],
        doc,
        meaning: |_| None,
        default: KeyDefault::Value(serde_json::Value::Null),
        is_size: false,
    };
    OptionReference {
        option,
        keys: syntax.into_iter().zip(meanings).map(key).collect(),
    }
}
