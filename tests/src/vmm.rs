//! A `cloud-hypervisor` process under test.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::descriptors::inherit;
use crate::literal_client::{Answer, request};
use crate::paths;
use crate::wait::wait_for;

/// Time for a process to start listening or to end; generous, because machines are shared.
pub const PROCESS_DEADLINE: Duration = Duration::from_secs(60);

/// The value of `--api-socket` that stands for a listening socket.
const INHERITED_API_SOCKET: &str = "fd=@api";

/// Time for a process that closed the serial port to print the reason.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(1);

/// A running VMM with its own folder; killed when dropped.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    folder: TempDir,
}

impl Vmm {
    /// Starts the VMM with an API socket and `arguments`, in which `@/` stands
    /// for the test's own folder. Waits for the socket.
    ///
    /// # Errors
    /// The program does not exist, or ended before it listened.
    pub fn start(arguments: &[&str]) -> Result<Vmm> {
        let mut vmm = Self::spawn(arguments)?;
        vmm.wait_api()?;
        Ok(vmm)
    }

    /// Starts the VMM without waiting for anything. With `--api-socket fd=@api` in `arguments`, it inherits a listening
    /// API socket instead of creating one.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(arguments: &[&str]) -> Result<Vmm> {
        Self::spawn_with(arguments, |_| ())
    }

    /// As [`Vmm::spawn`]; `set_up` gives the process other standard streams or
    /// something else to inherit.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn_with(arguments: &[&str], set_up: impl FnOnce(&mut Command)) -> Result<Vmm> {
        let program = paths::program("cloud-hypervisor")?;
        Self::spawn_program(&program, arguments, set_up)
    }

    /// As [`Vmm::spawn_with`], for another program with the same command line.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn_program(
        program: &Path,
        arguments: &[&str],
        set_up: impl FnOnce(&mut Command),
    ) -> Result<Vmm> {
        let folder = tempfile::Builder::new().prefix("vmm-test-").tempdir()?;
        let here = folder
            .path()
            .to_str()
            .context("temporary path is not UTF-8")?;
        let here = format!("{here}/");
        let mut command = Command::new(program);
        let socket = folder.path().join("api.sock");
        if !arguments.contains(&INHERITED_API_SOCKET) {
            // First, as programs that start the VMM expect it.
            command.arg("--api-socket").arg(&socket);
        }
        let mut listeners = Vec::new();
        for argument in arguments {
            if *argument == INHERITED_API_SOCKET {
                let inherited = File::from(OwnedFd::from(UnixListener::bind(&socket)?));
                command.arg(format!("fd={}", inherit(&inherited)?));
                listeners.push(inherited);
            } else {
                command.arg(argument.replace("@/", &here));
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(File::create(folder.path().join("stdout"))?)
            .stderr(File::create(folder.path().join("stderr"))?);
        set_up(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        // Only now, because the process has inherited them.
        drop(listeners);
        Ok(Vmm { child, folder })
    }

    /// Waits until the API responds.
    ///
    /// # Errors
    /// The process ended, or does not listen.
    pub fn wait_api(&mut self) -> Result<()> {
        let socket = self.socket();
        wait_for("API socket", PROCESS_DEADLINE, || {
            if let Some(status) = self.child.try_wait()? {
                anyhow::bail!("the VMM ended ({status}): {}", self.stderr());
            }
            Ok(request(&socket, "GET", "vmm.ping", None).ok().map(drop))
        })
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    /// The test's own folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Content of a file in the test's folder, lossily decoded; empty if it does not exist.
    pub fn text(&self, name: &str) -> String {
        fs::read(self.folder.path().join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The VMM's standard error.
    pub fn stderr(&self) -> String {
        self.text("stderr")
    }

    /// The VMM's output, and its exit status or the state of its threads, for the message of a failed test.
    pub fn last_words(&mut self) -> String {
        let child = &mut self.child;
        let ended = wait_for("end", LAST_WORDS_DEADLINE, || Ok(child.try_wait()?));
        let state = match ended {
            Ok(status) => format!("ended ({status})"),
            Err(_) => format!("runs:{}", threads(self.pid())),
        };
        format!("the VMM printed {:?} and {state}", self.stderr().trim_end())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One API request.
    ///
    /// # Errors
    /// The connection failed; an error status is not an error here.
    pub fn request(&self, method: &str, endpoint: &str, body: Option<&str>) -> Result<Answer> {
        request(&self.socket(), method, endpoint, body)
    }

    /// Sends a GET that must return 200 with JSON.
    ///
    /// # Errors
    /// The request failed.
    pub fn get(&self, endpoint: &str) -> Result<Value> {
        let answer = self.request("GET", endpoint, None)?;
        ensure!(answer.status == 200, "GET {endpoint}: {answer:?}");
        answer.json()
    }

    /// Sends a PUT that must succeed.
    ///
    /// # Errors
    /// The request failed.
    pub fn put(&self, endpoint: &str, body: Option<&str>) -> Result<Answer> {
        let answer = self.request("PUT", endpoint, body)?;
        ensure!(
            matches!(answer.status, 200 | 204),
            "PUT {endpoint}: {answer:?}"
        );
        Ok(answer)
    }

    /// Whether the process has ended, for any reason.
    ///
    /// # Errors
    /// The status cannot be read.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        wait_for("end of the VMM", deadline, || Ok(child.try_wait()?))
            .with_context(|| self.last_words())
    }

    /// Waits for the end and requires exit status 0.
    ///
    /// # Errors
    /// It ended with another status.
    pub fn expect_clean_exit(&mut self, deadline: Duration) -> Result<()> {
        let status = self.wait_exit(deadline)?;
        ensure!(
            status.success(),
            "exit {:?}, signal {:?}: {}",
            status.code(),
            status.signal(),
            self.stderr()
        );
        Ok(())
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let status = Command::new("kill")
            .args([format!("-{signal}"), self.pid().to_string()])
            .status()?;
        ensure!(status.success(), "kill -{signal}");
        Ok(())
    }

    /// Stops all threads, until the signal `CONT`. The signal `STOP` alone returns before they have stopped.
    ///
    /// # Errors
    /// They do not stop.
    pub fn stop(&self) -> Result<()> {
        self.signal("STOP")?;
        wait_for("the stop of all threads", PROCESS_DEADLINE, || {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()))?;
            for task in tasks {
                let stat = fs::read_to_string(task?.path().join("stat"))?;
                let state = stat.rsplit(") ").next().unwrap_or_default();
                if !state.starts_with('T') {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// Returns a function that kills the process, callable from any thread, even while another waits for a response.
    pub fn killer(&self) -> impl FnOnce() + Send + use<> {
        let pid = self.pid().to_string();
        move || {
            // The process may have ended already.
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
    }

    /// Number of descriptors and names of threads, to check that none are left behind. Sockets are excluded, because
    /// the last client's may still exist, and so are threads that KVM creates in a process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn possessions(&self) -> Result<(usize, BTreeSet<String>)> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        // Descriptors and threads that disappear in the meantime are skipped.
        let threads = fs::read_dir(proc.join("task"))?
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.starts_with("kvm-"))
            .collect();
        let descriptors = fs::read_dir(proc.join("fd"))?
            .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
            .filter(|link| !link.to_string_lossy().starts_with("socket:"))
            .count();
        Ok((descriptors, threads))
    }

    /// Resident set of the process in bytes, guest RAM included.
    ///
    /// # Errors
    /// The process has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.memory_bytes("VmRSS:")
    }

    /// Peak resident set of the process.
    pub fn peak_resident_bytes(&self) -> Result<u64> {
        self.memory_bytes("VmHWM:")
    }

    fn memory_bytes(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .with_context(|| format!("no {field}"))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib << 10)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each thread's name, state, used clock ticks, and system call, in the format of proc(5).
fn threads(pid: u32) -> String {
    let mut all = String::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (stat, call) = (read("stat"), read("syscall"));
        let fields: Vec<&str> = stat.split_ascii_whitespace().skip(1).collect();
        if let [name, state, rest @ ..] = fields.as_slice() {
            let ticks = rest.get(10..12).unwrap_or_default().join("+");
            let call = call.split(' ').next().unwrap_or_default().trim();
            all.push_str(&format!("\n  {name} {state} {ticks} {call}"));
        }
    }
    all
}
