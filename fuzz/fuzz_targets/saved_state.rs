//! Fuzz target: restores devices from saved states whose text was changed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::testing::any_registers::run_state;

fuzz_target!(|bytes: &[u8]| {
    let _accepted = run_state(bytes);
});
