//! The hinting queue, used correctly and abused.
//!
//! Throughout the test, the host starts one run after another. Every violation happens in a separate run, on a device
//! that was just reset. The doorbell holds its caller until the device has finished, so the guest does not wait. After
//! the kick has returned, the device must do nothing more.

use crate::balloon::{DATA, DEVICE_BALLOON, F_STATS_VQ};
use crate::memory::{fill, find_other, read, stamp, write};
use crate::queue::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Desc, Queue};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1, STATUS_NEEDS_RESET};

const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// Dense numbering: after inflate, deflate and statistics.
const HINT: u16 = 3;
/// In the configuration space.
const COMMAND_ID_OFFSET: u64 = 8;
const STOP: u32 = 0;
const DONE: u32 = 1;
const ID_FIRST: u32 = 2;

const BLOCK: u64 = 2 << 20;
const PATTERN: u32 = 0xa5a5_a5a5;
/// Memory that no valid hint names: the canary.
const CANARY: u64 = 96 << 20;
const CANARY_BYTES: u64 = 8 << 20;
/// Commands are written here.
const COMMAND: u64 = 48 << 20;
/// Nothing is mapped there.
const NOWHERE: u64 = 1 << 46;
/// Number of polls for the host's request: each is an exit, and the host is slow on a busy machine.
const POLLS_MAX: u32 = 5_000_000;

/// A running balloon with its hinting queue.
struct Hinter {
    device: Device,
    hint: Queue,
}

type Lie = fn(&mut Hinter, u32);

/// Each gets the id of the run, which has been acknowledged.
const LIES: &[(&str, Lie)] = &[
    ("hint_outside_ram", |h, _| {
        h.send(&[(NOWHERE, 4 << 20)], DESC_WRITE)
    }),
    ("hint_in_pci_hole", |h, _| {
        h.send(&[(0xe800_0000, 1 << 20)], DESC_WRITE)
    }),
    ("hint_wrapping", |h, _| {
        h.send(&[(u64::MAX - 0xfff, u32::MAX)], DESC_WRITE)
    }),
    ("hint_gigantic", |h, _| {
        let all = [
            (NOWHERE, u32::MAX),
            (NOWHERE + BLOCK, u32::MAX),
            (u64::MAX, u32::MAX),
        ];
        h.send(&all, DESC_WRITE);
    }),
    ("hint_unaligned_below_a_page", |h, _| {
        h.send(&[(CANARY + 1, 4094)], DESC_WRITE)
    }),
    ("hint_across_two_pages_whole_in_none", |h, _| {
        h.send(&[(CANARY + 2048, 4096)], DESC_WRITE);
    }),
    ("hint_zero_length", |h, _| {
        h.send(&[(CANARY, 0)], DESC_WRITE)
    }),
    ("hint_readable", |h, _| h.send(&[(CANARY, BLOCK as u32)], 0)),
    ("hint_command_writable", |h, _| {
        h.send(&[(CANARY, 4)], DESC_WRITE)
    }),
    ("hint_command_of_three_bytes", |h, _| {
        h.send(&[(COMMAND, 3)], 0)
    }),
    ("hint_command_of_many_bytes", |h, _| {
        h.send(&[(COMMAND, u32::MAX)], 0)
    }),
    ("hint_command_outside_ram", |h, _| {
        h.send(&[(NOWHERE, 4)], 0)
    }),
    ("hint_command_never_asked_for", |h, id| {
        for wrong in [
            DONE,
            id.wrapping_sub(1).max(DONE),
            id.wrapping_add(1),
            u32::MAX,
        ] {
            h.command(wrong);
        }
    }),
    ("hint_after_the_end_of_the_run", |h, _| {
        h.command(STOP);
        h.send(&[(CANARY, BLOCK as u32)], DESC_WRITE);
    }),
    ("hint_and_end_in_one_chain", |h, _| {
        write(COMMAND, STOP);
        h.hint.set_desc(0, desc(COMMAND, 4, DESC_NEXT, 1));
        h.hint
            .set_desc(1, desc(CANARY, BLOCK as u32, DESC_WRITE, 0));
        h.offer(0);
    }),
    ("hint_of_which_the_kick_is_over", |h, _| {
        // Two chains and one kick: it is unknown whether the first is still free.
        h.hint
            .set_desc(0, desc(CANARY, BLOCK as u32, DESC_WRITE, 0));
        h.hint
            .set_desc(1, desc(NOWHERE, BLOCK as u32, DESC_WRITE, 0));
        h.hint.offer(0);
        h.offer(1);
    }),
    ("hint_loop", |h, _| {
        h.hint
            .set_desc(0, desc(NOWHERE, 4096, DESC_WRITE | DESC_NEXT, 0));
        h.offer(0);
    }),
    ("hint_loop_of_commands", |h, _| {
        write(COMMAND, STOP);
        h.hint.set_desc(0, desc(COMMAND, 4, DESC_NEXT, 1));
        h.hint.set_desc(1, desc(COMMAND, 4, DESC_NEXT, 0));
        h.offer(0);
    }),
    ("hint_next_out_of_range", |h, _| {
        h.hint
            .set_desc(0, desc(NOWHERE, 4096, DESC_WRITE | DESC_NEXT, 0xffff));
        h.offer(0);
    }),
    ("hint_head_out_of_range", |h, _| h.offer(0xfff0)),
    ("hint_indirect_not_negotiated", |h, _| {
        h.hint.set_desc(0, desc(CANARY, 16, DESC_INDIRECT, 0));
        h.offer(0);
    }),
    ("hint_index_jumps", |h, _| {
        h.hint.publish(0x8000);
        h.device.kick(HINT);
    }),
];

