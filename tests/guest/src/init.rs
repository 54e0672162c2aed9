//! Process 1 of a test guest.
//!
//! mounts → `guest: init SECONDS` on the console → modules → `guest.run=` script or an interactive shell →
//! `guest: exit STATUS` → power off, reboot or stay. With `guest.root=`, the init of the system on that disk takes
//! over. The marker is printed as early as possible, because the time until then is a published figure. Pressing the
//! power button ends the guest in any state.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use crate::cmdline::{self, End, Request};
use crate::{modules, root, sys};

/// Port for which VMMs print a time stamp, and the value for "user space runs".
const DEBUG_PORT: u64 = 0x80;
const DEBUG_USER_SPACE: u8 = 0x41;

/// Input devices watched for the power button; a guest of ours has one or two.
const INPUT_DEVICES_MAX: usize = 4;

/// Never returns: process 1 must not end.
pub(crate) fn main() -> ! {
    mount("proc", "/proc", "proc");
    println!("guest: init {}", uptime());
    mount("devtmpfs", "/dev", "devtmpfs");
    mark_debug_port();
    modules::load();
    if let Err(error) = sys::link_standard_streams("/dev") {
        println!("guest: links in /dev: {error}");
    }
    for (kind, target) in [
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
    ] {
        mount(kind, target, kind);
    }

    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let end = match cmdline::parse(&line) {
        Ok(Request {
            root: Some(device), ..
        }) => {
            println!("guest: {device}: {}", root::go_on_with(&device));
            End::PowerOff
        }
        Ok(request) => {
            watch_power_button();
            let status = run(request.script.as_deref());
            println!("guest: exit {status}");
            request.end
        }
        Err(error) => {
            println!("guest: {error}");
            End::PowerOff
        }
    };
    match end {
        End::PowerOff => finish(libc::RB_POWER_OFF),
        End::Reboot => finish(libc::RB_AUTOBOOT),
        End::Stay => sys::reap_for_ever(),
    }
}

fn mount(source: &str, target: &str, kind: &str) {
    if let Err(error) = sys::mount(source, target, kind, 0, "") {
        println!("guest: mounting {target}: {error}");
    }
}

fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_string()
}

fn mark_debug_port() {
    // Absent on kernels without CONFIG_DEVPORT; the time stamp is then missing, which is harmless.
    if let Ok(mut port) = OpenOptions::new().write(true).open("/dev/port")
        && port.seek(SeekFrom::Start(DEBUG_PORT)).is_ok()
        && let Err(error) = port.write_all(&[DEBUG_USER_SPACE])
    {
        println!("guest: debug port: {error}");
    }
}

fn watch_power_button() {
    let Ok(entries) = std::fs::read_dir("/dev/input") else {
        return;
    };
    for entry in entries.flatten().take(INPUT_DEVICES_MAX) {
        if let Ok(mut device) = File::open(entry.path()) {
            std::thread::spawn(move || {
                if sys::wait_power_button(&mut device).is_ok() {
                    println!("guest: power button");
                    finish(libc::RB_POWER_OFF);
                }
            });
        }
    }
}

fn run(script: Option<&[u8]>) -> i32 {
    let mut command = Command::new("/bin/busybox");
    command
        .arg("sh")
        .env("PATH", "/bin")
        .env("HOME", "/")
        .env("TERM", "linux");
    match script {
        Some(script) => {
            command
                .arg("-c")
                .arg(String::from_utf8_lossy(script).as_ref());
        }
        None => interactive(&mut command),
    }
    match command.spawn() {
        Ok(child) => sys::reap_until(child.id()),
        Err(error) => {
            println!("guest: starting the shell: {error}");
            127
        }
    }
}

/// /dev/console cannot be a controlling terminal; the device behind it can.
#[allow(unsafe_code)]
// UNSAFETY: pre_exec is unsafe by signature.
fn interactive(command: &mut Command) {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let name = active.split_ascii_whitespace().last().unwrap_or("console");
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/{name}"))
    };
    if let (Ok(input), Ok(output), Ok(errors)) = (open(), open(), open()) {
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors));
        // SAFETY: the closure makes two system calls and allocates nothing.
        unsafe {
            command.pre_exec(sys::own_session_on_stdin);
        }
    }
}

fn finish(how: libc::c_int) -> ! {
    let error = sys::end_machine(how);
    println!("guest: ending: {error}");
    sys::reap_for_ever()
}
