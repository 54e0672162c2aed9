//! A Linux guest under QEMU's emulation, without our VMM. It tests our kernel patches with another host's memory
//! hot-plug and virtio-mem.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::linux::{BOOT_DEADLINE, COMMAND_DEADLINE};
use crate::paths;
use crate::serial::Serial;
use crate::vmm::PROCESS_DEADLINE;
use crate::wait::wait_for;

/// A booted guest; QEMU is killed when it is dropped.
#[derive(Debug)]
pub struct QemuGuest {
    child: Child,
    serial: Serial,
    control: Control,
    _folder: TempDir,
}

impl QemuGuest {
    /// Boots `kernel` with QEMU's `arguments` and more words for its command line, and waits until the guest responds
    /// to commands.
    ///
    /// # Errors
    /// It did not come up.
    pub fn serve(kernel: &Path, arguments: &[&str], command_line: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("qemu-test-").tempdir()?;
        let script = STANDARD.encode("guest-mem serve /dev/ttyS0");
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-machine", "q35", "-cpu", "max"])
            .args(["-accel", "tcg,thread=multi"])
            .args(arguments)
            .args(["-serial", "unix:serial.sock,server=on,wait=off"])
            .args(["-qmp", "unix:control.sock,server=on,wait=off"])
            .arg("-kernel")
            .arg(fs::canonicalize(kernel)?)
            .arg("-initrd")
            .arg(fs::canonicalize(paths::guest("initramfs.cpio.gz")?)?)
            .args([
                "-append",
                // On a busy machine, the timer may not tick within the kernel's timer test, and a processor that waits
                // for a one-shot timer may wait forever; periodic ticks prevent that.
                &format!(
                    "console=ttyS0 panic=-1 no_timer_check highres=off nohz=off {command_line} \
                     guest.run={script}"
                ),
            ])
            // Names of sockets are short.
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("stderr"))?)
            .spawn()
            .context("start qemu-system-x86_64")?;
        let mut child = Killed(Some(child));
        let complaints = folder.path().join("stderr");
        let told = || fs::read_to_string(&complaints).unwrap_or_default();
        let serial = Serial::connect(&folder.path().join("serial.sock"), PROCESS_DEADLINE);
        let serial = serial.with_context(told)?;
        let control = Control::connect(&folder.path().join("control.sock")).with_context(told)?;
        let mut guest = Self {
            child: child.0.take().context("QEMU was just started")?,
            serial,
            control,
            _folder: folder,
        };
        let started = guest.serial.expect("guest: init", BOOT_DEADLINE);
        started.with_context(|| format!("QEMU printed: {}", told()))?;
        wait_for("the guest's command server", COMMAND_DEADLINE, || {
            guest.serial.send("ping")?;
            let answer = guest.serial.expect("ok ping", Duration::from_secs(3));
            Ok(answer.ok())
        })?;
        Ok(guest)
    }

    /// Makes the guest execute one command; returns its response.
    ///
    /// # Errors
    /// The guest responded with an error, or did not respond.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let verb = line.split(' ').next().unwrap_or(line);
        self.serial.send(line)?;
        self.serial.expect_answer(verb, COMMAND_DEADLINE)
    }

    /// Runs a shell command in the guest that must succeed; returns its output.
    ///
    /// # Errors
    /// It failed.
    pub fn shell(&mut self, script: &str) -> Result<String> {
        let before = self.serial.text().len();
        let answer = self.command(&format!("sh {script}"))?;
        let said = self.serial.text()[before..].to_owned();
        ensure!(answer.ends_with("sh 0"), "{script}: {answer}; {said}");
        Ok(said)
    }

    /// A figure of `/sys/kernel/mm/page_reporting`.
    ///
    /// # Errors
    /// There is no figure of that name.
    pub fn figure(&mut self, name: &str) -> Result<u64> {
        let said = self.shell(&format!("cat /sys/kernel/mm/page_reporting/{name}"))?;
        said.lines()
            .find_map(|line| line.trim().parse().ok())
            .with_context(|| format!("{name}: {said}"))
    }

    /// One command of the QEMU Machine Protocol.
    ///
    /// # Errors
    /// QEMU rejected it.
    pub fn control(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.control.execute(command, arguments)
    }

    /// Resident bytes of QEMU, including some tens of MiB of its own.
    ///
    /// # Errors
    /// The process has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
        let kib: u64 = kib.context("no VmRSS")?.trim().parse()?;
        Ok(kib << 10)
    }

    /// Console lines in which the guest's kernel reports an error.
    pub fn complaints(&self) -> Vec<String> {
        const WORDS: &[&str] = &[
            "BUG: ",
            "WARNING: ",
            "Oops",
            "Kernel panic",
            "Bad page state",
        ];
        let text = self.serial.text();
        text.lines()
            .filter(|line| WORDS.iter().any(|word| line.contains(word)))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A child process that does not belong to a guest yet.
struct Killed(Option<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended already.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// The QEMU Machine Protocol: a line of JSON each way.
#[derive(Debug)]
struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    fn connect(path: &Path) -> Result<Self> {
        let stream = wait_for("QEMU's control socket", PROCESS_DEADLINE, || {
            Ok(UnixStream::connect(path).ok())
        })?;
        stream.set_read_timeout(Some(PROCESS_DEADLINE))?;
        let mut control = Self {
            stream: BufReader::new(stream),
        };
        control.line()?;
        control.execute("qmp_capabilities", &json!({}))?;
        Ok(control)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).context("QEMU's answer")?;
        ensure!(read > 0, "QEMU is gone");
        serde_json::from_str(&line).with_context(|| line.clone())
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        let stream = self.stream.get_mut();
        stream.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            // Events may arrive before the response.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }
}