pub fn scenario(report: &mut Report) {
    stamp(CANARY, CANARY_BYTES, PATTERN);
    works(report, "hint_is_discarded_during_its_kick");
    overlapping_is_discarded_once(report);
    not_acknowledged_is_left_alone(report);
    for (name, lie) in LIES {
        tell(name, *lie, report);
    }
    reset_while_hinting(report);
    works(report, "hinting_works_after_all");
}

impl Hinter {
    /// Brings the device up with its hinting queue.
    fn start() -> Option<Hinter> {
        let device = Device::find(DEVICE_BALLOON)?;
        if !device.negotiate(F_VERSION_1 | F_STATS_VQ | F_FREE_PAGE_HINT) {
            return None;
        }
        for index in 0..HINT {
            device.setup_queue(index)?;
        }
        let hint = device.setup_queue(HINT)?;
        device.driver_ok();
        Some(Hinter { device, hint })
    }

    /// As [`Hinter::start`], in an acknowledged run that the host has requested.
    fn start_run() -> Option<(Hinter, u32)> {
        let mut hinter = Self::start()?;
        let id = hinter.wait_asked()?;
        hinter.command(id);
        Some((hinter, id))
    }

    fn wait_asked(&self) -> Option<u32> {
        (0..POLLS_MAX)
            .map(|_| read::<u32>(self.device.config + COMMAND_ID_OFFSET))
            .find(|id| *id >= ID_FIRST)
    }

    fn command(&mut self, id: u32) {
        write(COMMAND, id);
        self.send(&[(COMMAND, 4)], 0);
    }

    fn send(&mut self, buffers: &[(u64, u32)], flags: u16) {
        self.hint.set_chain(buffers, flags);
        self.offer(0);
    }

    fn offer(&mut self, head: u16) {
        self.hint.offer(head);
        self.device.kick(HINT);
    }

    /// Whether this number of chains has been completed.
    fn answered(&self, chains: u16) -> bool {
        self.hint.used_index() == chains
    }
}

fn desc(address: u64, bytes: u32, flags: u16, next: u16) -> Desc {
    Desc {
        address,
        bytes,
        flags,
        next,
    }
}

