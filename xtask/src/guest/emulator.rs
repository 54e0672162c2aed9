//! A kernel under QEMU's emulation, without our VMM: for tests of the kernel alone.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::apt;
use crate::process::{self, Tie};
use crate::testbed::{QEMU, QEMU_PROGRAM};

/// The kernel to boot.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: Option<&'a Path>,
    pub(super) command_line: &'a str,
    pub(super) cpus: u32,
    /// Further options of QEMU, including the memory.
    pub(super) arguments: &'a [&'a str],
    pub(super) deadline: Duration,
}

/// The result.
#[derive(Debug)]
pub(super) struct Ended {
    /// Everything on the console, without carriage returns.
    pub(super) console: String,
    /// `None` if it ran out of time and was killed.
    pub(super) status: Option<ExitStatus>,
}

impl Machine<'_> {
    /// Boots and waits for the end, when the guest powers off; each line of its console goes to `see` immediately.
    pub(super) fn run(&self, mut see: impl FnMut(&str) + Send + 'static) -> Result<Ended> {
        apt::ensure_from_backports(QEMU)?;
        let mut command = Command::new(QEMU_PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-machine", "q35", "-cpu", "max"]);
        command.args(["-accel", "tcg,thread=multi", "-serial", "stdio"]);
        command.args(["-smp", &self.cpus.to_string()]);
        command.args(self.arguments);
        command.arg("-kernel").arg(self.kernel);
        if let Some(initramfs) = self.initramfs {
            command.arg("-initrd").arg(initramfs);
        }
        command.args(["-append", self.command_line]);
        command.stdout(Stdio::piped());
        let mut child = process::spawn_tied(&mut command, Tie::Kill, Vec::new())?;
        let stdout = child.stdout.take().context("QEMU's output is piped")?;
        let reader = thread::spawn(move || {
            let mut console = String::new();
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).replace('\r', "");
                see(&line);
                console.push_str(&line);
                console.push('\n');
            }
            console
        });
        let status = process::wait(child, Some(self.deadline))?;
        let console = reader.join().expect("a reading thread does not panic");
        Ok(Ended { console, status })
    }
}
