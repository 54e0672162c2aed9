//! A well-behaved balloon driver. Every queue must work as the standard requires. Afterwards, pages that the driver
//! gave up must read zero, and their neighbours must be unchanged.

use crate::interrupts;
use crate::machine::halt_forever;
use crate::memory::{find_other, read, stamp, write};
use crate::queue::{DESC_WRITE, Queue};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

pub const DEVICE_BALLOON: u16 = 5;
pub const F_STATS_VQ: u64 = 1 << 1;
pub const F_REPORTING: u64 = 1 << 5;

pub const INFLATE: u16 = 0;
pub const DEFLATE: u16 = 1;
pub const STATS: u16 = 2;
/// Dense numbering: after inflate, deflate and statistics.
pub const REPORTING: u16 = 3;

const PAGE: u64 = 4096;
const BLOCK: u64 = 2 << 20;
/// Memory to give up: 16 blocks from 64 MiB on.
pub const DATA: u64 = 64 << 20;
const BLOCKS: u64 = 16;
const PATTERN: u32 = 0x5a5a_5a5a;
/// Lists of page frame numbers and statistics are built here.
const SCRATCH: u64 = 48 << 20;
/// The values of the statistics: total memory, and initial free memory.
const TOTAL_BYTES: u64 = 987_654_321;
const FREE_BYTES: u64 = 123_456_789;
const SPIN_MAX: u32 = 50_000_000;

/// The queues of a running balloon.
pub struct Balloon {
    pub device: Device,
    pub inflate: Queue,
    pub deflate: Queue,
    pub stats: Queue,
    pub reporting: Queue,
}

impl Balloon {
    /// Brings the device up with statistics and reporting.
    pub fn start() -> Option<Balloon> {
        let device = Device::find(DEVICE_BALLOON)?;
        Self::start_on(device)
    }

    /// As [`Balloon::start`], on a device already probed.
    pub fn start_on(device: Device) -> Option<Balloon> {
        Self::start_with(device, F_VERSION_1 | F_STATS_VQ | F_REPORTING)
    }

    /// As [`Balloon::start_on`], with the caller's features, including statistics and reporting.
    pub fn start_with(device: Device, features: u64) -> Option<Balloon> {
        if !device.negotiate(features) {
            return None;
        }
        let inflate = device.setup_queue(INFLATE)?;
        let deflate = device.setup_queue(DEFLATE)?;
        let stats = device.setup_queue(STATS)?;
        let reporting = device.setup_queue(REPORTING)?;
        Some(Balloon {
            device,
            inflate,
            deflate,
            stats,
            reporting,
        })
    }

    /// Reports `ranges` as free; the used length when the device answered.
    pub fn report(&mut self, ranges: &[(u64, u32)]) -> Option<u32> {
        self.reporting.set_chain(ranges, DESC_WRITE);
        self.reporting.offer(0);
        self.device.kick(REPORTING);
        self.reporting.wait_used().map(|(_, bytes)| bytes)
    }

