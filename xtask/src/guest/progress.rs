//! Runs a long build. It shows live progress on a terminal, or an occasional line in a log. All output goes to a file,
//! which is quoted if the build fails.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Interval between two lines of progress without a terminal: CI shows activity, and logs stay short.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Interval between two updates of a terminal's line.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
/// Number of steps after which the remaining time is estimated.
const STEPS_THAT_TELL: usize = 50;
/// Lines of the log quoted when the build fails.
const QUOTED_LINES: usize = 30;

/// A build that prints one line per step.
#[derive(Debug)]
pub(crate) struct Steps<'a> {
    pub(crate) what: &'a str,
    /// Approximate number of steps of a full build, if this may be one.
    pub(crate) expected: Option<usize>,
    /// Continues the count of an interrupted build.
    pub(crate) log: &'a Path,
}

impl Steps<'_> {
    /// Runs `command` to completion.
    pub(crate) fn run(&self, command: &Command) -> Result<()> {
        let mut count = std::fs::read_to_string(self.log)
            .unwrap_or_default()
            .lines()
            .filter(|line| is_step(line))
            .count();
        let before = count;
        let mut log = self.open_log()?;
        let mut child = process::spawn_tied_group(command, Stdio::piped(), self.open_log()?)?;
        let stdout = child.stdout.take().context("the build's output is piped")?;
        let mut shown = Instant::now();
        let started = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        let interval = if terminal {
            TERMINAL_INTERVAL
        } else {
            LINE_INTERVAL
        };
        let show = |count| self.show(count, before, started.elapsed(), terminal);
        show(count);
        for line in BufReader::new(stdout).lines() {
            let line = line.context("reading the build's output")?;
            writeln!(log, "{line}").with_context(|| format!("writing {}", self.log.display()))?;
            count += usize::from(is_step(&line));
            if shown.elapsed() >= interval {
                show(count);
                shown = Instant::now();
            }
        }
        let status = child.wait().context("waiting for the build")?;
        if terminal {
            eprintln!();
        }
        if !status.success() {
            self.quote_log();
            bail!(
                "{} failed ({status}); all of its output: {}",
                self.what,
                self.log.display()
            );
        }
        eprintln!("{}: done in {} s", self.what, started.elapsed().as_secs());
        Ok(())
    }

    fn open_log(&self) -> Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log)
            .with_context(|| format!("opening {}", self.log.display()))
    }

    fn show(&self, count: usize, before: usize, elapsed: Duration, terminal: bool) {
        let line = self.line(count, before, elapsed);
        if terminal {
            eprint!("\r{line} ");
        } else {
            eprintln!("{line}");
        }
    }

    /// After `count` steps, `before` of them in an earlier run.
    fn line(&self, count: usize, before: usize, elapsed: Duration) -> String {
        let Self { what, expected, .. } = self;
        let seconds = elapsed.as_secs();
        let Some(all) = expected else {
            return format!("{what}: step {count}, {seconds} s");
        };
        let done = count - before;
        let left = if done < STEPS_THAT_TELL {
            String::new()
        } else {
            let each = elapsed / u32::try_from(done).unwrap_or(u32::MAX);
            let steps = u32::try_from(all.saturating_sub(count)).unwrap_or(u32::MAX);
            format!("; at most about {} s left", (each * steps).as_secs())
        };
        format!("{what}: step {count} of at most {all}, {seconds} s{left}")
    }

    fn quote_log(&self) {
        let text = std::fs::read_to_string(self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(QUOTED_LINES)..] {
            eprintln!("  | {line}");
        }
    }
}

/// Kbuild prints each step as two blanks, a word in capitals, and a file.
fn is_step(line: &str) -> bool {
    line.strip_prefix("  ")
        .and_then(|rest| rest.chars().next())
        .is_some_and(|first| first.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::{Steps, is_step};

    #[test]
    fn line_tells_what_is_left_by_the_pace_of_this_run() {
        let steps = |expected| Steps {
            what: "Kernel",
            expected,
            log: Path::new("/nowhere"),
        };
        let after = Duration::from_secs(20);
        assert_eq!(
            steps(Some(500)).line(300, 200, after),
            "Kernel: step 300 of at most 500, 20 s; at most about 40 s left"
        );
        assert_eq!(
            steps(Some(500)).line(210, 200, after),
            "Kernel: step 210 of at most 500, 20 s"
        );
        assert_eq!(steps(None).line(300, 200, after), "Kernel: step 300, 20 s");
    }

    #[test]
    fn step_of_kbuild_is_recognised() {
        assert!(is_step("  CC      mm/page_alloc.o"));
        assert!(!is_step("make[2]: Entering directory"));
        assert!(!is_step("Kernel: arch/x86/boot/bzImage is ready"));
    }
}
