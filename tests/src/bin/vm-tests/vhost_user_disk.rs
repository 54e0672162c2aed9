//! Tests a disk that QEMU's storage daemon serves, in a Linux guest.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use serde_json::json;

use crate::back_end::{self, BackEnd, counter, not_installed, wait_counter};
use crate::debian::reporting_goes_on_under_load;
use crate::hotplug::{expect, wait_disk, wait_gone};

pub(crate) fn tests() -> Vec<Test> {
    tests![vhost_user_disk_keeps_data_while_its_back_end_is_killed]
}

const DISK_BYTES: u64 = 64 << 20;
const KILLS: u64 = 6;
const QUEUES: usize = 2;

/// Each writer has a part of the disk. It writes 2 MiB, reads them back past the page cache, and leaves `/tmp/bad` if
/// they differ.
const LOAD: &str = "dd if=/dev/urandom of=/tmp/base.$w bs=64k count=32 2> /dev/null; n=0; \
    while [ ! -e /tmp/stop ]; do n=$((n+1)); echo $n | dd of=/tmp/base.$w conv=notrunc 2> /dev/null; \
    dd if=/tmp/base.$w of=/dev/vda bs=64k seek=$((w*32)) conv=notrunc,fsync 2> /dev/null && \
    echo 1 > /proc/sys/vm/drop_caches && \
    dd if=/dev/vda of=/tmp/read.$w bs=64k skip=$((w*32)) count=32 2> /dev/null && \
    cmp /tmp/base.$w /tmp/read.$w || { touch /tmp/bad; break; }; \
    echo $n > /tmp/rounds.$w; done; touch /tmp/stopped.$w";
const WRITERS: u32 = 3;

pub(crate) const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// Serves `image` through this many queues.
pub(crate) fn start(program: &Path, image: &Path, socket: &Path, queues: usize) -> Result<BackEnd> {
    let blockdev = format!(
        "driver=file,node-name=disk,discard=unmap,filename={}",
        image.display()
    );
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
        socket.display()
    );
    BackEnd::start(Command::new(program).args(["--blockdev", &blockdev, "--export", &export]))
}

/// Waits until every writer has done this many more rounds.
fn rounds(guest: &mut Guest, more: u64) -> Result<()> {
    let script = format!(
        "for w in $(seq {WRITERS}); do r=$(cat /tmp/rounds.$w 2> /dev/null || echo 0); \
         until [ $(cat /tmp/rounds.$w 2> /dev/null || echo 0) -ge $((r+{more})) ] || [ -e /tmp/bad ]; do sleep 0.2; done; done"
    );
    guest
        .shell(&script)
        .context("the writers make no progress")
        .map(drop)
}

fn vhost_user_disk_keeps_data_while_its_back_end_is_killed() -> Result<Outcome> {
    let Some(program) = back_end::program(STORAGE_DAEMON) else {
        return Ok(not_installed(STORAGE_DAEMON));
    };
    let place = tempfile::tempdir()?;
    let socket = place.path().join("disk.sock");
    let image = place.path().join("image");
    File::create(&image)?.set_len(DISK_BYTES)?;
    let option = format!(
        "vhost_user=on,socket={},num_queues={QUEUES},id=data",
        socket.display()
    );
    let machine = Machine {
        cpus: "boot=2",
        memory: "size=512M,shared=on",
        arguments: &[
            "--disk",
            &option,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    };
    // The guest waits for the back end when it probes the disk.
    let starting = machine.start()?;
    let mut daemon = start(&program, &image, &socket, QUEUES)?;
    let mut guest = Guest::on_socket(starting, "serial.sock")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    wait_disk(&mut guest)?;
    guest.command("disk-fill /dev/vda 64M 7")?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command("disk-verify /dev/vda 64M 7")?;

    guest.shell(&format!(
        "for w in $(seq {WRITERS}); do ({LOAD}) > /tmp/load.$w 2>&1 < /dev/null & done"
    ))?;
    rounds(&mut guest, 1)?;
    for kills in 1..=KILLS {
        drop(daemon);
        wait_counter(&guest, "data", "connections_lost", kills)?;
        daemon = start(&program, &image, &socket, QUEUES)?;
        rounds(&mut guest, 1).with_context(|| format!("after kill {kills}"))?;
    }
    reporting_goes_on_under_load(&mut guest).context("reporting under load")?;
    rounds(&mut guest, 2).context("after reporting")?;
    guest
        .shell("touch /tmp/stop; until [ $(ls /tmp/stopped.* | wc -l) = 3 ]; do sleep 0.2; done")?;
    guest
        .shell("cat /tmp/rounds.* /tmp/load.*; test ! -e /tmp/bad")
        .context("a block differs")?;
    ensure!(counter(&guest, "data", "uncertain_requests")? == 0);
    ensure!(counter(&guest, "data", "protocol_errors")? == 0);

    guest.command("disk-fill /dev/vda 8M 9")?;
    expect(&guest, "vm.remove-device", &json!({"id": "data"}), 204)?;
    wait_gone(&guest, "data")?;
    let disk =
        json!({"vhost_user": true, "vhost_socket": socket, "num_queues": QUEUES, "id": "data"});
    expect(&guest, "vm.add-disk", &disk, 200)?;
    wait_disk(&mut guest)?;
    guest.command("disk-verify /dev/vda 8M 9")?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
