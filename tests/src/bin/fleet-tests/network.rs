//! A bridge, and a link to it for each process.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Set for the copy of this program that runs in its own network namespace.
pub(crate) const INSIDE: &str = "FLEET_TESTS_INSIDE";
/// The bridge's own address, in this program's namespace.
const HERE: &str = "10.77.0.1/24";

/// The bridge.
#[derive(Debug)]
pub(crate) struct Network {
    links: u32,
}

impl Network {
    /// Creates the bridge in the namespace of this program.
    pub(crate) fn new() -> Result<Self> {
        if std::env::var_os(INSIDE).is_none() {
            bail!("unshare --net is not allowed");
        }
        ip("link set lo up")?;
        ip("link add br0 type bridge")?;
        ip(&format!("addr add {HERE} dev br0"))?;
        ip("link set br0 up")?;
        Ok(Self { links: 0 })
    }

    /// Links the namespace of a process to the bridge, under this address. Returns the name of the link's end here.
    pub(crate) fn link(&mut self, pid: u32, address: &str) -> Result<String> {
        self.links += 1;
        let here = format!("v{}", self.links);
        ip(&format!(
            "link add {here} type veth peer name eth0 netns {pid}"
        ))?;
        ip(&format!("link set {here} master br0 up"))?;
        for command in [
            "link set lo up",
            "link set eth0 up",
            &format!("addr add {address}/24 dev eth0"),
        ] {
            run(Command::new("nsenter")
                .args(["-t", &pid.to_string(), "-n", "ip"])
                .args(command.split(' ')))?;
        }
        Ok(here)
    }
}

/// Takes a link down or up.
pub(crate) fn set_link(link: &str, up: bool) -> Result<()> {
    ip(&format!(
        "link set {link} {}",
        if up { "up" } else { "down" }
    ))
}

fn ip(arguments: &str) -> Result<()> {
    run(Command::new("ip").args(arguments.split(' ')))
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
