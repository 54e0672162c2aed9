//! Tests the documented guarantees about the VMM itself (docs/promises.md).

use anyhow::{Result, ensure};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::overhead::Overhead;
use integration_tests::tests;

pub(crate) fn tests() -> Vec<Test> {
    tests![vmm_memory_beside_the_guest_is_small]
}

const RESIDENT_BYTES_MAX: u64 = 5 << 20;
const ANONYMOUS_BYTES_MAX: u64 = 1_000_000;

fn vmm_memory_beside_the_guest_is_small() -> Result<Outcome> {
    let Overhead {
        resident,
        anonymous,
        maps,
    } = Overhead::measure(None)?;
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
