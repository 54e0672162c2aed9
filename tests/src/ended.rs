//! Runs a program to its end and captures its output.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::wait::wait_for;

/// Time limit for a program that should end immediately.
const DEADLINE: Duration = Duration::from_secs(30);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// Runs `command` without input until it exits.
    ///
    /// # Errors
    /// It cannot be started, or does not end and is killed.
    pub fn run(command: &mut Command) -> Result<Ended> {
        let folder = tempfile::tempdir()?;
        let (stdout, stderr) = (folder.path().join("stdout"), folder.path().join("stderr"));
        // Files instead of pipes, because they need no reader while it runs.
        let mut child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let ended = wait_for("end of the program", DEADLINE, || Ok(child.try_wait()?));
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let text =
            |path| -> Result<String> { Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned()) };
        let (stdout, stderr) = (text(&stdout)?, text(&stderr)?);
        let status = ended.with_context(|| format!("{command:?} printed {stdout}{stderr}"))?;
        if let Some(signal) = status.signal() {
            bail!("{command:?} was ended by signal {signal}: {stdout}{stderr}");
        }
        Ok(Ended {
            code: status.code(),
            stdout,
            stderr,
        })
    }

    /// The links of the chain of errors, which must be the only output, with exit status 2 if an option cannot be parsed,
    /// else 1.
    ///
    /// # Errors
    /// It ended with another status or printed something else.
    pub fn chain(&self, program: &str) -> Result<Vec<String>> {
        ensure!(self.stdout.is_empty(), "{self:?}");
        let mut lines = self.stderr.lines();
        let heading = format!("Error: {program} exited with the following chain of errors:");
        ensure!(lines.next() == Some(&heading), "{self:?}");
        let links: Vec<String> = lines
            .by_ref()
            .take_while(|line| !line.is_empty())
            .enumerate()
            .map(|(index, line)| {
                line.strip_prefix(&format!("  {index}: "))
                    .map(str::to_owned)
                    .with_context(|| format!("link {index} in {self:?}"))
            })
            .collect::<Result<_>>()?;
        ensure!(!links.is_empty() && lines.next().is_none(), "{self:?}");
        let is_usage = links[0].starts_with("Error parsing --");
        let code = if is_usage { 2 } else { 1 };
        ensure!(self.code == Some(code), "{self:?}");
        Ok(links)
    }

    /// Its output, if it succeeded.
    ///
    /// # Errors
    /// It failed, or printed errors.
    pub fn output(&self) -> Result<&str> {
        ensure!(self.code == Some(0) && self.stderr.is_empty(), "{self:?}");
        Ok(&self.stdout)
    }
}
