//! Process 1 of the testbed's outer machine. It runs one command on a root that looks like the host's, and returns the
//! command's output and status.
//!
//! ```text
//! 9p "root" (the host's /, read-only) ─┐
//! tmpfs ──────────────────────────────┴─ overlay = / : everything readable, writes are lost
//!   /guest  links to kernels and initramfs      /share  9p "share", read-write
//!   /opt/vmm/bin  our binaries, copied to memory, first in PATH
//! virtio port "testbed.plan" ── this process: what to run, after "ready"
//! COMMAND ── pipe ── this process ── virtio port "testbed.stdout" / "testbed.stderr"
//!                                  └ virtio port "testbed.status": "ready", "start SECONDS", "exit N"
//! ```
//!
//! The plan is sent after the boot: the host saves the machine when it is ready, and starts later machines from there.
//! Until then, nothing may depend on the command or on the host's files.
//!
//! The command writes to pipes and not to the ports, because a port can be opened only once, and scripts reopen
//! /dev/stdout.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::{modules, sys};

/// A marker that only the outer machine's initramfs has.
pub(crate) const MARK: &str = "/testbed";

const ROOT: &str = "/newroot";
const BIN_DIR: &str = "/opt/vmm/bin";
/// The command's TMPDIR, in memory.
const TMPDIR: &str = "/run/tmp";

/// The serial number of the disk for swap.
const SWAP_SERIAL: &str = "swap";

/// Maximum time until a virtio port appears, and the polling interval.
const PORT_DEADLINE: Duration = Duration::from_secs(30);
const PORT_INTERVAL: Duration = Duration::from_millis(5);

/// Bytes moved from a pipe to a port at once.
const PUMP_BYTES: usize = 64 * 1024;
/// How long a poll waits for output before it checks whether the command has ended.
const POLL_MS: i32 = 20;

/// Never returns: process 1 must not end.
pub(crate) fn main() -> ! {
    let status = match prepare_and_run() {
        Ok(status) => status,
        Err(error) => {
            // The kernel console is shown by the host when no status arrives.
            println!("testbed: {error}");
            finish();
        }
    };
    if let Err(error) = say(&format!("exit {status}")) {
        println!("testbed: telling the status: {error}");
    }
    finish();
}

fn prepare_and_run() -> io::Result<i32> {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
    ] {
        step(target, sys::mount(source, target, kind, 0, ""))?;
    }
    modules::load();
    let plan = open_port("testbed.plan", OpenOptions::new().read(true))?;
    say("ready")?;
    let plan = step("plan", Plan::read(&mut BufReader::new(plan)))?;
    plan.start_afresh()?;
    build_root()?;
    fill_root(&plan)?;
    let [stdout, stderr] = ["testbed.stdout", "testbed.stderr"].map(port_to_write);
    let (stdout, stderr) = (stdout?, stderr?);
    step("chroot", sys::chroot(ROOT))?;
    environment_for_kvm()?;
    say(&format!("start {}", uptime()))?;
    run(&plan, stdout, stderr)
}

/// Adds the step to the error, so that the one line on the console is sufficient.
fn step<T>(what: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))
}

/// The host's request, sent as parts of the form `NAME LENGTH\n` and that many bytes; the part `end` is the last. Lists
/// have a NUL after each item.
#[derive(Debug, Default)]
struct Plan {
    /// The command and its arguments.
    argv: Vec<String>,
    /// Its environment, `KEY=VALUE`.
    env: Vec<String>,
    /// Its working directory.
    cwd: String,
    /// Files of the host to be copied into [`BIN_DIR`].
    bins: Vec<String>,
    /// Links in `/guest`, as `NAME=PATH`.
    guest: Vec<String>,
    /// `/guest` has copies in memory instead of links: while the clock counts instructions, reading through 9p would
    /// add the host's delays to the count.
    copy_guest: bool,
    /// Files, and links as `PATH=TARGET`, of the host to be copied to the same place in memory, for the same reason.
    libraries: Vec<String>,
    /// Seconds since 1970 and random bytes: a machine that was saved has old ones.
    time: Option<i64>,
    seed: Vec<u8>,
}

