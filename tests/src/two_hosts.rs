//! Two hosts on one machine. Each is a network namespace with a tap, and a mount namespace with a folder. Taps and
//! folders have the same names on both hosts, so that a VM can move.
//!
//! ```text
//! this machine   bridge, PREFIX.1
//!                ├── veth ── host 0: bridge ── tap
//!                └── veth ── host 1: bridge ── tap
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::linux::{BOOT_DEADLINE, Guest, Machine};
use crate::migration::{EVENTS, send_with, wait_event, while_receiving_with};
use crate::paths;
use crate::serial::Serial;
use crate::vmm::{PROCESS_DEADLINE, Vmm};
use crate::wait::wait_for;

/// The tap of each host.
pub const TAP: &str = "moved0";

/// Two hosts, whose namespaces end with this value.
#[derive(Debug)]
pub struct TwoHosts {
    hosts: [Host; 2],
    _bridge: Link,
    folder: TempDir,
}

impl TwoHosts {
    /// Creates both, on the network `prefix`.0/24. No other test may use `name`.
    ///
    /// # Errors
    /// This machine lacks namespaces, bridges or the tools for them.
    pub fn new(name: &str, prefix: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("own"))?;
        run(&format!(
            "ip link add {name} type bridge && ip addr add {prefix}.1/24 dev {name} && ip link set {name} up"
        ))?;
        let bridge = Link(name.to_owned());
        let hosts = [
            Host::new(folder.path(), name, 0)?,
            Host::new(folder.path(), name, 1)?,
        ];
        Ok(Self {
            hosts,
            _bridge: bridge,
            folder,
        })
    }

    /// A program that runs the VMM on the host of this number.
    #[must_use]
    pub fn program(&self, host: usize) -> &Path {
        &self.hosts[host].program
    }

    /// The path that stands for a different file on each host.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join("own").join(file)
    }

    /// Where this machine finds that file of the host of this number.
    #[must_use]
    pub fn path_on(&self, host: usize, file: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.hosts[host].holder.id()));
        let path = self.path(file);
        root.join(path.strip_prefix("/").unwrap_or(&path))
    }

    /// `--serial` and `--net` of a VM that can move: its network interface, and its serial port on the socket of its host.
    #[must_use]
    pub fn arguments(&self) -> (String, String) {
        let serial = format!("socket={}", self.path("serial.sock").display());
        (serial, format!("tap={TAP},mac=12:34:56:78:90:ae"))
    }

    /// Boots `machine` on the first host, with this disk, and with the network interface and the serial port of
    /// [`TwoHosts::arguments`]. Returns the guest once it serves commands.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn boot(&self, machine: &Machine<'_>, image: &Path) -> Result<Guest> {
        let disk = format!("path={},image_type=raw", image.display());
        let (serial, net) = self.arguments();
        let vmm = Machine {
            vmm: Some(self.program(0)),
            serial: &serial,
            arguments: &[
                EVENTS,
                &["--disk", &disk, "--net", &net],
                &["--balloon", "size=0,free_page_reporting=on"],
            ]
            .concat(),
            ..*machine
        }
        .start()?;
        let mut guest = self.guest_on(0, vmm)?;
        guest.wait_init()?;
        guest.wait_serving()?;
        Ok(guest)
    }

    /// The guest of `vmm`, which runs on the host of this number.
    ///
    /// # Errors
    /// Its serial port does not exist.
    pub fn guest_on(&self, host: usize, vmm: Vmm) -> Result<Guest> {
        let serial = Serial::connect(&self.path_on(host, "serial.sock"), BOOT_DEADLINE)?;
        Ok(Guest { vmm, serial })
    }

    /// Moves the guest to the host of this number. Returns it there, and what the source reported.
    ///
    /// # Errors
    /// The migration failed.
    pub fn move_to(
        &self,
        host: usize,
        mut guest: Guest,
        settings: &Value,
    ) -> Result<(Guest, Value)> {
        let mut target = Vmm::spawn_program(self.program(host), EVENTS, |_| ())?;
        target.wait_api()?;
        let url = format!("unix:{}", guest.vmm.folder().join("move").display());
        let mode = settings.get("memory_mode").cloned();
        let of_target = json!({ "memory_mode": mode.unwrap_or_else(|| "Precopy".into()) });
        let (status, body) = while_receiving_with(&target, &url, &of_target, || {
            send_with(&guest.vmm, &url, settings)
        })?;
        ensure!(
            status == 204,
            "{status} {body}\n{}{}",
            guest.vmm.stderr(),
            target.stderr()
        );
        let report = wait_event(&guest.vmm, "migration-finished")?;
        guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
        Ok((self.guest_on(host, target)?, report))
    }
}

/// A network interface of this machine, deleted on drop.
#[derive(Debug)]
struct Link(String);

impl Drop for Link {
    fn drop(&mut self) {
        // It may have ended with a namespace.
        let _ = run(&format!("ip link del {}", self.0));
    }
}

#[derive(Debug)]
struct Host {
    /// Keeps the namespaces until its input ends.
    holder: Child,
    program: PathBuf,
}

impl Host {
    fn new(folder: &Path, bridge: &str, number: usize) -> Result<Self> {
        let own = folder.join("own");
        let script = format!("mount -t tmpfs own {} && exec cat", own.display());
        let holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private"])
            .args(["--", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("unshare")?;
        let pid = holder.id();
        let mounts = format!("/proc/{pid}/mounts");
        let host = Self {
            holder,
            program: folder.join(format!("vmm-on-{number}")),
        };
        let mounted = format!("own {} ", own.display());
        wait_for("the namespaces", PROCESS_DEADLINE, || {
            let mounts = fs::read_to_string(&mounts)?;
            Ok(mounts.contains(&mounted).then_some(()))
        })?;
        let (outer, enter) = (format!("{bridge}v{number}"), enter(pid));
        run(&format!(
            "ip link add {outer} type veth peer name outside netns {pid} && \
             ip link set {outer} master {bridge} up"
        ))?;
        run(&format!(
            "{enter} sh -ec '\
             ip link set lo up; ip link add inside type bridge; ip tuntap add mode tap name {TAP}; \
             ip link set outside master inside up; ip link set {TAP} master inside up; ip link set inside up'"
        ))?;
        let vmm = paths::program("cloud-hypervisor")?;
        let script = format!("#!/bin/sh\nexec {enter} {} \"$@\"\n", vmm.display());
        fs::write(&host.program, script)?;
        fs::set_permissions(&host.program, fs::Permissions::from_mode(0o755))?;
        Ok(host)
    }
}

/// The command that runs another one in the namespaces of this process. Entering a mount namespace leaves the root folder.
fn enter(pid: u32) -> String {
    let of = format!("/proc/{pid}");
    format!("nsenter --net={of}/ns/net --mount={of}/ns/mnt --root={of}/root --wd={of}/cwd")
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn run(script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-c", script]).output()?;
    ensure!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
