//! Tests how a machine ends and restarts.

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;

use crate::balloon::REPORTING_PAIR;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        guest_poweroff_ends_the_vmm,
        guest_reboot_starts_the_guest_again,
        guest_poweroff_with_no_shutdown_leaves_the_vmm,
    ]
}

/// Tests that share a guest, and tests that end a shared one.
pub(crate) fn sharing() -> Vec<Test> {
    tests![
        every_way_to_reset_starts_the_guest_again,
        api_reboot_starts_the_guest_again,
        power_button_shuts_the_guest_down,
        api_shutdown_keeps_the_configuration,
        terminate_signal_ends_cleanly,
    ]
}

/// A test that shares a guest with two vCPUs and reporting.
pub(crate) fn sharing_reporting_pair() -> Vec<Test> {
    tests![pause_stops_the_guest_and_resume_lets_it_go_on]
}

fn guest_poweroff_ends_the_vmm() -> Result<Outcome> {
    let mut guest = Machine {
        script: "true",
        ..Machine::default()
    }
    .boot()?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}

fn guest_reboot_starts_the_guest_again() -> Result<Outcome> {
    let mut guest = Machine {
        end: "reboot",
        ..Machine::default()
    }
    .serve()?;
    for _ in 0..2 {
        guest.end()?;
        guest.wait_init()?;
        guest.wait_serving()?;
    }
    Ok(Outcome::Passed)
}

/// The ACPI register, the keyboard controller, and a triple fault.
fn every_way_to_reset_starts_the_guest_again() -> Result<Outcome> {
    Machine::default().share(|guest| {
        for way in ["acpi", "kbd", "triple"] {
            guest.shell(&format!("echo {way} > /sys/kernel/reboot/type"))?;
            guest.serial.send("sh reboot -f")?;
            guest.wait_init().with_context(|| way)?;
            guest.wait_serving()?;
        }
        Ok(Outcome::Passed)
    })
}

fn guest_poweroff_with_no_shutdown_leaves_the_vmm() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &["--no-shutdown"],
        ..Machine::default()
    }
    .serve()?;
    guest.end()?;
    wait_for("end of the machine", PROCESS_DEADLINE, || {
        Ok((guest.vmm.get("vm.info")?["state"] == "Created").then_some(()))
    })?;
    guest.vmm.put("vm.boot", None)?;
    guest.wait_init()?;
    guest.vmm.put("vmm.shutdown", None)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}

fn power_button_shuts_the_guest_down() -> Result<Outcome> {
    let mut guest = Machine::default().take_over()?;
    guest.vmm.put("vm.power-button", None)?;
    guest.serial.expect("guest: power button", BOOT_DEADLINE)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}

fn api_reboot_starts_the_guest_again() -> Result<Outcome> {
    let mut guest = Machine::default().take_over()?;
    guest.vmm.put("vm.reboot", None)?;
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn api_shutdown_keeps_the_configuration() -> Result<Outcome> {
    let mut guest = Machine::default().take_over()?;
    guest.vmm.put("vm.shutdown", None)?;
    let info = guest.vmm.get("vm.info")?;
    ensure!(info["state"] == "Created", "{info:#}");
    guest.vmm.put("vm.boot", None)?;
    guest.wait_init()?;
    guest.vmm.put("vm.delete", None)?;
    let gone = guest.vmm.request("GET", "vm.info", None)?;
    ensure!(gone.status == 404, "{gone:?}");
    guest.vmm.put("vmm.shutdown", None)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    Ok(Outcome::Passed)
}

fn terminate_signal_ends_cleanly() -> Result<Outcome> {
    let mut guest = Machine::default().take_over()?;
    guest.vmm.signal("TERM")?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)?;
    ensure!(
        !guest.vmm.socket().exists(),
        "the API socket was left behind"
    );
    Ok(Outcome::Passed)
}

fn pause_stops_the_guest_and_resume_lets_it_go_on() -> Result<Outcome> {
    REPORTING_PAIR.share(pause_and_resume)
}

fn pause_and_resume(guest: &mut Guest) -> Result<Outcome> {
    guest.vmm.put("vm.pause", None)?;
    let info = guest.vmm.get("vm.info")?;
    ensure!(info["state"] == "Paused", "{info:#}");
    let again = guest.vmm.request("PUT", "vm.pause", None)?;
    ensure!(again.status == 500, "pausing twice: {again:?}");
    // The vCPUs of a paused guest use no processor time.
    let ticks = vcpu_ticks(guest.vmm.pid())?;
    guest.serial.send("ping")?;
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    ensure!(stats["configured_bytes"] == 512u64 << 20, "{stats:#}");
    ensure!(vcpu_ticks(guest.vmm.pid())? == ticks, "a paused vCPU ran");
    guest.vmm.put("vm.resume", None)?;
    guest.serial.expect("ok ping", BOOT_DEADLINE)?;
    let still = wait_for("state", PROCESS_DEADLINE, || {
        Ok(Some(guest.vmm.get("vm.info")?["state"] == "Running"))
    })?;
    ensure!(still, "not running after resume");
    Ok(Outcome::Passed)
}

/// Clock ticks that the vCPU threads have used.
fn vcpu_ticks(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that answered a request may have ended by now.
        let Ok(stat) = std::fs::read_to_string(task?.path().join("stat")) else {
            continue;
        };
        if stat.contains("(vcpu") {
            let fields: Vec<&str> = stat
                .rsplit(')')
                .next()
                .unwrap_or("")
                .split_whitespace()
                .collect();
            // Fields 14 and 15 of proc(5); the first two were removed with the name.
            sum += fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        }
    }
    Ok(sum)
}