impl Plan {
    fn read(from: &mut impl BufRead) -> io::Result<Self> {
        let mut plan = Self::default();
        loop {
            let mut head = String::new();
            from.read_line(&mut head)?;
            let wrong = || io::Error::other(format!("no part begins with {head:?}"));
            let (name, length) = head.trim_end().split_once(' ').ok_or_else(wrong)?;
            let mut bytes = vec![0; length.parse().map_err(|_| wrong())?];
            from.read_exact(&mut bytes)?;
            if name == "seed" {
                plan.seed = bytes;
                continue;
            }
            let text = String::from_utf8_lossy(&bytes);
            let list = || text.split_terminator('\0').map(str::to_string).collect();
            match name {
                "argv" => plan.argv = list(),
                "env" => plan.env = list(),
                "cwd" => plan.cwd = text.into_owned(),
                "bins" => plan.bins = list(),
                "guest" => plan.guest = list(),
                "copy-guest" => plan.copy_guest = true,
                "libraries" => plan.libraries = list(),
                "time" => plan.time = Some(text.parse().map_err(|_| wrong())?),
                "end" => return Ok(plan),
                _ => return Err(wrong()),
            }
        }
    }

    /// Sets the state that this machine would otherwise share with others started from the same saved one.
    fn start_afresh(&self) -> io::Result<()> {
        if let Some(time) = self.time {
            step("clock", sys::set_clock(time))?;
        }
        if !self.seed.is_empty() {
            step("random numbers", sys::reseed(&self.seed))?;
        }
        Ok(())
    }
}

/// Puts a throw-away writable layer over the host's root and moves the kernel's file systems in.
fn build_root() -> io::Result<()> {
    let ninep = "trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    step(
        "9p root",
        sys::mount("root", "/lower", "9p", libc::MS_RDONLY, ninep),
    )?;
    step(
        "tmpfs",
        sys::mount("tmpfs", "/layer", "tmpfs", 0, "size=90%"),
    )?;
    fs::create_dir_all("/layer/upper")?;
    fs::create_dir_all("/layer/scratch")?;
    let layers = "lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/scratch";
    step("overlay", sys::mount("overlay", ROOT, "overlay", 0, layers))?;
    for (source, path, kind) in [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("devpts", "/dev/pts", "devpts"),
        ("tmpfs", "/dev/shm", "tmpfs"),
        ("tmpfs", "/run", "tmpfs"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2"),
        ("debugfs", "/sys/kernel/debug", "debugfs"),
    ] {
        step(
            path,
            sys::mount(source, &format!("{ROOT}{path}"), kind, 0, ""),
        )?;
    }
    step("/dev", sys::link_standard_streams(&format!("{ROOT}/dev")))?;
    // Names looked up here never reach the host, as they would in the overlay's /tmp.
    fs::create_dir_all(format!("{ROOT}{TMPDIR}"))?;
    // Absent unless the host gave a directory to share.
    if has_share() {
        let ninep = "trans=virtio,version=9p2000.L,cache=mmap,msize=512000";
        let target = format!("{ROOT}/share");
        step("9p share", sys::mount("share", &target, "9p", 0, ninep))?;
    }
    Ok(())
}

fn has_share() -> bool {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/drivers/9pnet_virtio") else {
        return false;
    };
    devices.flatten().any(|device| {
        fs::read_to_string(device.path().join("mount_tag"))
            .is_ok_and(|tag| tag.trim_end_matches(['\0', '\n']) == "share")
    })
}

