//! Runs the fleet agent with real guests, on a host that is a control group.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::control_group::Group;
use crate::paths;
use crate::wait::wait_for;

/// Generous, because an emulated host on a busy machine is slow.
const DEADLINE: Duration = Duration::from_secs(180);

/// The agent; ended when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    folder: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    /// Starts it with its files in `folder` and with additional `settings`, which must not be of the same tables.
    /// Metrics and page are served at `listen`, if given.
    ///
    /// # Errors
    /// The program does not start.
    pub fn start(
        folder: &Path,
        group: &Group,
        listen: Option<&str>,
        settings: &str,
    ) -> Result<Self> {
        let here = folder.display();
        let listen = listen.map_or_else(String::new, |at| format!("listen = '{at}'\n"));
        let settings = format!(
            "{settings}[agent]\nsocket = '{here}/agent.sock'\nstate_dir = '{here}/state'\n{listen}\
             [discovery]\nsockets = ['{here}/vms/*.sock']\n[host]\ncgroup = '{}'\n",
            group.name()
        );
        let file = folder.join("agent.toml");
        fs::write(&file, settings)?;
        let child = Command::new(paths::program("ch-fleet")?)
            .args(["agent", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("agent.log"))?)
            .spawn()
            .context("starting ch-fleet")?;
        Ok(Self {
            child,
            folder: folder.to_owned(),
        })
    }

    /// Runs a query by the command line.
    ///
    /// # Errors
    /// The program does not start.
    pub fn ask(&self, arguments: &[&str]) -> Result<std::process::Output> {
        Command::new(paths::program("ch-fleet")?)
            .arg("--socket")
            .arg(self.folder.join("agent.sock"))
            .args(["--output", "json"])
            .args(arguments)
            .output()
            .context("starting ch-fleet")
    }

    /// Waits until the agent admits a guest.
    ///
    /// # Errors
    /// This does not happen in time.
    pub fn admit(&self, name: &str, memory: &str) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("a place for {name}"), DEADLINE, || {
            let output = self.ask(&["reserve", name, "--memory", memory])?;
            last = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            Ok(output.status.success().then_some(()))
        })
        .with_context(|| {
            let why = self.ask(&["explain"]).map(|output| output.stdout);
            format!(
                "{last}\n{}",
                String::from_utf8_lossy(&why.unwrap_or_default())
            )
        })
    }

    /// Waits until the agent's status meets a condition.
    ///
    /// # Errors
    /// This does not happen in time.
    pub fn wait<T>(&self, what: &str, condition: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let mut last = Value::Null;
        wait_for(what, DEADLINE, || {
            let output = self.ask(&["status"])?;
            last = serde_json::from_slice(&output.stdout).unwrap_or_default();
            Ok(condition(&last))
        })
        .with_context(|| format!("{last}\n{}", self.last_words()))
    }

    /// The log's end, for the message of a test that failed.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// A VM in the agent's status.
#[must_use]
pub fn vm<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["vms"].as_array()?.iter().find(|vm| vm["vm"] == name)
}
