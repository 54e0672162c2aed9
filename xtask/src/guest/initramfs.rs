//! The guests' initramfs: busybox, our init and `guest-mem`.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use flate2::{Compression, write::GzEncoder};

use super::{cpio, programs};
use crate::apt::{self, Need};

const BUSYBOX: Need = Need {
    package: "busybox-static",
    why: "shell and tools inside test guests",
};

/// Checks that a busybox for it is installed.
pub(crate) fn ensure_tools() -> Result<()> {
    apt::ensure(&[BUSYBOX])
}

/// Writes the initramfs if its contents have changed.
pub(crate) fn build(path: &Path) -> Result<()> {
    ensure_tools()?;
    let program = programs::build()?;
    let program = fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    write_if_changed(path, &gzip(&archive(&program)?)?)
}

/// Writes the initramfs at `common` with additional files appended, if that has changed.
pub(crate) fn extend(common: &Path, more: cpio::Archive, path: &Path) -> Result<()> {
    let mut image = fs::read(common).with_context(|| format!("reading {}", common.display()))?;
    // Archives follow one another on a multiple of four.
    image.resize(image.len().next_multiple_of(4), 0);
    image.extend(gzip(&more.finish())?);
    write_if_changed(path, &image)
}

fn write_if_changed(path: &Path, image: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == image) {
        return Ok(());
    }
    let beside = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&beside, image).with_context(|| format!("writing {}", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("creating {}", path.display()))
}

fn archive(program: &[u8]) -> Result<Vec<u8>> {
    let busybox = fs::read("/bin/busybox").context("reading /bin/busybox")?;
    let mut archive = cpio::Archive::default();
    for name in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        archive.directory(name);
    }
    // Process 1 gets its standard streams from this node, before /dev is mounted.
    archive.character_device("dev/console", 0o600, (5, 1));
    // Init starts before it mounts /dev, and in a guest without a console it opens this as its standard streams.
    archive.character_device("dev/null", 0o666, (1, 3));
    archive.file("init", 0o755, program);
    archive.symlink("bin/guest-mem", "/init");
    archive.file("bin/busybox", 0o755, &busybox);
    for applet in applets()? {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.symlink("sbin", "bin");
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    Ok(archive.finish())
}

/// Every tool of this busybox, from its own list.
fn applets() -> Result<Vec<String>> {
    let output = Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .context("starting busybox")?;
    if !output.status.success() {
        bail!("busybox --list failed ({})", output.status);
    }
    let list = String::from_utf8(output.stdout).context("the list of busybox applets")?;
    Ok(list
        .lines()
        .filter(|name| *name != "busybox")
        .map(str::to_string)
        .collect())
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    // Stored without compression: the boot is a fifth faster (0.51 s instead of 0.63 s of counted time to init), and
    // the file is never transferred.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
    encoder.write_all(bytes).context("packing")?;
    encoder.finish().context("packing")
}
