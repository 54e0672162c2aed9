//! Tests operations on a running Linux: an NMI, a larger disk, two consoles on one terminal.

use std::fs::File;
use std::process::Stdio;

use anyhow::{Result, ensure};
use integration_tests::MIB;
use integration_tests::descriptors::open_terminal;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::json;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        nmi_and_a_resized_disk_reach_a_running_guest,
        serial_and_console_on_one_terminal_both_write,
    ]
}

fn nmi_and_a_resized_disk_reach_a_running_guest() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(8 * MIB)?;
    let option = format!("path={},image_type=raw,id=data", path.display());
    let mut guest = Machine {
        cpus: "boot=2",
        arguments: &["--disk", &option],
        ..Machine::default()
    }
    .serve()?;

    // Both vCPUs count the NMI.
    let counted = "set -- $(grep NMI: /proc/interrupts); [ $2 -gt 0 ] && [ $3 -gt 0 ]";
    guest.shell(&format!("! {{ {counted}; }}"))?;
    guest.vmm.put("vm.nmi", None)?;
    wait_for("the NMI on both vCPUs", BOOT_DEADLINE, || {
        let answer = guest.command(&format!("sh {counted}"))?;
        Ok(answer.ends_with("sh 0").then_some(()))
    })?;

    guest.command("disk-fill /dev/vda 8M 7")?;
    let resize = json!({"id": "data", "desired_size": 24 * MIB}).to_string();
    guest.vmm.put("vm.resize-disk", Some(&resize))?;
    wait_for("the new size in the guest", BOOT_DEADLINE, || {
        let answer = guest.command("sh [ $(cat /sys/block/vda/size) = 49152 ]")?;
        Ok(answer.ends_with("sh 0").then_some(()))
    })?;
    guest.command("disk-verify /dev/vda 8M 7")?;
    guest.command("disk-fill /dev/vda 24M 8")?;
    guest.command("disk-verify /dev/vda 24M 8")?;
    guest.end_cleanly()?;
    ensure!(
        path.metadata()?.len() == 24 * MIB,
        "the image kept its size"
    );
    Ok(Outcome::Passed)
}

/// The serial port receives the terminal's input.
fn serial_and_console_on_one_terminal_both_write() -> Result<Outcome> {
    let (master, path) = open_terminal()?;
    let terminal = File::options().read(true).write(true).open(&path)?;
    let (input, output) = (terminal.try_clone()?, terminal.try_clone()?);
    let machine = Machine {
        serial: "tty",
        console: "tty",
        ..Machine::DEFAULT
    };
    let vmm = machine.start_with(|command| {
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output));
    })?;
    let serial = Serial::over(master);
    let mut guest = Guest { vmm, serial };
    guest.wait_serving()?;
    guest.shell("echo from hvc0: $((6 * 7)) > /dev/hvc0")?;
    wait_for("the console's text", BOOT_DEADLINE, || {
        guest.command("ping")?;
        let seen = guest.serial.text().contains("from hvc0: 42");
        Ok(seen.then_some(()))
    })?;
    // Every byte still goes to the serial port.
    let text = guest.shell("seq 1 500")?;
    ensure!(text.contains("499"), "{text}");
    let log = guest.vmm.stderr();
    ensure!(log.contains("share the terminal"), "{log}");
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
