//! A VMM that runs as another user, in a separate root folder.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::paths;
use crate::vmm::Vmm;

/// The user and the group of the VMM.
pub const NOBODY: u32 = 65534;

/// Starts the VMM where every user may open `/dev/kvm`, with its socket in a folder of [`NOBODY`]. Neither the host's
/// device nor its owner changes.
const START: &str = r#"#!/bin/sh
set -e
[ "$1" = --api-socket ]
folder=$(dirname "$2")
chown 65534:65534 "$folder"
mknod -m 666 "$folder/kvm" c 10 232
exec unshare --mount sh -ec 'mount --bind "$1/kvm" /dev/kvm; shift; exec "$@"' sh "$folder" PROGRAM "$@"
"#;

/// Whether this process may start it.
///
/// # Errors
/// There is no `/proc`.
pub fn is_possible() -> Result<bool> {
    Ok(fs::metadata("/proc/self")?.uid() == 0)
}

/// Writes a program into `folder` that starts the VMM so that it can change to [`NOBODY`].
///
/// # Errors
/// The program cannot be written.
pub fn vmm(folder: &Path) -> Result<PathBuf> {
    let start = folder.join("vmm-of-nobody");
    let program = paths::program("cloud-hypervisor")?;
    let program = program.to_str().context("path is not UTF-8")?;
    fs::write(&start, START.replace("PROGRAM", program))?;
    fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
    Ok(start)
}

/// The process id of a VMM in a jail, which is process 1 of its own pid namespace. The process that was started waits
/// for it.
///
/// # Errors
/// The VMM does not respond, or it is not in such a namespace.
pub fn pid_of_jailed(vmm: &Vmm) -> Result<u64> {
    let ping = vmm.get("vmm.ping")?;
    let pid = ping["pid"].as_u64().with_context(|| ping.to_string())?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.with_context(|| status.clone())
    };
    ensure!(
        line("PPid:")?.trim() == vmm.pid().to_string(),
        "the started process is not its parent"
    );
    ensure!(line("NSpid:")?.ends_with("\t1"), "{status}");
    Ok(pid)
}

/// A folder of [`NOBODY`].
///
/// # Errors
/// It cannot be created.
pub fn folder() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    Ok(folder)
}

/// A file of [`NOBODY`] with this size.
///
/// # Errors
/// It cannot be created.
pub fn file(path: &Path, bytes: u64) -> Result<()> {
    fs::File::create(path)?.set_len(bytes)?;
    Ok(chown(path, Some(NOBODY), Some(NOBODY))?)
}
