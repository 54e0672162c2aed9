//! Tests saving a Linux guest and continuing it in another process, with its RAM restored in each way.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{BOOT_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::json;

use crate::balloon::{RECLAIM_DEADLINE, figure};

pub(crate) fn tests() -> Vec<Test> {
    tests![saved_guest_continues_in_each_mode_with_its_memory_disks_and_clock]
}

/// How RAM is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Copy,
    /// Only the pages that are accessed.
    OnDemand,
    /// All pages, those first that are accessed.
    Background,
    CopyOnWrite,
}

impl Mode {
    pub(crate) const ALL: [Self; 4] = [
        Self::CopyOnWrite,
        Self::Copy,
        Self::OnDemand,
        Self::Background,
    ];

    pub(crate) fn options(self) -> &'static str {
        match self {
            Self::Copy => "memory_restore_mode=copy",
            Self::OnDemand => "memory_restore_mode=ondemand,background_fill=off",
            Self::Background => "memory_restore_mode=ondemand",
            Self::CopyOnWrite => "memory_restore_mode=copyonwrite",
        }
    }
}

/// Saves a paused guest into a new folder, whose URL it returns.
pub(crate) fn save(guest: &Guest, folder: &Path) -> Result<String> {
    fs::create_dir(folder)?;
    let url = format!("file://{}", folder.display());
    let body = json!({"destination_url": url}).to_string();
    guest.vmm.put("vm.snapshot", Some(&body))?;
    Ok(url)
}

/// Ends the VMM of a guest that another one will continue.
pub(crate) fn end_vmm(guest: &mut Guest) -> Result<()> {
    guest.vmm.put("vmm.shutdown", None)?;
    guest.vmm.expect_clean_exit(PROCESS_DEADLINE)
}

/// The guest from a snapshot of `first`, paused.
pub(crate) fn restore(first: &Guest, url: &str) -> Result<Guest> {
    // The socket of the serial port is in the folder of the first process.
    restore_as(
        url,
        Mode::Copy.options(),
        &first.vmm.folder().join("serial.sock"),
    )
}

/// The same with its RAM restored in `mode`. `serial` is the socket of its serial port.
pub(crate) fn restore_in(mode: Mode, url: &str, serial: &Path) -> Result<Guest> {
    restore_as(url, mode.options(), serial)
}

/// The same with further keys of `--restore`.
pub(crate) fn restore_as(url: &str, options: &str, serial: &Path) -> Result<Guest> {
    let vmm = restored(url, options)?;
    let serial = Serial::connect(serial, BOOT_DEADLINE)?;
    Ok(Guest { vmm, serial })
}

