//! Fuzz target: vCPUs that move BARs and eject functions, while the host plugs and unplugs them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machine::fuzz::pci::run;

fuzz_target!(|bytes: &[u8]| {
    let _seen = run(bytes);
});
