//! Implements `ch-fleet simulate`: reads scenarios, runs them, and reports the results.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::config::SafetyRule;

use super::{Report, Scenario, SimError, simulate, svg};

/// Options of the command line.
#[derive(Clone, Debug, Default)]
pub struct SimulateOptions {
    /// Scenario files.
    pub scenarios: Vec<PathBuf>,
    /// A seed that replaces the file's.
    pub seed: Option<u64>,
    /// Safety rules to switch off, to show their effect.
    pub without: Vec<SafetyRule>,
    /// Report as JSON instead of tables.
    pub json: bool,
    /// Output file of the plot.
    pub plot: Option<PathBuf>,
}

/// Runs scenarios and writes the results; true if all of their expectations are met.
///
/// # Errors
/// [`SimError`] if a scenario cannot be run or its outcome cannot be written.
pub fn run_cli(options: &SimulateOptions, out: &mut dyn Write) -> Result<bool, SimError> {
    let mut holds = true;
    for path in &options.scenarios {
        let shown = path.display().to_string();
        let text = fs::read_to_string(path).map_err(|source| SimError::Read {
            path: shown,
            source,
        })?;
        let mut scenario = Scenario::from_toml(&text)?;
        for rule in &options.without {
            scenario = scenario.without(*rule);
        }
        scenario.seed = options.seed.unwrap_or(scenario.seed);
        let report = simulate(&scenario);
        holds &= report.faults.is_empty();
        write_report(&report, options, out).map_err(|source| SimError::Write {
            path: "standard output".to_owned(),
            source,
        })?;
        if let Some(plot) = &options.plot {
            fs::write(plot, svg(&report.name, &report.runs)).map_err(|source| SimError::Write {
                path: plot.display().to_string(),
                source,
            })?;
        }
    }
    Ok(holds)
}

fn write_report(report: &Report, options: &SimulateOptions, out: &mut dyn Write) -> io::Result<()> {
    if options.json {
        serde_json::to_writer(&mut *out, report)?;
        writeln!(out)
    } else {
        write!(out, "{report}")
    }
}
