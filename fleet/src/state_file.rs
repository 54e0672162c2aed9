//! Files that must survive the agent. They are replaced atomically, so that a file always has either its old or its new
//! content.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes a temporary file, syncs it to disk, and renames it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_beside(path, bytes)?.sync_all()?;
    take_name(path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// The same without syncing, for data that must survive the agent but not the machine.
pub(crate) fn replace_in_memory(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_beside(path, bytes)?;
    take_name(path)
}

/// Identifies the boot of the machine; empty if the kernel does not provide it.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| String::new(), |text| text.trim().to_owned())
}

fn write_beside(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let beside = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(bytes)?;
    Ok(file)
}

fn take_name(path: &Path) -> io::Result<()> {
    fs::rename(path.with_extension("new"), path)
}
