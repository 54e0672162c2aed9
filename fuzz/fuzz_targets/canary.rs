//! Checks that the fuzzer reaches the relevant code: this target asserts that no guest gets memory discarded both by a
//! report and by inflation in one run. The fuzzer must refute this within a minute.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::balloon::fuzz::run;

fuzz_target!(|bytes: &[u8]| {
    let figures = run(bytes);
    // One report is made by `run` itself, at the end.
    let by_report = figures.report.discarded.ranges > 1;
    let by_inflation = figures.inflate.discarded.ranges > 0;
    assert!(!(by_report && by_inflation), "canary: found, as it must be");
});