fn fill_root(plan: &Plan) -> io::Result<()> {
    let bin_dir = format!("{ROOT}{BIN_DIR}");
    fs::create_dir_all(&bin_dir)?;
    for bin in &plan.bins {
        let name = Path::new(bin).file_name().unwrap_or_default();
        let target = Path::new(&bin_dir).join(name);
        step(bin, fs::copy(format!("/lower{bin}"), target))?;
    }
    for item in &plan.libraries {
        match item.split_once('=') {
            Some((path, target)) => {
                let path = format!("{ROOT}{path}");
                step(item, fs::remove_file(&path))?;
                step(item, std::os::unix::fs::symlink(target, path))?;
            }
            None => {
                let copied = fs::copy(format!("/lower{item}"), format!("{ROOT}{item}"));
                step(item, copied).map(drop)?;
            }
        }
    }
    for link in &plan.guest {
        if let Some((name, path)) = link.split_once('=') {
            let target = format!("{ROOT}/guest/{name}");
            if let Some(folder) = Path::new(&target).parent() {
                fs::create_dir_all(folder)?;
            }
            if plan.copy_guest {
                step(name, fs::copy(format!("/lower{path}"), target))?;
            } else {
                step(name, std::os::unix::fs::symlink(path, target))?;
            }
        }
    }
    Ok(())
}

fn environment_for_kvm() -> io::Result<()> {
    step("hostname", sys::set_hostname("testbed"))?;
    step("loopback", sys::loopback_up())?;
    if let Some(disk) = swap_disk(Path::new("/sys/block")) {
        step("swapon", sys::swapon(&format!("/dev/{disk}")))?;
    }
    // Without the controllers turned on, no cgroup below the root can limit anything.
    step(
        "cgroup controllers",
        fs::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            "+cpu +memory +pids +cpuset",
        ),
    )
}

/// The disk that the host attaches as swap, with the header written; others are the test's.
fn swap_disk(blocks: &Path) -> Option<String> {
    let mut names = fs::read_dir(blocks).ok()?.filter_map(|disk| {
        let disk = disk.ok()?;
        disk.file_name().into_string().ok()
    });
    names.find(|name| {
        let serial = fs::read_to_string(blocks.join(name).join("serial"));
        serial.is_ok_and(|serial| serial.trim() == SWAP_SERIAL)
    })
}

fn port_to_write(name: &str) -> io::Result<File> {
    open_port(name, OpenOptions::new().write(true))
}

/// Opens a virtio port by name; udev, which would make the link, does not run here. The driver learns about its ports
/// from the device shortly after its start.
fn open_port(name: &str, how: &OpenOptions) -> io::Result<File> {
    let begin = Instant::now();
    loop {
        for port in step("virtio ports", fs::read_dir("/sys/class/virtio-ports"))?.flatten() {
            let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
            if found.trim_end() == name {
                let device = Path::new("/dev").join(port.file_name());
                return step(name, how.open(device));
            }
        }
        if begin.elapsed() > PORT_DEADLINE {
            return Err(io::Error::other(format!("no virtio port {name}")));
        }
        thread::sleep(PORT_INTERVAL);
    }
}

/// One line on the status port, which is reopened each time.
fn say(line: &str) -> io::Result<()> {
    port_to_write("testbed.status")?.write_all(format!("{line}\n").as_bytes())
}

fn uptime() -> String {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_string()
}

fn run(plan: &Plan, stdout: File, stderr: File) -> io::Result<i32> {
    let (program, args) = plan
        .argv
        .split_first()
        .ok_or_else(|| io::Error::other("no command"))?;
    let mut command = Command::new(program);
    command.args(args).env_clear().process_group(0);
    for pair in &plan.env {
        if let Some((key, value)) = pair.split_once('=') {
            command.env(key, value);
        }
    }
    command.env("TMPDIR", TMPDIR);
    if Path::new(&plan.cwd).is_dir() {
        command.current_dir(&plan.cwd);
    }
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let mut stderr = stderr;
            stderr.write_all(format!("testbed: {program}: {error}\n").as_bytes())?;
            // As in a shell: 127 not found, 126 found but not executable.
            return Ok(if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            });
        }
    };
    let from = (child.stdout.take(), child.stderr.take());
    drop(command);
    let pid = child.id();
    let mut out = Stream::new(from.0, stdout)?;
    let mut err = Stream::new(from.1, stderr)?;
    let mut status = None;
    while status.is_none() {
        pump(&mut out, &mut err, POLL_MS)?;
        while let Some((ended, code)) = sys::reap_one() {
            if ended == pid {
                status = Some(code);
            }
        }
        if out.from.is_none() && err.from.is_none() && status.is_none() {
            status = Some(sys::reap_until(pid));
        }
    }
    // Processes that the command left running end with it, which closes the pipes.
    sys::kill_all();
    while out.from.is_some() || err.from.is_some() {
        pump(&mut out, &mut err, -1)?;
    }
    Ok(status.unwrap_or(-1))
}

