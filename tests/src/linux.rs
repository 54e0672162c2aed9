//! A Linux guest that is controlled over its serial port.

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::idle::Idle;
use crate::paths;
use crate::serial::Serial;
use crate::vmm::{PROCESS_DEADLINE, Vmm};

/// The guest that no test uses now.
pub(crate) static IDLE: Idle<Guest> = Idle::new();

/// Ends the idle guest.
pub fn end_idle() {
    IDLE.end();
}

/// Time from the start of the VMM to the guest's init, under emulation on a busy machine.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// Time for one command in the guest: touching memory is slow under emulation.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(120);

/// The machine to boot; every field has a default.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// The VMM's program, if not the one under test.
    pub vmm: Option<&'a Path>,
    /// `vmlinux` (PVH) or `bzImage`, or one of them under `patched/`, or `debian/vmlinuz`.
    pub kernel: &'a str,
    /// `--cpus`.
    pub cpus: &'a str,
    /// `--memory`.
    pub memory: &'a str,
    /// `--serial`; the default is the socket that [`Machine::boot`] connects to.
    pub serial: &'a str,
    /// `--console`.
    pub console: &'a str,
    /// Additional options for the VMM; `@/` stands for the test's folder.
    pub arguments: &'a [&'a str],
    /// Additional kernel parameters.
    pub command_line: &'a str,
    /// The script of the guest's init; the default serves commands on the serial port.
    pub script: &'a str,
    /// Its action after the script: `poweroff`, `reboot` or `stay`.
    pub end: &'a str,
}

impl Machine<'_> {
    /// The default machine.
    pub const DEFAULT: Self = Self {
        vmm: None,
        kernel: "vmlinux",
        cpus: "boot=1",
        memory: "size=512M",
        serial: "socket=@/serial.sock",
        console: "off",
        arguments: &[],
        command_line: "",
        script: "guest-mem serve /dev/ttyS0",
        end: "poweroff",
    };

    /// The kernel command line for this machine.
    pub fn full_command_line(&self) -> String {
        let chosen = match self.kernel.contains('/') {
            false => paths::guest_kernel_arguments(),
            true => "",
        };
        format!(
            "console=ttyS0 quiet panic=-1 {} {chosen} {} guest.end={} guest.run={}",
            env::var("GUEST_CMDLINE_EXTRA").unwrap_or_default(),
            self.command_line,
            self.end,
            STANDARD.encode(self.script)
        )
    }

    /// The VMM's arguments for this machine.
    ///
    /// # Errors
    /// A guest image is not built.
    pub fn vmm_arguments(&self) -> Result<Vec<String>> {
        let text = |path: std::path::PathBuf| {
            path.into_os_string()
                .into_string()
                .ok()
                .context("path is not UTF-8")
        };
        let kernel = paths::guest(self.kernel)?;
        let initramfs = paths::guest_initramfs(&kernel)?;
        let mut all: Vec<String> = vec![
            "--kernel".into(),
            text(kernel)?,
            "--initramfs".into(),
            text(initramfs)?,
            "--cmdline".into(),
            self.full_command_line(),
            "--cpus".into(),
            self.cpus.into(),
            "--memory".into(),
            self.memory.into(),
            "--serial".into(),
            self.serial.into(),
            "--console".into(),
            self.console.into(),
        ];
        all.extend(self.arguments.iter().map(|argument| (*argument).to_owned()));
        Ok(all)
    }

    /// Starts the VMM with this machine and waits only for its API.
    ///
    /// # Errors
    /// The VMM did not come up.
    pub fn start(&self) -> Result<Vmm> {
        self.start_with(|_| ())
    }

    /// As [`Machine::start`]; `set_up` gives the process something to inherit.
    ///
    /// # Errors
    /// The VMM did not come up.
    pub fn start_with(&self, set_up: impl FnOnce(&mut Command)) -> Result<Vmm> {
        end_idle();
        let arguments = self.vmm_arguments()?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut vmm = match self.vmm {
            Some(program) => Vmm::spawn_program(program, &arguments, set_up)?,
            None => Vmm::spawn_with(&arguments, set_up)?,
        };
        vmm.wait_api()?;
        Ok(vmm)
    }

    /// Boots and waits for the guest's init.
    ///
    /// # Errors
    /// The VMM or the guest did not come up.
    pub fn boot(&self) -> Result<Guest> {
        let mut guest = Guest::on_socket(self.start()?, "serial.sock")?;
        guest.wait_init()?;
        Ok(guest)
    }

    /// Boots and waits until the guest responds to commands.
    ///
    /// # Errors
    /// It did not come up.
    pub fn serve(&self) -> Result<Guest> {
        let mut guest = self.boot()?;
        guest.wait_serving()?;
        Ok(guest)
    }
}

