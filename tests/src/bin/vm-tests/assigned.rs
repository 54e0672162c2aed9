//! Tests a disk of the host that a Linux guest drives. The host needs an IOMMU and an unused NVMe disk: `cargo xtask
//! testbed run --assignable`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};
use serde_json::{Value, json};

use crate::debian::DISTRIBUTION_DEADLINE;
use crate::hotplug::{expect, wait_gone};
use crate::iommu::{self, KERNEL, counter};

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_6_12_assigned_disk_keeps_data_and_pins_what_is_mapped_behind_the_iommu]
}

/// Debian's kernel with drivers of all devices of [`Kind`], and VFIO for programs of the guest.
pub(crate) const GENERIC_KERNEL: &str = "debian-generic/vmlinuz";
/// The address of the host's end of the network.
pub(crate) const PEER_MAC: &str = "52:54:00:00:00:02";
const DISK_NAME: &str = "nvme0n1";
/// Memory that the guest uses and frees, in MiB. `ASSIGNED_FREED_MIB` replaces it, and makes the guest larger by as
/// much.
const FREED_MIB: u64 = 700;
/// Memory that an assigned device may keep of it.
const GROWTH_MAX_BYTES: u64 = 64 * MIB;
/// Reporting, probing and releasing under emulation.
pub(crate) const GUEST_DEADLINE: Duration = Duration::from_secs(180);

/// A device of the host, by its files in sysfs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// A disk that is alone in its group.
    Nvme,
    /// A network interface, at the other end of which is the host's interface with the address [`PEER_MAC`].
    Igb,
    /// QEMU's educational device, which accesses any address that it is told.
    Edu,
}

impl Kind {
    /// A file, and its content.
    fn mark(self) -> (&'static str, &'static str) {
        match self {
            Self::Nvme => ("class", "0x010802"),
            Self::Igb => ("device", "0x10c9"),
            Self::Edu => ("device", "0x11e8"),
        }
    }

    /// Whether the device in this folder is of this kind.
    pub(crate) fn is(self, device: &Path) -> bool {
        let (file, content) = self.mark();
        let text = fs::read_to_string(device.join(file));
        text.is_ok_and(|text| text.trim() == content)
    }

    /// The id that tests give it.
    pub(crate) fn id(self) -> &'static str {
        match self {
            Self::Nvme => "nvme",
            Self::Igb => "nic",
            Self::Edu => "edu",
        }
    }
}

/// The folder in sysfs of a device that is alone in a group of the IOMMU, bound to vfio-pci. `None`: the host has none,
/// or is not emulated, so that its devices may have other users.
pub(crate) fn device_of_host(kind: Kind) -> Result<Option<PathBuf>> {
    let groups = groups_of_host()?.into_iter();
    let alone = groups.filter_map(|group| <[_; 1]>::try_from(group).ok());
    let Some([path]) = alone.into_iter().find(|[path]| kind.is(path)) else {
        return Ok(None);
    };
    give(&path, "vfio-pci")?;
    Ok(Some(path))
}

/// The folders of the devices in each group of the IOMMU, in order. There are none if the host is not emulated.
pub(crate) fn groups_of_host() -> Result<Vec<Vec<PathBuf>>> {
    let mut groups = Vec::new();
    if env::var_os("TESTBED").is_none_or(|testbed| testbed != "emulated") {
        return Ok(groups);
    }
    for group in fs::read_dir("/sys/kernel/iommu_groups")? {
        let devices = fs::read_dir(group?.path().join("devices"))?;
        let devices = devices.map(|device| device?.path().canonicalize());
        let mut devices = devices.collect::<Result<Vec<_>, _>>()?;
        devices.sort();
        groups.push(devices);
    }
    Ok(groups)
}

/// Gives a device of the host to a driver; to none, if this one does not exist.
pub(crate) fn give(device: &Path, driver: &str) -> Result<()> {
    let name = device.file_name().and_then(|name| name.to_str());
    let name = name.context("a device without a name")?;
    fs::write(device.join("driver_override"), driver)?;
    if device.join("driver").exists() {
        fs::write(device.join("driver/unbind"), name)?;
    }
    fs::write("/sys/bus/pci/drivers_probe", name)
        .with_context(|| format!("is the module {driver} loaded?"))
}

pub(crate) fn no_device() -> Outcome {
    Outcome::Skipped("the host is not emulated, or has no such device behind an IOMMU".to_owned())
}

/// The number in an environment variable.
pub(crate) fn number(variable: &str, default: u64) -> Result<u64> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(default),
    }
}

fn freed_mib() -> Result<u64> {
    number("ASSIGNED_FREED_MIB", FREED_MIB)
}

/// The size of the guest. Its kernel needs more for more memory.
fn guest_mib() -> Result<u64> {
    let freed = freed_mib()?;
    Ok(freed + 324 + freed.saturating_sub(FREED_MIB) / 16)
}

pub(crate) fn stats(guest: &Guest, pointer: &str) -> Result<u64> {
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    let found = stats.pointer(pointer).and_then(Value::as_u64);
    found.with_context(|| format!("no {pointer} in {stats:#}"))
}

fn boot() -> Result<Guest> {
    boot_with(KERNEL, &format!("size={}M", guest_mib()?))
}

