//! Text for the debug console, and a panic reported through pvpanic.

use crate::machine::{inb, outb};
use crate::memory::{read, write};
use crate::pci::{COMMAND_MEMORY_AND_MASTER, Function, REG_BAR0, REG_COMMAND};
use crate::report::Report;

const DEBUG_CONSOLE_PORT: u16 = 0xe9;
const VENDOR_REDHAT: u16 = 0x1b36;
const DEVICE_PVPANIC: u16 = 0x0011;
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

pub fn scenario(report: &mut Report) {
    let present = inb(DEBUG_CONSOLE_PORT);
    report.check(
        "debug_console_reads_its_port_number",
        present == 0xe9,
        format_args!("{present:#x}"),
    );
    for byte in *b"text for the debug console\n" {
        outb(DEBUG_CONSOLE_PORT, byte);
    }
    let is_pvpanic = |it: &Function| (it.vendor(), it.device()) == (VENDOR_REDHAT, DEVICE_PVPANIC);
    let Some(function) = Function::all().find(is_pvpanic) else {
        return report.fail("pvpanic", format_args!("there is none"));
    };
    // Placed below 4 GiB, where this program has the addresses mapped.
    let address = u64::from(function.read32(REG_BAR0) & !0xf);
    function.write32(REG_COMMAND, COMMAND_MEMORY_AND_MASTER);
    let supported: u8 = read(address);
    report.check(
        "pvpanic_supports_both_events",
        supported == PANICKED | CRASH_LOADED,
        format_args!("{supported:#x} at {address:#x}"),
    );
    write(address, PANICKED);
    write(address, CRASH_LOADED);
    write(address, 0x80_u8);
}
