//! Debian's `virtio_balloon` module with the patches of the series that need no other patch.
//!
//! ```text
//! linux-source package: virtio_balloon.c + guest-patches/patches/5* ─┐
//! linux-headers package of the kernel                               ─┴→ cache/balloon-KEY/virtio_balloon.ko
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::cache::{compiler, key};
use super::debian::DebianKernel;
use super::make::quiet;
use super::modules::Module;
use super::series::Series;
use super::source::Source;
use crate::apt::{self, Need};
use crate::paths;

const NAME: &str = "virtio_balloon";
const DRIVER: &str = "drivers/virtio/virtio_balloon.c";

/// The module for this kernel.
pub(super) fn build(kernel: &DebianKernel) -> Result<Module> {
    let source = Source::base()?;
    let series = Series::inflation()?;
    let key = key(&[
        kernel.release(),
        &source.key,
        &series.prefix_key(series.patches.len()),
        &compiler()?,
    ]);
    let done = paths::cache()?.join(format!("balloon-{key}"));
    if !done.exists() {
        let beside = done.with_extension(std::process::id().to_string());
        compile(kernel, &source, &series, &beside)?;
        fs::rename(&beside, &done).with_context(|| format!("creating {}", done.display()))?;
    }
    let path = done.join(format!("{NAME}.ko"));
    Ok(Module {
        name: NAME.into(),
        bytes: fs::read(&path).with_context(|| format!("reading {}", path.display()))?,
    })
}

fn compile(kernel: &DebianKernel, source: &Source, series: &Series, dir: &Path) -> Result<()> {
    let headers = headers(kernel.release())?;
    let driver = dir.join(DRIVER);
    let folder = driver.parent().context("the driver is in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    fs::write(&driver, source.read(DRIVER)?)?;
    let contents = series.applied(dir)?;
    ensure!(contents.len() == 1, "patches 5xx change more than {DRIVER}");
    let patched = contents.get(DRIVER).and_then(Option::as_ref);
    let patched = patched.with_context(|| format!("no patch 5xx changes {DRIVER}"))?;
    fs::write(dir.join(format!("{NAME}.c")), patched)?;
    fs::write(dir.join("Kbuild"), format!("obj-m := {NAME}.o\n"))?;
    let mut make = Command::new("make");
    make.arg("-C").arg(&headers);
    make.arg(format!("M={}", dir.display())).arg("modules");
    quiet(&mut make)
}

/// The folder of the kernel's headers, which are installed if they are missing.
fn headers(release: &str) -> Result<PathBuf> {
    let name = format!("linux-headers-{release}");
    let folder = Path::new("/usr/src").join(&name);
    if !folder.exists() {
        apt::ensure(&[Need {
            // Once per process.
            package: name.leak(),
            why: "builds a module for Debian's kernel",
        }])?;
    }
    Ok(folder)
}
