//! Fuzz target: loads arbitrary kernel and initramfs files.
#![no_main]

use fuzz::boot::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _loaded = run(bytes);
});
