//! Fuzz target: arbitrary operations on arbitrary disk images, damaged or not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::block::any_image::run;

fuzz_target!(|bytes: &[u8]| {
    let _seen = run(bytes);
});
