//! The values of `--api-socket` and `--event-monitor`.
//!
//! Both name a path or an inherited descriptor. They are not part of the VM's configuration.

use std::path::PathBuf;

use crate::options::{OptionError, OptionFault, Options};

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
        if !text.is_empty() && !text.starts_with("path=") && !text.starts_with("fd=") {
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

    fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(option, text, ["path", "fd"][..].into())?;
        match (options.text("path"), options.get::<u16>("fd")?) {
            (Some(path), None) => Ok(Self::Path(PathBuf::from(path))),
            (None, Some(fd)) => Ok(Self::Fd(fd.into())),
            _ => Err(options.refuse(OptionFault::NotExactlyOne {
                keys: "path=<path>, fd=<fd>".to_owned(),
            })),
        }
    }
}
