//! Fuzz target: feeds input of a hostile VMM, guest, store or client to the fleet manager.
#![no_main]

use fleet::fuzz::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _understood = run(bytes);
});