/// A VMM with a paused VM from this snapshot.
pub(crate) fn restored(url: &str, options: &str) -> Result<Vmm> {
    let mut vmm = Vmm::start(&["--restore", &format!("source_url={url},{options}")])?;
    let restored = wait_for("the restored VM", BOOT_DEADLINE, || {
        ensure!(!vmm.has_ended()?, "the VMM ended: {}", vmm.stderr());
        let info = vmm.request("GET", "vm.info", None)?;
        Ok(info
            .body
            .is_some_and(|body| body.contains(r#""state":"Paused""#))
            .then_some(()))
    });
    restored.with_context(|| vmm.last_words())?;
    Ok(vmm)
}

/// Errors of a guest's kernel that a pause or a new process can cause: lost memory, a clock that is wrong or jumped, a
/// device that does not answer.
const COMPLAINTS: &str =
    "corruption|bit error|BUG|Oops|Bad page|WARNING|stall|unstable|lockup|I/O error|timeout";

/// Empties the log of the guest's kernel, which complains of an emulated processor when it boots.
pub(crate) fn forget_complaints(guest: &mut Guest) -> Result<()> {
    guest.shell("dmesg -c > /dev/null").map(drop)
}

/// The guest's kernel must have logged no such error since.
pub(crate) fn expect_no_complaint(guest: &mut Guest) -> Result<()> {
    // The guest searches: the port is slow, and the log long.
    let found = guest.shell(&format!("! dmesg | grep -E '{COMPLAINTS}'"));
    found.context("the guest's kernel complains").map(drop)
}

/// The difference between the clocks of guest and host that is permitted: the guest's is read in whole seconds.
const CLOCK_ERROR_MAX: Duration = Duration::from_secs(2);

fn expect_right_clock(guest: &mut Guest) -> Result<()> {
    let host = || -> Result<Duration> { Ok(SystemTime::now().duration_since(UNIX_EPOCH)?) };
    let earliest = host()?.saturating_sub(CLOCK_ERROR_MAX);
    let text = guest.shell("echo seconds=$(date +%s)")?;
    let latest = host()? + CLOCK_ERROR_MAX;
    let seconds = text
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("seconds="));
    let time = Duration::from_secs(seconds.context("a time")?.parse()?);
    ensure!(
        (earliest..=latest).contains(&time),
        "it is {time:?} in the guest, and {earliest:?} to {latest:?} on the host"
    );
    Ok(())
}

/// Memory that the guest touches and returns, memory that it keeps, and disk content.
const RETURNED_BYTES: u64 = 600 * MIB;
const KEPT_BYTES: u64 = 48 * MIB;
const DISK: &str = "/dev/vda 16M 7";
const SECOND_DISK: &str = "/dev/vdb 8M";

/// A snapshot, and the guest's resident memory when it was taken.
struct Saved {
    url: String,
    at: Instant,
    resident_bytes: u64,
}

/// Memory that the guest returned is neither in the file nor resident afterwards; memory that it kept has the same
/// contents. All guests continue from one snapshot, one after the other.
fn saved_guest_continues_in_each_mode_with_its_memory_disks_and_clock() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let image = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(64 * MIB)?;
        Ok(format!("path={},image_type=raw", path.display()))
    };
    let vsock = format!("cid=3,socket={}", folder.path().join("vsock").display());
    let mut first = Machine {
        cpus: "boot=2",
        memory: "size=4G",
        arguments: &[
            "--disk",
            &image("disk.raw")?,
            &image("second.raw")?,
            "--balloon",
            "size=0,free_page_reporting=on",
            "--vsock",
            &vsock,
        ],
        ..Machine::default()
    }
    .serve()?;
    first.command(&format!("disk-fill {DISK}"))?;
    // In huge pages: blocks that are free only in part are not reported.
    first.command(&format!("alloc {KEPT_BYTES} seed=5 huge=always"))?;
    let idle = figure(&first, "/resident_bytes")?;
    first.command(&format!("alloc {RETURNED_BYTES}"))?;
    first.command("free 1")?;
    wait_for("the returned memory", RECLAIM_DEADLINE, || {
        let resident = figure(&first, "/resident_bytes")?;
        Ok((resident < idle + 64 * MIB).then_some(()))
    })?;
    expect_right_clock(&mut first)?;
    forget_complaints(&mut first)?;

    first.vmm.put("vm.pause", None)?;
    let at = Instant::now();
    let resident_bytes = figure(&first, "/resident_bytes")?;
    let snapshot = folder.path().join("saved");
    let url = save(&first, &snapshot)?;
    let took = at.elapsed();
    end_vmm(&mut first)?;
    let written = fs::metadata(snapshot.join("memory-0"))?.blocks() * 512;
    ensure!(
        written <= resident_bytes + resident_bytes / 20,
        "{written} bytes in the file of {resident_bytes}"
    );
    println!(
        "     {} MiB resident, {} MiB in the file, written in {took:?}; a plain copy of it takes {:?}",
        resident_bytes / MIB,
        written / MIB,
        time_to_copy(&snapshot, written)?
    );
    let saved = Saved {
        url,
        at,
        resident_bytes,
    };
    for (seed, mode) in (1..).zip(Mode::ALL) {
        let serial = first.vmm.folder().join("serial.sock");
        let continued = continue_in(mode, &saved, &serial, seed);
        continued.with_context(|| format!("{mode:?}"))?;
    }
    Ok(Outcome::Passed)
}

