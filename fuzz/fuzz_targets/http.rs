//! Fuzz target: arbitrary bytes on the API socket: framing, JSON, and validation of a configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::api::fuzz::run;

fuzz_target!(|bytes: &[u8]| {
    let _counts = run(bytes);
});
