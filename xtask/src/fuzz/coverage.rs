//! `cargo xtask fuzz --coverage`: shows which lines of the tested code the inputs of a target execute.
//!
//! The inputs are the committed ones and those that earlier runs have found on this machine. The programs are built
//! with rustc's own instrumentation, whose profiles only the tools of the same LLVM can read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::build::{TRIPLE, build, corpus};
use super::seeds;
use super::targets::Target;
use crate::apt::{self, Need};
use crate::paths;

const FLAGS: &str = "--cfg fuzzing -Cinstrument-coverage";
/// Files below this share are listed.
const WANTED_PERCENT: f64 = 80.0;
/// Fewer inputs per process than any limit on the length of its arguments.
const INPUTS_PER_RUN: usize = 2000;

/// Covered and existing lines and regions.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Figures {
    lines: (u64, u64),
    regions: (u64, u64),
}

impl Figures {
    fn add(&mut self, other: Self) {
        for (sum, more) in [
            (&mut self.lines, other.lines),
            (&mut self.regions, other.regions),
        ] {
            sum.0 += more.0;
            sum.1 += more.1;
        }
    }

    fn percent(self) -> f64 {
        100.0 * self.lines.0 as f64 / self.lines.1.max(1) as f64
    }
}

/// Prints the coverage of each target.
pub(super) fn print(targets: &[&Target]) -> Result<()> {
    let tools = tools()?;
    let names = targets.iter().map(|target| target.name);
    // Each input runs once, so compiling faster matters more than running faster.
    let programs = build("fuzz-coverage", FLAGS, false, names)?;
    for target in targets {
        let inputs = inputs(target.name)?;
        let profile = profile(&tools, &programs, target.name, &inputs)?;
        let report = report(&tools, &programs.join(target.name), &profile)?;
        let files = subject(target, &report)?;
        let mut all = Figures::default();
        files.iter().for_each(|(_, figures)| all.add(*figures));
        println!(
            "{}: {:.1} % of the lines ({} of {}), {} of {} regions, with {} inputs",
            target.name,
            all.percent(),
            all.lines.0,
            all.lines.1,
            all.regions.0,
            all.regions.1,
            inputs.len()
        );
        for (name, figures) in &files {
            if figures.percent() < WANTED_PERCENT {
                let (covered, lines) = figures.lines;
                println!(
                    "    {:5.1} % {name} ({covered} of {lines})",
                    figures.percent()
                );
            }
        }
    }
    Ok(())
}

/// The folder of the LLVM tools that can read rustc's profiles: those of rustup's component `llvm-tools`, otherwise
/// Debian's of the same version.
fn tools() -> Result<PathBuf> {
    let own = Path::new(rustc(&["--print", "sysroot"])?.trim())
        .join("lib/rustlib")
        .join(TRIPLE)
        .join("bin");
    if own.join("llvm-cov").exists() {
        return Ok(own);
    }
    let text = rustc(&["-vV"])?;
    let major = major_of_llvm(&text).with_context(|| format!("no version of LLVM in {text:?}"))?;
    let package = format!("llvm-{major}");
    apt::ensure(&[Need {
        package: package.clone().leak(),
        why: "reads coverage profiles of this rustc",
    }])
    .context("`rustup component add llvm-tools` has the same tools")?;
    Ok(Path::new("/usr/lib").join(package).join("bin"))
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new("rustc")
        .args(arguments)
        .output()
        .context("starting rustc")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn major_of_llvm(text: &str) -> Option<&str> {
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()
}

fn inputs(target: &str) -> Result<Vec<PathBuf>> {
    let mut inputs = Vec::new();
    for folder in [seeds::unpack(target)?, corpus(target)?] {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            inputs.push(entry?.path());
        }
    }
    Ok(inputs)
}

