//! Counts and prints the result of each check.

use core::fmt;

use crate::console;

/// The checks so far.
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    pub fn new() -> Self {
        Self {
            passed: 0,
            failed: 0,
        }
    }

    pub fn pass(&mut self, name: &str) {
        self.passed += 1;
        console::line(format_args!("PASS {name}"));
    }

    pub fn fail(&mut self, name: &str, why: fmt::Arguments<'_>) {
        self.failed += 1;
        console::line(format_args!("FAIL {name}: {why}"));
    }

    /// Passes if `condition` holds, otherwise fails with `why`.
    pub fn check(&mut self, name: &str, condition: bool, why: fmt::Arguments<'_>) {
        if condition {
            self.pass(name);
        } else {
            self.fail(name, why);
        }
    }

    pub fn done(&self) {
        console::line(format_args!(
            "DONE {} passed, {} failed",
            self.passed, self.failed
        ));
    }
}
