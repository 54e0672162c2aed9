//! The emulated host: QEMU without KVM. Its AMD processor has nested paging, so the KVM of the Linux inside can boot
//! Linux.
//!
//! The initramfs is in a memfd; the plan and all output are transferred through pipes. Once the host has booted, it is
//! saved in the cache ([`super::saved`]). The kernel kills QEMU when this process ends, so nothing else is left behind.
//!
//! ```text
//! this process ── memfd: init ──→ QEMU -initrd
//!     plan    ──→ pipe → virtio port testbed.plan
//!     stdout  ←── pipe ← virtio port testbed.stdout
//!     stderr  ←── pipe ← virtio port testbed.stderr
//!     status  ←── pipe ← virtio port testbed.status
//!     console ←── pipe ← first serial port (quoted when no status comes)
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use parking_lot::Mutex;

use super::job::{Job, Options, Outcome};
use super::saved::SavedHost;
use super::{plan, swap, tsc};
use crate::apt::{self, Need};
use crate::guest::debian::{self, DebianKernel};
use crate::guest::{cpio, programs};
use crate::process::{self, Tie};

pub(crate) const QEMU: Need = Need {
    package: "qemu-system-x86",
    why: "emulates machines that boot Linux",
};
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// Time limit until a host is ready to be saved, and until a saved host starts its command.
const START_MAX: Duration = Duration::from_secs(120);

/// Console text kept for the case that the machine ends without a status.
const CONSOLE_BYTES_MAX: usize = 32 * 1024;

/// QEMU up to 10.1 clears a virtual interrupt with a plain read-modify-write of the word in which
/// other threads set pending interrupts, so a `VMEXIT` can lose an interrupt of the outer
/// machine. It stays in the local APIC's request register and is delivered with the next one.
/// One-shot timers have no next one: a lost timer interrupt would be the processor's last.
/// Periodic ticks bound the loss to one tick.
const OUTER_TIMERS: &str = " highres=off nohz=off";

/// With interrupt remapping, without which VFIO gives no device away.
const IOMMU: &str = "intel-iommu,intremap=on,caching-mode=on";
/// Size of each disk that guests can drive.
const ASSIGNABLE_BYTES: u64 = 1 << 30;
/// Disks that guests can drive, and their place. The last two are functions of one device, and so in one IOMMU group.
/// Its third function is in [`ASSIGNABLE`].
const ASSIGNABLE_DISKS: [(&str, &str); 3] = [
    ("nvme", ""),
    ("pair0", ",addr=0x10.0,multifunction=on"),
    ("pair1", ",addr=0x10.1"),
];
/// Further devices that guests can drive: a network interface, whose other end is an interface of the host with the
/// second address, a device that accesses any address of 64 bits that it is told, and a function with a driver of the host
/// beside two of the disks.
const ASSIGNABLE: [&str; 12] = [
    "-netdev",
    "hubport,hubid=0,id=nic",
    "-device",
    "igb,netdev=nic,mac=52:54:00:00:00:01",
    "-netdev",
    "hubport,hubid=0,id=peer",
    "-device",
    "virtio-net-pci,netdev=peer,mac=52:54:00:00:00:02",
    "-device",
    "edu,dma_mask=0xffffffffffffffff",
    "-device",
    "virtio-rng-pci,addr=0x10.2",
];

/// All processor features that QEMU emulates except two: QEMU executes string instructions one iteration at a time, and
/// without these features Linux clears 8 bytes per iteration instead of 1.
const PROCESSOR: &str = "max,erms=off,fsrm=off";

