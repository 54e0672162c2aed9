//! Names in the cache, and the lock that allows one build at a time.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// A short hash over `parts`, separated by their lengths.
pub(crate) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    short(hash)
}

/// A short hash over the contents of a file.
pub(super) fn file_key(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(bytes_key(&bytes))
}

/// A short hash over `bytes`.
pub(crate) fn bytes_key(bytes: &[u8]) -> String {
    short(Sha256::new_with_prefix(bytes))
}

fn short(hash: Sha256) -> String {
    let digest = hash.finalize();
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The version of the compiler that builds every kernel.
pub(super) fn compiler() -> Result<String> {
    let output = Command::new("gcc")
        .arg("-dumpfullversion")
        .output()
        .context("starting gcc")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// Holds the cache for one build at a time; released when dropped or when the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn take(cache: &Path) -> Result<Self> {
        Self::take_named(cache, "lock", "another kernel build")
    }

    /// As [`Lock::take`], for other work: the file to lock, and what another holder is doing.
    #[allow(unsafe_code)]
    // UNSAFETY: flock is not in std for the oldest supported compiler.
    pub(crate) fn take_named(cache: &Path, name: &str, holder: &str) -> Result<Self> {
        let path = cache.join(name);
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        // SAFETY: flock takes an open descriptor and no pointers.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            eprintln!("Waiting for {holder}");
            // SAFETY: as above.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
                bail!(
                    "locking {}: {}",
                    path.display(),
                    std::io::Error::last_os_error()
                );
            }
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn key_depends_on_every_part_and_on_their_borders() {
        let base = key(&["a", "bc"]);
        assert_eq!(base, key(&["a", "bc"]));
        assert_eq!(base.len(), 16);
        for other in [key(&["ab", "c"]), key(&["a", "bd"]), key(&["a"])] {
            assert_ne!(base, other);
        }
    }
}
