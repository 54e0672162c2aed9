//! Latency of the API.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use integration_tests::linux::Machine;
use integration_tests::literal_client::request;
use integration_tests::vmm::Vmm;
use serde_json::{Value, json};

/// Requests for the latency distribution.
const REQUESTS: usize = 500;

/// `vm.info` of `vmm` while somebody waits for a guest that never answers.
pub(crate) fn measure(vmm: &Path) -> Result<Value> {
    let guest = Machine {
        vmm: Some(vmm),
        arguments: &["--balloon", "size=0,free_page_reporting=on"],
        ..Machine::default()
    }
    .serve()?;
    guest.vmm.put("vm.pause", None)?;
    let paused = latency(&guest.vmm)?;
    Ok(json!({ "vm_info_us": paused }))
}

fn latency(vmm: &Vmm) -> Result<Value> {
    let socket = vmm.socket();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let begin = Instant::now();
            // Its answer is an error: the guest is paused. Only the wait counts.
            let answer = request(&socket, "GET", "vm.balloon-stats", None);
            (answer.is_ok(), begin.elapsed())
        });
        let mut times_us: Vec<u64> = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            let begin = Instant::now();
            let answer = request(&socket, "GET", "vm.info", None)?;
            ensure!(answer.status == 200, "{answer:?}");
            times_us.push(begin.elapsed().as_micros() as u64);
        }
        let Ok((answered, waited)) = waiting.join() else {
            bail!("the waiting thread panicked");
        };
        ensure!(answered, "vm.balloon-stats got no answer at all");
        times_us.sort_unstable();
        Ok(json!({
            "p50": times_us[REQUESTS / 2],
            "p99": times_us[REQUESTS * 99 / 100],
            "max": times_us[REQUESTS - 1],
            "balloon_stats_answered_after_ms": waited.as_millis() as u64,
        }))
    })
}
