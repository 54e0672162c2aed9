//! Processors that the host adds to the running machine and asks back, while it also saves and restores the machine.
//! Each added processor counts until it leaves.

use core::hint::spin_loop;

use crate::console;
use crate::hotplug::{ADDED, Controller, LEAVES, PRESENT};
use crate::interrupts::start_processor;
use crate::machine::inb;
use crate::memory::{read, write};
use crate::report::Report;

/// The processors that come and leave, by number and APIC id.
const NUMBERS: core::ops::Range<u32> = 1..4;
/// The scenario ends after this many additions, when every processor has left.
const ADDITIONS: u32 = 4;
/// The page with the code of processor 0, if it had any; those of the others follow.
const CODE: u64 = 0x9000;
const PAGE: u64 = 4096;
/// The counter of processor 0; those of the others follow.
const COUNTERS: u64 = 0xe000;
/// How often a counter is read before its processor counts as stopped.
const POLLS_MAX: u32 = 5_000_000;
/// Reading it is an exit, during which other vCPUs of a busy host run.
const UNUSED_PORT: u16 = 0x80;

pub fn scenario(report: &mut Report) {
    let Some(controller) = Controller::find(0) else {
        report.fail("processors_found", format_args!("no controller"));
        return;
    };
    let mut additions = 0;
    let mut running = [false; NUMBERS.end as usize];
    console::line(format_args!("READY processors"));
    while additions < ADDITIONS || running.contains(&true) {
        for number in NUMBERS {
            let status = controller.processor_status(number);
            if status & (ADDED | LEAVES) == 0 {
                continue;
            }
            // The host may have restored the machine since the last change.
            let mut numbers = NUMBERS;
            let stopped = numbers.find(|it| running[*it as usize] && !counts(*it));
            report.check(
                "processors_run",
                stopped.is_none(),
                format_args!("{stopped:?} does not count"),
            );
            controller.release_processor(number);
            let comes = status & ADDED != 0;
            running[number as usize] = comes;
            if comes {
                additions += 1;
                start(number);
                report.check("processor_started", counts(number), format_args!("{number}"));
            } else {
                let status = controller.processor_status(number);
                report.check(
                    "processor_left",
                    status & PRESENT == 0,
                    format_args!("{number} has {status:#x}"),
                );
            }
        }
        spin_loop();
    }
}

fn counter(number: u32) -> u64 {
    COUNTERS + 4 * u64::from(number)
}

/// Has the processor count in real mode.
fn start(number: u32) {
    let code = CODE + u64::from(number) * PAGE;
    let [low, high] = (counter(number) as u16).to_le_bytes();
    let program = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x66, 0xff, 0x06, low, high, // inc dword ptr [counter]
        0xf3, 0x90, // pause
        0xeb, 0xf7, // back to inc
    ];
    for (at, byte) in (code..).zip(program) {
        write::<u8>(at, byte);
    }
    start_processor(number, code);
}

fn counts(number: u32) -> bool {
    let before: u32 = read(counter(number));
    (0..POLLS_MAX).any(|_| {
        inb(UNUSED_PORT);
        read::<u32>(counter(number)) != before
    })
}
