//! Option strings. An accepted option must serialize to JSON that parses to the same value.
#![no_main]

use fuzz::options::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _accepted = run(bytes);
});
