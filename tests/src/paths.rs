//! Paths of the programs, kernels and images under test.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The workspace this test was built from.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
        .to_path_buf()
}

/// The variable that names a VMM with our command line and API to use instead of ours, for comparisons.
pub const OTHER_VMM: &str = "OTHER_VMM";

/// One of our programs: from `PATH` inside the testbed, else the release build.
///
/// # Errors
/// There is no such program.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(other) = env::var_os(OTHER_VMM)
        && name == "cloud-hypervisor"
    {
        return Ok(other.into());
    }
    let in_path = env::var_os("PATH")
        .into_iter()
        .flat_map(|path| env::split_paths(&path).collect::<Vec<_>>())
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    let built = workspace().join("target/release").join(name);
    // Outside the testbed, a program of that name in PATH is not ours.
    let choice = if env::var_os("TESTBED").is_some() {
        in_path
    } else {
        None
    };
    match choice.or_else(|| built.is_file().then_some(built)) {
        Some(found) => Ok(found),
        None => bail!("{name} is not built: run `cargo build --release`"),
    }
}

/// Whether `GUEST_KERNEL` in the environment selects this kernel for names without a folder.
fn guest_kernel_is(choice: &str) -> bool {
    env::var_os("GUEST_KERNEL").is_some_and(|chosen| chosen == choice)
}

/// Whether a kernel without a folder is the patched one.
pub fn guest_kernel_is_patched() -> bool {
    guest_kernel_is("patched")
}

/// Whether a kernel without a folder is Debian's own.
pub fn guest_kernel_is_debian() -> bool {
    guest_kernel_is("debian")
}

/// Whether the balloon driver of a kernel without a folder inflates with free blocks of 2 MiB, as patch 501 makes it.
pub fn guest_kernel_inflates_by_blocks() -> bool {
    guest_kernel_is_patched() || guest_kernel_is("mainline")
}

/// Kernel parameters that make a kernel without a folder the selected one.
pub fn guest_kernel_arguments() -> &'static str {
    if guest_kernel_is("mainline") {
        "page_reporting.tracker=mainline"
    } else {
        ""
    }
}

/// A guest image: `initramfs.cpio.gz`, `vmlinux` or `bzImage`, one of the latter two under `patched/`, or
/// `debian/{vmlinux,vmlinuz}`. `GUEST_KERNEL` selects the kernel for names without a folder: `stock`, `patched`,
/// `mainline` (the patched one with [`guest_kernel_arguments`]) or `debian`.
///
/// # Errors
/// There is no such image.
pub fn guest(name: &str) -> Result<PathBuf> {
    let name = match name {
        "vmlinux" | "bzImage" if guest_kernel_is_patched() || guest_kernel_is("mainline") => {
            format!("patched/{name}")
        }
        "vmlinux" if guest_kernel_is_debian() => "debian/vmlinux".to_owned(),
        "bzImage" if guest_kernel_is_debian() => "debian/vmlinuz".to_owned(),
        name => name.to_owned(),
    };
    let built = workspace().join("target/guest");
    [
        PathBuf::from("/guest").join(&name),
        built.join("stock").join(&name),
        built.join(&name),
    ]
    .into_iter()
    .find(|file| file.is_file())
    .with_context(|| format!("no guest {name}: run `cargo xtask guest build`"))
}

/// The initramfs for a kernel that [`guest`] has found: the one in its folder, which has its modules, otherwise the
/// common one.
///
/// # Errors
/// There is neither.
pub fn guest_initramfs(kernel: &Path) -> Result<PathBuf> {
    let beside = kernel.with_file_name("initramfs.cpio.gz");
    if beside.is_file() {
        return Ok(beside);
    }
    guest("initramfs.cpio.gz")
}
