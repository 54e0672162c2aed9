//! Tests with guests of a distribution: Debian's own kernels with every device, and a Debian system on a disk. The
//! testbed provides them with `--distributions`.

use std::fs::{self, File};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{COMMAND_DEADLINE, Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::paths;
use integration_tests::serial::Serial;
use integration_tests::tests;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;

use crate::balloon::{RECLAIM_DEADLINE, figure, resize, wait_actual};
use crate::network;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        debian_6_1_kernel_drives_every_device_and_gives_memory_back,
        debian_6_12_kernel_drives_every_device_and_gives_memory_back,
        debian_newest_kernel_drives_every_device_and_gives_memory_back,
        debian_system_on_a_disk_boots_to_a_login_and_gives_memory_back,
    ]
}

/// Memory that a guest touches and frees.
const TOUCHED_BYTES: u64 = 200 * MIB;
/// Time for a kernel with many drivers to start, and for systemd to start its services, under emulation on a busy
/// machine.
pub(crate) const DISTRIBUTION_DEADLINE: Duration = Duration::from_secs(240);

fn debian_6_1_kernel_drives_every_device_and_gives_memory_back() -> Result<Outcome> {
    drives_every_device("6.1", "vmtest5", 251)
}

fn debian_6_12_kernel_drives_every_device_and_gives_memory_back() -> Result<Outcome> {
    drives_every_device("6.12", "vmtest6", 252)
}

fn debian_newest_kernel_drives_every_device_and_gives_memory_back() -> Result<Outcome> {
    drives_every_device("newest", "vmtest7", 253)
}

