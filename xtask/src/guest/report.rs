//! The result of many checks: a line each, and a summary line that `cargo xtask ci` counts.

use std::fmt::Display;

use anyhow::Result;

/// The results of the checks so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Report {
    /// Shows the result of one check; true if it passed.
    pub(super) fn check(&mut self, name: impl Display, result: Result<()>) -> bool {
        match result {
            Ok(()) => {
                println!("PASS  {name}");
                self.passed += 1;
                true
            }
            Err(error) => {
                println!("FAIL  {name}: {error:#}");
                self.failed += 1;
                false
            }
        }
    }

    pub(super) fn skip(&mut self, name: impl Display, why: impl Display) {
        println!("SKIP  {name}: {why}");
        self.skipped += 1;
    }

    /// Prints the summary line; true if nothing failed.
    pub(super) fn close(&self) -> bool {
        // Machine-readable, so it is on a separate line.
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        );
        self.failed == 0
    }
}