/// Runs the job and returns its command's result.
pub(crate) fn run(job: &Job) -> Result<Outcome> {
    apt::ensure_from_backports(QEMU)?;
    let host = HostKernel::of(job)?;
    let initramfs = initramfs(host.modules.clone())?;
    let swap = job.options.swap.map(swap::create).transpose()?;
    let mut command = Command::new(PROGRAM);
    machine(&mut command, job, &host);
    let saved = can_be_saved(&job.options)
        .then(|| SavedHost::of(&command, &host.kernel, &initramfs, job.share.is_some()))
        .transpose()?;
    filesystems(&mut command, job);
    if let Some(swap) = &swap {
        let drive = format!(
            "if=none,id=swap,format=raw,cache=unsafe,file={}",
            fd_path(swap)
        );
        // The guest finds it by its serial number, among other disks.
        let device = "virtio-blk-pci,drive=swap,serial=swap";
        command.args(["-drive", &drive, "-device", device]);
    }
    let disks = match job.options.assignable {
        true => assignable(&mut command)?,
        false => Vec::new(),
    };
    command.args(
        job.options
            .qemu
            .iter()
            .flat_map(|text| text.split_whitespace()),
    );
    let emulated = Emulated {
        job,
        command,
        initramfs: memfd(&initramfs)?,
        files: swap.into_iter().chain(disks).collect(),
    };
    let incoming = saved.as_ref().and_then(SavedHost::incoming);
    if let (Some(saved), Some(incoming)) = (&saved, incoming) {
        let ended = emulated.run(&Start::From(&incoming))?;
        if ended.has_started {
            return ended.outcome();
        }
        eprintln!("testbed: the saved host does not start; booting a new one");
        saved.forget()?;
    }
    let start = saved.as_ref().map_or(Start::Boot, Start::BootAndSave);
    emulated.run(&start)?.outcome()
}

/// Adds an IOMMU and devices that guests can drive, and returns the files of the disks.
fn assignable(command: &mut Command) -> Result<Vec<File>> {
    command.args(["-device", IOMMU]);
    let disks = ASSIGNABLE_DISKS.iter().map(|(id, place)| {
        let file = swap::nameless(ASSIGNABLE_BYTES)?;
        let drive = format!(
            "if=none,id={id},format=raw,cache=unsafe,file={}",
            fd_path(&file)
        );
        let device = format!("nvme,drive={id},serial={id}{place}");
        command.args(["-drive", &drive, "-device", &device]);
        Ok(file)
    });
    let disks = disks.collect::<Result<_>>()?;
    command.args(ASSIGNABLE);
    Ok(disks)
}

/// Whether a saved host can be used: additional devices may not be savable, and counted runs and shown consoles must
/// begin at boot.
fn can_be_saved(options: &Options) -> bool {
    let has_devices = options.qemu.is_some() || options.swap.is_some() || options.assignable;
    !options.icount && !options.console && !has_devices
}

/// How the emulated host starts.
#[derive(Debug)]
enum Start<'a> {
    Boot,
    /// Boots, and is saved when it is ready.
    BootAndSave(&'a SavedHost),
    /// Starts from a saved state, with QEMU's option for it.
    From(&'a str),
}

/// Common data of all runs of a job.
#[derive(Debug)]
struct Emulated<'a> {
    job: &'a Job,
    command: Command,
    initramfs: File,
    /// Further files that QEMU inherits.
    files: Vec<File>,
}

