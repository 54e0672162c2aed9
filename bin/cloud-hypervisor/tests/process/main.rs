//! Tests the program as a process: exit status, output, and files left behind. No test here runs a guest.

#![allow(clippy::unwrap_used)]

mod confinement;
mod waiter;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_cloud-hypervisor"))
}

/// Runs the program until it exits, which it must do without a signal.
fn output(line: &str) -> Output {
    let mut child = program()
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{line}: does not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

/// A VMM without a machine, ended when dropped.
struct Vmm {
    child: Child,
    dir: tempfile::TempDir,
}

impl Vmm {
    fn start(arguments: &[&str]) -> Self {
        let mut command = program();
        command.args(arguments);
        Self::start_in(tempfile::tempdir().unwrap(), &mut command)
    }

    /// Starts `command` with a socket in `dir`, without waiting for anything.
    fn spawn_in(dir: tempfile::TempDir, command: &mut Command) -> Self {
        let child = command
            .arg("--api-socket")
            .arg(dir.path().join("s"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    /// The same, and waits until it responds.
    fn start_in(dir: tempfile::TempDir, command: &mut Command) -> Self {
        let vmm = Self::spawn_in(dir, command);
        let deadline = Instant::now() + PATIENCE;
        while vmm.request("GET", "vmm.ping").is_none() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        vmm
    }

    /// The first line of the response; `None` if there is no listener.
    fn request(&self, method: &str, name: &str) -> Option<String> {
        let answer = self.response(method, name, "")?;
        answer.lines().next().map(str::to_owned)
    }

    /// The whole response; `None` if there is no listener.
    fn response(&self, method: &str, name: &str, body: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.dir.path().join("s")).ok()?;
        let length = body.len();
        write!(
            stream,
            "{method} /api/v1/{name} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        Some(answer)
    }

    fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    fn wait(self) -> (Option<i32>, String, Vec<String>) {
        let (status, text, left) = self.wait_for_status();
        (status.code(), text, left)
    }

    fn wait_for_status(mut self) -> (ExitStatus, String, Vec<String>) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(1));
        };
        let mut text = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        (status, text, files(self.dir.path()))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // In every passing test, it has already ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn program_without_arguments_shows_its_help() {
    let output = output("");
    assert!(stderr(&output).contains("--api-socket"));
}

#[test]
fn program_version_has_upstreams_form() {
    let output = output("--version");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert!(lines.next().unwrap().starts_with("cloud-hypervisor v"));
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with("Migration Protocol Versions: ")
    );
}

#[test]
fn program_bad_values_end_in_one_chain_and_leave_nothing_behind() {
    for (line, reason) in [
        ("--kernel /k --memory size=0", "The size is 0"),
        ("--kernel /k --memory size=1000", "less than 2097152 bytes"),
        (
            "--kernel /k --memory size=3000001",
            "not a multiple of 4096",
        ),
        (
            "--kernel /k --memory size=16777216T",
            "Error parsing --memory",
        ),
        (
            "--kernel /k --memory size=65536G",
            "does not fit into 46 address bits",
        ),
        (
            "--kernel /k --cpus boot=0",
            "cpus.boot must be between 1 and cpus.max",
        ),
        (
            "--kernel /k --balloon size=512M",
            "A balloon of 536870912 bytes",
        ),
        (
            "--kernel /k --disk path=/a,image_type=qcow",
            "Error parsing --disk",
        ),
        (
            "--kernel /k --balloon colour=red",
            "unknown parameter \"colour\"",
        ),
        (
            "--kernel /k --disk path=/a,id=x path=/b,id=x",
            "Identifier x is not unique",
        ),
        (
            "--kernel /k --debug-console tty,iobase=0x3f8",
            "0x3f8 belongs to another device",
        ),
        (
            "--kernel /k --platform system_uuid=me",
            "\"me\" is not a UUID",
        ),
        (
            "--kernel /k --event-monitor path=/nonexistent/e",
            "No such file",
        ),
        ("-v", "Neither a payload"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let with_socket = match line {
            "-v" => line.to_owned(),
            _ => format!("{line} --api-socket {}", socket.display()),
        };
        let output = output(&with_socket);
        let text = stderr(&output);
        // A value that cannot be parsed is a usage error; a VM that cannot exist is not.
        let code = if text.contains("Error parsing --") {
            2
        } else {
            1
        };
        assert_eq!(output.status.code(), Some(code), "{line}: {text}");
        let mut lines = text.lines();
        assert_eq!(
            lines.next(),
            Some("Error: Cloud Hypervisor exited with the following chain of errors:"),
            "{line}: {text}"
        );
        assert!(lines.next().unwrap().starts_with("  0: "), "{line}: {text}");
        assert!(text.contains(reason), "{line}: {text}");
        assert!(files(dir.path()).is_empty(), "{line}");
    }
}

#[test]
fn program_kernel_that_is_not_there_ends_in_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let output = output(&format!(
        "--kernel /nonexistent/kernel --console off --api-socket {}",
        dir.path().join("s").display()
    ));
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("  0: The VM could not boot"), "{text}");
    assert_eq!(text.matches("could not boot").count(), 1, "{text}");
    assert!(files(dir.path()).is_empty());
}

