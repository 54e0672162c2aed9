//! A disk with a small Debian system: this machine's release with systemd and a root login without password. It is
//! created once and shared by all checkouts; tests boot copies.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::cache::{Lock, key};
use super::make::quiet;
use crate::apt::{self, Need};
use crate::{disk, paths};

const NEEDS: [Need; 2] = [
    Need {
        package: "mmdebstrap",
        why: "makes Debian's root file system for a test guest",
    },
    Need {
        package: "e2fsprogs",
        why: "puts that on a disk",
    },
];

/// Packages needed to boot to a login. The kernel is not on the disk.
const PACKAGES: &str = "systemd-sysv,udev";
/// Size of the file system: the packages take 180 MiB. Tests keep a copy in memory.
const SIZE: &str = "288M";
/// Space needed to create it: packages, unpacked files, and the disk.
const SPACE_BYTES: u64 = 1 << 30;
/// Folders that tests do not need.
const LEFT_OUT: [&str; 4] = ["doc", "man", "locale", "info"];
/// Commands for a shell outside the new root, which is `$1`.
const SET_UP: [&str; 2] = [
    "chroot \"$1\" passwd --delete root",
    "echo debian-guest > \"$1/etc/hostname\"",
];

/// The disk's image, created if it does not exist.
pub(super) fn image() -> Result<PathBuf> {
    let suite = apt::release_codename()?;
    let left_out = LEFT_OUT.join(",");
    let recipe = [&suite, PACKAGES, SIZE, &left_out, SET_UP[0], SET_UP[1]];
    let cache = paths::cache()?;
    let dir = cache.join(format!("debian-disk-{}", key(&recipe)));
    let image = dir.join("disk.ext4");
    if image.exists() {
        return Ok(image);
    }
    apt::ensure(&NEEDS)?;
    let _lock = Lock::take_named(&cache, "debian-lock", "another download from Debian")?;
    if !image.exists() {
        disk::require(&cache, SPACE_BYTES, "making a disk with Debian")?;
        make(&suite, &dir)?;
    }
    Ok(image)
}

fn make(suite: &str, dir: &Path) -> Result<()> {
    eprintln!("Making a disk with Debian {suite}, which takes several minutes the first time");
    let part = dir.with_extension("part");
    if part.exists() {
        // Left by an interrupted run, with files owned by root.
        quiet(
            apt::as_root("rm", "making a disk with Debian")?
                .args(["-rf", "--one-file-system"])
                .arg(&part),
        )?;
    }
    fs::create_dir_all(&part).with_context(|| format!("creating {}", part.display()))?;
    let root = part.join("root");
    let disk = part.join("disk.ext4");
    let mut bootstrap = apt::as_root("mmdebstrap", "making a disk with Debian")?;
    bootstrap.args(["--quiet", "--mode=root", "--variant=minbase"]);
    bootstrap.arg(format!("--include={PACKAGES}"));
    for folder in LEFT_OUT {
        bootstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    for script in SET_UP {
        bootstrap.arg(format!("--customize-hook={script}"));
    }
    bootstrap.arg(suite).arg(&root);
    bootstrap.arg(apt::archive_line(suite)?);
    quiet(&mut bootstrap)?;
    let mut fill = apt::as_root("mke2fs", "making a disk with Debian")?;
    fill.args(["-q", "-t", "ext4", "-m", "0", "-d"])
        .arg(&root)
        .arg(&disk)
        .arg(SIZE);
    quiet(&mut fill)?;
    let mut clear = apt::as_root("rm", "making a disk with Debian")?;
    quiet(clear.args(["-rf", "--one-file-system"]).arg(&root))?;
    fs::rename(&part, dir).with_context(|| format!("creating {}", dir.display()))
}
