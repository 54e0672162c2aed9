//! `--vmm PATH`: a VMM compatible with Cloud Hypervisor, measured in addition to ours or instead of it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// The program's full path, or an immediate error, because the next steps take minutes.
pub(crate) fn found(path: &Path) -> Result<PathBuf> {
    let told = || format!("--vmm {}", path.display());
    let full = path.canonicalize().with_context(told)?;
    let metadata = full.metadata().with_context(told)?;
    ensure!(
        metadata.is_file() && metadata.permissions().mode() & 0o111 != 0,
        "--vmm {}: not an executable file",
        path.display()
    );
    let output = Command::new(&full)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(told)?;
    ensure!(
        output.status.success(),
        "--vmm {}: --version failed ({}): {}",
        path.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::found;

    #[test]
    fn path_of_a_program_that_tells_its_version_is_found() {
        assert!(found("/bin/bash".as_ref()).unwrap().is_absolute());
    }

    #[test]
    fn path_of_no_program_is_refused_with_its_name() {
        for path in ["/nowhere/vmm", "/etc", "/etc/passwd", "/bin/false"] {
            let error = found(path.as_ref()).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }
}
