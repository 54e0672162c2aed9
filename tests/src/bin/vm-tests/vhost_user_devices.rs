//! Tests a daemon that serves a device of which the VMM knows only the type, in a Linux guest.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use serde_json::json;

use crate::back_end::{self, BackEnd, counter, not_installed, wait_counter};
use crate::hotplug::{expect, wait_gone};

pub(crate) fn tests() -> Vec<Test> {
    tests![entropy_of_a_killed_daemon_flows_again]
}

const KILLS: u64 = 3;

/// The VMM has another entropy device, whose bytes are not zero.
const SELECT: &str = "head -c 64 /dev/zero > /tmp/zeros; cd /sys/class/misc/hw_random; \
    for r in $(cat rng_available); do echo $r > rng_current; \
    dd if=/dev/hwrng bs=64 count=1 2> /dev/null | cmp - /tmp/zeros && exit; done; exit 1";
const READ: &str =
    "dd if=/dev/hwrng bs=64 count=1 2> /dev/null | cmp - /tmp/zeros || touch /tmp/bad";

/// Repeats a command in the background until there is `/tmp/stop`, and counts in a file `/tmp/rounds.NAME`.
fn repeat(guest: &mut Guest, name: &str, command: &str) -> Result<()> {
    let count = format!("echo $n > /tmp/new.{name}; mv /tmp/new.{name} /tmp/rounds.{name}");
    let all = format!(
        "n=0; while [ ! -e /tmp/stop ]; do {command}; n=$((n+1)); {count}; sleep 0.1; done"
    );
    let start = format!(
        "rm -f /tmp/stop; ({all}; rm /tmp/rounds.{name}) > /tmp/load.{name} 2>&1 < /dev/null &"
    );
    guest.shell(&start).map(drop)
}

/// Waits for two more rounds, of which the second began after this call.
fn progress(guest: &mut Guest, name: &str) -> Result<()> {
    let now = format!("$(cat /tmp/rounds.{name} 2> /dev/null || echo 0)");
    guest
        .shell(&format!(
            "wanted=$(({now}+2)); until [ {now} -ge $wanted ]; do sleep 0.2; done; test ! -e /tmp/bad"
        ))
        .with_context(|| format!("{name} makes no progress"))
        .map(drop)
}

fn stop(guest: &mut Guest) -> Result<()> {
    let stopped = "touch /tmp/stop; while ls /tmp/rounds.*; do sleep 0.2; done > /dev/null 2>&1";
    guest.shell(stopped).map(drop)
}

fn entropy_of_a_killed_daemon_flows_again() -> Result<Outcome> {
    const NAME: &str = "vhost-device-rng";
    let Some(program) = back_end::program(NAME) else {
        return Ok(not_installed(NAME));
    };
    let place = tempfile::tempdir()?;
    let path = place.path().join("entropy");
    // The daemon appends a number.
    let socket = place.path().join("entropy0");
    let start = || {
        let mut command = Command::new(&program);
        command.args(["--rng-source", "/dev/zero"]);
        BackEnd::start(command.arg("--socket-path").arg(&path))
    };
    let option = format!(
        "device_type=rng,socket={},queue_sizes=[64],id=entropy",
        socket.display()
    );
    let machine = Machine {
        memory: "size=512M,shared=on",
        arguments: &["--generic-vhost-user", &option],
        ..Machine::default()
    };
    // The guest waits for the back end when it probes the device.
    let starting = machine.start()?;
    let mut daemon = start()?;
    let mut guest = Guest::on_socket(starting, "serial.sock")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    guest.shell(SELECT)?;

    repeat(&mut guest, "entropy", READ)?;
    progress(&mut guest, "entropy")?;
    for kills in 1..=KILLS {
        drop(daemon);
        wait_counter(&guest, "entropy", "connections_lost", kills)?;
        daemon = start()?;
        progress(&mut guest, "entropy").with_context(|| format!("after kill {kills}"))?;
    }
    stop(&mut guest)?;
    ensure!(counter(&guest, "entropy", "uncertain_requests")? == 0);

    expect(&guest, "vm.remove-device", &json!({"id": "entropy"}), 204)?;
    wait_gone(&guest, "entropy")?;
    let device = json!({"device_type": 4, "socket": socket, "queue_sizes": [64], "id": "entropy"});
    expect(&guest, "vm.add-generic-vhost-user", &device, 200)?;
    guest.shell_until(&format!("({SELECT})"))?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
