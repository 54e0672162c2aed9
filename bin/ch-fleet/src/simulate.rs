//! `ch-fleet simulate`: scenarios on virtual time, without an agent.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use fleet::sim::{SimulateOptions, run_cli};

use crate::args::{Output, SimulateArguments};

/// Runs the scenarios; not successful when one does not hold what it says.
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
