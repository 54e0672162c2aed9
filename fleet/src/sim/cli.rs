//! Implements `ch-fleet simulate`: reads scenarios, runs them, and reports the results.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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
        let text = fs::read_to_string(path).map_err(|source| SimError::Read {
            path: path.display().to_string(),
            suggestion: match source.kind() {
                io::ErrorKind::NotFound => suggestion(path),
                _ => String::new(),
            },
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

/// A suggestion to append to a message about a file that does not exist: a file of the same folder.
fn suggestion(path: &Path) -> String {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str))
    else {
        return String::new();
    };
    let folder = if folder == Path::new("") {
        Path::new(".")
    } else {
        folder
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|other| other != name)
        .collect();
    api::suggestion_among(name, names.iter().map(String::as_str))
}

fn write_report(report: &Report, options: &SimulateOptions, out: &mut dyn Write) -> io::Result<()> {
    if options.json {
        serde_json::to_writer(&mut *out, report)?;
        writeln!(out)
    } else {
        write!(out, "{report}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn refused(path: PathBuf) -> String {
        let options = SimulateOptions {
            scenarios: vec![path],
            ..SimulateOptions::default()
        };
        api::error_line(&run_cli(&options, &mut io::sink()).unwrap_err())
    }

    #[test]
    fn misspelt_scenario_is_refused_with_the_name_that_it_resembles() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("everyone.toml"), "").unwrap();
        for (name, end) in [
            ("everyon.toml", " (did you mean \"everyone.toml\"?)"),
            ("night", "night"),
        ] {
            let message = refused(folder.path().join(name));
            assert!(message.contains(&format!("{end}: ")), "{message}");
        }
        // A file that cannot be read for another reason is not suggested.
        let message = refused(folder.path().to_path_buf());
        assert!(!message.contains("did you mean"), "{message}");
    }

    #[test]
    fn misspelt_key_of_a_scenario_is_refused_with_the_one_that_it_resembles() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.toml");
        fs::write(&path, "sead = 1\n").unwrap();
        let message = refused(path);
        assert!(message.ends_with("(did you mean \"seed\"?)"), "{message}");
    }
}
