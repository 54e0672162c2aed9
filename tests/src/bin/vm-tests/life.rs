//! Tests concurrent machines, and the events of a VM's life cycle.

use anyhow::{Context, Result, ensure};
use integration_tests::linux::Machine;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::vmm::Vmm;
use serde_json::Value;

use crate::balloon::REPORTING;

pub(crate) fn tests() -> Vec<Test> {
    tests![events_tell_a_whole_life]
}

/// A test that ends a shared guest.
pub(crate) fn sharing_reporting() -> Vec<Test> {
    tests![two_guests_run_side_by_side]
}

fn events_tell_a_whole_life() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &[
            "--event-monitor",
            "path=@/events",
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    guest.vmm.put("vm.pause", None)?;
    guest.vmm.put("vm.resume", None)?;
    let resize = "{\"desired_balloon\":16777216}";
    guest.vmm.put("vm.resize", Some(resize))?;
    guest.vmm.put("vm.reboot", None)?;
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.end_cleanly()?;

    let events = events(&guest.vmm)?;
    let names: Vec<String> = events
        .iter()
        .filter(|event| event["source"] != "virtio-device")
        .map(|event| format!("{}:{}", event["source"], event["event"]).replace('"', ""))
        .collect();
    let wanted = "vmm:starting vm:booting vm:booted vm:pausing vm:paused vm:resuming vm:resumed \
                  vm:resizing vm:resized vm:rebooting vm:rebooted \
                  vm:shutdown vm:deleted vmm:shutdown";
    ensure!(names.join(" ") == wanted, "{names:?}");
    let balloons = events
        .iter()
        .filter(|event| event["event"] == "activated" && event["properties"]["id"] == "__balloon");
    ensure!(balloons.count() == 2, "activated once a boot: {events:#?}");
    Ok(Outcome::Passed)
}

/// All events, each in the documented format, in order of time.
fn events(vmm: &Vmm) -> Result<Vec<Value>> {
    let text = vmm.text("events");
    let events: Vec<Value> = serde_json::Deserializer::from_str(&text)
        .into_iter::<Value>()
        .collect::<Result<_, _>>()
        .with_context(|| text.clone())?;
    let time = |event: &Value| {
        let part = |name: &str| event["timestamp"][name].as_u64();
        Some((part("secs")?, part("nanos")?))
    };
    ensure!(
        events.iter().all(|event| time(event).is_some()) && events.is_sorted_by_key(time),
        "{text}"
    );
    Ok(events)
}

/// Each keeps its memory contents while both use memory.
fn two_guests_run_side_by_side() -> Result<Outcome> {
    let mut first = REPORTING.take_over()?;
    let mut second = REPORTING.serve()?;
    first.command("alloc 100M seed=1")?;
    second.command("alloc 100M seed=2")?;
    first.command("verify")?;
    first.end_cleanly()?;
    second.command("verify")?;
    second.end_cleanly()?;
    Ok(Outcome::Passed)
}
