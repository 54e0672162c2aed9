//! Fuzz target: arbitrary guest behaviour against any device: chains, rings, configuration, resets, saved states.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::testing::any_guest::run;

fuzz_target!(|bytes: &[u8]| {
    let _answers = run(bytes);
});
