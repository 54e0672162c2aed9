//! Fuzz target: reads the stream of a migration as its target does.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::migration::fuzz::receive;

fuzz_target!(|bytes: &[u8]| {
    let _taken_over = receive(bytes);
});
