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
    /// Cases that are not measured.
    pub(crate) left_out: Vec<String>,
    /// Folder of a copy of the program.
    pub(crate) _folder: Option<TempDir>,
}

/// Ours and, if there is one, the `other`, which must start. `left_out` names cases as [`Subject::case`] does.
///
/// # Errors
/// One of them cannot be run.
pub(crate) fn all(other: Option<&Path>, left_out: &[String]) -> Result<Vec<Subject>> {
    let ours = paths::program("cloud-hypervisor")?;
    let mut subjects = match other {
        None => vec![Subject {
            name: "ours",
            program: ours,
            left_out: Vec::new(),
            _folder: None,
        }],
        Some(other) => vec![copy("ours", &ours)?, copy("other", other)?],
    };
    for subject in &mut subjects {
        subject.left_out = left_out.to_vec();
    }
    Ok(subjects)
}

impl Subject {
    /// The name of one of its cases, as progress shows it and `--leave-out` takes it.
    pub(crate) fn case(&self, figure: &str, case: &str) -> String {
        format!("{figure}/{case}/{}", self.name)
    }

    /// Whether the command line excludes this case.
    pub(crate) fn leaves_out(&self, case: &str) -> bool {
        self.left_out.iter().any(|name| name == case)
    }
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
        left_out: Vec::new(),
        _folder: Some(folder),
    })
}
