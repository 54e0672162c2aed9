//! A driver that pings the watchdog once and then never again.

use crate::memory::{read, write};
use crate::queue::DESC_WRITE;
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

/// Device id, as Cloud Hypervisor gives it.
const TYPE_WATCHDOG: u16 = 35;
/// Buffer for the response to the ping.
const ANSWER: u64 = 48 << 20;

pub fn scenario(report: &mut Report) {
    let Some(device) = Device::find(TYPE_WATCHDOG) else {
        return report.fail("watchdog", format_args!("there is none"));
    };
    report.check(
        "watchdog_negotiates",
        device.negotiate(F_VERSION_1),
        format_args!("status {:#x}", device.status()),
    );
    let Some(mut queue) = device.setup_queue(0) else {
        return report.fail("watchdog", format_args!("has no queue"));
    };
    device.driver_ok();
    write(ANSWER, 0u8);
    queue.set_chain(&[(ANSWER, 1)], DESC_WRITE);
    queue.offer(0);
    device.kick(0);
    let used = queue.wait_used();
    let answer: u8 = read(ANSWER);
    report.check(
        "watchdog_answers_a_ping_with_1",
        used == Some((0, 1)) && answer == 1,
        format_args!("used {used:?}, answer {answer}"),
    );
}
