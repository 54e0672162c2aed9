//! `cargo xtask guest build`: what test guests boot.
//!
//! ```text
//! linux-source package + stock.config ─→ cache/kernel-KEY/{vmlinux,bzImage} ─→ target/guest/stock/
//! busybox-static + tests/guest        ─→ target/guest/initramfs.cpio.gz
//! ```

mod config;
pub(crate) mod cpio;
mod initramfs;
mod kernel;
pub(crate) mod programs;
mod progress;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::paths;

/// The finished files.
#[derive(Debug, Clone)]
pub(crate) struct Artefacts {
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
    pub(crate) initramfs: PathBuf,
}

/// Builds what is missing or out of date.
pub(crate) fn build() -> Result<Artefacts> {
    let guest = paths::guest();
    let stock = guest.join("stock");
    std::fs::create_dir_all(&stock).with_context(|| format!("creating {}", stock.display()))?;
    let artefacts = Artefacts {
        vmlinux: stock.join("vmlinux"),
        bzimage: stock.join("bzImage"),
        initramfs: guest.join("initramfs.cpio.gz"),
    };
    kernel::build(&artefacts)?;
    initramfs::build(&artefacts.initramfs)?;
    Ok(artefacts)
}
