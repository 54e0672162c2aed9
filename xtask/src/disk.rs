//! Checks that a file system has room for the data to be written.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Space to leave free for other uses of the machine.
const SPARE_BYTES: u64 = 256 << 20;

/// Fails if the file system of `dir` has no room for `bytes` more, with the amount that `task` needs.
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

/// As [`require`], for data that takes `bytes` in `dir` when complete; earlier runs may have left a part.
pub(crate) fn require_in_all(dir: &Path, bytes: u64, task: &str) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let left = bytes.saturating_sub(used_bytes(dir)?);
    match left {
        0 => Ok(()),
        left => require(dir, left, task),
    }
}

/// As reported by df(1): the space that this user may still write.
pub(crate) fn free_bytes(dir: &Path) -> Result<u64> {
    let text = ask("df", &["--output=avail", "-B1"], dir)?;
    let number = text
        .lines()
        .nth(1)
        .and_then(|line| line.trim().parse().ok());
    number.with_context(|| format!("no free space of {} in {text:?}", dir.display()))
}

/// As reported by du(1).
fn used_bytes(dir: &Path) -> Result<u64> {
    let text = ask("du", &["-s", "-B1"], dir)?;
    let number = text
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok());
    number.with_context(|| format!("no size of {} in {text:?}", dir.display()))
}

/// The program's output for `dir`; files may disappear while du reads them, which is not an error.
fn ask(program: &str, options: &[&str], dir: &Path) -> Result<String> {
    let output = Command::new(program)
        .args(options)
        .arg(dir)
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("starting {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{require, require_in_all};

    #[test]
    fn room_that_is_missing_is_named_with_its_amount_and_place() {
        let dir = Path::new("/tmp");
        require(dir, 0, "nothing").unwrap();
        let error = require(dir, 1 << 60, "a test").unwrap_err().to_string();
        assert!(error.starts_with("a test needs 10995116"), "{error}");
        assert!(error.contains(" MiB in /tmp, which has "), "{error}");
    }

    #[test]
    fn room_that_earlier_runs_have_taken_is_not_asked_for_again() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("built"), vec![1; 64 << 10]).unwrap();
        require_in_all(dir.path(), 64 << 10, "nothing").unwrap();
        let error = require_in_all(dir.path(), 1 << 60, "a test");
        assert!(error.unwrap_err().to_string().starts_with("a test needs"));
    }
}
