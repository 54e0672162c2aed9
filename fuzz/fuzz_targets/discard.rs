//! Fuzz target: arbitrary claims on guest memory of mixed kinds: small, shared and huge pages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::reclaim::any_claims::run;

fuzz_target!(|bytes: &[u8]| {
    let _seen = run(bytes);
});
