//! A minimal interrupt table: every vector counts, exceptions end the run.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::console;
use crate::machine::power_off;
use crate::memory::{read, write};

/// Vectors with a stub in the boot code.
const VECTORS: usize = 64;
/// First vector that is not an exception.
pub const FIRST_FREE_VECTOR: u8 = 32;
/// x2APIC registers (Intel SDM vol. 3, table 10-6).
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_X2APIC_EOI: u32 = 0x80b;
const MSR_X2APIC_COMMAND: u32 = 0x830;
const MSR_X2APIC_SPURIOUS: u32 = 0x80f;
/// Commands to another processor: delivery mode and level.
const INIT: u64 = 0x4500;
const START_UP: u64 = 0x4600;
/// Interrupt gate, present, ring 0.
const GATE: u64 = 0x8e00;

unsafe extern "C" {
    static interrupt_stubs: u8;
}

#[repr(C, align(16))]
struct Table([[u64; 2]; VECTORS]);

static mut TABLE: Table = Table([[0; 2]; VECTORS]);
static COUNTS: [AtomicU32; VECTORS] = [const { AtomicU32::new(0) }; VECTORS];

/// Builds and loads the interrupt table. Interrupts stay off.
pub fn install() {
    let table = &raw mut TABLE as u64;
    let stubs = &raw const interrupt_stubs as u64;
    for vector in 0..VECTORS as u64 {
        let handler = stubs + vector * 16;
        let low =
            (handler & 0xffff) | (0x08 << 16) | (GATE << 32) | ((handler >> 16 & 0xffff) << 48);
        write(table + vector * 16, low);
        write(table + vector * 16 + 8, handler >> 32);
    }
    let mut pointer = [0u8; 10];
    pointer[..2].copy_from_slice(&((VECTORS * 16 - 1) as u16).to_le_bytes());
    pointer[2..].copy_from_slice(&table.to_le_bytes());
    // SAFETY: `pointer` describes the table built above, which is static.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) }
}

/// Enables the local APIC in x2APIC mode and accepts interrupts.
pub fn enable() {
    write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | 0xc00);
    write_msr(MSR_X2APIC_SPURIOUS, 0x1ff);
    // SAFETY: the table is loaded and every vector has a stub.
    unsafe { asm!("sti") }
}

/// Resets another processor, which then runs the real-mode code of this page below 1 MiB.
pub fn start_processor(apic_id: u32, page: u64) {
    write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | 0xc00);
    let destination = u64::from(apic_id) << 32;
    for command in [INIT, START_UP | page >> 12] {
        write_msr(MSR_X2APIC_COMMAND, destination | command);
    }
}

/// How often this vector fired.
pub fn count(vector: u8) -> u32 {
    COUNTS[usize::from(vector)].load(Ordering::Relaxed)
}

/// Called by the stubs.
#[unsafe(no_mangle)]
extern "C" fn on_interrupt(vector: u64, address: u64) {
    if vector < u64::from(FIRST_FREE_VECTOR) {
        console::line(format_args!(
            "FAIL exception: vector {vector}, stack {address:#x}, {:#x}",
            read::<u64>(0)
        ));
        power_off();
    }
    let counter = &COUNTS[vector as usize];
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    write_msr(MSR_X2APIC_EOI, 0);
}

fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the registers used exist in every machine of ours.
    unsafe { asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high) };
    u64::from(low) | u64::from(high) << 32
}

fn write_msr(register: u32, value: u64) {
    // SAFETY: as in `read_msr`; the values are legal for those registers.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32)
    }
}
