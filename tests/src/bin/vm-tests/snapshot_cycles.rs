//! Saves and restores a busy guest repeatedly, at random moments and in every way.
//!
//! `SNAPSHOT_CYCLES=200` makes the test longer, and `STRESS_SEED=N` repeats its choices:
//!
//! ```text
//! cargo xtask testbed run --timeout 7200 -- env SNAPSHOT_CYCLES=200 target/debug/vm-tests saved_and_restored
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::random::Random;
use integration_tests::tests;
use integration_tests::wait::wait_for;
use tempfile::TempDir;

use crate::balloon::{figure, resize};
use crate::churn::{self, Churn, PROGRESS_DEADLINE};
use crate::snapshot::{Mode, end_vmm, expect_no_complaint, forget_complaints, restore_in, save};

pub(crate) fn tests() -> Vec<Test> {
    tests![guest_saved_and_restored_at_random_moments_loses_no_byte]
}

/// Enough for each mode to restore what each other has restored.
const CYCLES: u64 = 8;
const RAM_BYTES: u64 = 256 * MIB;
const BALLOON_BYTES_MAX: u64 = 80 * MIB;

/// Free pages of the guest must read as zeros (`init_on_free=1`): it does not clear them again. Pages that show a
/// snapshot's content after they were returned would therefore be found by the threads.
fn guest_saved_and_restored_at_random_moments_loses_no_byte() -> Result<Outcome> {
    let cycles = churn::cycles("SNAPSHOT_CYCLES", CYCLES)?;
    let seed = churn::seed()?;
    let folder = tempfile::tempdir()?;
    let mut guest = Machine {
        cpus: "boot=2",
        memory: "size=256M",
        command_line: "init_on_free=1",
        arguments: &[
            "--disk",
            &churn::disk(folder.path())?,
            "--balloon",
            "size=0,deflate_on_oom=on,free_page_reporting=on,free_page_hinting=on,stats_poll_ms=200",
        ],
        ..Machine::default()
    }
    .serve()?;
    forget_complaints(&mut guest)?;
    let churn = Churn::start(&mut guest, seed)?;
    let mut run = Run {
        serial: guest.vmm.folder().join("serial.sock"),
        guest,
        churn,
        random: Random(seed),
        reported_bytes: 0,
        first: None,
        snapshot: None,
    };
    for cycle in 0..cycles {
        let mode = Mode::ALL[(cycle % 4) as usize];
        let done = run.cycle(mode);
        done.with_context(|| format!("cycle {cycle}, {mode:?}"))?;
    }
    run.settle()?;
    println!(
        "     {cycles} cycles, {} steps, {} MiB verified, {} MiB reported",
        run.churn.steps,
        run.churn.verified_bytes / MIB,
        run.reported_bytes / MIB
    );
    Ok(Outcome::Passed)
}

struct Run {
    guest: Guest,
    churn: Churn,
    random: Random,
    /// Reported by the guest and discarded.
    reported_bytes: u64,
    serial: PathBuf,
    /// The first process: its folder has the socket of the serial port.
    first: Option<Guest>,
    /// The snapshot that the guest's RAM may need.
    snapshot: Option<TempDir>,
}

impl Run {
    /// Saves the guest at a random moment, and continues it.
    fn cycle(&mut self, mode: Mode) -> Result<()> {
        let action = disturb(&self.guest, &mut self.random)?;
        self.churn.go_on(&mut self.guest, &mut self.random)?;
        pause(&self.guest)?;
        self.reported_bytes = figure(&self.guest, "/report/discarded_bytes")?;
        let folder = tempfile::tempdir()?;
        let url = save(&self.guest, &folder.path().join("saved")).context(action)?;
        end_vmm(&mut self.guest)?;
        let restored = restore_in(mode, &url, &self.serial).context(action)?;
        let last = std::mem::replace(&mut self.guest, restored);
        self.first.get_or_insert(last);
        self.snapshot = Some(folder);
        self.guest.vmm.put("vm.resume", None)?;
        self.guest.wait_serving().context(action)?;
        self.churn.verify_disk(&mut self.guest)
    }

    /// Ends everything, with a check of every byte and of the kernel's log.
    fn settle(&mut self) -> Result<()> {
        let Self { guest, churn, .. } = self;
        hinting(guest, "stop")?;
        resize(guest, 0)?;
        wait_for("all memory back in the guest", PROGRESS_DEADLINE, || {
            let info = guest.vmm.get("vm.info")?;
            Ok((info["memory_actual_size"] == RAM_BYTES).then_some(()))
        })?;
        churn.wait(guest, 16)?;
        churn.stop(guest)?;
        expect_no_complaint(guest)?;
        ensure!(figure(guest, "/report/failed_bytes")? == 0);
        guest.end_cleanly()
    }
}

/// Starts something that the pause is to interrupt. Returns its name.
pub(crate) fn disturb(guest: &Guest, random: &mut Random) -> Result<&'static str> {
    Ok(match random.below(4) {
        0 => {
            resize(guest, random.below(BALLOON_BYTES_MAX / 4096 + 1) * 4096)?;
            "inflation"
        }
        1 => {
            hinting(guest, "start")?;
            "hinting"
        }
        2 => {
            hinting(guest, "stop")?;
            "no hinting"
        }
        _ => "nothing",
    })
}

/// Rejected if a run is in progress, or none.
fn hinting(guest: &Guest, action: &str) -> Result<()> {
    let body = format!("{{\"action\":\"{action}\"}}");
    let answer = guest
        .vmm
        .request("PUT", "vm.balloon-hinting", Some(&body))?;
    ensure!(answer.status < 500, "{answer:?}");
    Ok(())
}

/// Pauses the guest. A machine around the host that does not run the vCPUs keeps them from stopping in time.
pub(crate) fn pause(guest: &Guest) -> Result<()> {
    wait_for("the pause", PROGRESS_DEADLINE, || {
        let answer = guest.vmm.request("PUT", "vm.pause", None)?;
        let state = guest.vmm.get("vm.info")?["state"].clone();
        ensure!(
            state == "Paused" || state == "Running",
            "{answer:?}, {state}"
        );
        Ok((state == "Paused").then_some(()))
    })
}
