//! A guest without an operating system, for tests of the machine itself.
//!
//! It is started through the PVH entry point, and reads the name of a scenario from the kernel command line
//! (`scenario=NAME`). It drives the virtual hardware directly, and prints one line per check on COM1:
//!
//! ```text
//! PASS balloon_report_discards
//! FAIL balloon_report_discards: block 3 reads 0x5a5a5a5a
//! DONE 12 passed, 0 failed
//! ```
//!
//! Then it powers off through ACPI. With `stay` on the command line, it keeps running instead, with a balloon that
//! responds, so that the host can inspect the machine.

#![no_std]
#![no_main]

mod balloon;
mod chaos;
mod console;
mod hinting;
mod hostile;
mod hotplug;
mod interrupts;
mod machine;
mod memory;
mod panic;
mod pci;
mod plug;
mod policy;
mod processors;
mod queue;
mod registers;
mod report;
mod reread;
mod rtc;
mod virtio;
mod vsock;
mod watchdog;

use core::arch::global_asm;

use report::Report;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// Seed of the noise, unless the command line has `seed=NUMBER`.
const DEFAULT_SEED: u32 = 42;

/// Called by the boot code with the physical address of `hvm_start_info`.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    interrupts::install();
    let command_line = machine::command_line(start_info);
    let mut report = Report::new();
    let mut balloon = None;
    match machine::option(command_line, "scenario=") {
        Some("pci") => pci::scenario(&mut report),
        Some("balloon") => balloon = balloon::scenario(&mut report),
        Some("chaos") => chaos::scenario(&mut report),
        Some("hotplug") => hotplug::scenario(0, &mut report),
        Some("hotplug-on-segment-1") => hotplug::scenario(1, &mut report),
        Some("plug") => plug::scenario(&mut report),
        Some("policy") => policy::scenario(false, &mut report),
        Some("policy-lies") => policy::scenario(true, &mut report),
        Some("processors") => processors::scenario(&mut report),
        Some("hostile") => hostile::scenario(&mut report),
        Some("panic") => panic::scenario(&mut report),
        Some("hinting") => hinting::scenario(&mut report),
        Some("registers") => {
            let seed = machine::option(command_line, "seed=").and_then(|seed| seed.parse().ok());
            registers::scenario(seed.unwrap_or(DEFAULT_SEED), &mut report);
        }
        Some("reread") => balloon = reread::scenario(&mut report),
        Some("rtc") => rtc::scenario(&mut report),
        Some("vsock") => vsock::scenario(&mut report),
        Some("watchdog") => watchdog::scenario(&mut report),
        Some("triple-fault") => machine::triple_fault(),
        Some("reset") => machine::reset(),
        Some("spin") => loop {
            core::hint::spin_loop();
        },
        other => report.fail("scenario", format_args!("unknown scenario {other:?}")),
    }
    report.done();
    if command_line.split(' ').any(|word| word == "stay") {
        match balloon {
            Some(balloon) => balloon.serve_statistics(),
            None => machine::halt_forever(),
        }
    }
    machine::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::line(format_args!("FAIL panic: {info}"));
    machine::power_off()
}

/// Referenced by the precompiled core library, never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
