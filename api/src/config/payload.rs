//! Configuration of the payload to boot.

use std::path::PathBuf;

use api_macros::section;

/// The payload: a kernel with its command line and initramfs, or a firmware.
#[section]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadConfig {
    /// Firmware image with a PVH entry point.
    pub firmware: Option<PathBuf>,
    /// Kernel image: ELF with a PVH note, or bzImage.
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Initial RAM disk.
    pub initramfs: Option<PathBuf>,
}
