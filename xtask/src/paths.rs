//! Locations of the source tree, the target directory, and the cache shared by all checkouts.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The root of the source tree this program was built from.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the manifest is in a folder of the workspace")
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        // Cargo reads a relative path from the directory it was started in.
        Some(dir) => std::path::absolute(&dir).unwrap_or_else(|_| dir.into()),
        None => workspace().join("target"),
    }
}

/// The output of `guest build`, shared by all checkouts.
pub(crate) fn guest() -> PathBuf {
    target().join("guest")
}

/// Kernel sources and finished kernels, keyed by content and so shared between checkouts.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(
            std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?,
        )
        .join(".cache"),
    };
    let cache = base.join("cloud-hypervisor-xtask");
    std::fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    Ok(cache)
}

/// Creates `to` with the contents of `from`: a hard link if the file system allows it, otherwise a copy. In both cases
/// `to` appears atomically.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    let beside = to.with_extension(format!("new-{}", std::process::id()));
    if std::fs::hard_link(from, &beside).is_err() {
        std::fs::copy(from, &beside).with_context(|| format!("copying {}", from.display()))?;
    }
    // Renaming onto another link of the same file does nothing and leaves `beside` there.
    if to.exists() {
        std::fs::remove_file(to).with_context(|| format!("replacing {}", to.display()))?;
    }
    std::fs::rename(&beside, to).with_context(|| format!("creating {}", to.display()))
}
