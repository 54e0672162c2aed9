//! Tests clients that change a machine at random, while its Linux guest verifies memory and a disk.
//!
//! `CHAOS_SECONDS=1800` makes the test longer, and `CHAOS_SEED=N` repeats the choices of the clients.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::chaos::{
    Belongings, KEPT_DISK, Limits, Progress, host_has_taps, length_and_seed, run_clients, settle,
};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;

pub(crate) fn tests() -> Vec<Test> {
    tests![linux_loses_nothing_while_clients_change_its_machine]
}

const LENGTH: Duration = Duration::from_secs(20);
/// Time for the guest to make some steps under full load.
const STEPS_DEADLINE: Duration = Duration::from_secs(300);
/// Steps of the guest's threads that are one round of the clients' progress, and rounds at least.
const STEPS_PER_ROUND: u64 = 8;
const ROUNDS_MIN: u64 = 6;
/// Rounds in which each change must have been accepted once.
const ROUNDS_MAX: u64 = 100;
/// Linux uses an added vCPU only on request. A vCPU may be removed in the meantime.
const ONLINE: &str = "for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 > $cpu; done 2> /dev/null; true";
/// Words of Linux about lost memory.
const COMPLAINTS: [&str; 5] = ["corruption", "bit error", "BUG", "Oops", "Bad page"];
const DISK: &str = "/dev/vda 8M 7";

fn linux_loses_nothing_while_clients_change_its_machine() -> Result<Outcome> {
    let (length, seed) = length_and_seed(LENGTH)?;
    let limits = Limits {
        vcpus: (1, 2),
        ram_mib: (256, 384),
        balloon_bytes: 64 * MIB,
        has_taps: host_has_taps(),
    };
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(16 * MIB)?;
    let disk = format!("path={},image_type=raw,id={KEPT_DISK}", path.display());
    let mut guest = Machine {
        cpus: "boot=1,max=2",
        memory: "size=256M,hotplug_method=virtio-mem,hotplug_size=128M",
        // The log is read at the end.
        command_line: "log_buf_len=4M",
        arguments: &[
            "--disk",
            &disk,
            "--balloon",
            "size=0,deflate_on_oom=on,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    guest.command(&format!("disk-fill {DISK}"))?;
    guest.command(&format!("churn-start {} seed={seed} threads=2", 48 * MIB))?;
    let progress = Progress::default();
    let before = Belongings::of(&guest.vmm)?;
    let started = Instant::now();
    let place = (guest.vmm.socket(), guest.vmm.folder().to_owned());
    let mut rounds = 0;
    let done = run_clients(place, &limits, seed, &progress, || {
        wait_steps(&mut guest, (rounds + 1) * STEPS_PER_ROUND)?;
        guest.shell(ONLINE)?;
        guest.command(&format!("disk-verify {DISK}"))?;
        rounds += 1;
        progress.set(rounds);
        let is_long = rounds >= ROUNDS_MIN && started.elapsed() >= length;
        Ok(is_long && (progress.has_all(&limits) || rounds >= ROUNDS_MAX))
    });
    let done = done.with_context(|| format!("CHAOS_SEED={seed}"))?;
    println!("     {rounds} rounds, {done}");
    done.expect_all(&limits)?;
    settle(&guest.vmm, &limits)?;
    guest.command(&format!("disk-verify {DISK}"))?;
    guest.command("churn-stop")?;
    // The guest searches: the port is slow, and the log long.
    let search = format!("dmesg | grep -E '{}' || true", COMPLAINTS.join("|"));
    let found = guest.shell(&search)?;
    let is_complaint = |line: &&str| COMPLAINTS.iter().any(|it| line.contains(it));
    let complaint = found.lines().find(is_complaint);
    ensure!(
        complaint.is_none(),
        "the guest's kernel logged {complaint:?}"
    );
    before.expect_no_more(&guest.vmm)?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}

/// Waits until the guest's threads have made this many steps, without a wrong byte.
fn wait_steps(guest: &mut Guest, wanted: u64) -> Result<()> {
    wait_for("steps of the guest", STEPS_DEADLINE, || {
        let status = guest.command("churn-status")?;
        let steps = status
            .split(' ')
            .find_map(|word| word.strip_prefix("steps="));
        let steps: u64 = steps.with_context(|| status.clone())?.parse()?;
        Ok((steps >= wanted).then_some(()))
    })
}
