//! The emulated host: QEMU without KVM, whose AMD processor has nested paging, so that the
//! Linux inside has a KVM that boots Linux.
//!
//! Nothing is written to disk: the plan travels in an initramfs held in a memfd, output and
//! status come back on pipes. QEMU is told by the kernel to die with this process, so nothing
//! is left behind however it ends.
//!
//! ```text
//! this process ── memfd: init + plan ──→ QEMU -initrd
//!     stdout  ←── pipe ← virtio port testbed.stdout
//!     stderr  ←── pipe ← virtio port testbed.stderr
//!     status  ←── pipe ← virtio port testbed.status
//!     console ←── pipe ← first serial port (quoted when no status comes)
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal as _, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{Job, KernelChoice, Outcome, swap};
use crate::apt::{self, Need};
use crate::guest::debian::{self, DebianKernel};
use crate::guest::{cpio, programs};
use crate::process::{self, Tie};

pub(crate) const QEMU: Need = Need {
    package: "qemu-system-x86",
    why: "emulates machines that boot Linux",
};
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Where the outer machine puts our binaries.
const BIN_DIR: &str = "/opt/vmm/bin";

/// Console text kept for the case that the machine ends without a status.
const CONSOLE_BYTES_MAX: usize = 32 * 1024;

/// QEMU up to 10.1 clears a virtual interrupt with a plain read-modify-write of the word in which
/// other threads set pending interrupts, so a `VMEXIT` can lose an interrupt of the outer
/// machine. It stays in the local APIC's request register and is delivered with the next one.
/// One-shot timers have no next one: a lost timer interrupt would be the processor's last.
/// Periodic ticks bound the loss to one tick.
const OUTER_TIMERS: &str = " highres=off nohz=off";

/// Every processor feature QEMU emulates but two: it clears memory an instruction's iteration at a
/// time, and without these Linux clears 8 bytes in each, not 1.
const PROCESSOR: &str = "max,erms=off,fsrm=off";

/// Guests inside must not use the TSC-deadline timer: when the outer machine loses its
/// interrupt (see [`OUTER_TIMERS`]), the guest's is gone too.
const GUEST_CMDLINE_EXTRA: &str = "lapic=notscdeadline";

/// Runs the job and returns how its command ended.
pub(crate) fn run(job: &Job) -> Result<Outcome> {
    apt::ensure_from_backports(QEMU)?;
    let host = HostKernel::of(job)?;
    let initrd = memfd(&initramfs(job, host.modules.clone())?)?;
    let swap = job.options.swap.map(swap::create).transpose()?;

    let (stdout, stdout_end) = io::pipe().context("creating a pipe")?;
    let (stderr, stderr_end) = io::pipe().context("creating a pipe")?;
    let (status, status_end) = io::pipe().context("creating a pipe")?;
    let (console, console_end) = io::pipe().context("creating a pipe")?;
    let mut command = Command::new(PROGRAM);
    machine(&mut command, job, &host);
    command.arg("-initrd").arg(fd_path(&initrd));
    ports(
        &mut command,
        &[&stdout_end, &stderr_end, &status_end, &console_end],
    );
    filesystems(&mut command, job);
    if let Some(swap) = &swap {
        let drive = format!(
            "if=none,id=swap,format=raw,cache=unsafe,file={}",
            fd_path(swap)
        );
        command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=swap"]);
    }
    command.args(
        job.options
            .qemu
            .iter()
            .flat_map(|text| text.split_whitespace()),
    );
    let mut inherited = vec![initrd.as_raw_fd()];
    inherited.extend(swap.iter().map(|file| file.as_raw_fd()));
    inherited
        .extend([&stdout_end, &stderr_end, &status_end, &console_end].map(|end| end.as_raw_fd()));
    // QEMU's own words are for us, not for the command's output.
    command.stdout(io::stderr());
    let child = process::spawn_tied(&mut command, Tie::Kill, inherited)?;
    // Only QEMU must hold the writing ends, or the readers below never see the end.
    drop((command, stdout_end, stderr_end, status_end, console_end));

    let show_console = job.options.console;
    let readers = Readers {
        stdout: thread::spawn(move || copy(stdout, io::stdout())),
        stderr: thread::spawn(move || copy(stderr, io::stderr())),
        status: thread::spawn(move || io::read_to_string(status)),
        console: thread::spawn(move || keep_tail(console, show_console)),
    };
    let Some(ended) = process::wait(child, job.timeout())? else {
        readers.join();
        return Ok(Outcome::TimedOut);
    };
    let (status, console) = readers.join();
    match exit_status(&status) {
        Some(code) => Ok(Outcome::Exit(code)),
        None => {
            eprintln!("testbed: last words of the emulated host's console:");
            for line in console.lines() {
                eprintln!("  | {}", line.trim_end());
            }
            bail!("the emulated host ended without a status ({PROGRAM}: {ended})")
        }
    }
}

