//! Tests disks and entropy with real data.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        disk_keeps_what_the_guest_wrote,
        disk_with_four_queues_and_direct_keeps_what_the_guest_wrote,
        disk_discard_gives_space_back,
        disk_read_only_refuses_writes,
        ten_disks_are_all_there,
        disk_works_where_the_guest_moves_it,
    ]
}

/// Tests that share a guest.
pub(crate) fn sharing() -> Vec<Test> {
    tests![entropy_flows]
}

const DISK_BYTES: u64 = 64 << 20;

/// A sparse image in a folder that exists as long as the value.
fn image(name: &str) -> Result<(tempfile::TempDir, String)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(name);
    File::create(&path)?.set_len(DISK_BYTES)?;
    let text = path.to_str().context("path is not UTF-8")?.to_owned();
    Ok((folder, text))
}

fn boot_with_disk(option: &str) -> Result<Guest> {
    Machine {
        cpus: "boot=4",
        arguments: &["--disk", option],
        ..Machine::default()
    }
    .serve()
}

/// The guest writes data, reads it back after a reboot of the machine, and the host checks it.
fn keeps_data(options: &str) -> Result<Outcome> {
    let (_folder, path) = image("disk.raw")?;
    let option = format!("path={path},image_type=raw{options}");
    let mut guest = boot_with_disk(&option)?;
    guest.command("disk-fill /dev/vda 16M 7")?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command("disk-verify /dev/vda 16M 7")?;
    let counters = guest.vmm.get("vm.counters")?;
    let written = counters
        .pointer("/_disk0/write_bytes")
        .and_then(serde_json::Value::as_u64);
    ensure!(written >= Some(16 << 20), "{counters:#}");
    guest.end_cleanly()?;

    let mut second = boot_with_disk(&option)?;
    second.command("disk-verify /dev/vda 16M 7")?;
    second.end_cleanly()?;
    let held = fs::metadata(&path)?;
    ensure!(held.len() == DISK_BYTES, "the image changed its size");
    ensure!(held.blocks() * 512 >= 16 << 20, "the image is empty");
    Ok(Outcome::Passed)
}

fn disk_keeps_what_the_guest_wrote() -> Result<Outcome> {
    keeps_data("")
}

fn disk_with_four_queues_and_direct_keeps_what_the_guest_wrote() -> Result<Outcome> {
    keeps_data(",num_queues=4,queue_size=256,direct=on")
}

fn disk_discard_gives_space_back() -> Result<Outcome> {
    let (_folder, path) = image("disk.raw")?;
    let mut guest = boot_with_disk(&format!("path={path},image_type=raw"))?;
    guest.command("disk-fill /dev/vda 32M 3")?;
    let before = fs::metadata(&path)?.blocks();
    guest.shell("blkdiscard /dev/vda && sync")?;
    let after = fs::metadata(&path)?.blocks();
    ensure!(
        before * 512 >= 32 << 20 && after == 0,
        "blocks {before} → {after}"
    );
    Ok(Outcome::Passed)
}

fn disk_read_only_refuses_writes() -> Result<Outcome> {
    let (_folder, path) = image("disk.raw")?;
    let mut guest = boot_with_disk(&format!("path={path},readonly=on,image_type=raw"))?;
    let text = guest.shell(
        "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4k count=1 || echo refused",
    )?;
    ensure!(text.contains("refused"), "{text}");
    ensure!(fs::metadata(&path)?.blocks() == 0, "something was written");
    Ok(Outcome::Passed)
}

fn ten_disks_are_all_there() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let mut options = Vec::new();
    for index in 0..10 {
        let path = folder.path().join(format!("disk{index}.raw"));
        File::create(&path)?.set_len(1 << 20)?;
        options.push("--disk".to_owned());
        options.push(format!(
            "path={},image_type=raw,serial=nr{index}",
            path.display()
        ));
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut guest = Machine {
        arguments: &options,
        ..Machine::default()
    }
    .serve()?;
    let text =
        guest.shell("echo disks $(ls /sys/block | grep -c vd) $(cat /sys/block/vdj/serial)")?;
    ensure!(text.contains("disks 10 nr9"), "{text}");
    Ok(Outcome::Passed)
}

/// A guest that finds a device anew assigns its BAR from the start of the window, which is free.
fn disk_works_where_the_guest_moves_it() -> Result<Outcome> {
    let (_folder, path) = image("disk.raw")?;
    let mut guest = boot_with_disk(&format!("path={path},image_type=raw"))?;
    guest.command("disk-fill /dev/vda 8M 5")?;
    let text = guest.shell("basename $(readlink -f /sys/block/vda/device/..)")?;
    let address = text
        .lines()
        .map(str::trim)
        .find(|line| line.starts_with("0000:00:"))
        .with_context(|| text.clone())?
        .to_owned();
    let function = format!("/sys/bus/pci/devices/{address}");
    let bar = |guest: &mut Guest| {
        let text = guest.shell(&format!("grep -m1 -v '^0x0* ' {function}/resource"))?;
        let line = text.lines().map(str::trim).find(|it| it.starts_with("0x"));
        line.map(str::to_owned).context(text.clone())
    };
    let before = bar(&mut guest)?;
    guest.shell(&format!(
        "echo 1 > {function}/remove; echo 1 > /sys/bus/pci/rescan"
    ))?;
    let after = bar(&mut guest)?;
    ensure!(before != after, "the BAR stays at {before}");
    guest.command("disk-verify /dev/vda 8M 5")?;
    guest.command("disk-fill /dev/vda 16M 6")?;
    guest.command("disk-verify /dev/vda 16M 6")?;
    let info = guest.vmm.get("vm.info")?.to_string();
    let start = after.split(' ').next().unwrap_or_default();
    let start = u64::from_str_radix(start.trim_start_matches("0x"), 16)?;
    ensure!(
        info.contains(&format!("\"base\":{start}")),
        "{start:#x}: {info}"
    );
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

fn entropy_flows() -> Result<Outcome> {
    let text = Machine::default().share(|guest| {
        guest.shell(
            "cat /sys/class/misc/hw_random/rng_current; echo bytes $(head -c 512 /dev/hwrng | wc -c)",
        )
    })?;
    ensure!(
        text.contains("virtio_rng") && text.contains("bytes 512"),
        "{text}"
    );
    Ok(Outcome::Passed)
}
