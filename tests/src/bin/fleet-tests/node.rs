//! A process of the fleet, which can be started, killed, stopped and disconnected.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::network::{Network, run, set_link};

/// Generous, because test machines are shared.
pub(crate) const DEADLINE: Duration = Duration::from_secs(150);

/// A member or an agent.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) address: String,
    /// Its log file.
    pub(crate) log: PathBuf,
    command: Vec<String>,
    child: Option<Child>,
    link: Option<String>,
}

impl Node {
    pub(crate) fn new(name: &str, address: String, log: PathBuf, command: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            address,
            log,
            command,
            child: None,
            link: None,
        }
    }

    /// Starts it, in its own namespace if there is a network. The child ends with the thread that calls this.
    pub(crate) fn start(&mut self, network: Option<&mut Network>) -> Result<()> {
        let log = File::options()
            .append(true)
            .create(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if network.is_some() {
            command.args(["unshare", "--net"]);
        }
        // It waits for its link before it executes the program.
        command.args(["sh", "-c", "read -r _; exec \"$@\" </dev/null", "sh"]);
        let mut child = command
            .args(&self.command)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().context("doubling a descriptor")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        let mut stdin = child.stdin.take().context("a pipe was asked for")?;
        let pid = child.id();
        self.child = Some(child);
        if let Some(network) = network {
            own_namespace(pid)?;
            self.link = Some(network.link(pid, &self.address)?);
        }
        writeln!(stdin).with_context(|| format!("starting {}", self.name))?;
        Ok(())
    }

    /// Kills it, as a power failure would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().context("killing a child")?;
            child.wait().context("waiting for a child")?;
        }
        self.link = None;
        Ok(())
    }

    /// Stops it, or continues it.
    pub(crate) fn stop(&self, stop: bool) -> Result<()> {
        let child = self.child.as_ref().context("it runs")?;
        let signal = if stop { "STOP" } else { "CONT" };
        run(Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]))
    }

    /// Disconnects it, or reconnects it.
    pub(crate) fn cut(&self, cut: bool) -> Result<()> {
        set_link(self.link.as_deref().context("it has a link")?, !cut)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It is killed together with this program at the latest.
        let _ = self.kill();
    }
}

/// Waits until a process has left the namespace of this program.
fn own_namespace(pid: u32) -> Result<()> {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let here = of("self").context("reading the namespace")?;
    integration_tests::wait::wait_for("a namespace", DEADLINE, || {
        let there = of(&pid.to_string()).context("reading the namespace")?;
        Ok((there != here).then_some(()))
    })
}
