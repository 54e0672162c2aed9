//! Any guest against the balloon: every queue, the configuration space, resets
//! and the discard switch, over private and shared memory with guards around it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::balloon::fuzz::run;

fuzz_target!(|bytes: &[u8]| {
    // What must hold is asserted inside; the figures are for the canary.
    let _figures = run(bytes);
});
