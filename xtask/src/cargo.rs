//! Cargo, as our commands start it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::{paths, process};

/// Its program: the one that runs us, if one does.
pub(crate) fn program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Cargo in the workspace. A build's messages go to stderr, because stdout carries results.
pub(crate) fn command<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program());
    command.args(arguments).current_dir(paths::workspace());
    command
}

/// Runs it to its end.
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
    // Cargo's name for the folder of the default profile.
    paths::target().join(if profile == "dev" { "debug" } else { profile })
}

/// Builds and calls `progress` with the packages done and their number. The build ends with this
/// process; what it has compiled until then is kept for the next one.
pub(crate) fn build(
    packages: &[&str],
    more: &[&str],
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    let selected = packages.iter().flat_map(|name| ["--package", name]);
    let all = count_packages(selected.clone())?;
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
    let mut done = BTreeSet::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("reading cargo's messages")?;
        if let Some(package) = finished_package(&line) {
            done.insert(package);
            progress(done.len() as u64, all);
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

/// The package that a message of cargo says is compiled.
fn finished_package(line: &str) -> Option<String> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| message.get(key).and_then(serde_json::Value::as_str);
    (text("reason")? == "compiler-artifact").then(|| text("package_id").map(str::to_string))?
}

/// How many packages a build consists of.
fn count_packages<'a>(selected: impl IntoIterator<Item = &'a str>) -> Result<u64> {
    let tree = ["tree", "--quiet", "--prefix=none", "--edges=normal,build"];
    let output = command(tree.into_iter().chain(selected))
        .stderr(Stdio::null())
        .output()
        .context("starting cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A package that was shown before ends with ` (*)`.
    let names: BTreeSet<&str> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty())
        .collect();
    Ok(names.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::finished_package;

    #[test]
    fn package_that_is_compiled_is_read_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","package_id":"a#1.0","fresh":true}"#;
        assert_eq!(finished_package(line), Some("a#1.0".into()));
        for other in [r#"{"reason":"build-finished","success":true}"#, "text", ""] {
            assert_eq!(finished_package(other), None, "{other}");
        }
    }
}
