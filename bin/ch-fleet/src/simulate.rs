//! Implements `ch-fleet simulate`: runs scenarios on virtual time, without an agent.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use fleet::sim::{SimulateOptions, run_cli};

use crate::args::{Output, SimulateArguments};

/// Runs the scenarios; fails if one does not meet its expectations.
pub(crate) fn run(
    arguments: &SimulateArguments,
    output: Output,
    out: &mut dyn Write,
) -> Result<ExitCode> {
    let options = SimulateOptions {
        scenarios: arguments.scenarios.clone(),
        seed: arguments.seed,
        without: arguments.without.clone(),
        json: output == Output::Json,
        plot: arguments.plot.clone(),
    };
    let holds = run_cli(&options, out).context("Cannot simulate")?;
    Ok(if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