#[test]
fn program_entropy_source_that_is_not_there_is_named() {
    let output = output("--kernel /k --console off --rng src=/nonexistent/random");
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("/nonexistent/random"), "{text}");
}

#[test]
fn program_ends_on_signals_and_requests_and_takes_its_socket_away() {
    for way in ["-TERM", "-INT", "vmm.shutdown"] {
        let vmm = Vmm::start(&[]);
        assert_eq!(files(vmm.dir.path()), ["s", "s.lock"]);
        match way {
            "vmm.shutdown" => {
                assert_eq!(vmm.request("PUT", way).as_deref(), Some("HTTP/1.1 200 "));
            }
            signal => vmm.signal(signal),
        }
        let (status, text, left) = vmm.wait();
        assert_eq!(status, Some(0), "{way}: {text}");
        assert_eq!(text, "", "{way}");
        assert!(left.is_empty(), "{way}: {left:?}");
    }
}

/// The earliest moment is when the process no longer dies of the signal.
#[test]
fn program_that_is_still_starting_ends_cleanly_on_a_signal() {
    expect_clean_end_during_the_start("");
    expect_clean_end_during_the_start("--kernel /bin/true --console off --serial off");
}

fn expect_clean_end_during_the_start(arguments: &str) {
    const TERM_BIT: u64 = 1 << (15 - 1);
    let dir = tempfile::tempdir().unwrap();
    let vmm = Vmm::spawn_in(dir, program().args(arguments.split_whitespace()));
    let status = format!("/proc/{}/status", vmm.child.id());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string(&status).unwrap();
        let masks = text.lines().filter_map(|line| {
            let (name, mask) = line.split_once(':')?;
            let is_mask = matches!(name, "SigBlk" | "SigCgt");
            u64::from_str_radix(mask.trim(), 16)
                .ok()
                .filter(|_| is_mask)
        });
        let waits = text.starts_with("Name:\tvmm-waiter\n");
        if waits || masks.fold(0, |all, mask| all | mask) & TERM_BIT != 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::hint::spin_loop();
    }
    vmm.signal("-TERM");
    let (status, text, left) = vmm.wait();
    // A kernel that cannot boot may be noticed first.
    let failed = status == Some(1) && text.contains("could not boot");
    assert!(
        status == Some(0) || (failed && !arguments.is_empty()),
        "{status:?}: {text}"
    );
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn program_under_a_file_size_limit_names_it_if_ram_is_a_file() {
    if let Err(error) = std::fs::File::open("/dev/kvm") {
        test_skip::skip(format!("no /dev/kvm: {error}"));
        return;
    }
    for memory in ["size=1G,shared=on", "size=0"] {
        let zone = "--memory-zone id=a,size=1G,file=/tmp,shared=on";
        let zone = if memory == "size=0" { zone } else { "" };
        let line = format!(
            "ulimit -f 262144; exec {} --kernel /bin/true --console off --memory {memory} {zone}",
            env!("CARGO_BIN_EXE_cloud-hypervisor")
        );
        let output = Command::new("sh").args(["-c", &line]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = stderr(&output);
        assert!(
            text.contains("1073741824 bytes exceeds the limit of file sizes"),
            "{text}"
        );
    }
}

#[test]
fn program_socket_in_use_is_refused_and_stays_in_use() {
    let vmm = Vmm::start(&[]);
    let socket = vmm.dir.path().join("s");
    let second = output(&format!("--api-socket path={}", socket.display()));
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("is in use by another process"));
    assert_eq!(
        vmm.request("GET", "vmm.ping").as_deref(),
        Some("HTTP/1.1 200 ")
    );
}

#[test]
fn program_killed_leaves_a_socket_that_the_next_one_replaces() {
    let mut vmm = Vmm::start(&[]);
    vmm.signal("-KILL");
    vmm.child.wait().unwrap();
    let mut second = program();
    second.arg("--api-socket").arg(vmm.dir.path().join("s"));
    second.stdin(Stdio::null()).stderr(Stdio::piped());
    vmm.child = second.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while vmm.request("PUT", "vmm.shutdown").is_none() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    let (status, text, left) = vmm.wait();
    assert_eq!(status, Some(0), "{text}");
    assert!(left.is_empty());
}

#[test]
fn manual_pages_and_completions_are_written() {
    program_docs::expect_written(
        env!("CARGO_BIN_EXE_cloud-hypervisor"),
        &[
            ("man/man1/cloud-hypervisor.1", r"memory\-zone"),
            (
                "bash-completion/completions/cloud-hypervisor",
                "--memory-zone",
            ),
            ("zsh/site-functions/_cloud-hypervisor", "--memory-zone"),
            (
                "fish/vendor_completions.d/cloud-hypervisor.fish",
                "-l memory-zone",
            ),
        ],
    );
}
