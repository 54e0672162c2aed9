//! What the VMM itself takes of the host's memory.

use std::fs::File;

use anyhow::{Result, ensure};
use integration_tests::linux::Machine;
use integration_tests::mappings::{Mapping, beside_guest_ram};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![vmm_memory_beside_the_guest_is_small]
}

const GUEST_BYTES: u64 = 512 << 20;
/// The promises (docs/promises.md).
const RESIDENT_BYTES_MAX: u64 = 5 << 20;
const ANONYMOUS_BYTES_MAX: u64 = 1_000_000;

fn vmm_memory_beside_the_guest_is_small() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("disk.raw");
    File::create(&path)?.set_len(64 << 20)?;
    let disk = format!("path={},image_type=raw", path.display());
    let guest = Machine {
        arguments: &[
            "--balloon",
            "size=0,free_page_reporting=on",
            "--disk",
            &disk,
            "--net",
            "tap=vmmem0",
        ],
        ..Machine::default()
    }
    .serve()?;
    let maps = beside_guest_ram(guest.vmm.pid(), GUEST_BYTES)?;
    let sum = |field: fn(&Mapping) -> u64| -> u64 { maps.iter().map(field).sum() };
    let (resident, anonymous) = (sum(|map| map.resident), sum(|map| map.anonymous));
    println!("     {resident} bytes resident, {anonymous} of them anonymous");
    ensure!(
        resident <= RESIDENT_BYTES_MAX,
        "{resident} bytes resident: {maps:?}"
    );
    ensure!(
        anonymous <= ANONYMOUS_BYTES_MAX,
        "{anonymous} bytes anonymous: {maps:?}"
    );
    Ok(Outcome::Passed)
}
