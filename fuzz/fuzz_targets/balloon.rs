//! Fuzz target: arbitrary guest behaviour against the balloon: every queue, the configuration space, resets and the
//! discard switch. Memory is private or shared, between guard regions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::balloon::fuzz::run;

fuzz_target!(|bytes: &[u8]| {
    // `run` asserts the invariants; the figures are for the canary.
    let _figures = run(bytes);
});
