//! `cargo xtask bench`: measures figures of the VMM with a Linux guest, in the testbed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};

use crate::testbed::{self, KernelChoice, Outcome, Surroundings};
use crate::{experiment, other_vmm, test_programs};

/// A host that produces no output for this time hangs. Cases end after two minutes of an idle processor by their own
/// clock, which QEMU sometimes stops when it counts instructions.
const SILENCE_MAX: Duration = Duration::from_secs(600);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernel of the guests
    #[arg(long, value_enum, default_value = "stock")]
    kernel: KernelChoice,
    /// Count instructions instead of time: repeatable figures, without a measure of parallel work
    #[arg(long)]
    icount: bool,
    /// Memory of the emulated host
    #[arg(long, value_name = "SIZE", default_value = "3G", value_parser = testbed::parse_size)]
    memory: u64,
    /// Also measure another VMM with the same command line and API, in turns
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Folder for the figures, one file each
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Figures to measure, or the group `vmm` [default: all that do not take minutes]
    names: Vec<OsString>,
    /// Options of the named figure
    #[arg(last = true)]
    options: Vec<OsString>,
}

/// Measures the VMM with a Linux guest and prints one JSON object per figure.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(vmm) = &options.vmm {
        arguments.extend(["--vmm".into(), other_vmm::found(vmm)?.into()]);
    }
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
        arguments.extend(["--out".into(), "/share".into()]);
    }
    let begin = SystemTime::now();
    let program: OsString = test_programs::build("vm-bench")?.into();
    let mut left_out = LeftOut::default();
    let status = loop {
        let mut command = vec![program.clone()];
        command.extend(arguments.iter().cloned());
        command.extend(left_out.arguments());
        command.extend(options.names.iter().cloned());
        if !options.options.is_empty() {
            command.push("--".into());
            command.extend(options.options.iter().cloned());
        }
        let outcome = testbed::outcome_of(
            command,
            Surroundings {
                memory: options.memory,
                icount: options.icount,
                kernel: options.kernel,
                share: options.out.clone(),
                silence_max: Some(SILENCE_MAX),
                ..Surroundings::default()
            },
        )?;
        match outcome {
            Outcome::Silent(line) => left_out.add(&line)?,
            outcome => break outcome.status(),
        }
    };
    if let Some(out) = &options.out {
        for path in written_since(out, begin)? {
            experiment::say_what_was_measured(&path, options.kernel)?;
        }
    }
    Ok(status)
}

/// Cases in which the host hung.
#[derive(Debug, Default)]
struct LeftOut(Vec<String>);

impl LeftOut {
    /// Takes the case from the last line of output, `FIGURE/CASE/VMM … `.
    ///
    /// # Errors
    /// It names none, or one that is left out already.
    fn add(&mut self, line: &str) -> Result<()> {
        let case = line.strip_suffix(" … ").filter(|case| case.contains('/'));
        let Some(case) = case.filter(|case| !self.0.iter().any(|other| other == case)) else {
            bail!("the host produced no output for {SILENCE_MAX:?} after {line:?}");
        };
        eprintln!("\n{case}: the host hung for {SILENCE_MAX:?}; continuing without this case");
        self.0.push(case.to_owned());
        Ok(())
    }

    /// Starts again at the figure that did not end, without these cases.
    fn arguments(&self) -> Vec<OsString> {
        let figure = self.0.last().and_then(|case| case.split('/').next());
        let from = figure.map(|figure| ["--from", figure]);
        let cases = self.0.iter().map(|case| ["--leave-out", case]);
        from.into_iter()
            .chain(cases)
            .flatten()
            .map(OsString::from)
            .collect()
    }
}

/// The figures in `folder` that are not from an earlier run.
fn written_since(folder: &Path, begin: SystemTime) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let modified = path.metadata()?.modified()?;
        if name.starts_with("bench-") && name.ends_with(".json") && modified >= begin {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_in_which_the_host_stands_still_is_left_out_of_the_next_run() {
        let mut left_out = LeftOut::default();
        assert!(left_out.arguments().is_empty());
        left_out.add("api/one_client/other … ").unwrap();
        left_out.add("block/read_1m/ours … ").unwrap();
        let words = "--from block --leave-out api/one_client/other --leave-out block/read_1m/ours";
        assert!(left_out.arguments().iter().eq(words.split(' ')));
    }

    #[test]
    fn silence_that_no_case_explains_is_an_error() {
        let mut left_out = LeftOut::default();
        assert!(left_out.add("").is_err());
        assert!(left_out.add("booting … ").is_err());
        assert!(left_out.add("api/one_client/other … 3.0 s").is_err());
        left_out.add("api/one_client/other … ").unwrap();
        assert!(left_out.add("api/one_client/other … ").is_err());
    }
}
