//! Fuzz target: reads the files of a snapshot chain as a restore and a merge do.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _accepted = fuzz::snapshot::run(bytes);
});
