//! Switches from the initramfs to the system on a disk.

use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::sys;

const ROOT: &str = "/root";
/// The path of this program in the new root, which does not include it.
const TOOL: &str = "/run/guest-mem";
/// Maximum time until a disk appears, and the polling interval.
const DISK_DEADLINE: Duration = Duration::from_secs(30);
const DISK_INTERVAL: Duration = Duration::from_millis(5);

/// Becomes the init of the system on `device`; returns only on failure.
pub(crate) fn go_on_with(device: &str) -> io::Error {
    match switch(device) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn switch(device: &str) -> io::Result<Infallible> {
    let begin = Instant::now();
    while !Path::new(device).exists() && begin.elapsed() < DISK_DEADLINE {
        std::thread::park_timeout(DISK_INTERVAL);
    }
    sys::mount(device, ROOT, "ext4", 0, "")?;
    std::fs::copy("/init", TOOL)?;
    for folder in ["/dev", "/proc", "/sys", "/run"] {
        sys::mount(folder, &format!("{ROOT}{folder}"), "", libc::MS_MOVE, "")?;
    }
    std::env::set_current_dir(ROOT)?;
    sys::mount(".", "/", "", libc::MS_MOVE, "")?;
    sys::chroot(".")?;
    Err(Command::new("/sbin/init").exec())
}