impl Emulated<'_> {
    fn run(&self, start: &Start<'_>) -> Result<Ended> {
        let (stdout, stdout_end) = io::pipe().context("creating a pipe")?;
        let (stderr, stderr_end) = io::pipe().context("creating a pipe")?;
        let (status, status_end) = io::pipe().context("creating a pipe")?;
        let (console, console_end) = io::pipe().context("creating a pipe")?;
        let (plan_end, mut plan) = io::pipe().context("creating a pipe")?;
        let (control, control_end) = UnixStream::pair().context("creating a socket")?;
        let mut command = Command::new(self.command.get_program());
        command.args(self.command.get_args());
        command.arg("-initrd").arg(fd_path(&self.initramfs));
        ports(
            &mut command,
            &[&stdout_end, &stderr_end, &status_end, &console_end],
            &plan_end,
        );
        if let Start::From(incoming) = start {
            command.args(["-incoming", incoming]);
        }
        let chardev = format!("socket,id=control,fd={}", control_end.as_raw_fd());
        command.args(["-chardev", &chardev, "-mon", "chardev=control,mode=control"]);
        let mut inherited = vec![
            self.initramfs.as_raw_fd(),
            plan_end.as_raw_fd(),
            control_end.as_raw_fd(),
        ];
        inherited.extend(self.files.iter().map(|file| file.as_raw_fd()));
        inherited.extend(
            [&stdout_end, &stderr_end, &status_end, &console_end].map(|end| end.as_raw_fd()),
        );
        // QEMU's own messages must not be mixed with the command's output.
        command.stdout(io::stderr());
        let child = process::spawn_tied(&mut command, Tie::Kill, inherited)?;
        // Only QEMU may hold the writing ends, otherwise the readers below never see the end.
        drop((command, stdout_end, stderr_end, status_end, console_end));
        drop((plan_end, control_end));

        let show_console = self.job.options.console;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (sender, lines) = mpsc::channel();
        let readers = Readers {
            stdout: thread::spawn({
                let heard = heard.clone();
                move || copy(stdout, io::stdout(), &heard)
            }),
            stderr: thread::spawn({
                let heard = heard.clone();
                move || copy(stderr, io::stderr(), &heard)
            }),
            status: thread::spawn(move || read_status(status, &sender)),
            console: thread::spawn(move || keep_tail(console, show_console)),
        };
        // The lines end early if QEMU ends, which is detected below.
        let says = |word| {
            lines
                .recv_timeout(START_MAX)
                .is_ok_and(|line: String| line.starts_with(word))
        };
        if let Start::BootAndSave(saved) = start
            && says("ready")
            && let Err(error) = saved.save(control)
        {
            eprintln!("testbed: the booted host was not saved: {error:#}");
        }
        // Created now, because it contains the time.
        let bytes = plan::bytes(self.job)?;
        // Ends at the latest with the host, because QEMU has the only reading end.
        let sender = thread::spawn(move || plan.write_all(&bytes).map(|()| plan));
        let stands_still = matches!(start, Start::From(_)) && !says("start");
        let begin = Instant::now();
        let silence_left = || process::time_left(self.job.options.silence_max, heard.lock().at);
        let time_left = || {
            if stands_still {
                return Duration::ZERO;
            }
            process::time_left(self.job.timeout(), begin).min(silence_left())
        };
        let ended = process::wait_while(child, time_left)?;
        let silent = ended.is_none() && !stands_still && silence_left().is_zero();
        let (status, console) = readers.join();
        // It failed only if QEMU has ended, which is reported.
        sender.join().expect("a writing thread does not panic").ok();
        Ok(Ended {
            has_started: status.lines().any(|line| line.starts_with("start ")),
            status,
            console,
            ended,
            silent_after: silent.then(|| heard.lock().last_line()),
        })
    }
}

/// How a run of QEMU ended.
#[derive(Debug)]
struct Ended {
    /// `None` on a timeout.
    ended: Option<ExitStatus>,
    /// The last line, if what ran out was the time in which it may print nothing.
    silent_after: Option<String>,
    /// The command was about to run.
    has_started: bool,
    status: String,
    console: String,
}

impl Ended {
    fn outcome(self) -> Result<Outcome> {
        let Some(ended) = self.ended else {
            return Ok(self.silent_after.map_or(Outcome::TimedOut, Outcome::Silent));
        };
        if let Some(code) = exit_status(&self.status) {
            return Ok(Outcome::Exit(code));
        }
        eprintln!("testbed: last lines of the emulated host's console:");
        for line in self.console.lines() {
            eprintln!("  | {}", line.trim_end());
        }
        bail!("the emulated host ended without a status ({PROGRAM}: {ended})")
    }
}

/// The threads that carry QEMU's output; each ends when QEMU has closed its pipe.
#[derive(Debug)]
struct Readers {
    stdout: JoinHandle<()>,
    stderr: JoinHandle<()>,
    status: JoinHandle<String>,
    console: JoinHandle<String>,
}

impl Readers {
    /// Waits for all of them; returns the output of the status port and of the console.
    fn join(self) -> (String, String) {
        for reader in [self.stdout, self.stderr] {
            reader.join().expect("a copying thread does not panic");
        }
        let status = self.status.join().expect("a reading thread does not panic");
        let console = self
            .console
            .join()
            .expect("a reading thread does not panic");
        (status, console)
    }
}

/// The kernel of the emulated host.
struct HostKernel {
    kernel: PathBuf,
    /// Modules that its init loads; `None` for a kernel with all drivers built in.
    modules: Option<cpio::Archive>,
}

impl HostKernel {
    /// Debian's kernel if the guests use Debian's, so that nothing must be compiled; otherwise ours.
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
            modules: Some(kernel.modules(&debian::HOST_MODULES, &[])?),
        })
    }
}

