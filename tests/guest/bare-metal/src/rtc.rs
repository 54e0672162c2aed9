//! A driver that reads the host's clock from virtio-rtc.

use crate::memory::{read, write};
use crate::queue::{DESC_NEXT, DESC_WRITE, Desc};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

const TYPE_RTC: u16 = 17;
const REQUEST: u64 = 48 << 20;
const RESPONSE: u64 = REQUEST + 4096;
/// Bytes of a request with a clock, and of each response.
const BYTES: u32 = 16;
/// `VIRTIO_RTC_REQ_READ`.
const READ: u64 = 0x0001;
/// `VIRTIO_RTC_REQ_CFG`.
const CFG: u64 = 0x1000;

pub fn scenario(report: &mut Report) {
    let Some(device) = Device::find(TYPE_RTC) else {
        return report.fail("rtc", format_args!("there is none"));
    };
    report.check(
        "rtc_negotiates",
        device.negotiate(F_VERSION_1),
        format_args!("status {:#x}", device.status()),
    );
    let Some(mut queue) = device.setup_queue(0) else {
        return report.fail("rtc", format_args!("has no queue"));
    };
    device.driver_ok();
    // The status and the content of the response to a request for clock 0.
    let mut ask = |kind: u64| {
        write(REQUEST, kind);
        write(REQUEST + 8, 0u64);
        write(RESPONSE, u64::MAX);
        write(RESPONSE + 8, 0u64);
        for (index, address, flags) in [(0, REQUEST, DESC_NEXT), (1, RESPONSE, DESC_WRITE)] {
            let desc = Desc {
                address,
                bytes: BYTES,
                flags,
                next: 1,
            };
            queue.set_desc(index, desc);
        }
        queue.offer(0);
        device.kick(0);
        let used = queue.wait_used();
        (used == Some((0, BYTES))).then(|| (read::<u64>(RESPONSE), read::<u64>(RESPONSE + 8)))
    };
    let clocks = ask(CFG);
    report.check(
        "rtc_has_one_clock",
        clocks == Some((0, 1)),
        format_args!("answer {clocks:?}"),
    );
    let (first, second) = (ask(READ), ask(READ));
    report.check(
        "rtc_reads",
        matches!((first, second), (Some((0, a)), Some((0, b))) if a <= b),
        format_args!("answers {first:?} and {second:?}"),
    );
    let nanoseconds = second.map_or(0, |(_, content)| content);
    crate::console::line(format_args!("CLOCK {nanoseconds}"));
}
