//! Fuzz target: parses option strings.
#![no_main]

use fuzz::options::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _accepted = run(bytes);
});
