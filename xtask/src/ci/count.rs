//! Counts of tests, read from the closing lines of the test runners.

use std::fmt;
use std::ops::AddAssign;

/// The number of tests by result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    /// Tests that marked themselves as skipped, and that their runner counted as passed.
    pub(super) fn move_to_skipped(&mut self, tests: u64) {
        self.passed = self.passed.saturating_sub(tests);
        self.skipped += tests;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Parses one line of output: `None` if it is not a summary line.
///
/// Known are cargo test (`test result: ok. 3 passed; 0 failed; 1 ignored; …`), nextest
/// (`Summary [ 0.1s] 4 tests run: 3 passed, 1 failed, 2 skipped`) and our VM tests
/// (`3 passed, 0 failed, 1 skipped`). nextest indents the output of a failed test, in which such a line does not count.
pub(crate) fn closing_line(line: &str) -> Option<Counts> {
    let line = line.trim_end();
    let rest = if let Some(rest) = line.strip_prefix("test result: ") {
        rest.split_once(". ")?.1
    } else if line.trim_start().starts_with("Summary [") {
        line.split_once(" run: ")?.1
    } else if line.ends_with(" skipped") && line.starts_with(|c: char| c.is_ascii_digit()) {
        line
    } else {
        return None;
    };
    let mut counts = Counts::default();
    for part in rest.split([',', ';']) {
        // nextest adds remarks in brackets: `3 passed (1 slow)`.
        let mut words = part.split_whitespace();
        let (Some(number), Some(word)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(number) = number.parse::<u64>() else {
            continue;
        };
        match word {
            "passed" => counts.passed += number,
            "failed" => counts.failed += number,
            "skipped" | "ignored" => counts.skipped += number,
            _ => {}
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Option<Counts> {
        Some(Counts {
            passed,
            failed,
            skipped,
        })
    }

    #[test]
    fn closing_line_of_each_runner_is_read() {
        let cargo = "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 5 filtered out; finished in 0.02s";
        assert_eq!(closing_line(cargo), counts(3, 1, 2));
        let nextest =
            "     Summary [   0.105s] 4 tests run: 3 passed (1 slow), 1 failed, 2 skipped";
        assert_eq!(closing_line(nextest), counts(3, 1, 2));
        assert_eq!(
            closing_line("3 passed, 1 failed, 2 skipped"),
            counts(3, 1, 2)
        );
    }

    #[test]
    fn test_that_marked_itself_as_skipped_is_no_longer_passed() {
        let mut total = closing_line("5 passed, 1 failed, 2 skipped").unwrap_or_default();
        total.move_to_skipped(3);
        assert_eq!(Some(total), counts(2, 1, 5));
    }

    #[test]
    fn other_line_is_not_counted() {
        for line in [
            "",
            "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 228 filtered out; finished in 5.94s",
            "running 3 tests",
            "test a ... ok",
            "3 passed",
            "PASS [1 s] x skipped",
        ] {
            assert_eq!(closing_line(line), None, "{line}");
        }
    }
}