/// One violation, then a check that the canary is intact and the device works after a reset.
fn tell(name: &str, lie: Lie, report: &mut Report) {
    let Some((mut hinter, id)) = Hinter::start_run() else {
        report.fail(name, format_args!("no run of hinting"));
        return;
    };
    lie(&mut hinter, id);
    let wrong = find_other(CANARY, CANARY_BYTES, PATTERN);
    let asked = hinter.device.status() & STATUS_NEEDS_RESET != 0;
    report.check(
        name,
        wrong.is_none() && hinter.device.reset(),
        format_args!("changed {wrong:x?}, asked for reset: {asked}"),
    );
}

/// A run in which a block is hinted, discarded before the kick returns, and used again.
fn works(report: &mut Report, name: &str) {
    let Some((mut hinter, _)) = Hinter::start_run() else {
        report.fail(name, format_args!("no run of hinting"));
        return;
    };
    stamp(DATA, 2 * BLOCK, PATTERN);
    hinter.send(&[(DATA, BLOCK as u32)], DESC_WRITE);
    let answered = hinter.answered(2);
    let kept = find_other(DATA, BLOCK, 0);
    let gone = find_other(DATA + BLOCK, BLOCK, PATTERN);
    // The driver may use the block from now on, in the run or after it.
    stamp(DATA, BLOCK, PATTERN);
    hinter.command(STOP);
    let lost = find_other(DATA, BLOCK, PATTERN);
    report.check(
        name,
        answered && kept.is_none() && gone.is_none() && lost.is_none() && hinter.answered(3),
        format_args!("answered {answered}, kept {kept:x?}, gone {gone:x?}, lost {lost:x?}"),
    );
}

fn overlapping_is_discarded_once(report: &mut Report) {
    let name = "hint_overlapping_is_discarded_once";
    let Some((mut hinter, _)) = Hinter::start_run() else {
        report.fail(name, format_args!("no run of hinting"));
        return;
    };
    stamp(DATA, 3 * BLOCK, PATTERN);
    let block = BLOCK as u32;
    let ranges = [(DATA + BLOCK / 2, block), (DATA, block), (DATA, block)];
    hinter.send(&ranges, DESC_WRITE);
    let kept = find_other(DATA, BLOCK + BLOCK / 2, 0);
    let gone = find_other(DATA + BLOCK + BLOCK / 2, BLOCK, PATTERN);
    report.check(
        name,
        kept.is_none() && gone.is_none(),
        format_args!("kept {kept:x?}, gone {gone:x?}"),
    );
}

/// The host has requested a run, but this guest has not acknowledged it.
fn not_acknowledged_is_left_alone(report: &mut Report) {
    let name = "hint_before_the_acknowledgement";
    let Some(mut hinter) = Hinter::start() else {
        report.fail(name, format_args!("the balloon does not start"));
        return;
    };
    let asked = hinter.wait_asked();
    hinter.send(&[(CANARY, BLOCK as u32)], DESC_WRITE);
    let wrong = find_other(CANARY, CANARY_BYTES, PATTERN);
    report.check(
        name,
        asked.is_some() && wrong.is_none() && hinter.answered(1),
        format_args!("asked {asked:?}, changed {wrong:x?}"),
    );
}

/// Rings full of blocks, kicked, and the device reset during the work.
fn reset_while_hinting(report: &mut Report) {
    let name = "reset_while_hinting_completes";
    for round in 0..4 {
        let Some((mut hinter, _)) = Hinter::start_run() else {
            report.fail(name, format_args!("no run of hinting in round {round}"));
            return;
        };
        fill(DATA, BLOCK, PATTERN);
        for head in 0..hinter.hint.size {
            hinter
                .hint
                .set_desc(head, desc(DATA, BLOCK as u32, DESC_WRITE, 0));
            hinter.hint.offer(head);
        }
        hinter.device.kick(HINT);
        if !hinter.device.reset() {
            let status = hinter.device.status();
            report.fail(name, format_args!("status {status:#x} in round {round}"));
            return;
        }
        // A doorbell of a reset device holds no caller.
        hinter.device.kick(HINT);
    }
    report.pass(name);
}
