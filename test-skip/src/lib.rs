//! Counts tests that cannot run on this machine.
//!
//! A Rust test cannot report that it was skipped: it returns, and its runner counts it as passed. With this crate, it
//! appends a line to a file that `cargo xtask ci` provides. The command then lists the test with the reason, and counts
//! it as skipped.

use std::env;
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};

/// The variable of the environment that names the file.
pub const SKIPS_FILE: &str = "TEST_SKIPS_FILE";

/// Marks the test on this thread as skipped. The caller returns from the test.
///
/// # Panics
/// The file that the environment names cannot be written: a skip that is not counted must not look like a success.
pub fn skip(reason: impl Display) {
    let reason = reason.to_string();
    eprintln!("SKIPPED: {reason}");
    if let Some(file) = env::var_os(SKIPS_FILE) {
        let package = env::var("CARGO_PKG_NAME").unwrap_or_default();
        // Runners name the thread of a test after the test.
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test without a name");
        append(&file, &line(&package, test, &reason)).expect("the list of skips can be written");
    }
}

fn line(package: &str, test: &str, reason: &str) -> String {
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("{package} {test}: {reason}\n")
}

/// Appends in one write, because tests of several processes share the file.
fn append(file: &OsStr, line: &str) -> io::Result<()> {
    let mut file = File::options().append(true).create(true).open(file)?;
    file.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_is_one_line_with_package_test_and_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("skips");
        for reason in ["no KVM", "several\n  lines"] {
            append(file.as_os_str(), &line("machine", "pc::boots", reason)).expect("a line");
        }
        let lines = std::fs::read_to_string(file).expect("the file");
        assert_eq!(
            lines,
            "machine pc::boots: no KVM\nmachine pc::boots: several lines\n"
        );
    }
}