/// The time to write as many bytes as a snapshot has to another file, and to sync it.
fn time_to_copy(snapshot: &Path, bytes: u64) -> Result<Duration> {
    let block = vec![1; MIB as usize];
    let mut file = File::create(snapshot.with_extension("copy"))?;
    let begin = Instant::now();
    for _ in 0..bytes / MIB {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let took = begin.elapsed();
    fs::remove_file(snapshot.with_extension("copy"))?;
    Ok(took)
}

/// A guest whose memory has just become free reports it within this time; mainline collects for 2 s.
const QUIET: Duration = Duration::from_secs(6);

/// Waits until the guest has nothing left to report: to find it, its kernel touches the descriptions of all pages, which
/// makes them resident in a machine that shares a snapshot.
fn wait_for_last_report(guest: &Guest) -> Result<()> {
    let begin = Instant::now();
    wait_for("the end of reports", RECLAIM_DEADLINE, || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        let age = stats.pointer("/report/last_batch/age_ms");
        let age = age.and_then(serde_json::Value::as_u64);
        let is_quiet = age.is_none_or(|age| u128::from(age) >= QUIET.as_millis());
        Ok((is_quiet && begin.elapsed() >= QUIET).then_some(()))
    })
}

/// Resident memory, measured after this call: samples can be many seconds old.
fn resident_now(guest: &Guest) -> Result<u64> {
    let begin = Instant::now();
    wait_for("a new sample", RECLAIM_DEADLINE, || {
        let stats = guest.vmm.get("vm.reclaim-stats")?;
        let age = stats["resident_age_ms"].as_u64().context("an age")?;
        let is_new = Duration::from_millis(age) < begin.elapsed();
        Ok(is_new.then(|| stats["resident_bytes"].as_u64()).flatten())
    })
}

/// Restores the guest, lets it verify everything and use it, and ends it.
fn continue_in(mode: Mode, saved: &Saved, serial: &Path, seed: u32) -> Result<()> {
    let mut guest = restore_in(mode, &saved.url, serial)?;
    let before = saved.resident_bytes;
    let restored = figure(&guest, "/resident_bytes")?;
    let most = match mode {
        Mode::Copy | Mode::CopyOnWrite => before + before / 20,
        Mode::OnDemand => before / 10,
        // As much as has come so far.
        Mode::Background => before + before / 20,
    };
    ensure!(
        restored <= most,
        "{restored} bytes resident, {before} before"
    );
    wait_for("a pause that a clock would show", RECLAIM_DEADLINE, || {
        Ok((saved.at.elapsed() > 2 * CLOCK_ERROR_MAX).then_some(()))
    })?;
    guest.vmm.put("vm.resume", None)?;
    guest.wait_serving()?;
    let serving = figure(&guest, "/resident_bytes")?;
    expect_right_clock(&mut guest)?;
    guest.command("verify")?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command(&format!("disk-verify {DISK}"))?;
    guest.command(&format!("disk-fill {SECOND_DISK} {seed}"))?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command(&format!("disk-verify {SECOND_DISK} {seed}"))?;
    guest.vmm.get("vm.balloon-stats")?;
    wait_for_last_report(&guest)?;
    let discarded = figure(&guest, "/report/discarded_bytes")?;
    let resident = resident_now(&guest)?;
    guest.command("free")?;
    wait_for("a report after the restore", RECLAIM_DEADLINE, || {
        let now = figure(&guest, "/report/discarded_bytes")?;
        let left = figure(&guest, "/resident_bytes")?;
        let enough = now >= discarded + 32 * MIB && left + 32 * MIB <= resident;
        Ok(enough.then_some(()))
    })
    .with_context(|| {
        let now = guest.vmm.get("vm.reclaim-stats").unwrap_or_default();
        format!("{discarded} bytes were discarded, {resident} resident; now {now}")
    })?;
    ensure!(figure(&guest, "/report/failed_bytes")? == 0);
    // The memory can be used again.
    guest.command(&format!("alloc {KEPT_BYTES} seed={seed}"))?;
    guest.command("verify")?;
    expect_no_complaint(&mut guest)?;
    guest.end_cleanly()?;
    println!(
        "     {mode:?}: {} MiB resident before the first instruction, {} MiB at the first answer",
        restored / MIB,
        serving / MIB
    );
    Ok(())
}
