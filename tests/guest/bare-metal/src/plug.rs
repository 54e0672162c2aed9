//! A virtio-mem driver that touches blocks before it plugs them, and after it has unplugged them.

use crate::memory::{find_other, map_high, read, stamp, write};
use crate::queue::{DESC_NEXT, DESC_WRITE, Desc};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

const TYPE_RNG: u16 = 4;
const TYPE_MEM: u16 = 24;

// Requests and responses (virtio 1.2 §5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const ACK: u16 = 0;

/// The request, and the response behind it.
const REQUEST: u64 = 48 << 20;
const REQUEST_BYTES: u32 = 24;
const RESPONSE: u64 = REQUEST + 64;
const RESPONSE_BYTES: u32 = 10;
/// The number of bytes requested from the entropy device.
const RANDOM_BYTES: u32 = 64;
/// The value that a processor reads where no memory is.
const NOTHING: u32 = u32::MAX;
const WORD: u32 = 0x5a5a_1234;

/// A field of the configuration space.
fn field(device: &Device, offset: u64) -> u64 {
    let low: u32 = read(device.config + offset);
    let high: u32 = read(device.config + offset + 4);
    u64::from(low) | u64::from(high) << 32
}

/// Sends a request for one block; `None` if there is no response.
fn request(device: &Device, kind: u16, block: u64) -> Option<u16> {
    if !device.negotiate(F_VERSION_1) {
        return None;
    }
    let mut queue = device.setup_queue(0)?;
    device.driver_ok();
    (0..u64::from(REQUEST_BYTES) / 4).for_each(|word| write(REQUEST + 4 * word, 0u32));
    write(REQUEST, kind);
    write(REQUEST + 8, block);
    write(REQUEST + 16, 1u16);
    write(RESPONSE, u16::MAX);
    queue.set_desc(
        0,
        Desc {
            address: REQUEST,
            bytes: REQUEST_BYTES,
            flags: DESC_NEXT,
            next: 1,
        },
    );
    queue.set_desc(
        1,
        Desc {
            address: RESPONSE,
            bytes: RESPONSE_BYTES,
            flags: DESC_WRITE,
            next: 0,
        },
    );
    queue.offer(0);
    device.kick(0);
    queue.wait_used()?;
    Some(read(RESPONSE))
}

/// Lets the entropy device write to `address`; the number of bytes that it wrote.
fn random(device: &Device, address: u64) -> Option<u32> {
    if !device.negotiate(F_VERSION_1) {
        return None;
    }
    let mut queue = device.setup_queue(0)?;
    device.driver_ok();
    queue.set_chain(&[(address, RANDOM_BYTES)], DESC_WRITE);
    queue.offer(0);
    device.kick(0);
    let used = queue.wait_used();
    device.reset();
    used.map(|(_, bytes)| bytes)
}

/// Neither the processor nor a device gets memory at `block`.
fn check_closed(report: &mut Report, name: &str, rng: &Device, block: u64) {
    let at = map_high(block);
    let before: u32 = read(at);
    write(at, WORD);
    let after: u32 = read(at);
    let written = random(rng, block);
    report.check(
        name,
        (before, after, written) == (NOTHING, NOTHING, Some(0)),
        format_args!("{before:#x}, then {after:#x}; a device wrote {written:?} bytes"),
    );
}

pub fn scenario(report: &mut Report) {
    let (Some(mem), Some(rng)) = (Device::find(TYPE_MEM), Device::find(TYPE_RNG)) else {
        return report.fail("plug", format_args!("a device is missing"));
    };
    let (block_bytes, first) = (field(&mem, 0), field(&mem, 16));
    let end = first + field(&mem, 24);
    let second = first + block_bytes;
    check_closed(report, "plug_first_is_closed_at_boot", &rng, first);
    check_closed(report, "plug_last_is_closed_at_boot", &rng, end - block_bytes);

    let response = request(&mem, PLUG, first);
    report.check(
        "plug_is_acknowledged",
        response == Some(ACK),
        format_args!("{response:?}"),
    );
    let at = map_high(first);
    stamp(at, block_bytes, WORD);
    let other = find_other(at, block_bytes, WORD);
    report.check(
        "plug_gives_memory",
        other.is_none(),
        format_args!("{other:x?}"),
    );
    let written = random(&rng, first + block_bytes - u64::from(RANDOM_BYTES));
    report.check(
        "plug_gives_devices_memory",
        written == Some(RANDOM_BYTES),
        format_args!("{written:?}"),
    );
    check_closed(report, "plug_leaves_the_next_closed", &rng, second);
    // A buffer that begins in an open block and ends in a closed one.
    let written = random(&rng, second - u64::from(RANDOM_BYTES) / 2);
    report.check(
        "plug_leaves_the_end_of_a_buffer_closed",
        written == Some(0),
        format_args!("{written:?}"),
    );

    let response = request(&mem, UNPLUG, first);
    report.check(
        "unplug_is_acknowledged",
        response == Some(ACK),
        format_args!("{response:?}"),
    );
    check_closed(report, "unplug_closes", &rng, first);
    let response = request(&mem, PLUG, second);
    let at = map_high(second);
    let other = find_other(at, block_bytes, 0);
    report.check(
        "plug_of_another_gives_new_memory",
        (response, other) == (Some(ACK), None),
        format_args!("{response:?} {other:x?}"),
    );
    // The host measures it.
    stamp(at, block_bytes, WORD);
}