/// Boots a guest to which devices with and without the virtual IOMMU can be added.
pub(crate) fn boot_with(kernel: &str, memory: &str) -> Result<Guest> {
    let machine = Machine {
        kernel,
        memory,
        // Plugged memory can then be unplugged again.
        command_line: "memhp_default_state=online_movable",
        arguments: &[
            "--platform",
            "num_pci_segments=2,iommu_segments=[1],iommu_address_width=48",
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    };
    let mut guest = Guest::on_socket(machine.start()?, "serial.sock")?;
    guest.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    guest.wait_serving()?;
    Ok(guest)
}

/// Makes the guest use and free memory, and waits until the host has most of it back. Returns what is resident then.
fn give_back(guest: &mut Guest) -> Result<u64> {
    let freed_mib = freed_mib()?;
    let before = stats(guest, "/report/discarded_bytes")?;
    guest.command(&format!("alloc {freed_mib}M"))?;
    guest.command("free")?;
    wait_for("the guest's reports", GUEST_DEADLINE, || {
        let now = stats(guest, "/report/discarded_bytes")?;
        Ok((now > before + freed_mib * MIB * 9 / 10).then_some(()))
    })?;
    guest.vmm.resident_bytes()
}

fn wait_disk(guest: &mut Guest) -> Result<()> {
    wait_disk_named(guest, DISK_NAME)
}

pub(crate) fn wait_disk_named(guest: &mut Guest, name: &str) -> Result<()> {
    let script = format!(
        "for i in $(seq 1200); do [ -b /dev/{name} ] && exit; sleep 0.1; done; dmesg | tail -20; exit 1"
    );
    guest.shell(&script).map(drop)
}

fn write_and_verify(guest: &mut Guest, seed: u32) -> Result<()> {
    iommu::write_and_verify(guest, DISK_NAME, seed)
}

/// Adds a device to a guest with two segments, and returns its address in the guest.
pub(crate) fn add(guest: &Guest, (kind, path): (Kind, &Path), iommu: bool) -> Result<String> {
    let device =
        json!({"path": path, "id": kind.id(), "iommu": iommu, "pci_segment": u16::from(iommu)});
    let added = expect(guest, "vm.add-device", &device, 200)?;
    let added: Value = serde_json::from_str(&added)?;
    let address = added["bdf"].as_str();
    address.context("no address").map(str::to_owned)
}

/// Removes it again.
pub(crate) fn remove(guest: &Guest, kind: Kind) -> Result<()> {
    let body = json!({"id": kind.id()});
    expect(guest, "vm.remove-device", &body, 204)?;
    wait_gone(guest, kind.id())
}

fn debian_6_12_assigned_disk_keeps_data_and_pins_what_is_mapped_behind_the_iommu() -> Result<Outcome>
{
    if paths::guest(KERNEL).is_err() {
        return Ok(Outcome::Skipped(format!("there is no guest {KERNEL}")));
    }
    let Some(path) = device_of_host(Kind::Nvme)? else {
        return Ok(no_device());
    };
    behind_the_iommu(&path)?;
    without_an_iommu(&path)?;
    Ok(Outcome::Passed)
}

fn behind_the_iommu(path: &Path) -> Result<()> {
    let mut guest = boot()?;
    let without = give_back(&mut guest)?;
    // For longer load.
    let load = Duration::from_secs(number("ASSIGNED_SECONDS", 0)?);
    let begun = Instant::now();
    let mut round = 0;
    while round < 2 || begun.elapsed() < load {
        let before = guest.vmm.resident_bytes()?;
        add(&guest, (Kind::Nvme, path), true)?;
        wait_disk(&mut guest)?;
        let added = guest.vmm.resident_bytes()?;
        let mapped = counter(&guest, "host_mapped_bytes")?;
        write_and_verify(&mut guest, 7 + round)?;
        let used = give_back(&mut guest)?;
        // The memory that was reported while the device was assigned still holds the right data, and so does the disk.
        write_and_verify(&mut guest, 9 + round)?;
        println!(
            "     resident MiB: before the device was added {}, then {}, after I/O and reports {}; mapped for DMA {} KiB",
            before / MIB,
            added / MIB,
            used / MIB,
            mapped / 1024
        );
        ensure!(mapped > 0, "its queues are mapped");
        for (resident, of) in [(added, before), (used, without)] {
            ensure!(resident < of + GROWTH_MAX_BYTES, "{resident} bytes");
        }
        remove(&guest, Kind::Nvme)?;
        let left = counter(&guest, "host_mapped_bytes")?;
        ensure!(left == 0, "{left} bytes are still mapped");
        round += 1;
    }
    for name in ["bad_requests", "refused_requests"] {
        let count = counter(&guest, name)?;
        ensure!(count == 0, "{name}: {count}");
    }
    // Absent if nothing was skipped: a guest with a sound driver does not report what it maps.
    let report = guest.vmm.get("vm.reclaim-stats")?;
    println!(
        "     {} requests, {} bytes not discarded because they were mapped",
        counter(&guest, "requests")?,
        report["report"]["skipped_bytes"]["dma_mapped"]
            .as_u64()
            .unwrap_or(0)
    );
    guest.end_cleanly()
}

/// All of RAM is pinned, until the guest has released the device.
fn without_an_iommu(path: &Path) -> Result<()> {
    let mut guest = boot()?;
    let without = give_back(&mut guest)?;
    add(&guest, (Kind::Nvme, path), false)?;
    wait_disk(&mut guest)?;
    write_and_verify(&mut guest, 7)?;
    let added = guest.vmm.resident_bytes()?;
    println!(
        "     resident MiB: without a device {}, with it {}",
        without / MIB,
        added / MIB
    );
    ensure!(added > guest_mib()? * MIB * 97 / 100, "{added} bytes");
    remove(&guest, Kind::Nvme)?;
    // Reporting resumes.
    give_back(&mut guest)?;
    guest.end_cleanly()
}