/// Runs the target with each input; returns the merged profile.
fn profile(tools: &Path, programs: &Path, target: &str, inputs: &[PathBuf]) -> Result<PathBuf> {
    let folder = paths::target().join("fuzz-coverage/profiles").join(target);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    for (number, inputs) in inputs.chunks(INPUTS_PER_RUN).enumerate() {
        let output = Command::new(programs.join(target))
            .args(inputs)
            .env(
                "LLVM_PROFILE_FILE",
                folder.join(format!("{number}.profraw")),
            )
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {target}"))?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{target} failed: {text}");
    }
    let raw: Vec<_> = fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    ensure!(!raw.is_empty(), "{target} has no inputs: run it first");
    let merged = folder.join("merged.profdata");
    let status = Command::new(tools.join("llvm-profdata"))
        .args(["merge", "-sparse", "-o"])
        .arg(&merged)
        .args(raw)
        .status()
        .context("starting llvm-profdata")?;
    ensure!(
        status.success(),
        "the profiles of {target} cannot be merged"
    );
    Ok(merged)
}

fn report(tools: &Path, program: &Path, profile: &Path) -> Result<Value> {
    let output = Command::new(tools.join("llvm-cov"))
        .args(["export", "-summary-only"])
        .arg(format!("-instr-profile={}", profile.display()))
        .arg(program)
        .stderr(Stdio::inherit())
        .output()
        .context("starting llvm-cov")?;
    ensure!(
        output.status.success(),
        "llvm-cov failed ({})",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the report of llvm-cov")
}

/// The files of the report that the target is for, by path from the workspace.
fn subject(target: &Target, report: &Value) -> Result<Vec<(String, Figures)>> {
    let files = report["data"][0]["files"].as_array();
    let mut found = Vec::new();
    for file in files.context("llvm-cov reports no files")? {
        let path = Path::new(file["filename"].as_str().unwrap_or_default());
        let Some(path) = from_workspace(path) else {
            continue;
        };
        if target.is_for(&path) {
            let figures = |of: &str| {
                let figure = |name: &str| file["summary"][of][name].as_u64();
                Some((figure("covered")?, figure("count")?))
            };
            let figures = Figures {
                lines: figures("lines").with_context(|| format!("no lines of {path}"))?,
                regions: figures("regions").with_context(|| format!("no regions of {path}"))?,
            };
            found.push((path, figures));
        }
    }
    ensure!(
        !found.is_empty(),
        "{} executes nothing that it is for",
        target.name
    );
    Ok(found)
}

/// The path from the workspace. Cargo names a dependency's files from the folder of the package that is built.
fn from_workspace(path: &Path) -> Option<String> {
    let absolute = paths::workspace().join("fuzz").join(path);
    let absolute = absolute.canonicalize().ok()?;
    let inside = absolute.strip_prefix(paths::workspace()).ok()?;
    inside.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::targets::TARGETS;
    use super::*;

    #[test]
    fn version_of_llvm_is_read() {
        let text = "rustc 1.95.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.2\n";
        assert_eq!(major_of_llvm(text), Some("22"));
        assert_eq!(major_of_llvm("rustc 1.95.0\n"), None);
    }

    #[test]
    fn only_files_that_the_target_is_for_are_counted() {
        let root = paths::workspace();
        let file = |name: &str, covered: u64| {
            let figures = json!({"count": 10, "covered": covered});
            json!({
                "filename": root.join(name),
                "summary": {"lines": figures, "regions": figures},
            })
        };
        let files = [file("machine/src/bus.rs", 9), file("machine/src/lib.rs", 3)];
        let report = json!({"data": [{"files": files}]});
        let pci = TARGETS
            .iter()
            .find(|target| target.name == "pci")
            .expect("pci");
        let found = subject(pci, &report).expect("figures");
        let figures = Figures {
            lines: (9, 10),
            regions: (9, 10),
        };
        assert_eq!(found, [("machine/src/bus.rs".to_owned(), figures)]);
        assert_eq!(figures.percent(), 90.0);
    }
}
