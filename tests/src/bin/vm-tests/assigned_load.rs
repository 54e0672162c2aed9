//! Tests a disk and a network interface of the host in one guest, while memory is reported, ballooned and plugged. The
//! host needs both behind an IOMMU: `cargo xtask testbed run --assignable`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::Guest;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::{paths, tests};

use crate::assigned::{
    GENERIC_KERNEL, Kind, PEER_MAC, add, boot_with, device_of_host, no_device, number, remove,
    stats, wait_disk_named,
};
use crate::hotplug::{resize, wait_figure};
use crate::iommu::counter;
use crate::network;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        debian_assigned_disk_and_network_behind_the_iommu_keep_data_while_memory_changes,
        debian_assigned_disk_and_network_keep_data_while_memory_changes,
    ]
}

const DISK: &str = "nvme0n1";
const MAC: &str = "52:54:00:00:00:01";
/// Large packets, because each is expensive.
const MTU: &str = "9000";
const PREFIX: &str = "192.168.231";
/// Boot memory. Half as much is plugged in, and a quarter is ballooned.
const RAM_MIB: u64 = 512;
const PLUGGED_MIB: u64 = 256;
const BALLOONED_MIB: u64 = 128;
/// Memory that the guest uses, checks and frees.
const USED_MIB: u64 = 64;
/// Data that each device carries between two checks. Behind the virtual IOMMU of an emulated host, a packet takes tens of
/// milliseconds.
const CARRIED_BYTES: usize = 1 << 18;
const DISK_MIB: u64 = 8;

fn debian_assigned_disk_and_network_behind_the_iommu_keep_data_while_memory_changes()
-> Result<Outcome> {
    with_devices(true)
}

fn debian_assigned_disk_and_network_keep_data_while_memory_changes() -> Result<Outcome> {
    with_devices(false)
}

fn with_devices(iommu: bool) -> Result<Outcome> {
    if paths::guest(GENERIC_KERNEL).is_err() {
        let reason = format!("there is no guest {GENERIC_KERNEL}");
        return Ok(Outcome::Skipped(reason));
    }
    let (disk, nic) = (device_of_host(Kind::Nvme)?, device_of_host(Kind::Igb)?);
    let (Some(disk), Some(nic)) = (disk, nic) else {
        return Ok(no_device());
    };
    set_up_host()?;
    load([(Kind::Nvme, &disk), (Kind::Igb, &nic)], iommu)?;
    Ok(Outcome::Passed)
}

/// Gives the host's end of the network its address.
fn set_up_host() -> Result<()> {
    let mut found = None;
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("address"))?.trim() == PEER_MAC {
            found = path
                .file_name()
                .and_then(|name| name.to_str())
                .map(str::to_owned);
        }
    }
    let name = found.context("the host has no end of the network")?;
    let address = format!("{PREFIX}.1/24");
    for arguments in [
        &["addr", "replace", &address, "dev", &name][..],
        &["link", "set", &name, "mtu", MTU, "up"],
    ] {
        let status = Command::new("ip")
            .args(arguments)
            .status()
            .context("starting ip")?;
        ensure!(status.success(), "ip {arguments:?}");
    }
    Ok(())
}

/// Prints what is done, because the test takes minutes in an emulated host.
#[derive(Debug)]
struct Steps(Instant);

impl Steps {
    fn done(&self, step: &str) {
        println!("     {:4} s: {step}", self.0.elapsed().as_secs());
    }
}

/// Writes the disk, and reads it back past the page cache.
fn write_and_verify(guest: &mut Guest, seed: u64) -> Result<()> {
    guest.command(&format!("disk-fill /dev/{DISK} {DISK_MIB}M {seed}"))?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    let verify = format!("disk-verify /dev/{DISK} {DISK_MIB}M {seed}");
    guest.command(&verify).map(drop)
}

fn load(devices: [(Kind, &Path); 2], iommu: bool) -> Result<()> {
    let steps = Steps(Instant::now());
    let memory = format!("size={RAM_MIB}M,hotplug_method=virtio-mem,hotplug_size={PLUGGED_MIB}M");
    let mut guest = boot_with(GENERIC_KERNEL, &memory)?;
    steps.done("booted");
    let discarded = |guest: &_| stats(guest, "/report/discarded_bytes");
    let begun_discarded = discarded(&guest)?;
    let before = guest.vmm.resident_bytes()?;
    for device in devices {
        add(&guest, device, iommu)?;
    }
    steps.done("devices added");
    wait_disk_named(&mut guest, DISK)?;
    guest.shell_until("[ -e /sys/class/net/eth0 ]")?;
    steps.done("devices found");
    network::set_up(&mut guest, PREFIX, MAC)?;
    guest.shell(&format!("ip link set eth0 mtu {MTU}"))?;
    steps.done("network up");
    let added = guest.vmm.resident_bytes()?;
    let rounds = number("ASSIGNED_ROUNDS", 1)?;
    for seed in 0..rounds {
        for (ballooned, plugged) in [(BALLOONED_MIB, PLUGGED_MIB), (0, 0)] {
            // While the devices access memory, the guest reports what it frees here, and balloon and virtio-mem change.
            guest.command(&format!("alloc {USED_MIB}M seed={seed}"))?;
            guest.command("verify")?;
            guest.command("free")?;
            resize(&guest, "desired_balloon", ballooned)?;
            resize(&guest, "desired_ram", RAM_MIB + plugged)?;
            guest.command(&format!("alloc {USED_MIB}M seed={}", seed + 1))?;
            steps.done("memory used");
            network::carry(&mut guest, PREFIX, CARRIED_BYTES)?;
            steps.done("network verified");
            write_and_verify(&mut guest, seed)?;
            steps.done("disk verified");
            wait_figure(&guest, "/ballooned_bytes", |bytes| bytes == ballooned * MIB)?;
            wait_figure(&guest, "/zones/1/configured_bytes", |bytes| {
                bytes == plugged * MIB
            })?;
            steps.done("balloon and virtio-mem changed");
            network::carry(&mut guest, PREFIX, CARRIED_BYTES)?;
            write_and_verify(&mut guest, seed + 1)?;
            guest.command("verify")?;
            guest.command("free")?;
            steps.done("all verified again");
        }
    }
    let resident = guest.vmm.resident_bytes()?;
    let reported = discarded(&guest)? - begun_discarded;
    println!(
        "     iommu={iommu}: {rounds} rounds; reports discarded {} MiB; resident MiB without the devices {}, with them {}, after the load {}",
        reported / MIB,
        before / MIB,
        added / MIB,
        resident / MIB
    );
    ensure!(iommu == (reported > 0), "{reported} bytes discarded");
    for (kind, _) in devices {
        remove(&guest, kind)?;
    }
    steps.done("devices removed");
    if iommu {
        for name in ["bad_requests", "refused_requests", "host_mapped_bytes"] {
            let count = counter(&guest, name)?;
            ensure!(count == 0, "{name}: {count}");
        }
    }
    guest.end_cleanly()
}
