//! `--since COMMIT`: selects the steps that the changes since a commit can affect.
//!
//! Files belong to parts of the project, and a step names the parts that it depends on.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::part::{Part, part_of};
use super::step::{STEPS, Step};
use crate::paths;

/// The steps to run: those affected and those that they need.
pub(super) fn steps(commit: &str) -> Result<Vec<&'static Step>> {
    let files = changed(commit)?;
    let mut names: BTreeSet<&str> = STEPS
        .iter()
        .filter(|step| files.iter().any(|file| affects(file, step)))
        .map(|step| step.name)
        .collect();
    // Needed steps come earlier in the list, so one backward pass finds all.
    for step in STEPS.iter().rev() {
        if names.contains(step.name) {
            names.extend(step.needs);
        }
    }
    Ok(STEPS
        .iter()
        .filter(|step| names.contains(step.name))
        .collect())
}

fn affects(file: &str, step: &Step) -> bool {
    let part = part_of(file);
    part == Part::Root || step.parts.contains(&part)
}

/// Files that differ from the commit, and untracked files.
fn changed(commit: &str) -> Result<Vec<String>> {
    let mut files = git(&["diff", "--name-only", "--no-renames", commit, "--"])
        .with_context(|| format!("--since {commit}"))?;
    files.extend(git(&["ls-files", "--others", "--exclude-standard"])?);
    Ok(files)
}

fn git(arguments: &[&str]) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(paths::workspace())
        .output()
        .context("starting git")?;
    ensure!(
        output.status.success(),
        "git {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_string)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn affected(file: &str) -> Vec<&'static str> {
        STEPS
            .iter()
            .filter(|step| affects(file, step))
            .map(|step| step.name)
            .collect()
    }

    fn unaffected(file: &str) -> Vec<&'static str> {
        let affected = affected(file);
        let names = STEPS.iter().map(|step| step.name);
        names.filter(|name| !affected.contains(name)).collect()
    }

    #[test]
    fn change_affects_the_steps_that_depend_on_its_part() {
        assert_eq!(affected("Cargo.lock").len(), STEPS.len());
        assert_eq!(affected(".cargo/config.toml").len(), STEPS.len());
        assert_eq!(affected("docs/api.md"), ["unit tests"]);
        assert_eq!(
            affected("fleet/src/plan.rs"),
            [
                "format",
                "clippy",
                "build",
                "unit tests",
                "fuzz programs",
                "fuzz",
                "fleet store",
                "package",
                "fleet page",
                "doc tests",
                "vm tests"
            ]
        );
        let guest_only = ["guest", "qemu tests", "guest core", "kunit", "guest series"];
        let mut vmm_not = guest_only.to_vec();
        vmm_not.extend(["fleet store", "fleet page", "crate"]);
        for file in ["virtio-devices/src/lib.rs", "machine/src/lib.rs"] {
            let mut unaffected = unaffected(file);
            unaffected.sort_by_key(|name| vmm_not.iter().position(|other| other == name));
            assert_eq!(unaffected, vmm_not, "{file}");
        }
        assert_eq!(unaffected("api/src/lib.rs"), guest_only);
        assert_eq!(
            affected("guest-patches/patches/1.patch"),
            [
                "unit tests",
                "guest",
                "qemu tests",
                "vm bench",
                "experiment",
                "guest core",
                "kunit",
                "guest series",
                "vm tests"
            ]
        );
        assert_eq!(
            unaffected("xtask/src/main.rs"),
            ["build", "test programs", "benchmarks", "doc tests", "crate"]
        );
        assert_eq!(
            unaffected("tests/src/lib.rs"),
            [
                "build",
                "fuzz programs",
                "fuzz",
                "benchmarks",
                "package",
                "fleet page",
                "guest core",
                "doc tests",
                "crate",
                "kunit",
                "guest series"
            ]
        );
    }

    #[test]
    fn every_step_is_affected_by_something() {
        for step in STEPS {
            assert!(!step.parts.is_empty(), "{}", step.name);
        }
    }

    #[test]
    fn commit_that_does_not_exist_is_named() {
        let error = format!("{:#}", steps("no-such-commit").unwrap_err());
        assert!(error.contains("--since no-such-commit"), "{error}");
    }
}
