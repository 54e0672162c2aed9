//! Shows samples of the demonstration: one changing line on a terminal, an occasional line in a log.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::chart::terminal_line;
use crate::recording::Sample;

/// Interval between two lines of a log.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(crate) struct Screen {
    /// Whether the output is a terminal.
    terminal: bool,
    /// The last line, which a terminal may still change and a log may have omitted.
    last: Option<String>,
    written: Option<Instant>,
}

impl Screen {
    pub(crate) fn new() -> Self {
        // The testbed's emulated host has a pipe in place of the terminal, and sets a variable.
        let terminal = std::io::stdout().is_terminal()
            || std::env::var_os("TESTBED_TERMINAL").is_some_and(|says| says == "yes");
        Self {
            terminal,
            last: None,
            written: None,
        }
    }

    pub(crate) fn sample(&mut self, sample: &Sample, full_bytes: u64) {
        let line = terminal_line(sample, full_bytes, self.terminal);
        if self.terminal {
            print!("\r{line}");
            // A closed terminal is not an error.
            std::io::stdout().flush().ok();
            self.last = Some(line);
        } else if self.written.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
            println!("{line}");
            self.written = Some(Instant::now());
            self.last = None;
        } else {
            self.last = Some(line);
        }
    }

    /// Ends the line of the last sample and prints a heading.
    pub(crate) fn headline(&mut self, words: &str) {
        self.end();
        println!("{words}");
    }

    /// Ends the line of the last sample.
    pub(crate) fn end(&mut self) {
        if let Some(line) = self.last.take() {
            if self.terminal {
                println!();
            } else {
                println!("{line}");
            }
        }
        self.written = None;
    }
}
