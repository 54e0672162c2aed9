//! Fuzz target: an arbitrary vhost-user back end against the front end: wrong responses, noise, the end of the
//! connection.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::vhost_user::any_back_end::run;

fuzz_target!(|bytes: &[u8]| {
    let _stopped = run(bytes);
});
