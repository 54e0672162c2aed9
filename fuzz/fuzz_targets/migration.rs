//! Streams of a migration, as the target reads them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::migration::fuzz::receive;

fuzz_target!(|bytes: &[u8]| {
    let _taken_over = receive(bytes);
});