impl Default for Machine<'_> {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A booted guest.
#[derive(Debug)]
pub struct Guest {
    /// The VMM it runs in.
    pub vmm: Vmm,
    /// Its serial port.
    pub serial: Serial,
}

impl Guest {
    /// A guest that is controlled over a socket of this name in the test's folder.
    ///
    /// # Errors
    /// There is no listener.
    pub fn on_socket(mut vmm: Vmm, name: &str) -> Result<Guest> {
        let serial = Serial::connect(&vmm.folder().join(name), BOOT_DEADLINE)
            .with_context(|| vmm.last_words())?;
        Ok(Guest { vmm, serial })
    }

    /// Waits until the guest's init has started (again).
    ///
    /// # Errors
    /// It did not.
    pub fn wait_init(&mut self) -> Result<()> {
        self.expect("guest: init", BOOT_DEADLINE).map(drop)
    }

    /// Waits until the command server responds.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_serving(&mut self) -> Result<()> {
        // Data sent before the terminal is raw may be echoed or lost, so the request is repeated until the first
        // response.
        for _ in 0..40 {
            self.send("ping")?;
            if self
                .serial
                .expect("ok ping", Duration::from_secs(3))
                .is_ok()
            {
                return Ok(());
            }
        }
        self.expect("ok ping", Duration::from_secs(1)).map(drop)
    }

    /// Waits for a line on the serial port, as [`Serial::expect`] does; a failure shows the VMM's output.
    ///
    /// # Errors
    /// No such line arrived in time.
    pub fn expect(&mut self, pattern: &str, deadline: Duration) -> Result<String> {
        let found = self.serial.expect(pattern, deadline);
        found.with_context(|| self.vmm.last_words())
    }

    fn send(&mut self, line: &str) -> Result<()> {
        let sent = self.serial.send(line);
        sent.with_context(|| self.vmm.last_words())
    }

    /// Makes the guest execute one command; returns its response without the `ok`.
    ///
    /// # Errors
    /// The guest responded with an error, or did not respond.
    pub fn command(&mut self, line: &str) -> Result<String> {
        self.command_within(line, COMMAND_DEADLINE)
    }

    /// As [`Guest::command`], for a command that may take longer.
    ///
    /// # Errors
    /// As [`Guest::command`].
    pub fn command_within(&mut self, line: &str, deadline: Duration) -> Result<String> {
        let verb = line.split(' ').next().unwrap_or(line);
        self.send(line)?;
        let answer = self.serial.expect_answer(verb, deadline);
        answer.with_context(|| self.vmm.last_words())
    }

    /// Runs a shell command in the guest that must succeed; returns its output.
    ///
    /// # Errors
    /// It failed.
    pub fn shell(&mut self, script: &str) -> Result<String> {
        let before = self.serial.text().len();
        let answer = self.command(&format!("sh {script}"))?;
        ensure!(
            answer.ends_with("sh 0"),
            "{script}: {answer}; {}",
            &self.serial.text()[before..]
        );
        Ok(self.serial.text()[before..].to_owned())
    }

    /// Has the guest try a shell command until it succeeds, for what the guest finds only after the
    /// VMM has answered: hot-added devices, processors and memory. Returns what all tries printed.
    ///
    /// # Errors
    /// It did not succeed within a minute.
    pub fn shell_until(&mut self, condition: &str) -> Result<String> {
        self.shell(&format!(
            "for i in $(seq 600); do {{ {condition}; }} && exit; sleep 0.1; done; exit 1"
        ))
    }

    /// One figure in bytes from the guest's response to `mem`: `total`, `free` or `available`.
    ///
    /// # Errors
    /// The guest does not respond.
    pub fn memory_bytes(&mut self, name: &str) -> Result<u64> {
        memory_bytes_in(&self.command("mem")?, name)
    }

    /// Makes the guest power off and waits for the VMM to exit cleanly.
    ///
    /// # Errors
    /// The guest or the VMM does not end, or the VMM fails.
    pub fn end_cleanly(&mut self) -> Result<()> {
        self.end()?;
        let ended = self.vmm.expect_clean_exit(PROCESS_DEADLINE);
        ended.with_context(|| self.serial.last_words())
    }

    /// Ends the command server, after which the guest's init ends the machine.
    ///
    /// # Errors
    /// The guest does not respond.
    pub fn end(&mut self) -> Result<()> {
        self.command("exit").map(drop)
    }
}

/// The figure `name` in the guest's answer to `mem`.
///
/// # Errors
/// There is none.
pub fn memory_bytes_in(answer: &str, name: &str) -> Result<u64> {
    answer
        .split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {name} in {answer:?}"))
}
