//! Ports, power and the PVH start information.

use core::arch::asm;
use core::ffi::CStr;

use crate::memory::read;

/// ACPI sleep and reset register of the machine.
const ACPI_SLEEP_PORT: u16 = 0x600;
/// SLP_TYP 5 and SLP_EN: soft-off.
const ACPI_S5: u8 = (5 << 2) | (1 << 5);
/// `hvm_start_info.magic`.
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Offset of `cmdline_paddr` in `hvm_start_info`.
const START_INFO_CMDLINE: u64 = 24;

macro_rules! port_access {
    ($out:ident, $in:ident, $type:ty, $register:tt) => {
        pub fn $out(port: u16, value: $type) {
            // SAFETY: port writes reach virtual hardware only.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value) }
        }

        pub fn $in(port: u16) -> $type {
            let value;
            // SAFETY: port reads reach virtual hardware only.
            unsafe { asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value) };
            value
        }
    };
}

port_access!(outb, inb, u8, "al");
port_access!(outw, inw, u16, "ax");
port_access!(outl, inl, u32, "eax");

/// The kernel command line; empty if there is none.
pub fn command_line(start_info: u64) -> &'static str {
    if read::<u32>(start_info) != START_INFO_MAGIC {
        return "";
    }
    let address: u64 = read(start_info + START_INFO_CMDLINE);
    if address == 0 {
        return "";
    }
    // SAFETY: the loader put a NUL-terminated string there and nothing overwrites it.
    unsafe { CStr::from_ptr(address as *const core::ffi::c_char) }
        .to_str()
        .unwrap_or("")
}

/// The value of `key` in the command line.
pub fn option(command_line: &'static str, key: &str) -> Option<&'static str> {
    command_line
        .split(' ')
        .find_map(|word| word.strip_prefix(key))
}

pub fn power_off() -> ! {
    outb(ACPI_SLEEP_PORT, ACPI_S5);
    halt_forever()
}

pub fn reset() -> ! {
    outb(0x64, 0xfe);
    halt_forever()
}

pub fn triple_fault() -> ! {
    let empty = [0u8; 10];
    // SAFETY: this deliberately ends the machine: no interrupt table, then an invalid instruction. Not `int3`, which
    // KVM's emulator does not know outside of real mode.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &empty, options(noreturn)) }
}

pub fn halt_forever() -> ! {
    loop {
        // SAFETY: stops this processor until the next interrupt.
        unsafe { asm!("hlt") }
    }
}
