//! Guests of distributions for tests: Debian's kernels for cloud guests of every tested series, its kernel for any
//! machine, and a disk with Debian.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::debian::{self, DebianKernel};
use super::debian_disk;
use crate::paths;

/// Series with separate names under `/guest`; the newest is `debian-newest`.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The kernel for any machine, which has more drivers for devices of the host.
const GENERIC: &str = "generic";

/// Names under `/guest` and the files. A series that this machine's release lacks is omitted, and so is the newest if
/// its archive is unreachable.
pub(super) fn publish(common: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut kernels: Vec<(String, DebianKernel)> = Vec::new();
    for packages in [debian::CLOUD, debian::CLOUD_6_12] {
        let kernel = DebianKernel::fetch(packages, |_, _| ())?;
        let series = kernel.series();
        let is_new = kernels.iter().all(|(name, _)| *name != series);
        if is_new && SERIES.contains(&series.as_str()) {
            kernels.push((series, kernel));
        }
    }
    match DebianKernel::fetch_newest() {
        Ok(kernel) if kernels.iter().all(|(name, _)| *name != kernel.series()) => {
            kernels.push(("newest".into(), kernel));
        }
        Ok(kernel) => eprintln!("note: {} is the newest kernel", kernel.series()),
        Err(error) => eprintln!("note: the newest kernel is skipped: {error:#}"),
    }
    // The emulated host boots it, too.
    let generic = DebianKernel::fetch(debian::GENERIC, |_, _| ())?;
    kernels.push((GENERIC.into(), generic));
    let mut files = vec![("debian-disk.ext4".into(), debian_disk::image()?)];
    for (name, kernel) in kernels {
        let folder = format!("debian-{name}");
        let dir = paths::guest().join(&folder);
        let optional: &[&str] = match name.as_str() {
            GENERIC => &debian::ASSIGNED_MODULES,
            _ => &debian::GUEST_MODULES_OPTIONAL,
        };
        debian::publish_packed(&kernel, common, optional, &dir)?;
        for file in ["vmlinuz", "initramfs.cpio.gz"] {
            files.push((format!("{folder}/{file}"), dir.join(file)));
        }
    }
    Ok(files)
}