/// Adds the options for processor, memory and kernel.
fn machine(command: &mut Command, job: &Job, host: &HostKernel) {
    let options = &job.options;
    let mut append = String::from("console=ttyS0 quiet panic=-1");
    if host.modules.is_some() {
        // A distribution's kernel enables mitigations that an emulated processor does not need, which cost time.
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
        // Linux measures the rate of the counter twice. If the first result is wrong, KVM, which needs it before the
        // second, sets no rate: its clocks of guests then jump with each pause.
        append.push_str(&format!(" tsc_early_khz={}", tsc::khz()));
    }
    if options.assignable {
        // On a busy machine, Linux finds too few ticks when it checks the timer, and panics if interrupts are remapped.
        append.push_str(" intel_iommu=on no_timer_check");
    }
    append.push_str(OUTER_TIMERS);
    command.args(["-m", &format!("{}K", options.memory / 1024)]);
    command.arg("-kernel").arg(&host.kernel);
    command.args(["-append", &append]);
}

/// One serial line for the kernel's console, three virtio ports to write and one to read.
fn ports(command: &mut Command, ends: &[&PipeWriter; 4], plan: &PipeReader) {
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
    let chardev = format!("file,id=plan,path=/dev/null,input-path={}", fd_path(plan));
    let port = "virtserialport,chardev=plan,name=testbed.plan";
    command.args(["-chardev", &chardev, "-device", port]);
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

/// The outer machine's initramfs: the same init, with a folder that marks it as the outer machine's.
fn initramfs(modules: Option<cpio::Archive>) -> Result<Vec<u8>> {
    let program = programs::build()?;
    let program =
        std::fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    let mut archive = modules.unwrap_or_default();
    for name in ["dev", "testbed"] {
        archive.directory(name);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &program);
    Ok(archive.finish())
}

/// A path by which QEMU opens a file that it inherits.
fn fd_path(file: &impl std::os::fd::AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[allow(unsafe_code)]
// UNSAFETY: std has no memfd.
fn memfd(contents: &[u8]) -> Result<File> {
    // SAFETY: the name is a NUL-terminated constant; a descriptor returned by the call has no other owner.
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

/// The result of the command, as far as its silence is concerned.
#[derive(Debug)]
struct Heard {
    /// When it printed last, or began.
    at: Instant,
    /// The end of what it printed, with the last line in it.
    tail: Vec<u8>,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            at: Instant::now(),
            tail: Vec::new(),
        }
    }
}

impl Heard {
    const TAIL_BYTES_MAX: usize = 4096;

    fn hear(&mut self, bytes: &[u8]) {
        self.at = Instant::now();
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(Self::TAIL_BYTES_MAX);
        self.tail.drain(..excess);
    }

    /// Without the line's end.
    fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.tail);
        text.lines().last().unwrap_or_default().to_owned()
    }
}

fn copy(mut from: PipeReader, mut to: impl io::Write, heard: &Mutex<Heard>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        heard.lock().hear(&buffer[..count]);
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

/// Reads the status port to its end, and passes on each line immediately.
fn read_status(from: PipeReader, lines: &Sender<String>) -> String {
    let mut text = String::new();
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        text.push_str(&line);
        text.push('\n');
        // The receiver may be dropped before the last lines.
        lines.send(line).ok();
    }
    text
}

/// Finds `exit N` in the output of the status port.
fn exit_status(text: &str) -> Option<u8> {
    let code: i32 = text
        .lines()
        .find_map(|line| line.strip_prefix("exit "))?
        .parse()
        .ok()?;
    // A code outside a shell's range is also a failure.
    Some(u8::try_from(code).unwrap_or(255))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_line_is_that_which_was_printed_last() {
        let mut heard = Heard::default();
        assert_eq!(heard.last_line(), "");
        heard.hear(b"one\ntwo ");
        heard.hear("… ".as_bytes());
        assert_eq!(heard.last_line(), "two … ");
        heard.hear(&[b'x'; 3 * Heard::TAIL_BYTES_MAX]);
        heard.hear(b"\nthree\n");
        assert_eq!(heard.last_line(), "three");
        assert!(heard.tail.len() <= Heard::TAIL_BYTES_MAX);
    }

    #[test]
    fn status_is_found_after_the_start_line() {
        assert_eq!(exit_status("start 1.20\nexit 3\n"), Some(3));
        assert_eq!(exit_status("start 1.20\nexit -1\n"), Some(255));
        assert_eq!(exit_status("start 1.20\n"), None);
        assert_eq!(exit_status(""), None);
    }
}