/// The threads that carry QEMU's output; each ends when QEMU has closed its pipe.
#[derive(Debug)]
struct Readers {
    stdout: JoinHandle<()>,
    stderr: JoinHandle<()>,
    status: JoinHandle<io::Result<String>>,
    console: JoinHandle<String>,
}

impl Readers {
    /// Waits for all of them: what the status port and the console said.
    fn join(self) -> (String, String) {
        for reader in [self.stdout, self.stderr] {
            reader.join().expect("a copying thread does not panic");
        }
        let status = self.status.join().expect("a reading thread does not panic");
        let console = self
            .console
            .join()
            .expect("a reading thread does not panic");
        (status.unwrap_or_default(), console)
    }
}

/// What the emulated host boots.
struct HostKernel {
    kernel: PathBuf,
    /// What its init loads; nothing for a kernel that has all drivers built in.
    modules: Option<cpio::Archive>,
}

impl HostKernel {
    /// Debian's for guests with Debian's, so that nothing has to be compiled; else ours.
    fn of(job: &Job) -> Result<Self> {
        if let Some(ours) = &job.artefacts.ours {
            return Ok(Self {
                kernel: ours.vmlinux.clone(),
                modules: None,
            });
        }
        let kernel = DebianKernel::fetch(debian::GENERIC, |_, _| ())?;
        Ok(Self {
            kernel: kernel.quickest()?,
            modules: Some(kernel.modules(&debian::HOST_MODULES)?),
        })
    }
}

/// Processor, memory, kernel.
fn machine(command: &mut Command, job: &Job, host: &HostKernel) {
    let options = &job.options;
    let mut append = String::from("console=ttyS0 quiet panic=-1");
    if host.modules.is_some() {
        // A distribution's kernel guards against leaks that an emulated processor does not have,
        // which costs time there.
        append.push_str(" mitigations=off");
    }
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(["-machine", "q35,kernel-irqchip=off", "-cpu", PROCESSOR]);
    if options.icount {
        command.args([
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=1,sleep=off",
        ]);
        command.args(["-smp", "1"]);
        append.push_str(" tsc=reliable");
    } else {
        command.args(["-accel", "tcg,thread=multi"]);
        command.args(["-smp", &options.cpus.to_string()]);
    }
    append.push_str(OUTER_TIMERS);
    command.args(["-m", &format!("{}K", options.memory / 1024)]);
    command.arg("-kernel").arg(&host.kernel);
    command.args(["-append", &append]);
}

/// One serial line for the kernel's console and three virtio ports.
fn ports(command: &mut Command, ends: &[&PipeWriter; 4]) {
    command.args(["-device", "virtio-serial-pci"]);
    for (name, end) in ["stdout", "stderr", "status", "console"].iter().zip(ends) {
        let chardev = format!("file,id={name},path={}", fd_path(*end));
        command.args(["-chardev", &chardev]);
        if *name == "console" {
            command.args(["-serial", "chardev:console"]);
        } else {
            let port = format!("virtserialport,chardev={name},name=testbed.{name}");
            command.args(["-device", &port]);
        }
    }
}

/// This machine's root, read-only, and the shared directory.
fn filesystems(command: &mut Command, job: &Job) {
    let mut export = |tag: &str, path: &OsStr, read_only: bool| {
        let mut fsdev = format!("local,id={tag},security_model=none,multidevs=remap,");
        if read_only {
            fsdev.push_str("readonly=on,");
        }
        fsdev.push_str("path=");
        let mut fsdev = std::ffi::OsString::from(fsdev);
        fsdev.push(path);
        command.arg("-fsdev").arg(fsdev);
        let device = format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}");
        command.args(["-device", &device]);
    };
    export("root", OsStr::new("/"), true);
    if let Some(share) = &job.share {
        export("share", share.as_os_str(), false);
    }
}

