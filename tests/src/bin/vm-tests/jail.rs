//! Tests a Linux guest whose VMM runs as another user in a separate root folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::Machine;
use integration_tests::other_user::{self, NOBODY};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;

use crate::balloon::{RECLAIM_DEADLINE, figure, resize, wait_actual};

pub(crate) fn tests() -> Vec<Test> {
    tests![jailed_guest_of_another_user_reports_inflates_and_powers_off]
}

const RAM_BYTES: u64 = 256 * MIB;

fn jailed_guest_of_another_user_reports_inflates_and_powers_off() -> Result<Outcome> {
    if !other_user::is_possible()? {
        let reason = "changing the user and the root folder needs root";
        return Ok(Outcome::Skipped(reason.into()));
    }
    let start = tempfile::tempdir()?;
    let program = other_user::vmm(start.path())?;
    let folder = other_user::folder()?;
    let disk = folder.path().join("disk.raw");
    other_user::file(&disk, 16 * MIB)?;
    let disk_option = format!("path={},image_type=raw", disk.display());
    let mut guest = Machine {
        vmm: Some(&program),
        memory: "size=256M",
        arguments: &[
            "--user",
            "65534",
            "--group",
            "65534",
            "--jail",
            "--disk",
            &disk_option,
            "--balloon",
            "size=0,free_page_reporting=on",
        ],
        ..Machine::default()
    }
    .serve()?;
    let pid = other_user::pid_of_jailed(&guest.vmm)?;
    let proc = Path::new("/proc").join(pid.to_string());
    ensure!(
        !proc.join("root/etc").exists(),
        "the VMM sees the host's root"
    );
    let status = fs::read_to_string(proc.join("status"))?;
    for (name, wanted) in [
        ("Uid:", NOBODY.to_string()),
        ("CapEff:", format!("{:016x}", 0)),
    ] {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let line = line.with_context(|| status.clone())?;
        let mut words = line.split_whitespace();
        ensure!(words.all(|word| word == wanted), "{name} {line}");
    }

    guest.command("disk-fill /dev/vda 8M 7")?;
    guest.command("alloc 128M seed=1")?;
    let touched = figure(&guest, "/resident_bytes")?;
    guest.command("verify")?;
    guest.command("free")?;
    wait_for("the guest's reports", RECLAIM_DEADLINE, || {
        let resident = figure(&guest, "/resident_bytes")?;
        Ok((resident + 96 * MIB < touched).then_some(()))
    })?;
    ensure!(figure(&guest, "/report/failed_bytes")? == 0);
    resize(&guest, 64 * MIB)?;
    wait_actual(&guest, RAM_BYTES - 64 * MIB)?;
    resize(&guest, 0)?;
    wait_actual(&guest, RAM_BYTES)?;
    guest.command("disk-verify /dev/vda 8M 7")?;
    guest.end_cleanly()?;
    for name in ["api.sock", "api.sock.lock", "serial.sock"] {
        ensure!(
            !guest.vmm.folder().join(name).exists(),
            "{name} was left behind"
        );
    }
    Ok(Outcome::Passed)
}