/// Boots a bzImage whose drivers are modules. `tap` and `network` are used by this test only.
fn drives_every_device(series: &str, tap: &str, network: u8) -> Result<Outcome> {
    let kernel = format!("debian-{series}/vmlinuz");
    if paths::guest(&kernel).is_err() {
        return Ok(Outcome::Skipped(format!(
            "this machine's Debian offers no kernel of this series ({series}) for cloud guests"
        )));
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.raw");
    File::create(&image)?.set_len(64 * MIB)?;
    let disk = format!("path={},image_type=raw", image.display());
    let prefix = format!("192.168.{network}");
    let mac = network::MAC;
    let net = format!("tap={tap},ip={prefix}.1,mask=255.255.255.0,mac={mac}");
    let vmm = Machine {
        kernel: &kernel,
        console: "socket=@/console.sock",
        arguments: &[
            "--disk",
            &disk,
            "--net",
            &net,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .start()?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    guest.expect("guest: init", DISTRIBUTION_DEADLINE)?;
    guest.wait_serving()?;
    let release = guest.shell("uname -r")?;
    ensure!(
        release.contains("-cloud-amd64") && (series == "newest" || release.contains(series)),
        "{release}"
    );
    // The checks run one after another with the same guest, because a boot costs more than all of them.
    disk_keeps_data(&mut guest).context("disk")?;
    network::exchange(&mut guest, &prefix).context("net")?;
    console_carries_lines(&mut guest).context("console")?;
    balloon_inflates_and_deflates(&guest).context("balloon")?;
    let (touched, resident) = reporting_gives_back(&mut guest).context("reporting")?;
    guest.end_cleanly()?;
    println!(
        "     {}: {} → {} MiB resident",
        release
            .lines()
            .find(|line| line.contains("-cloud-"))
            .unwrap_or_default(),
        touched / MIB,
        resident / MIB
    );
    Ok(Outcome::Passed)
}

fn disk_keeps_data(guest: &mut Guest) -> Result<()> {
    guest.command("disk-fill /dev/vda 8M 7")?;
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command("disk-verify /dev/vda 8M 7").map(drop)
}

/// Sends a line in each direction.
fn console_carries_lines(guest: &mut Guest) -> Result<()> {
    let path = guest.vmm.folder().join("console.sock");
    let mut console = Serial::connect(&path, PROCESS_DEADLINE)?;
    guest
        .serial
        .send("sh read line < /dev/hvc0; echo the guest had $line > /dev/hvc0")?;
    console.send("a line of the host")?;
    console.expect("the guest had a line of the host", COMMAND_DEADLINE)?;
    guest.expect("ok sh 0", COMMAND_DEADLINE).map(drop)
}

pub(crate) fn balloon_inflates_and_deflates(guest: &Guest) -> Result<()> {
    resize(guest, 64 * MIB)?;
    wait_actual(guest, 448 * MIB)?;
    let ballooned = figure(guest, "/ballooned_bytes")?;
    ensure!(ballooned == 64 * MIB, "{} MiB ballooned", ballooned / MIB);
    resize(guest, 0)?;
    wait_actual(guest, 512 * MIB)
}

/// Resident bytes with the memory touched, and after it returned to the host.
pub(crate) fn reporting_gives_back(guest: &mut Guest) -> Result<(u64, u64)> {
    let touched = touch(guest)?;
    guest.command("free")?;
    let resident = wait_for("the guest's memory on the host", RECLAIM_DEADLINE, || {
        let resident = figure(guest, "/resident_bytes")?;
        Ok((resident + TOUCHED_BYTES * 3 / 4 < touched).then_some(resident))
    });
    let resident =
        told(guest, resident).with_context(|| format!("{} MiB were resident", touched / MIB))?;
    no_discard_failed(guest)?;
    Ok((touched, resident))
}

/// Memory is reported while a load in the guest takes free pages of ever new blocks. How much is up to the load: it takes
/// pages before their report, and leaves free memory in blocks that are too small for one.
pub(crate) fn reporting_goes_on_under_load(guest: &mut Guest) -> Result<()> {
    touch(guest)?;
    let before = figure(guest, "/report/discarded_bytes")?;
    guest.command("free")?;
    let reported = wait_for("reports from a guest under load", RECLAIM_DEADLINE, || {
        let reported = figure(guest, "/report/discarded_bytes")? - before;
        Ok((reported >= TOUCHED_BYTES / 4).then_some(()))
    });
    told(guest, reported)?;
    no_discard_failed(guest)
}

/// Returns the resident bytes with the memory touched.
fn touch(guest: &mut Guest) -> Result<u64> {
    guest.command(&format!("alloc {TOUCHED_BYTES} seed=3"))?;
    guest.command("verify")?;
    let touched = figure(guest, "/resident_bytes")?;
    ensure!(touched > TOUCHED_BYTES, "{} MiB resident", touched / MIB);
    Ok(touched)
}

/// Adds what host and guest know of the memory to an error.
fn told<T>(guest: &mut Guest, result: Result<T>) -> Result<T> {
    let Err(error) = result else { return result };
    let stats = guest.vmm.get("vm.reclaim-stats")?;
    let free = guest.shell("cat /proc/buddyinfo; head -5 /proc/meminfo; cat /proc/loadavg")?;
    Err(error.context(format!("{stats}; {free}")))
}

fn no_discard_failed(guest: &Guest) -> Result<()> {
    let failed = figure(guest, "/report/failed_bytes")?;
    ensure!(failed == 0, "{failed} bytes failed");
    Ok(())
}

/// The release's kernel and a disk with the release on it: systemd, a login, a clean end.
fn debian_system_on_a_disk_boots_to_a_login_and_gives_memory_back() -> Result<Outcome> {
    let Some(kernel) = ["debian-6.1/vmlinuz", "debian-6.12/vmlinuz"]
        .into_iter()
        .find(|kernel| paths::guest(kernel).is_ok())
    else {
        return Ok(Outcome::Skipped("no kernel of Debian's".into()));
    };
    // The system writes to its disk.
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.raw");
    fs::copy(paths::guest("debian-disk.ext4")?, &image).context("copying the disk")?;
    let disk = format!("path={},image_type=raw", image.display());
    let machine = Machine {
        kernel,
        arguments: &[
            "--disk",
            &disk,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        command_line: "guest.root=/dev/vda",
        ..Machine::default()
    };
    let mut guest = Guest::on_socket(machine.start()?, "serial.sock")?;
    let log_in = |guest: &mut Guest| -> Result<()> {
        guest
            .serial
            .expect_text("debian-guest login: ", DISTRIBUTION_DEADLINE)?;
        guest.serial.send("root")?;
        guest
            .serial
            .expect_text("root@debian-guest:~# ", DISTRIBUTION_DEADLINE)
    };
    log_in(&mut guest).with_context(|| guest.vmm.last_words())?;
    guest
        .serial
        .send("systemctl --failed --no-legend --no-pager; systemctl is-system-running --wait; echo state $?")?;
    guest.expect("state 0", DISTRIBUTION_DEADLINE)?;
    guest
        .serial
        .send("/run/guest-mem serve; systemctl poweroff")?;
    guest.wait_serving()?;
    let (touched, resident) = reporting_gives_back(&mut guest)?;
    guest.end()?;
    let ended = guest.vmm.expect_clean_exit(DISTRIBUTION_DEADLINE);
    ended.with_context(|| guest.serial.last_words())?;
    println!(
        "     Debian with systemd: {} → {} MiB resident",
        touched / MIB,
        resident / MIB
    );
    Ok(Outcome::Passed)
}