    /// Gives up (or takes back) `frames`, which are copied to scratch memory.
    pub fn move_frames(&mut self, index: u16, frames: &[u32]) -> Option<u32> {
        for (at, frame) in frames.iter().enumerate() {
            write(SCRATCH + at as u64 * 4, *frame);
        }
        let queue = if index == INFLATE {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        queue.set_chain(&[(SCRATCH, frames.len() as u32 * 4)], 0);
        queue.offer(0);
        self.device.kick(index);
        queue.wait_used().map(|(_, bytes)| bytes)
    }

    /// Leaves a statistics buffer with the host and refills it whenever it is returned. Free memory is one byte less
    /// each time, so that a fresh response can be distinguished from an old one.
    pub fn serve_statistics(mut self) -> ! {
        for free_bytes in (0..FREE_BYTES).rev() {
            self.offer_statistics(free_bytes);
            while self.stats.wait_used().is_none() {}
        }
        halt_forever()
    }

    /// Free memory, total memory, and a tag that the device does not know.
    fn offer_statistics(&mut self, free_bytes: u64) {
        self.offer_entries(&[(4, free_bytes), (5, TOTAL_BYTES), (0x7abc, 1)]);
    }

    /// Sends statistics, tags with their values.
    pub fn offer_entries(&mut self, entries: &[(u16, u64)]) {
        for (at, (tag, value)) in entries.iter().enumerate() {
            // Entries of ten bytes, without padding.
            let address = SCRATCH + 0x1000 + at as u64 * 10;
            write(address, *tag);
            for byte in 0..8 {
                write(address + 2 + byte, (*value >> (8 * byte)) as u8);
            }
        }
        let bytes = entries.len() as u32 * 10;
        self.stats.set_chain(&[(SCRATCH + 0x1000, bytes)], 0);
        self.stats.offer(0);
        self.device.kick(STATS);
    }
}

/// Runs the checks; the balloon keeps its final state.
pub fn scenario(report: &mut Report) -> Option<Balloon> {
    let Some(mut balloon) = Balloon::start() else {
        report.fail(
            "balloon_starts",
            format_args!("no balloon or no FEATURES_OK"),
        );
        return None;
    };
    report.pass("balloon_starts");
    route_interrupt(&balloon.device);
    balloon.device.driver_ok();
    report_discards(&mut balloon, report);
    interrupt_arrives(report);
    inflate_discards(&mut balloon, report);
    deflate_answers(&mut balloon, report);
    config_space(&balloon.device, report);
    Some(balloon)
}

/// Entry 1 of the MSI-X table for the reporting queue.
fn route_interrupt(device: &Device) {
    device.program_msix(1, interrupts::FIRST_FREE_VECTOR);
    device.enable_msix();
    device.select_queue(REPORTING);
    device.set_queue_vector(1);
    interrupts::enable();
}

fn interrupt_arrives(report: &mut Report) {
    let fired = (0..SPIN_MAX).any(|_| interrupts::count(interrupts::FIRST_FREE_VECTOR) > 0);
    report.check(
        "balloon_interrupt_arrives",
        fired,
        format_args!("no interrupt after a report"),
    );
}

/// Every other block is reported: those read zero, the rest keep the pattern.
fn report_discards(balloon: &mut Balloon, report: &mut Report) {
    stamp(DATA, BLOCKS * BLOCK, PATTERN);
    let mut ranges = [(0u64, BLOCK as u32); BLOCKS as usize / 2];
    for (at, range) in ranges.iter_mut().enumerate() {
        range.0 = DATA + 2 * at as u64 * BLOCK;
    }
    let answer = balloon.report(&ranges);
    report.check(
        "balloon_report_is_answered",
        answer.is_some(),
        format_args!("no used element"),
    );
    report.check(
        "balloon_report_claims_nothing_written",
        answer == Some(0),
        format_args!("used length {answer:?}"),
    );
    let mut wrong = None;
    for block in 0..BLOCKS {
        let expected = if block % 2 == 0 { 0 } else { PATTERN };
        wrong = wrong.or(find_other(DATA + block * BLOCK, BLOCK, expected));
    }
    report.check(
        "balloon_report_discards_exactly",
        wrong.is_none(),
        format_args!("{wrong:x?}"),
    );
}

/// Scattered frames are discarded, the frames between them stay.
fn inflate_discards(balloon: &mut Balloon, report: &mut Report) {
    stamp(DATA, 4 * BLOCK, PATTERN);
    let mut frames = [0u32; 256];
    for (at, frame) in frames.iter_mut().enumerate() {
        *frame = ((DATA + at as u64 * 2 * PAGE) / PAGE) as u32;
    }
    let answer = balloon.move_frames(INFLATE, &frames);
    let wrong = (0..512u64).find_map(|page| {
        let expected = if page % 2 == 0 { 0 } else { PATTERN };
        find_other(DATA + page * PAGE, PAGE, expected)
    });
    report.check(
        "balloon_inflate_discards_exactly",
        answer == Some(0) && wrong.is_none(),
        format_args!("used length {answer:?}, {wrong:x?}"),
    );
}

fn deflate_answers(balloon: &mut Balloon, report: &mut Report) {
    let answer = balloon.move_frames(DEFLATE, &[(DATA / PAGE) as u32]);
    write(DATA, PATTERN);
    report.check(
        "balloon_deflate_answers",
        answer == Some(0) && read::<u32>(DATA) == PATTERN,
        format_args!("used length {answer:?}"),
    );
}

/// `actual` is what the driver wrote; odd writes change nothing.
fn config_space(device: &Device, report: &mut Report) {
    write(device.config + 4, 256u32);
    write(device.config + 5, 0xffu8);
    write(device.config + 6, 0xffffu16);
    let actual: u32 = read(device.config + 4);
    report.check(
        "balloon_actual_keeps_whole_writes_only",
        actual == 256,
        format_args!("actual {actual:#x}"),
    );
}
