//! A guest that violates the protocol on every balloon queue. After each violation the device must either still work,
//! or set DEVICE_NEEDS_RESET and work again after a reset. Memory that was not given up must be unchanged.

use crate::balloon::{Balloon, DATA, DEFLATE, DEVICE_BALLOON, INFLATE, REPORTING, STATS};
use crate::memory::{fill, find_other, stamp, write};
use crate::queue::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Desc, Queue};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1, STATUS_NEEDS_RESET};

const BLOCK: u64 = 2 << 20;
const PATTERN: u32 = 0xa5a5_a5a5;
/// Memory that is never named in a valid request: the canary.
const CANARY: u64 = 96 << 20;
const CANARY_BYTES: u64 = 8 << 20;
/// A list of page frame numbers.
const LIST: u64 = 49 << 20;
/// Nothing is mapped there.
const NOWHERE: u64 = 1 << 46;

type Lie = fn(&mut Balloon);

const LIES: &[(&str, Lie)] = &[
    ("report_outside_ram", |b| {
        offer(b, &[(NOWHERE, 4 << 20)], DESC_WRITE)
    }),
    ("report_in_pci_hole", |b| {
        offer(b, &[(0xe800_0000, 1 << 20)], DESC_WRITE)
    }),
    ("report_wrapping", |b| {
        offer(b, &[(u64::MAX - 0xfff, 0xffff_ffff)], DESC_WRITE)
    }),
    ("report_unaligned_below_a_page", |b| {
        offer(b, &[(CANARY + 1, 4094)], DESC_WRITE)
    }),
    ("report_zero_length", |b| {
        offer(b, &[(CANARY, 0)], DESC_WRITE)
    }),
    ("report_readable", |b| {
        offer(b, &[(CANARY, BLOCK as u32)], 0)
    }),
    ("report_overlapping", |b| {
        let block = BLOCK as u32;
        let ranges = [(DATA + BLOCK / 2, block), (DATA, block), (DATA, 4 * block)];
        offer(b, &ranges, DESC_WRITE);
    }),
    ("report_loop", |b| {
        endless(b, REPORTING, NOWHERE, DESC_WRITE)
    }),
    ("report_next_out_of_range", |b| {
        let desc = Desc {
            address: NOWHERE,
            bytes: 4096,
            flags: DESC_WRITE | DESC_NEXT,
            next: 0xffff,
        };
        b.reporting.set_desc(0, desc);
        b.reporting.offer(0);
        b.device.kick(REPORTING);
    }),
    ("report_head_out_of_range", |b| {
        b.reporting.offer(0xfff0);
        b.device.kick(REPORTING);
    }),
    ("report_indirect_not_negotiated", |b| {
        b.reporting.set_desc(
            0,
            Desc {
                address: CANARY,
                bytes: 16,
                flags: DESC_INDIRECT,
                next: 0,
            },
        );
        b.reporting.offer(0);
        b.device.kick(REPORTING);
    }),
    ("report_index_jumps", |b| {
        b.reporting.publish(0x8000);
        b.device.kick(REPORTING);
    }),
    ("inflate_frames_outside_ram", |b| {
        // The device may refuse to respond; the machine is checked afterwards.
        let _ = b.move_frames(INFLATE, &[0xffff_ffff, 0xffff_fffe, 0x00ff_ffff]);
    }),
    ("inflate_device_writable", |b| {
        offer_on(b, INFLATE, &[(CANARY, 1024)], DESC_WRITE)
    }),
    ("inflate_gigantic_list", |b| {
        offer_on(b, INFLATE, &[(NOWHERE, 0xffff_fff0)], 0)
    }),
    ("inflate_odd_length", |b| {
        offer_on(b, INFLATE, &[(NOWHERE, 7)], 0)
    }),
    ("deflate_gigantic_list", |b| {
        offer_on(b, DEFLATE, &[(CANARY, 0xffff_ffff)], 0)
    }),
    ("inflate_one_page_many_times", |b| {
        // With or without a response, the pages around it are checked afterwards.
        let _ = b.move_frames(INFLATE, &[(DATA >> 12) as u32; 512]);
    }),
    ("inflate_list_outside_ram", |b| {
        offer_on(b, INFLATE, &[(NOWHERE, 1024)], 0)
    }),
    ("inflate_loop", |b| endless(b, INFLATE, NOWHERE, 0)),
    ("deflate_device_writable", |b| {
        offer_on(b, DEFLATE, &[(CANARY, 1024)], DESC_WRITE)
    }),
    ("deflate_loop", |b| endless(b, DEFLATE, CANARY, 0)),
    // Entries have ten bytes: more than four hundred million of them.
    ("statistics_gigantic", |b| {
        offer_on(b, STATS, &[(CANARY, u32::MAX)], 0)
    }),
    ("statistics_gigantic_many_times", |b| {
        let all = [(0, u32::MAX), (CANARY, u32::MAX), (NOWHERE, u32::MAX)];
        offer_on(b, STATS, &all, 0);
    }),
    ("statistics_device_writable", |b| {
        offer_on(b, STATS, &[(CANARY, 160)], DESC_WRITE)
    }),
    ("statistics_outside_ram", |b| {
        offer_on(b, STATS, &[(u64::MAX - 79, 160)], 0)
    }),
    ("statistics_ragged", |b| {
        offer_on(b, STATS, &[(CANARY, 13)], 0)
    }),
    ("statistics_loop", |b| endless(b, STATS, CANARY, 0)),
    ("statistics_buffer_after_buffer", |b| {
        for _ in 0..b.stats.size {
            offer_on(b, STATS, &[(CANARY, 10)], 0);
        }
    }),
    ("kick_of_no_queue", |b| {
        b.device.kick(STATS);
        b.device.kick(0xffff);
    }),
    ("actual_lies", |b| write(b.device.config + 4, u32::MAX)),
    ("kick_every_queue", |b| {
        (0..16).for_each(|queue| b.device.kick(queue))
    }),
];

