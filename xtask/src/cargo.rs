//! Runs cargo for our commands.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::{paths, process};

/// The program: the cargo that runs us, if any.
pub(crate) fn program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Cargo in the workspace. A build's messages go to stderr, because stdout is for results.
pub(crate) fn command<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program());
    command.args(arguments).current_dir(paths::workspace());
    command
}

/// Runs it to completion.
pub(crate) fn run<'a>(arguments: impl IntoIterator<Item = &'a str> + Clone) -> Result<()> {
    let status = command(arguments.clone())
        .stdout(std::io::stderr())
        .status()
        .context("starting cargo")?;
    let words: Vec<&str> = arguments.into_iter().collect();
    ensure!(
        status.success(),
        "cargo {} failed ({status})",
        words.join(" ")
    );
    Ok(())
}

/// The folder of a profile in the target directory.
pub(crate) fn folder(profile: &str) -> PathBuf {
    paths::target().join(folder_name(profile))
}

/// The name of a profile's folder, which cargo calls differently for the default profile.
pub(crate) fn folder_name(profile: &str) -> &str {
    if profile == "dev" { "debug" } else { profile }
}

/// Approximate relative build time of this workspace's packages: they are larger, and little else is left to compile
/// beside them.
const OURS_WEIGHT: u64 = 8;

/// Builds without default features and calls `progress` with the completed and total work. The build ends with this
/// process; what it has compiled by then is kept for the next one.
pub(crate) fn build(
    packages: &[&str],
    more: &[&str],
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    const FEATURES: &str = "--no-default-features";
    let selected = packages.iter().flat_map(|name| ["--package", name]);
    let selected = selected.chain([FEATURES]);
    let all = work_of_packages(selected.clone())?;
    let mut command = command(
        [
            "build",
            "--quiet",
            "--message-format=json-render-diagnostics",
        ]
        .into_iter()
        .chain(selected)
        .chain(more.iter().copied()),
    );
    command.stdin(Stdio::null());
    let mut child = process::spawn_tied_group(&command, Stdio::piped(), Stdio::inherit())?;
    let stdout = child.stdout.take().context("cargo's output is piped")?;
    let mut finished = BTreeSet::new();
    let mut done = 0;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading cargo's messages")?;
        if let Some(package) = finished_package(&line) {
            let is_ours = package.starts_with("path+");
            if finished.insert(package) {
                done += weight(is_ours);
                progress(done, all);
            }
        }
    }
    let status = child.wait().context("waiting for cargo")?;
    ensure!(
        status.success(),
        "building {} failed ({status})",
        packages.join(", ")
    );
    Ok(())
}

/// The package that a cargo message reports as compiled.
fn finished_package(line: &str) -> Option<String> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| message.get(key).and_then(serde_json::Value::as_str);
    (text("reason")? == "compiler-artifact").then(|| text("package_id").map(str::to_string))?
}

fn weight(is_ours: bool) -> u64 {
    if is_ours { OURS_WEIGHT } else { 1 }
}

/// The work of a build.
fn work_of_packages<'a>(selected: impl IntoIterator<Item = &'a str>) -> Result<u64> {
    let tree = ["tree", "--quiet", "--prefix=none", "--edges=normal,build"];
    let output = command(tree.into_iter().chain(selected))
        .stderr(Stdio::null())
        .output()
        .context("starting cargo")?;
    Ok(work_in_tree(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines of `cargo tree`: `anyhow v1.0.104`, and `api v0.1.0 (/path/of/api)` for a package of ours.
fn work_in_tree(text: &str) -> u64 {
    let packages: BTreeSet<&str> = text
        .lines()
        // A package that was shown before.
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty())
        .collect();
    packages
        .iter()
        .map(|line| weight(line.contains(" (/")))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{OURS_WEIGHT, finished_package, work_in_tree};

    #[test]
    fn package_of_ours_is_more_work_than_another_and_each_is_counted_once() {
        let text = "api v0.1.0 (/src/api)\nserde_derive v1.0.229 (proc-macro)\nlibc v0.2.1\nlibc v0.2.1 (*)\n\n";
        assert_eq!(work_in_tree(text), OURS_WEIGHT + 2);
    }

    #[test]
    fn release_builds_check_arithmetic() {
        let manifest = crate::paths::workspace().join("Cargo.toml");
        let text = std::fs::read_to_string(manifest).unwrap();
        let profile = text
            .split("\n[")
            .find(|part| part.starts_with("profile.release]"));
        let mut lines = profile.expect("a profile").lines();
        assert!(lines.any(|line| line == "overflow-checks = true"));
    }

    #[test]
    fn package_that_is_compiled_is_read_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","package_id":"a#1.0","fresh":true}"#;
        assert_eq!(finished_package(line), Some("a#1.0".into()));
        for other in [r#"{"reason":"build-finished","success":true}"#, "text", ""] {
            assert_eq!(finished_package(other), None, "{other}");
        }
    }
}
