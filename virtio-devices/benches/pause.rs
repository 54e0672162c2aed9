//! Prints the longest pause of each device with the worst rings that it accepts.
//!
//! `cargo bench -p virtio-devices --features test-utils --bench pause`

use virtio_devices::testing::pauses::{self, Pause};
use virtio_devices::testing::pauses_of_requests;

/// By how much a device may delay a pause, in addition to one system call.
const LIMIT_MS: f64 = 50.0;
/// Pauses per ring.
const ROUNDS: u32 = 12;

fn main() {
    // `cargo test --bench` pauses once per ring.
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let rounds = if measuring { ROUNDS } else { 1 };
    let mut longest_ms: f64 = 0.0;
    let mut report = |pause: Pause| {
        let ms = pause.longest.as_secs_f64() * 1e3;
        let mark = if ms > LIMIT_MS {
            "  <-- above 50 ms"
        } else {
            ""
        };
        println!("{ms:8.2} ms  {}, {}{mark}", pause.device, pause.ring);
        longest_ms = longest_ms.max(ms);
    };
    pauses::measure(rounds, &mut report);
    pauses_of_requests::measure(rounds, &mut report);
    println!("{longest_ms:8.2} ms  at most");
}
