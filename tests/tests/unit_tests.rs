//! Checks that unit tests are where the rules of `docs/testing.md` put them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::crate_borders::{metadata, sources};

/// Tests up to this length may be longer than the code above them.
const LINES_MAX: usize = 150;
/// Modules that compare the code with documents or run all devices have the name of their subject.
const NAMED_AFTER_THEIR_SUBJECT: &[&str] = &[
    "api/src/options/page.rs",
    "test-docs/src/figures.rs",
    "test-docs/src/layout.rs",
    "test-docs/src/named_tests.rs",
    "virtio-devices/src/testing/every_device.rs",
];

/// The reason why the tests of a file, which is in no `tests.rs`, are in the wrong place.
fn fault(source: &str) -> Option<&'static str> {
    let is_test = |line: &&str| line.trim() == "#[test]";
    let lines: Vec<&str> = source.lines().collect();
    let is_start = |line: &&str| line.ends_with("mod tests {") && !line.starts_with(' ');
    let start = lines.iter().position(is_start);
    let (code, tests) = lines.split_at(start.unwrap_or(lines.len()));
    if code.iter().any(is_test) {
        return Some("has tests outside of `mod tests` at its end");
    }
    if tests.iter().filter(|line| **line == "}").count() > 1 {
        return Some("has code after `mod tests`");
    }
    (tests.len() > code.len().max(LINES_MAX)).then_some("has long tests, which belong in tests.rs")
}

#[test]
fn unit_tests_are_at_the_end_of_their_file_or_in_tests_rs() -> Result<()> {
    let metadata = metadata()?;
    let root = metadata["workspace_root"].as_str().context("root")?;
    let mut seen = 0;
    for package in metadata["packages"].as_array().context("packages")? {
        let manifest = package["manifest_path"].as_str().context("manifest")?;
        let folder = Path::new(manifest).with_file_name("src");
        let mut files = Vec::new();
        if folder.is_dir() {
            sources(&folder, &mut files)?;
        }
        for file in files {
            let path = file.strip_prefix(root)?.to_string_lossy().into_owned();
            if !path.ends_with(".rs") || NAMED_AFTER_THEIR_SUBJECT.contains(&path.as_str()) {
                continue;
            }
            let fault = fault(&fs::read_to_string(&file)?);
            ensure!(fault.is_none(), "{path} {}", fault.unwrap_or_default());
            seen += 1;
        }
    }
    ensure!(seen > 300, "only {seen} files were seen");
    Ok(())
}

#[test]
fn tests_in_the_wrong_place_are_found() {
    let tests = "#[cfg(test)]\nmod tests {\n    #[test]\n    fn a() {}\n}\n";
    assert_eq!(fault(&format!("fn a() {{\n}}\n{tests}")), None);
    assert!(fault("#[test]\nfn a() {}\n").is_some());
    assert!(fault(&format!("{tests}fn a() {{\n}}\n")).is_some());
    let long = tests.replace("#[test]\n", &"#[test]\n\n".repeat(LINES_MAX));
    assert!(fault(&long).is_some());
    assert_eq!(
        fault(&format!("{}{long}", "\n".repeat(3 * LINES_MAX))),
        None
    );
}