pub fn scenario(report: &mut Report) {
    stamp(CANARY, CANARY_BYTES, PATTERN);
    for (name, lie) in LIES {
        tell(name, *lie, report);
    }
    bad_rings(report);
    reset_while_busy(report);
    for device in Device::all() {
        garbage_rings(&device, report);
    }
    works(report, "balloon_works_after_all");
}

/// One violation on a fresh device, then a check that the device still works.
fn tell(name: &str, lie: Lie, report: &mut Report) {
    let Some(mut balloon) = Balloon::start() else {
        report.fail(name, format_args!("the balloon does not start"));
        return;
    };
    balloon.device.driver_ok();
    lie(&mut balloon);
    let wrong = find_other(CANARY, CANARY_BYTES, PATTERN);
    if wrong.is_some() {
        report.fail(
            name,
            format_args!("memory not given up changed: {wrong:x?}"),
        );
        return;
    }
    works(report, name);
}

/// Resets the balloon and has it discard a block.
fn works(report: &mut Report, name: &str) {
    let Some(mut balloon) = Balloon::start() else {
        report.fail(name, format_args!("the balloon does not restart"));
        return;
    };
    balloon.device.driver_ok();
    stamp(DATA, BLOCK, PATTERN);
    let answer = balloon.report(&[(DATA, BLOCK as u32)]);
    let wrong = find_other(DATA, BLOCK, 0);
    report.check(
        name,
        answer.is_some() && wrong.is_none(),
        format_args!("afterwards: answer {answer:?}, {wrong:x?}"),
    );
}

fn offer(balloon: &mut Balloon, ranges: &[(u64, u32)], flags: u16) {
    // The device may or may not respond to a violation.
    balloon.reporting.set_chain(ranges, flags);
    balloon.reporting.offer(0);
    balloon.device.kick(REPORTING);
}

fn offer_on(balloon: &mut Balloon, index: u16, buffers: &[(u64, u32)], flags: u16) {
    let queue = queue(balloon, index);
    queue.set_chain(buffers, flags);
    queue.offer(0);
    balloon.device.kick(index);
}

/// A chain whose only descriptor comes after itself.
fn endless(balloon: &mut Balloon, index: u16, address: u64, flags: u16) {
    let desc = Desc {
        address,
        bytes: 4096,
        flags: flags | DESC_NEXT,
        next: 0,
    };
    queue(balloon, index).set_desc(0, desc);
    queue(balloon, index).offer(0);
    balloon.device.kick(index);
}

fn queue(balloon: &mut Balloon, index: u16) -> &mut Queue {
    match index {
        INFLATE => &mut balloon.inflate,
        DEFLATE => &mut balloon.deflate,
        STATS => &mut balloon.stats,
        _ => &mut balloon.reporting,
    }
}

/// Rings outside of RAM, misaligned, of invalid size.
fn bad_rings(report: &mut Report) {
    let rings: [(u16, u64, u64, u64); 6] = [
        (128, 1 << 46, 1 << 46, 1 << 46),
        (128, u64::MAX, u64::MAX, u64::MAX),
        (128, 0xe800_0000, 0xe800_0000, 0xe800_0000),
        (128, (32 << 20) + 1, (33 << 20) + 1, (34 << 20) + 1),
        (0, 32 << 20, 33 << 20, 34 << 20),
        (0x7fff, 32 << 20, 33 << 20, 34 << 20),
    ];
    for (size, descriptors, available, used) in rings {
        let Some(device) = Device::find(DEVICE_BALLOON) else {
            report.fail("bad_rings", format_args!("no balloon"));
            return;
        };
        device.negotiate(F_VERSION_1);
        device.select_queue(0);
        device.set_rings(size, descriptors, available, used);
        device.enable_queue();
        device.driver_ok();
        device.kick(0);
    }
    works(report, "bad_rings");
}

/// A reset in the middle of work on every queue completes, and the device works again.
fn reset_while_busy(report: &mut Report) {
    let Some(mut balloon) = Balloon::start() else {
        report.fail("reset_while_busy", format_args!("no balloon"));
        return;
    };
    balloon.device.driver_ok();
    fill(LIST, 4096, (DATA >> 12) as u32);
    for _ in 0..64 {
        offer(&mut balloon, &[(DATA, 16 << 20)], DESC_WRITE);
        for index in [INFLATE, DEFLATE, STATS] {
            offer_on(&mut balloon, index, &[(LIST, 4096)], 0);
        }
    }
    let done = balloon.device.reset();
    report.check(
        "reset_while_busy_completes",
        done,
        format_args!("status {:#x}", balloon.device.status()),
    );
    works(report, "reset_while_busy");
}

/// Any device: rings full of noise. It may request a reset, and must accept it.
fn garbage_rings(device: &Device, report: &mut Report) {
    let negotiated = device.negotiate(device.offered_features());
    let mut noise = 0x1234_5678u32;
    for index in 0..device.queue_count().min(8) {
        if let Some(queue) = device.setup_queue(index) {
            for word in 0..(Queue::AREA_BYTES / 2 / 4) {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                write(queue.base + word * 4, noise);
            }
        }
    }
    device.driver_ok();
    for index in 0..device.queue_count().min(8) {
        device.kick(index);
    }
    let asked = device.status() & STATUS_NEEDS_RESET != 0;
    report.check(
        "garbage_rings_then_reset",
        negotiated && device.reset(),
        format_args!(
            "slot {}, asked for reset: {asked}, status {:#x}",
            device.function.slot,
            device.status()
        ),
    );
}
