//! Runs the scenario `chaos` of the guest without an operating system, which writes and verifies memory and a disk in
//! rounds.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::bare_metal::SCENARIO_DEADLINE;
use crate::vmm::Vmm;
use crate::wait::wait_for;

/// The balloon's target that ends the scenario.
pub const END_BYTES: u64 = 1000 * 4096;

/// Waits for a round later than `after` in this file of a serial port, in the folder of `vmm`.
///
/// # Errors
/// The guest has found a wrong byte, or does not come that far.
pub fn wait_rounds(vmm: &Vmm, serial: &str, after: u32) -> Result<u32> {
    wait_for("another round of the guest", SCENARIO_DEADLINE, || {
        let newest = newest_round(&vmm.text(serial))?;
        Ok(newest.filter(|newest| *newest > after))
    })
}

/// The last round in this output of the guest.
///
/// # Errors
/// The guest has found a wrong byte.
pub fn newest_round(text: &str) -> Result<Option<u32>> {
    ensure!(!text.contains("FAIL"), "{text}");
    let rounds = text.split("ROUND ").skip(1);
    let numbers = rounds.filter_map(|it| it.split_once(' ')?.0.parse().ok());
    Ok(numbers.max())
}

/// Has the guest of `vmm` verify everything and end. `first` has the file of the serial port.
///
/// # Errors
/// The guest has lost something, or does not end.
pub fn expect_nothing_lost(first: &Vmm, serial: &str, vmm: &Vmm) -> Result<()> {
    let body = json!({"desired_balloon": END_BYTES}).to_string();
    vmm.put("vm.resize", Some(&body))?;
    let text = wait_for("the guest's closing line", SCENARIO_DEADLINE, || {
        let text = first.text(serial);
        Ok(has_ended(&text).then_some(text))
    })?;
    expect_pass(&text)
}

/// Whether this output of the guest has its closing line.
#[must_use]
pub fn has_ended(text: &str) -> bool {
    // The last word of that line.
    text.contains(" failed")
}

/// The guest's report at its end.
///
/// # Errors
/// It has lost something.
pub fn expect_pass(text: &str) -> Result<()> {
    ensure!(
        text.contains("PASS chaos_loses_nothing") && text.contains(" 0 failed"),
        "{text}"
    );
    Ok(())
}
