//! Tests the serial port and the virtio console with each back end: file, pseudo-terminal, terminal, socket, none.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration_tests::descriptors::open_terminal;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        serial_on_a_pty_serves_across_a_reboot,
        serial_on_a_terminal_serves_and_restores_it,
        serial_to_a_file_holds_what_the_guest_printed,
        serial_to_null_lets_the_guest_run,
        serial_off_lets_the_guest_run,
        console_to_a_file_holds_what_the_guest_printed,
        console_on_a_pty_serves_across_a_reboot,
        console_on_a_terminal_serves_and_restores_it,
        console_on_a_socket_serves,
    ]
}

/// Tests that share a guest.
pub(crate) fn sharing() -> Vec<Test> {
    tests![serial_client_that_comes_back_is_served]
}

const ON_SERIAL: Machine<'_> = Machine::DEFAULT;

/// A guest whose console and command server are on the virtio console.
const ON_CONSOLE: Machine<'_> = Machine {
    serial: "null",
    command_line: "console=hvc0",
    script: "guest-mem serve /dev/hvc0",
    ..Machine::DEFAULT
};

/// The path of a `serial` or `console` in `vm.info`.
fn told_path(vmm: &Vmm, device: &str) -> Result<PathBuf> {
    wait_for("path of the pseudo-terminal", PROCESS_DEADLINE, || {
        let answer = vmm.request("GET", "vm.info", None)?;
        // The API responds before the machine exists.
        if answer.status == 404 {
            return Ok(None);
        }
        let path = &answer.json()?["config"][device]["file"];
        Ok(path.as_str().map(PathBuf::from))
    })
}

fn serves_on_a_pty(machine: &Machine<'_>, device: &str) -> Result<Outcome> {
    let vmm = machine.start()?;
    let path = told_path(&vmm, device)?;
    let serial = Serial::open(&path)?;
    let mut guest = Guest { vmm, serial };
    guest.wait_serving()?;
    guest.vmm.put("vm.reboot", None)?;
    guest.wait_init()?;
    guest.wait_serving()?;
    ensure!(told_path(&guest.vmm, device)? == path, "another terminal");
    let text = guest.shell("seq 1 2000")?;
    ensure!(text.contains("1999") && text.contains("2000"), "{text}");
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn serial_on_a_pty_serves_across_a_reboot() -> Result<Outcome> {
    let machine = Machine {
        serial: "pty",
        ..ON_SERIAL
    };
    serves_on_a_pty(&machine, "serial")
}

fn console_on_a_pty_serves_across_a_reboot() -> Result<Outcome> {
    let machine = Machine {
        console: "pty",
        ..ON_CONSOLE
    };
    serves_on_a_pty(&machine, "console")
}

/// The settings of a terminal as `stty` writes them.
fn settings(terminal: &Path) -> Result<String> {
    let output = Command::new("stty")
        .args(["-g", "-F"])
        .arg(terminal)
        .output()
        .context("stty")?;
    ensure!(output.status.success(), "stty: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The VMM runs on a terminal as if by hand.
fn serves_on_a_terminal(machine: &Machine<'_>) -> Result<Outcome> {
    let (master, path) = open_terminal()?;
    let terminal = File::options().read(true).write(true).open(&path)?;
    let before = settings(&path)?;
    let (input, output) = (terminal.try_clone()?, terminal.try_clone()?);
    let vmm = machine.start_with(|command| {
        command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output));
    })?;
    let serial = Serial::over(master);
    let mut guest = Guest { vmm, serial };
    guest.wait_serving()?;
    ensure!(settings(&path)? != before, "the terminal is not raw");
    let text = guest.shell("echo seen from here")?;
    ensure!(text.contains("seen from here"), "{text}");
    guest.end_cleanly()?;
    let after = settings(&path)?;
    ensure!(after == before, "settings {before} became {after}");
    Ok(Outcome::Passed)
}

fn serial_on_a_terminal_serves_and_restores_it() -> Result<Outcome> {
    serves_on_a_terminal(&Machine {
        serial: "tty",
        ..ON_SERIAL
    })
}

fn console_on_a_terminal_serves_and_restores_it() -> Result<Outcome> {
    serves_on_a_terminal(&Machine {
        console: "tty",
        ..ON_CONSOLE
    })
}

/// The guest prints a line and ends; the VMM must end, too. Returns the content of `file`.
fn prints_and_ends(machine: &Machine<'_>, file: &str) -> Result<String> {
    let mut vmm = Machine {
        script: "echo printed and done",
        ..machine.clone()
    }
    .start()?;
    vmm.expect_clean_exit(BOOT_DEADLINE)?;
    Ok(vmm.text(file))
}

fn serial_to_a_file_holds_what_the_guest_printed() -> Result<Outcome> {
    let machine = Machine {
        serial: "file=@/text",
        ..ON_SERIAL
    };
    let text = prints_and_ends(&machine, "text")?;
    ensure!(text.contains("printed and done"), "{text:?}");
    Ok(Outcome::Passed)
}

fn console_to_a_file_holds_what_the_guest_printed() -> Result<Outcome> {
    let machine = Machine {
        console: "file=@/text",
        ..ON_CONSOLE
    };
    let text = prints_and_ends(&machine, "text")?;
    ensure!(text.contains("printed and done"), "{text:?}");
    Ok(Outcome::Passed)
}

fn serial_to_null_lets_the_guest_run() -> Result<Outcome> {
    let machine = Machine {
        serial: "null",
        ..ON_SERIAL
    };
    let text = prints_and_ends(&machine, "stdout")?;
    ensure!(text.is_empty(), "{text:?}");
    Ok(Outcome::Passed)
}

fn serial_off_lets_the_guest_run() -> Result<Outcome> {
    let machine = Machine {
        serial: "off",
        console: "file=@/text",
        ..ON_CONSOLE
    };
    let text = prints_and_ends(&machine, "text")?;
    ensure!(text.contains("printed and done"), "{text:?}");
    Ok(Outcome::Passed)
}

fn serial_client_that_comes_back_is_served() -> Result<Outcome> {
    Machine::default().share(|guest| {
        let path = guest.vmm.folder().join("serial.sock");
        for _ in 0..3 {
            guest.serial = Serial::connect(&path, PROCESS_DEADLINE)?;
            guest.wait_serving()?;
        }
        Ok(Outcome::Passed)
    })
}

fn console_on_a_socket_serves() -> Result<Outcome> {
    let vmm = Machine {
        console: "socket=@/console.sock",
        ..ON_CONSOLE
    }
    .start()?;
    let mut guest = Guest::on_socket(vmm, "console.sock")?;
    guest.wait_serving()?;
    let text = guest.shell("seq 1 2000")?;
    ensure!(text.contains("1999") && text.contains("2000"), "{text}");
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
