//! Verifies memory and a disk while the host changes everything else. The host pauses, resumes and reboots the machine,
//! resizes the balloon, and plugs and unplugs disks and processors. The guest follows each request immediately.
//!
//! The guest writes the blocks of the disk in turn, each time with the next number, also after reboots. Each block must
//! therefore contain the last number written to it.

use crate::balloon::{Balloon, DATA, DEFLATE, INFLATE};
use crate::console;
use crate::hotplug::{Controller, SLOTS_DOWN, SLOTS_UP};
use crate::memory::{fill, find_other, read, stamp, write};
use crate::pci::{Function, VENDOR_VIRTIO};
use crate::queue::{DESC_NEXT, DESC_WRITE, Desc, Queue};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

const DEVICE_BLOCK: u16 = 2;
const BLOCK_BYTES: u32 = 4096;
const SECTORS_PER_BLOCK: u64 = 8;
/// Blocks that are written in turn.
const BLOCKS: u32 = 64;
/// In each word of a block, in addition to the number.
const MARK: u32 = 0xc000_0000;

const READ: u32 = 0;
const WRITE: u32 = 1;
const OK: u8 = 0;

/// Header, data and status of a request.
const HEADER: u64 = 52 << 20;
const BUFFER: u64 = HEADER + 0x1000;
const STATUS: u64 = HEADER + 0x2000;
/// Rings of the disk from the start.
const RINGS: u64 = 40 << 20;

/// Rings of a disk that comes. One that stays has its own: a resume makes it look at them again.
fn rings_of(slot: u8) -> u64 {
    RINGS + (1 + u64::from(slot)) * Queue::AREA_BYTES
}

/// Memory that is written and verified in each round.
const MEMORY: u64 = 128 << 20;
const MEMORY_BYTES: u64 = 2 << 20;
/// Pages that the balloon can have.
const FRAMES_MAX: u32 = 256;
/// Pages per request.
const FRAMES_AT_ONCE: usize = 64;
/// The host's balloon target that ends the scenario.
const END_FRAMES: u32 = 1000;
/// Rounds per line on the serial port.
const ROUNDS_PER_LINE: u32 = 16;
const PROCESSORS_MAX: u32 = 4;

struct Disk {
    device: Device,
    queue: Queue,
}

impl Disk {
    fn start(device: Device, rings: u64) -> Option<Disk> {
        if !device.negotiate(F_VERSION_1) {
            return None;
        }
        device.select_queue(0);
        let queue = Queue::new(rings, device.queue_size().min(64));
        device.set_rings(
            queue.size,
            queue.descriptors(),
            queue.available(),
            queue.used(),
        );
        device.enable_queue();
        device.driver_ok();
        Some(Disk { device, queue })
    }

    /// Transfers a block from or to [`BUFFER`]; true if the device answered that it has.
    fn transfer(&mut self, kind: u32, block: u32) -> bool {
        write(HEADER, kind);
        write(HEADER + 4, 0u32);
        write(HEADER + 8, u64::from(block) * SECTORS_PER_BLOCK);
        write(STATUS, 0xffu8);
        let data_flags = if kind == READ { DESC_WRITE } else { 0 };
        for (at, (address, bytes, flags)) in [
            (HEADER, 16, DESC_NEXT),
            (BUFFER, BLOCK_BYTES, DESC_NEXT | data_flags),
            (STATUS, 1, DESC_WRITE),
        ]
        .into_iter()
        .enumerate()
        {
            let next = at as u16 + 1;
            self.queue.set_desc(
                at as u16,
                Desc {
                    address,
                    bytes,
                    flags,
                    next,
                },
            );
        }
        self.queue.offer(0);
        self.device.kick(0);
        self.queue.wait_used().is_some() && read::<u8>(STATUS) == OK
    }

    fn write_word(&mut self, block: u32, word: u32) -> bool {
        fill(BUFFER, u64::from(BLOCK_BYTES), word);
        self.transfer(WRITE, block)
    }

    /// The word of which a block consists; `None` if it cannot be read or has several.
    fn read_word(&mut self, block: u32) -> Option<u32> {
        fill(BUFFER, u64::from(BLOCK_BYTES), !MARK);
        if !self.transfer(READ, block) {
            return None;
        }
        let word = read::<u32>(BUFFER);
        let mut words = (BUFFER..BUFFER + u64::from(BLOCK_BYTES)).step_by(4);
        words.all(|at| read::<u32>(at) == word).then_some(word)
    }
}

/// The word that a block must have if `newest` was written last.
fn expected(block: u32, newest: u32) -> u32 {
    let age = newest.wrapping_sub(block) % BLOCKS;
    match newest.checked_sub(age) {
        Some(number) if number > 0 => MARK | number,
        _ => 0,
    }
}

