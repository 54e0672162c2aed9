//! Measures how soon each tracker has reported the memory that is free at boot.
//!
//! Time is measured from the guest's first report, because the driver starts to report when it has found the balloon.
//! The guest's memory is never touched: only the reports are measured.

use std::time::{Duration, Instant};

use anyhow::Result;
use integration_tests::linux::Machine;
use integration_tests::paths;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

use crate::options::Asked;

/// Its name on the command line.
pub(crate) const NAME: &str = "boot-free";

const MEMORY: &str = "size=16G";
/// Mainline pauses for two seconds between two parts of its lists.
const QUIET: Duration = Duration::from_secs(8);
const DEADLINE: Duration = Duration::from_secs(600);
const SHARE: f64 = 0.95;

/// Reported memory at one time.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    bytes: u64,
    batches: u64,
}

/// Bytes, batches, and the time to 95 % of them, for each tracker that the kernel has.
pub(crate) fn run(asked: &Asked<'_>) -> Result<Value> {
    asked.refuse_options()?;
    if paths::guest_kernel_is_patched() {
        return Ok(json!({
            "mainline": of("page_reporting.tracker=mainline")?,
            "bitmap": of("page_reporting.tracker=bitmap")?,
        }));
    }
    Ok(json!({ "mainline": of("")? }))
}

fn of(command_line: &str) -> Result<Value> {
    let vmm = Machine {
        memory: MEMORY,
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        command_line,
        script: "true",
        end: "stay",
        ..Machine::default()
    }
    .start()?;
    let mut samples: Vec<Sample> = Vec::new();
    wait_for("an end of the reports", DEADLINE, || {
        // Until the guest's memory exists, the response is an error.
        let report = &vmm.get("vm.reclaim-stats").unwrap_or_default()["report"];
        let figure = |name: &str| report[name].as_u64().unwrap_or(0);
        let now = Sample {
            at: Instant::now(),
            bytes: figure("requested_bytes"),
            batches: figure("batches"),
        };
        match samples.last() {
            None if now.bytes == 0 => {}
            Some(last) if last.bytes == now.bytes => {}
            _ => samples.push(now),
        }
        let over = samples.last().is_some_and(|last| last.at.elapsed() > QUIET);
        Ok(over.then_some(()))
    })?;
    let (first, last) = (samples[0], samples[samples.len() - 1]);
    let enough = (last.bytes as f64 * SHARE) as u64;
    let nearly = samples.iter().find(|sample| sample.bytes >= enough);
    let since_first = |sample: &Sample| sample.at.duration_since(first.at).as_millis() as u64;
    Ok(json!({
        "reported_bytes": last.bytes,
        "batches": last.batches,
        "batches_per_gib": last.batches as f64 / (last.bytes as f64 / (1u64 << 30) as f64),
        "at_first_sight_bytes": first.bytes,
        "to_95_percent_ms": nearly.map(since_first),
        "to_the_end_ms": since_first(&last),
    }))
}