/// One direction of output.
#[derive(Debug)]
struct Stream<R> {
    /// None once the last writer has closed.
    from: Option<R>,
    to: File,
}

impl<R: io::Read + AsRawFd> Stream<R> {
    fn new(from: Option<R>, to: File) -> io::Result<Self> {
        if let Some(from) = &from {
            sys::set_nonblocking(from)?;
        }
        Ok(Self { from, to })
    }

    fn pollable(&self) -> Option<&dyn AsRawFd> {
        self.from.as_ref().map(|from| from as &dyn AsRawFd)
    }

    fn copy_once(&mut self) -> io::Result<()> {
        let Some(from) = &mut self.from else {
            return Ok(());
        };
        let mut buffer = [0; PUMP_BYTES];
        match from.read(&mut buffer) {
            Ok(0) => self.from = None,
            Ok(count) => self.to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn pump<A, B>(out: &mut Stream<A>, err: &mut Stream<B>, timeout_ms: i32) -> io::Result<()>
where
    A: io::Read + AsRawFd,
    B: io::Read + AsRawFd,
{
    let ready = sys::wait_readable(&[out.pollable(), err.pollable()], timeout_ms);
    if ready[0] {
        out.copy_once()?;
    }
    if ready[1] {
        err.copy_once()?;
    }
    Ok(())
}

fn finish() -> ! {
    let error = sys::end_machine(libc::RB_POWER_OFF);
    println!("testbed: powering off: {error}");
    sys::reap_for_ever()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_the_disk_of_that_serial_number() {
        let blocks = std::env::temp_dir().join(format!("blocks-{}", std::process::id()));
        for (name, serial) in [("vda", "data\n"), ("vdb", "swap\n")] {
            fs::create_dir_all(blocks.join(name)).unwrap();
            fs::write(blocks.join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir_all(blocks.join("loop0")).unwrap();
        let found = swap_disk(&blocks);
        fs::remove_dir_all(&blocks).unwrap();
        assert_eq!(found.as_deref(), Some("vdb"));
    }

    #[test]
    fn plan_is_read_to_its_end_and_not_beyond() {
        let mut stream: &[u8] =
            b"argv 5\0a\0b\0cwd 4\n/tmpcopy-guest 0\ntime 2\n17seed 2\n\xff\nend 0\nmore";
        // The first part lacks its line end.
        Plan::read(&mut stream).unwrap_err();
        let mut stream: &[u8] =
            b"argv 4\na\0b\0cwd 4\n/tmpcopy-guest 0\ntime 2\n17seed 2\n\xff\nend 0\nmore";
        let plan = Plan::read(&mut stream).unwrap();
        assert_eq!(plan.argv, ["a", "b"]);
        assert_eq!(plan.cwd, "/tmp");
        assert!(plan.copy_guest);
        assert_eq!(plan.time, Some(17));
        assert_eq!(plan.seed, b"\xff\n");
        assert_eq!(stream, b"more");
    }

    #[test]
    fn plan_that_ends_early_or_has_unknown_parts_is_an_error() {
        for mut stream in [
            &b""[..],
            b"argv 4\na\0",
            b"argv x\n",
            b"other 0\nend 0\n",
            b"time 1\nxend 0\n",
        ] {
            Plan::read(&mut stream).unwrap_err();
        }
    }
}