/// The last number that was written to the disk, if every block is as it must be.
fn newest(disk: &mut Disk, report: &mut Report) -> Option<u32> {
    let mut newest = 0;
    for block in 0..BLOCKS {
        match disk.read_word(block) {
            Some(word) if word == 0 || word & MARK == MARK => newest = newest.max(word & !MARK),
            other => {
                report.fail("chaos_disk", format_args!("block {block} has {other:x?}"));
                return None;
            }
        }
    }
    for block in 0..BLOCKS {
        let found = disk.read_word(block);
        if found != Some(expected(block, newest)) {
            report.fail(
                "chaos_disk",
                format_args!("block {block} has {found:x?} after {newest:#x}"),
            );
            return None;
        }
    }
    Some(newest)
}

/// Inflates or deflates towards the host's target.
fn follow(balloon: &mut Balloon, held: &mut u32, report: &mut Report) -> bool {
    let target = read::<u32>(balloon.device.config).min(FRAMES_MAX);
    let mut frames = [0; FRAMES_AT_ONCE];
    let count = held.abs_diff(target).min(FRAMES_AT_ONCE as u32);
    if count == 0 {
        return true;
    }
    let first = if target > *held { *held } else { *held - count };
    for (frame, number) in frames.iter_mut().zip(first..first + count) {
        *frame = (DATA / 4096) as u32 + number;
    }
    let frames = &frames[..count as usize];
    let (start, bytes) = (DATA + u64::from(first) * 4096, u64::from(count) * 4096);
    let answered = if target > *held {
        stamp(start, bytes, MARK);
        *held += count;
        balloon.move_frames(INFLATE, frames).is_some() && find_other(start, bytes, 0).is_none()
    } else {
        *held -= count;
        balloon.move_frames(DEFLATE, frames).is_some()
    };
    write(balloon.device.config + 4, *held);
    if !answered {
        report.fail("chaos_balloon", format_args!("{first} and {count} pages"));
    }
    answered
}

/// Uses a disk that has come, before it may leave again.
fn try_disk(function: Function, report: &mut Report) -> bool {
    if function.vendor() != VENDOR_VIRTIO || function.device() != 0x1040 + DEVICE_BLOCK {
        return true;
    }
    let Some(mut disk) = Disk::start(Device::probe(function), rings_of(function.slot)) else {
        report.fail("chaos_disk_starts", format_args!("slot {}", function.slot));
        return false;
    };
    let word = MARK | u32::from(function.slot);
    let good = disk.write_word(1, word) && disk.read_word(1) == Some(word);
    if !good {
        report.fail("chaos_disk_works", format_args!("slot {}", function.slot));
    }
    good
}

/// Does what the host requests of functions and processors.
fn release(controller: &Controller, report: &mut Report) -> bool {
    let mut good = true;
    for function in controller.slots(SLOTS_UP) {
        good &= try_disk(function, report);
    }
    for function in controller.slots(SLOTS_DOWN) {
        controller.eject(function);
    }
    for processor in 1..PROCESSORS_MAX {
        controller.release_processor(processor);
    }
    good
}

pub fn scenario(report: &mut Report) {
    let disk = Device::find(DEVICE_BLOCK).and_then(|device| Disk::start(device, RINGS));
    let (Some(mut disk), Some(mut balloon), Some(controller)) =
        (disk, Balloon::start(), Controller::find(0))
    else {
        return report.fail("chaos_starts", format_args!("a device is missing"));
    };
    balloon.device.driver_ok();
    let Some(mut last) = newest(&mut disk, report) else {
        return;
    };
    console::line(format_args!("READY {last}"));
    let mut held = 0;
    for round in 1u32.. {
        let word = MARK | round;
        stamp(MEMORY, MEMORY_BYTES, word);
        last += 1;
        if !disk.write_word(last % BLOCKS, MARK | last) {
            return report.fail("chaos_write", format_args!("block {}", last % BLOCKS));
        }
        if !release(&controller, report) || !follow(&mut balloon, &mut held, report) {
            return;
        }
        // Another block in each round.
        let block = round.wrapping_mul(31) % BLOCKS;
        let found = disk.read_word(block);
        if found != Some(expected(block, last)) {
            return report.fail(
                "chaos_disk",
                format_args!("block {block} has {found:x?} after {last:#x}"),
            );
        }
        if let Some((at, found)) = find_other(MEMORY, MEMORY_BYTES, word) {
            return report.fail("chaos_memory", format_args!("{at:#x} has {found:#x}"));
        }
        if round % ROUNDS_PER_LINE == 0 {
            console::line(format_args!("ROUND {round} {last}"));
        }
        if read::<u32>(balloon.device.config) == END_FRAMES {
            break;
        }
    }
    if newest(&mut disk, report) == Some(last) {
        report.pass("chaos_loses_nothing");
    }
}
