//! The VMMs that are measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration_tests::paths;
use tempfile::TempDir;

/// One VMM.
#[derive(Debug)]
pub(crate) struct Subject {
    /// `ours` or `other`.
    pub(crate) name: &'static str,
    /// The program to start.
    pub(crate) program: PathBuf,
    /// Folder of a copy of the program.
    _folder: Option<TempDir>,
}

/// Ours and, if there is one, the `other`, which must start.
///
/// # Errors
/// One of them cannot be run.
pub(crate) fn all(other: Option<&Path>) -> Result<Vec<Subject>> {
    let ours = paths::program("cloud-hypervisor")?;
    let Some(other) = other else {
        return Ok(vec![Subject {
            name: "ours",
            program: ours,
            _folder: None,
        }]);
    };
    Ok(vec![copy("ours", &ours)?, copy("other", other)?])
}

/// Both are copied to the same place: an emulated host has our program in memory, and would read the other from the
/// surrounding machine, which slows each start.
fn copy(name: &'static str, from: &Path) -> Result<Subject> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("cloud-hypervisor");
    fs::copy(from, &program).with_context(|| format!("copying {}", from.display()))?;
    let output = Command::new(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", from.display()))?;
    ensure!(
        output.status.success(),
        "{} --version: {}",
        from.display(),
        output.status
    );
    eprintln!(
        "{name}: {} ({})",
        String::from_utf8_lossy(&output.stdout).trim(),
        from.display()
    );
    Ok(Subject {
        name,
        program,
        _folder: Some(folder),
    })
}
