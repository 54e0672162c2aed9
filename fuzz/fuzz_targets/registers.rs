//! Fuzz target: arbitrary accesses to a device's registers, with pauses and resets in between, while its workers run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::testing::any_registers::run;

fuzz_target!(|bytes: &[u8]| {
    let _gave_up = run(bytes);
});
