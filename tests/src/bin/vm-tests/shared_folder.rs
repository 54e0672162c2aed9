//! Tests a folder of the host in a Linux guest, shared by virtiofsd. The kernel is one of Debian's.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::tests;
use integration_tests::wait::wait_for;

use crate::back_end::{self, BackEnd, counter, not_installed, wait_counter};
use crate::debian::{
    DISTRIBUTION_DEADLINE, balloon_inflates_and_deflates, reporting_goes_on_under_load,
};

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_guest_shares_a_folder_while_memory_goes_and_the_back_end_is_killed]
}

const FILE_BYTES: usize = 3 << 20;
/// Time for background work of the guest, under emulation.
const GUEST_DEADLINE: Duration = Duration::from_secs(240);

/// Writes files to the folder until it is stopped, reads each back from the host, renames it and removes an earlier
/// one. If one differs, it creates `/tmp/bad`. It pauses between files, because everything else shares its processor.
const LOAD: &str = "dd if=/dev/urandom of=/tmp/base bs=64k count=4 2> /dev/null; n=0; \
    while [ ! -e /tmp/stop ]; do n=$((n+1)); { cat /tmp/base; echo $n; } > /tmp/source; \
    cp /tmp/source /mnt/new && sync && echo 1 > /proc/sys/vm/drop_caches && \
    mv /mnt/new /mnt/load.$n && cmp /tmp/source /mnt/load.$n || { touch /tmp/bad; break; }; \
    [ $n -lt 3 ] || rm /mnt/load.$((n-2)); echo $n > /tmp/rounds; sleep 2; done; touch /tmp/stopped";

pub(crate) const VIRTIOFSD: &str = "virtiofsd";

pub(crate) fn start(program: &Path, socket: &Path, folder: &Path) -> Result<BackEnd> {
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket);
    command.arg("--shared-dir").arg(folder);
    // The emulated host has no other users, and its kernel lacks features that the sandbox needs.
    BackEnd::start(command.args(["--sandbox", "none", "--seccomp", "none"]))
}

fn wait_file(guest: &mut Guest, name: &str) -> Result<()> {
    wait_for(name, GUEST_DEADLINE, || {
        let answer = guest.command(&format!("sh test -e {name}"))?;
        Ok(answer.ends_with("sh 0").then_some(()))
    })
}

/// SHA-256 as printed by sha256sum; the guest uses a different program.
fn sum(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    let sum = text.split(' ').next().unwrap_or_default();
    ensure!(sum.len() == 64, "{}: {text:?}", path.display());
    Ok(sum.to_owned())
}

/// Writes a file on each side, which the other side reads.
fn exchange(guest: &mut Guest, folder: &Path, round: usize) -> Result<()> {
    let ours = format!("host.{round}");
    // The period is not a power of two, so that a misplaced page is detected.
    let data: Vec<u8> = (0..FILE_BYTES)
        .map(|index| ((index + round) % 251) as u8)
        .collect();
    fs::write(folder.join(&ours), data)?;
    let wanted = sum(&folder.join(&ours))?;
    let printed = guest.shell(&format!("sha256sum /mnt/{ours}"))?;
    ensure!(printed.contains(&wanted), "{ours}: {wanted}, {printed}");

    let theirs = format!("guest.{round}");
    let printed = guest.shell(&format!(
        "dd if=/dev/urandom of=/mnt/{theirs} bs=64k count=32 2> /dev/null; sync; sha256sum /mnt/{theirs}"
    ))?;
    let found = sum(&folder.join(&theirs))?;
    ensure!(printed.contains(&found), "{theirs}: {found}, {printed}");
    Ok(())
}

fn debian_guest_shares_a_folder_while_memory_goes_and_the_back_end_is_killed() -> Result<Outcome> {
    let Some(program) = back_end::program(VIRTIOFSD) else {
        return Ok(not_installed(VIRTIOFSD));
    };
    let Some(kernel) = ["debian-6.12/vmlinuz", "debian-6.1/vmlinuz"]
        .into_iter()
        .find(|kernel| paths::guest(kernel).is_ok())
    else {
        return Ok(Outcome::Skipped("no kernel of Debian's".into()));
    };
    let place = tempfile::tempdir()?;
    let socket = place.path().join("work.sock");
    let folder = place.path().join("work");
    fs::create_dir(&folder)?;
    let mut back_end = start(&program, &socket, &folder)?;
    let option = format!("tag=work,id=work,socket={}", socket.display());
    let machine = Machine {
        kernel,
        memory: "size=512M,shared=on",
        arguments: &[
            "--fs",
            &option,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    };
    let mut guest = Guest::on_socket(machine.start()?, "serial.sock")?;
    guest.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    guest.wait_serving()?;
    guest.shell("mkdir -p /mnt && mount -t virtiofs work /mnt")?;
    exchange(&mut guest, &folder, 0).context("before anything happens")?;

    guest.shell(&format!("({LOAD}) > /tmp/load 2>&1 < /dev/null &"))?;
    wait_file(&mut guest, "/tmp/rounds")?;
    balloon_inflates_and_deflates(&guest).context("balloon under load")?;
    reporting_goes_on_under_load(&mut guest).context("reporting under load")?;
    guest.shell("touch /tmp/stop")?;
    wait_file(&mut guest, "/tmp/stopped")?;
    guest
        .shell("cat /tmp/rounds /tmp/load; test ! -e /tmp/bad")
        .context("a file differs")?;
    exchange(&mut guest, &folder, 1).context("after the load")?;

    for round in 2..4 {
        drop(back_end);
        wait_counter(&guest, "work", "connected", 0)?;
        // A new virtiofsd does not know the previous mount. Until there is one, the guest waits.
        guest.shell(
            "rm -f /tmp/again; (umount /mnt; mount -t virtiofs work /mnt && touch /tmp/again) \
             > /tmp/mount 2>&1 < /dev/null &",
        )?;
        back_end = start(&program, &socket, &folder)?;
        wait_file(&mut guest, "/tmp/again")?;
        exchange(&mut guest, &folder, round).context("after a restart of the back end")?;
    }
    ensure!(counter(&guest, "work", "connections_lost")? == 2);
    ensure!(counter(&guest, "work", "protocol_errors")? == 0);
    guest.shell("umount /mnt")?;
    guest.end_cleanly()?;
    drop(back_end);
    Ok(Outcome::Passed)
}
