//! Prints the responses of the agent, as a table or as JSON.

use std::io::{self, Write};

use anyhow::{Context, Result};

use crate::args::Output;

/// Prints a response in the requested format.
pub(crate) fn print<T: serde::Serialize>(
    out: &mut dyn Write,
    output: Output,
    value: &T,
    table: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    match output {
        Output::Json => writeln!(out, "{}", api::to_ascii_json(value)?),
        Output::Table => table(out),
    }
    .context("Cannot write the output")
}
