//! From a free in the guest to the memory back on the host.

use std::time::{Duration, Instant};

use anyhow::Result;
use integration_tests::linux::Machine;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

use crate::options::Asked;

/// By what it is chosen on the command line.
pub(crate) const NAME: &str = "reclaim";

const MIB: u64 = 1 << 20;

/// 700 of 1024 MiB freed by a mainline kernel: how far and how fast.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let mut guest = Machine {
        memory: "size=1G",
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest.command("alloc 700M")?;
    let before = guest.vmm.resident_bytes()?;
    guest.command("free")?;
    let begin = Instant::now();
    let (mut lowest, mut lowest_at) = (u64::MAX, begin);
    wait_for("an end of the fall", Duration::from_secs(120), || {
        let resident = guest.vmm.resident_bytes()?;
        if resident + 2 * MIB < lowest {
            (lowest, lowest_at) = (resident, Instant::now());
        }
        let settled = lowest_at.elapsed() > Duration::from_secs(5) && lowest + 100 * MIB < before;
        Ok(settled.then_some(()))
    })?;
    let stats = guest.vmm.get("vm.reclaim-stats").unwrap_or_default();
    Ok(json!({
        "resident_before_bytes": before,
        "resident_after_bytes": lowest,
        "fall_ended_after_ms": lowest_at.duration_since(begin).as_millis() as u64,
        "report_latency_us": stats["report"]["latency_us"],
        "reports": stats["report"]["batches"],
        "discard_syscalls": stats["report"]["discard_syscalls"],
        "sample_cost_us": stats["resident_sample_us"],
    }))
}
