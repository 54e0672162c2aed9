//! The host side of a console: non-blocking descriptors.

use std::fs::File;
use std::os::fd::OwnedFd;

/// The source and destination of a console's bytes; either may be missing.
#[derive(Debug, Default)]
pub struct ConsoleEndpoint {
    pub(super) input: Option<File>,
    pub(super) output: Option<File>,
}

impl ConsoleEndpoint {
    /// Accepts descriptors that are non-blocking, or regular files. An input that ends or fails is not read again. Keep
    /// the other end of a pseudo-terminal open; otherwise reads fail whenever no other process has it open.
    pub fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self {
            input: input.map(File::from),
            output: output.map(File::from),
        }
    }

    /// No input; all output is dropped.
    pub fn null() -> Self {
        Self::default()
    }
}
