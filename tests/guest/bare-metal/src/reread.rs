//! Writes memory, and reads it again after the host has saved and restored the machine. The host sets a balloon target
//! as the signal to continue. Then the guest reports a part of the memory as free, and checks all of it.

use core::hint::spin_loop;

use crate::balloon::{Balloon, DATA, INFLATE};
use crate::memory::{find_other, read, write};
use crate::report::Report;

const PAGE: u64 = 4096;
const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 32;
const BLOCK_PAGES: u64 = BLOCK / PAGE;

/// Differs from page to page and is never zero.
fn mark(address: u64) -> u32 {
    (address / PAGE) as u32 | 0xa500_0000
}

fn first_wrong(block: u64, is_zero: impl Fn(u64) -> bool) -> Option<u64> {
    (0..BLOCK_PAGES).find_map(|page| {
        let address = DATA + block * BLOCK + page * PAGE;
        if is_zero(page) {
            return find_other(address, PAGE, 0).map(|_| address);
        }
        (read::<u32>(address) != mark(address)).then_some(address)
    })
}

pub fn scenario(report: &mut Report) -> Option<Balloon> {
    let Some(mut balloon) = Balloon::start() else {
        report.fail("reread_starts", format_args!("no balloon"));
        return None;
    };
    balloon.device.driver_ok();
    for page in 0..BLOCKS * BLOCK_PAGES {
        let address = DATA + page * PAGE;
        write(address, mark(address));
    }
    report.pass("reread_written");
    while read::<u32>(balloon.device.config) == 0 {
        spin_loop();
    }
    // Every fourth block was touched before, every second is discarded.
    for block in (0..BLOCKS).step_by(4) {
        let wrong = first_wrong(block, |_| false);
        if let Some(address) = wrong {
            report.fail("reread_first", format_args!("page {address:#x}"));
        }
    }
    let mut ranges = [(0, BLOCK as u32); BLOCKS as usize / 2];
    for (at, range) in ranges.iter_mut().enumerate() {
        range.0 = DATA + 2 * at as u64 * BLOCK;
    }
    let answer = balloon.report(&ranges);
    report.check(
        "reread_report_is_answered",
        answer == Some(0),
        format_args!("{answer:?}"),
    );
    // Every second page of a block that no one has touched since the restore.
    let mut frames = [0; BLOCK_PAGES as usize / 2];
    for (at, frame) in frames.iter_mut().enumerate() {
        *frame = ((DATA + BLOCK) / PAGE + 2 * at as u64) as u32;
    }
    let answer = balloon.move_frames(INFLATE, &frames);
    report.check(
        "reread_inflate_is_answered",
        answer == Some(0),
        format_args!("{answer:?}"),
    );
    let wrong = (0..BLOCKS).find_map(|block| {
        first_wrong(block, |page| block % 2 == 0 || (block == 1 && page % 2 == 0))
    });
    report.check(
        "reread_finds_what_it_wrote_and_zeros_where_it_gave_up",
        wrong.is_none(),
        format_args!("page {wrong:x?}"),
    );
    Some(balloon)
}
