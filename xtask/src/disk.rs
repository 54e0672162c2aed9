//! Whether a file system has room for what is about to be written.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Left free for everything else on the machine.
const SPARE_BYTES: u64 = 256 << 20;

/// Fails if the file system of `dir` has no room for `bytes` more, saying how much `task` needs.
pub(crate) fn require(dir: &Path, bytes: u64, task: &str) -> Result<()> {
    let free = free_bytes(dir)?;
    ensure!(
        free >= bytes.saturating_add(SPARE_BYTES),
        "{task} needs {} MiB in {}, which has {} MiB free: free some space, or set XDG_CACHE_HOME \
         (downloads, kernels) or CARGO_TARGET_DIR (builds) to a folder on another disk",
        (bytes + SPARE_BYTES) >> 20,
        dir.display(),
        free >> 20
    );
    Ok(())
}

/// As df(1) reports it: what this user may still write.
fn free_bytes(dir: &Path) -> Result<u64> {
    let output = Command::new("df")
        .args(["--output=avail", "-B1"])
        .arg(dir)
        .output()
        .context("starting df")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .nth(1)
        .and_then(|line| line.trim().parse().ok())
        .with_context(|| {
            format!(
                "free space of {}: {}",
                dir.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            )
        })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::require;

    #[test]
    fn room_that_is_missing_is_named_with_its_amount_and_place() {
        let dir = Path::new("/tmp");
        require(dir, 0, "nothing").unwrap();
        let error = require(dir, 1 << 60, "a test").unwrap_err().to_string();
        assert!(error.starts_with("a test needs 10995116"), "{error}");
        assert!(error.contains(" MiB in /tmp, which has "), "{error}");
    }
}
