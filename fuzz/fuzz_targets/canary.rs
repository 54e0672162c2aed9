//! Fuzz target: checks that another target reaches the relevant code, and can fail. It contains a false assertion about
//! that code, which the fuzzer must refute. The environment variable `CANARY` names the other target.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use machine::fuzz::{legacy, pci};
use virtio_devices::block::any_image;
use virtio_devices::reclaim::any_claims;
use virtio_devices::testing::{any_guest, any_registers};
use virtio_devices::vhost_user::any_back_end;

/// Inputs that are not longer prove nothing.
const BYTES_MIN: usize = 8;

fn refutes(target: &str, bytes: &[u8]) -> bool {
    match target {
        // No back end is stopped and started again.
        "back_end" => any_back_end::run(bytes) > 1,
        // No guest gets memory discarded by a report and by inflation.
        "balloon" => {
            let figures = virtio_devices::balloon::fuzz::run(bytes);
            // One report is made by `run` itself, at the end.
            let by_report = figures.report.discarded.ranges > 1;
            by_report && figures.inflate.discarded.ranges > 0
        }
        // No kernel with changed headers can be loaded.
        "boot" => fuzz::boot::run(bytes) && bytes.len() > BYTES_MIN,
        // No device completes several chains.
        "devices" => any_guest::run(bytes) > 3,
        // The kernel never refuses to discard memory next to memory that it discards.
        "discard" => {
            let seen = any_claims::run(bytes);
            seen.discarded > 0 && seen.failed > 0
        }
        // No longer text is valid, and no plan has actions.
        "fleet" => bytes.len() > BYTES_MIN && fleet::fuzz::run(bytes),
        // No bytes are a request.
        "http" => vmm::api::fuzz::run(bytes).0 > 0,
        // No damaged image is accepted, and then fails.
        "image" => {
            let seen = any_image::run(bytes);
            seen.opened && seen.damaged && seen.done > 1 && seen.failed > 0
        }
        // No guest is interrupted and ejects a vCPU.
        "legacy" => {
            let seen = legacy::run(bytes);
            seen.interrupts > 0 && seen.ejected > 0
        }
        // No stream is a whole migration.
        "migration" => vmm::migration::fuzz::receive(bytes),
        // No option is valid.
        "options" => bytes.len() > BYTES_MIN && fuzz::options::run(bytes),
        // No guest ejects a function, and BARs never overlap.
        "pci" => {
            let seen = pci::run(bytes);
            seen.ejected > 0 && seen.unmapped_bars > 0
        }
        // No register access makes a device need a reset.
        "registers" => any_registers::run(bytes),
        // No changed state is accepted.
        "saved_state" => bytes.len() > BYTES_MIN && any_registers::run_state(bytes),
        // No longer input is a good chain.
        "snapshot" => bytes.len() > BYTES_MIN && fuzz::snapshot::run(bytes),
        other => panic!("{other:?} is not a target"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<String> = OnceLock::new();
    let target = TARGET.get_or_init(|| std::env::var("CANARY").unwrap_or_default());
    assert!(!refutes(target, bytes), "canary: found, as it must be");
});