/// The outer machine's initramfs: its init and what it shall do.
fn initramfs(job: &Job, modules: Option<cpio::Archive>) -> Result<Vec<u8>> {
    let program = programs::build()?;
    let program =
        std::fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    let mut archive = modules.unwrap_or_default();
    for name in ["dev", "testbed"] {
        archive.directory(name);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &program);
    let argv = job
        .options
        .command
        .iter()
        .map(|arg| arg.as_bytes().to_vec());
    archive.file("testbed/argv", 0o644, &nul_separated(argv));
    let environment = environment(job.options.kernel);
    archive.file("testbed/env", 0o644, &nul_separated(environment));
    let cwd = std::env::current_dir().context("the current directory")?;
    archive.file("testbed/cwd", 0o644, cwd.as_os_str().as_bytes());
    let bins = job
        .bins
        .iter()
        .map(|bin| bin.as_os_str().as_bytes().to_vec());
    archive.file("testbed/bins", 0o644, &nul_separated(bins));
    let links = job.artefacts.files().into_iter().map(|(name, path)| {
        let mut link = format!("{name}=").into_bytes();
        link.extend(path.as_os_str().as_bytes());
        link
    });
    archive.file("testbed/guest", 0o644, &nul_separated(links));
    if job.options.icount {
        archive.file("testbed/copy-guest", 0o644, b"");
    }
    Ok(archive.finish())
}

/// The caller's environment with what the testbed adds.
fn environment(kernel: KernelChoice) -> impl Iterator<Item = Vec<u8>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut with_bins = std::ffi::OsString::from(format!("{BIN_DIR}:"));
    with_bins.push(path);
    let terminal = if io::stdout().is_terminal() {
        "yes"
    } else {
        "no"
    };
    let ours = [
        ("PATH".into(), with_bins),
        ("TESTBED".into(), "emulated".into()),
        ("GUEST_CMDLINE_EXTRA".into(), GUEST_CMDLINE_EXTRA.into()),
        ("GUEST_KERNEL".into(), kernel.name().into()),
        // The command itself writes to a pipe.
        ("TESTBED_TERMINAL".into(), terminal.into()),
    ];
    std::env::vars_os()
        .filter(|(key, _)| key != "PATH")
        .chain(ours)
        .map(|(key, value): (std::ffi::OsString, std::ffi::OsString)| {
            [key.as_bytes(), b"=", value.as_bytes()].concat()
        })
}

fn nul_separated(items: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        bytes.extend(item);
        bytes.push(0);
    }
    bytes
}

/// A path by which QEMU opens a file that it inherits.
fn fd_path(file: &impl std::os::fd::AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[allow(unsafe_code)]
// UNSAFETY: std has no memfd.
fn memfd(contents: &[u8]) -> Result<File> {
    // SAFETY: the name is a NUL-terminated constant; a descriptor that the call returned is
    // owned by nobody else.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"testbed-initramfs".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(anyhow!(io::Error::last_os_error()).context("creating a memfd"));
        }
        File::from(OwnedFd::from_raw_fd(fd))
    };
    file.write_all(contents).context("filling a memfd")?;
    Ok(file)
}

fn copy(mut from: PipeReader, mut to: impl io::Write) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        // A reader of ours that has gone away (`| head`) does not end the command.
        if to
            .write_all(&buffer[..count])
            .and_then(|()| to.flush())
            .is_err()
        {
            continue;
        }
    }
}

/// Reads a console to its end and keeps the last part.
fn keep_tail(mut from: PipeReader, show: bool) -> String {
    let mut tail = Vec::new();
    let mut buffer = vec![0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if show && io::stderr().write_all(&buffer[..count]).is_err() {
            continue;
        }
        tail.extend(&buffer[..count]);
        if tail.len() > 2 * CONSOLE_BYTES_MAX {
            tail.drain(..tail.len() - CONSOLE_BYTES_MAX);
        }
    }
    String::from_utf8_lossy(&tail).into_owned()
}

/// Finds `exit N` in what the status port said.
fn exit_status(text: &str) -> Option<u8> {
    let code: i32 = text
        .lines()
        .find_map(|line| line.strip_prefix("exit "))?
        .parse()
        .ok()?;
    // Anything outside a shell's range is a failure all the same.
    Some(u8::try_from(code).unwrap_or(255))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_found_after_the_start_line() {
        assert_eq!(exit_status("start 1.20\nexit 3\n"), Some(3));
        assert_eq!(exit_status("start 1.20\nexit -1\n"), Some(255));
        assert_eq!(exit_status("start 1.20\n"), None);
        assert_eq!(exit_status(""), None);
    }

    #[test]
    fn environment_puts_our_binaries_first() {
        let path = environment(KernelChoice::Stock)
            .find(|pair| pair.starts_with(b"PATH="))
            .unwrap();
        assert!(path.starts_with(b"PATH=/opt/vmm/bin:"));
    }
}
