//! Back ends of vhost-user devices: programs of other projects, which tests kill. `cargo xtask test-tools` installs them.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::linux::Guest;
use integration_tests::outcome::Outcome;
use integration_tests::paths;
use integration_tests::wait::wait_for;

/// Time for background work of the guest, under emulation.
const GUEST_DEADLINE: Duration = Duration::from_secs(240);

/// The program of this name, if it is installed.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let own = paths::workspace().join("target").join(name).join("bin");
    let of_the_system = PathBuf::from("/usr/bin");
    [own, of_the_system]
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// The outcome of a test without its program.
pub(crate) fn not_installed(name: &str) -> Outcome {
    Outcome::Skipped(format!(
        "{name} is not installed: run `cargo xtask test-tools`"
    ))
}

/// A process; killed when it is dropped.
pub(crate) struct BackEnd(Child);

impl BackEnd {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        // Some programs end with their input.
        let command = command.stdin(Stdio::piped());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        child
            .map(Self)
            .with_context(|| format!("starting {}", command.get_program().display()))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // SIGKILL.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A counter of a device.
pub(crate) fn counter(guest: &Guest, id: &str, name: &str) -> Result<u64> {
    let counters = guest.vmm.get("vm.counters")?;
    let found = counters[id][name].as_u64();
    found.with_context(|| format!("no {name} of {id} in {counters:#}"))
}

pub(crate) fn wait_counter(guest: &Guest, id: &str, name: &str, value: u64) -> Result<()> {
    wait_for(name, GUEST_DEADLINE, || {
        Ok((counter(guest, id, name)? == value).then_some(()))
    })
}
