//! Saved emulated hosts that have already booted.
//!
//! The first host of a kind is saved when its init waits for the plan. Later hosts start from there and skip the boot.
//! A kind is defined by QEMU's version, options, kernel and initramfs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::guest::cache;
use crate::paths;

const PREFIX: &str = "host-";
/// Number of saved hosts to keep, most recently used first; there is one per memory size in use.
const KEPT: usize = 4;
/// Time limit for saving: QEMU writes a few hundred MiB, on a busy machine.
const SAVE_MAX: Duration = Duration::from_secs(120);
/// Polling interval for QEMU's completion.
const STATUS_INTERVAL: Duration = Duration::from_millis(50);

/// The saved state of one kind of host.
#[derive(Debug)]
pub(super) struct SavedHost {
    path: PathBuf,
}

impl SavedHost {
    /// The path for a host with the processor, memory and kernel of `command`, this `initramfs`, and optionally a
    /// shared directory.
    pub(super) fn of(
        command: &Command,
        kernel: &Path,
        initramfs: &[u8],
        shares: bool,
    ) -> Result<Self> {
        let version = Command::new(command.get_program())
            .arg("--version")
            .output()
            .context("asking QEMU for its version")?;
        let about = fs::metadata(kernel).with_context(|| kernel.display().to_string())?;
        let kernel = format!("{} {:?}", about.len(), about.modified()?);
        let mut parts = vec![
            String::from_utf8_lossy(&version.stdout).into_owned(),
            kernel,
            cache::bytes_key(initramfs),
            shares.to_string(),
        ];
        parts.extend(
            command
                .get_args()
                .map(|arg| arg.to_string_lossy().into_owned()),
        );
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let name = format!("{PREFIX}{}", cache::key(&parts));
        Ok(Self {
            path: paths::cache()?.join(name),
        })
    }

    /// The option that starts QEMU from it, if it exists.
    pub(super) fn incoming(&self) -> Option<String> {
        let file = File::options().append(true).open(&self.path).ok()?;
        // The order of use decides which are kept. If this fails, it is kept for less long.
        file.set_modified(SystemTime::now()).ok();
        Some(format!("exec:cat {}", quoted(&self.path)))
    }

    /// Removes a saved state from which QEMU could not start.
    pub(super) fn forget(&self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("removing {}", self.path.display()))
    }

    /// Saves the machine that `control` belongs to, and lets it continue.
    pub(super) fn save(&self, control: UnixStream) -> Result<()> {
        let beside = self
            .path
            .with_extension(format!("new-{}", std::process::id()));
        let saved = Control::new(control).and_then(|mut control| {
            let saved = control.save(&beside);
            // The machine must continue in any case.
            control.wait_finalized()?;
            control.command("cont", &json!({}))?;
            saved
        });
        if let Err(error) = saved {
            fs::remove_file(&beside).ok();
            return Err(error);
        }
        fs::rename(&beside, &self.path)
            .with_context(|| format!("creating {}", self.path.display()))?;
        prune(self.path.parent().context("the cache has no folder")?)
    }
}

/// Removes saved hosts that were not used recently, and incomplete ones of killed processes.
fn prune(folder: &Path) -> Result<()> {
    let mut saved = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
        {
            saved.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    saved.sort();
    saved.reverse();
    for (_, path) in saved.into_iter().skip(KEPT) {
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Quotes a path for the shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// QEMU's machine protocol.
struct Control {
    reader: BufReader<UnixStream>,
}

impl Control {
    fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(SAVE_MAX))?;
        let mut control = Self {
            reader: BufReader::new(stream),
        };
        control.message()?;
        control.command("qmp_capabilities", &json!({}))?;
        Ok(control)
    }

    fn save(&mut self, path: &Path) -> Result<()> {
        // The machine keeps running, because a stopped one would be saved as stopped.
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.command("migrate-set-capabilities", &events)?;
        // Unlimited bandwidth. By default, QEMU limits it as for a network.
        self.command("migrate-set-parameters", &json!({"max-bandwidth": 0}))?;
        let to = format!("exec:cat > {}", quoted(path));
        self.command("migrate", &json!({"uri": to}))?;
        loop {
            let message = self.message()?;
            if message["event"] != "MIGRATION" {
                continue;
            }
            match message["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU could not save its machine"),
                _ => {}
            }
        }
    }

    /// Waits until the machine can continue: on a busy machine, QEMU reports that it has saved everything a while before.
    fn wait_finalized(&mut self) -> Result<()> {
        let started = Instant::now();
        while self.command("query-status", &json!({}))?["status"] == "finish-migrate" {
            ensure!(
                started.elapsed() < SAVE_MAX,
                "QEMU does not finish saving its machine"
            );
            thread::sleep(STATUS_INTERVAL);
        }
        Ok(())
    }

    /// QEMU's response to a command.
    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": name, "arguments": arguments}).to_string();
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut message = self.message()?;
            ensure!(
                message["error"].is_null(),
                "QEMU: {name}: {}",
                message["error"]
            );
            if !message["return"].is_null() {
                return Ok(message["return"].take());
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .reader
            .read_line(&mut line)
            .context("waiting for QEMU")?;
        ensure!(count > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }
}
