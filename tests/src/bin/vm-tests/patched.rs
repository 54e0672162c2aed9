//! Guests with our kernel patches.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};

pub(crate) fn tests() -> Vec<Test> {
    tests![patched_reporting_gives_memory_back]
}

const MIB: u64 = 1 << 20;
/// The patched kernel reports at once; a busy machine does not.
const RECLAIM_DEADLINE: Duration = Duration::from_secs(120);

fn resident(guest: &Guest) -> Result<u64> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    stats["resident_bytes"]
        .as_u64()
        .with_context(|| format!("no resident_bytes in {stats:#}"))
}

fn patched_reporting_gives_memory_back() -> Result<Outcome> {
    let kernel = "patched/vmlinux";
    if let Err(error) = paths::guest(kernel) {
        return Ok(Outcome::Skipped(format!("{error:#}")));
    }
    let mut guest = Machine {
        kernel,
        cpus: "boot=2",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        command_line: "page_reporting.tracker=bitmap",
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 300M seed=3")?;
    let touched = resident(&guest)?;
    ensure!(touched > 300 * MIB, "resident {} MiB", touched / MIB);
    guest.command("free")?;
    wait_for("the guest's memory on the host", RECLAIM_DEADLINE, || {
        Ok((resident(&guest)? < 150 * MIB).then_some(()))
    })?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    ensure!(
        stats["report"]["failed_bytes"].as_u64() == Some(0) && stats["reporting"]["active"] == true,
        "{stats:#}"
    );
    // And it can be used again.
    guest.command("alloc 200M seed=4")?;
    guest.command("verify")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
