//! Files of a chain of snapshots, as a restore and a merge read them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _accepted = fuzz::snapshot::run(bytes);
});
