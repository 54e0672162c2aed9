//! Counts the reports that each tracker needs for a fast or slow burst of frees. Each report costs a kick by the guest
//! and an interrupt.
//!
//! `cargo xtask bench --kernel patched kicks`

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::paths;
use serde_json::{Map, Value, json};

use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "kicks";

/// Bursts: freed at once, and within seconds.
const BURSTS: [(&str, &str); 2] = [
    ("at once", "remove --tasks 1 --bytes 704M"),
    (
        "480 MiB in 3 s",
        "remove --tasks 1 --bytes 480M --over-ms 3000",
    ),
];
/// Mainline pauses for two seconds between two parts of its lists.
const QUIET: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(300);
const GIB: f64 = (1u64 << 30) as f64;

/// Reports and bytes of each burst, for each tracker that the kernel has.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    let patched = paths::guest_kernel_is_patched();
    let trackers: &[(&str, &str)] = if patched {
        &[
            ("bitmap", "page_reporting.tracker=bitmap"),
            ("mainline", "page_reporting.tracker=mainline"),
        ]
    } else {
        &[("mainline", "")]
    };
    let mut rows = Map::new();
    for (tracker, command_line) in trackers {
        let mut guest = Machine {
            memory: "size=2G",
            arguments: &["--balloon", "size=0,free_page_reporting=on"],
            command_line,
            ..Machine::default()
        }
        .serve()?;
        let mut before = settled(&guest)?;
        for (burst, arguments) in BURSTS {
            guest.shell(&format!("mkdir -p /tmp && guest-mem workload {arguments}"))?;
            let after = settled(&guest)?;
            let (batches, bytes) = (after.0 - before.0, after.1 - before.1);
            let row = json!({
                "batches": batches,
                "bytes": bytes,
                "batches_per_gib": batches as f64 / (bytes as f64 / GIB),
            });
            eprintln!("{tracker}, {burst}: {row}");
            rows.insert(format!("{burst}, {tracker}"), row);
            before = after;
        }
    }
    Ok(Value::Object(rows))
}

/// Batches and bytes reported since boot, after the last report.
fn settled(guest: &Guest) -> Result<(u64, u64)> {
    let figures = || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        let figure = |name: &str| stats["report"][name].as_u64().context("no figure");
        Ok::<_, anyhow::Error>((figure("batches")?, figure("requested_bytes")?))
    };
    let end = Instant::now() + DEADLINE;
    loop {
        let before = figures()?;
        // Continuous polling would keep the emulated host busy.
        thread::sleep(QUIET);
        if figures()? == before {
            return Ok(before);
        }
        ensure!(Instant::now() < end, "the reports come to no end");
    }
}
