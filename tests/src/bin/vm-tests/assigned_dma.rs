//! Tests that an assigned device reaches no memory that the guest has not mapped for it. The host needs QEMU's
//! educational device behind an IOMMU: `cargo xtask testbed run --assignable`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::Guest;
use integration_tests::outcome::{Outcome, Test};
use integration_tests::wait::wait_for;
use integration_tests::{paths, tests};

use crate::assigned::{
    GENERIC_KERNEL, GUEST_DEADLINE, Kind, add, boot_with, device_of_host, no_device, remove, stats,
};
use crate::iommu::counter;

pub(crate) fn tests() -> Vec<Test> {
    tests![debian_assigned_device_reaches_no_memory_that_is_not_mapped]
}

const PAGE_BYTES: u64 = 4096;
/// Bits of an entry in `/proc/PID/pagemap`: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 3 << 62;

fn debian_assigned_device_reaches_no_memory_that_is_not_mapped() -> Result<Outcome> {
    if paths::guest(GENERIC_KERNEL).is_err() {
        return Ok(Outcome::Skipped(format!(
            "there is no guest {GENERIC_KERNEL}"
        )));
    }
    let Some(path) = device_of_host(Kind::Edu)? else {
        return Ok(no_device());
    };
    attack(&path)?;
    Ok(Outcome::Passed)
}

/// A page of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Page {
    address: u64,
    /// Its first word.
    word: u64,
}

/// The first page of a region of the guest's program.
fn page(guest: &mut Guest, region: u32) -> Result<Page> {
    let answer = guest.command(&format!("page {region}"))?;
    let numbers = answer.split(' ').filter_map(|word| word.strip_prefix("0x"));
    let numbers = numbers.map(|digits| u64::from_str_radix(digits, 16));
    let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
    match numbers[..] {
        [address, word] => Ok(Page { address, word }),
        _ => anyhow::bail!("{answer}"),
    }
}

/// The address at which the VMM has guest RAM, in its largest mapping.
fn ram_of(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let ranges = text.lines().filter_map(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        Some((number(start)?, number(end)?))
    });
    let largest = ranges.max_by_key(|(start, end)| end - start);
    largest.map(|(start, _)| start).context("no mappings")
}

/// Whether the host has memory for a page of guest RAM.
fn is_resident(pid: u32, ram: u64, page: Page) -> Result<bool> {
    let mut entry = [0; 8];
    let place = (ram + page.address) / PAGE_BYTES * 8;
    File::open(format!("/proc/{pid}/pagemap"))?.read_exact_at(&mut entry, place)?;
    Ok(u64::from_ne_bytes(entry) & PRESENT_OR_SWAPPED != 0)
}

/// The first word of a page, as the host sees it.
fn word_on_host(pid: u32, ram: u64, page: Page) -> Result<u64> {
    let mut word = [0; 8];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut word, ram + page.address)?;
    Ok(u64::from_ne_bytes(word))
}

/// Faults at this address in the log of the host's kernel.
fn faults_at(page: Page) -> Result<usize> {
    let log = Command::new("dmesg").output().context("starting dmesg")?;
    let log = String::from_utf8_lossy(&log.stdout);
    let fault = format!("fault addr {:#x} ", page.address);
    Ok(log.lines().filter(|line| line.contains(&fault)).count())
}

/// Has the device access a page that is not mapped, until the host's kernel has logged that the IOMMU refused it. The
/// kernel logs about three accesses in five seconds.
fn refused(guest: &mut Guest, verb: &str, page: Page) -> Result<()> {
    let before = faults_at(page)?;
    wait_for("a fault of the host's IOMMU", GUEST_DEADLINE, || {
        guest.command(&format!("{verb} {:#x}", page.address))?;
        Ok((faults_at(page)? > before).then_some(()))
    })
}

fn attack(path: &Path) -> Result<()> {
    let mut guest = boot_with(GENERIC_KERNEL, "size=1G")?;
    let address = add(&guest, (Kind::Edu, path), true)?;
    guest.shell_until(&format!("[ -e /sys/bus/pci/devices/{address} ]"))?;
    // The guest reports only large free blocks, and keeps up to an eighth of its memory for reuse.
    let (own, mapped, other) = (0, 1, 2);
    for region in ["2M seed=5", "400M", "2M seed=7"] {
        guest.command(&format!("alloc {region} huge=always"))?;
    }
    guest.command(&format!("dma-open {address}"))?;
    let source = page(&mut guest, own)?;
    let target = page(&mut guest, mapped)?;
    let secret = page(&mut guest, other)?;
    let pid = guest.vmm.pid();
    let ram = ram_of(pid)?;
    ensure!(
        word_on_host(pid, ram, secret)? == secret.word,
        "not at {ram:#x}"
    );

    // The device does what it is told, as far as memory is mapped.
    for region in [own, mapped] {
        guest.command(&format!("dma-map {region}"))?;
    }
    let host_mapped = counter(&guest, "host_mapped_bytes")?;
    guest.command(&format!("dma-read {:#x}", source.address))?;
    guest.command(&format!("dma-write {:#x}", target.address))?;
    let copied = page(&mut guest, mapped)?;
    ensure!(copied.word == source.word, "{copied:x?} is not {source:x?}");

    // Memory in use that was never mapped: neither written nor read.
    refused(&mut guest, "dma-write", secret)?;
    guest.command(&format!("verify {other}"))?;
    refused(&mut guest, "dma-read", secret)?;
    guest.command(&format!("dma-write {:#x}", source.address))?;
    let read = page(&mut guest, own)?;
    ensure!(read.word != secret.word, "the device has read {secret:x?}");

    // Memory that was mapped, and is not any more, before and after it has returned to the host.
    guest.command(&format!("dma-unmap {mapped}"))?;
    refused(&mut guest, "dma-write", target)?;
    ensure!(
        page(&mut guest, mapped)? == copied,
        "the device has written"
    );
    let discarded = stats(&guest, "/report/discarded_bytes")?;
    ensure!(is_resident(pid, ram, target)?, "it is in use");
    guest.command(&format!("free {mapped}"))?;
    wait_for("the page to return to the host", GUEST_DEADLINE, || {
        Ok((!is_resident(pid, ram, target)?).then_some(()))
    })?;
    for verb in ["dma-write", "dma-read"] {
        refused(&mut guest, verb, target)?;
        ensure!(
            !is_resident(pid, ram, target)?,
            "the access made it resident"
        );
    }
    println!(
        "     mapped for DMA {host_mapped} bytes; logged faults: {} to memory in use, {} to memory that was mapped; \
         {} bytes discarded meanwhile",
        faults_at(secret)?,
        faults_at(target)?,
        stats(&guest, "/report/discarded_bytes")? - discarded
    );
    guest.command(&format!("verify {other}"))?;
    guest.command("dma-close")?;
    remove(&guest, Kind::Edu)?;
    for name in ["bad_requests", "host_mapped_bytes"] {
        let count = counter(&guest, name)?;
        ensure!(count == 0, "{name}: {count}");
    }
    guest.end_cleanly()
}
