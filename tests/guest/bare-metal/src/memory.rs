//! Raw memory: volatile access to physical addresses, and the memory functions
//! the compiler calls.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

/// Reads a value at a physical address (identity-mapped below 4 GiB).
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the first 4 GiB are mapped; a wrong address faults and is reported.
    unsafe { read_volatile(address as *const T) }
}

/// Writes a value at a physical address.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `read`; this guest owns all of its memory.
    unsafe { write_volatile(address as *mut T, value) }
}

unsafe extern "C" {
    /// 2048 entries of 2 MiB each, made by the boot code.
    static mut page_directories: [u64; 2048];
}

/// Maps the 2 MiB around a physical address above 4 GiB at the address of the firmware, which is absent; returns the
/// mapped address. Each call replaces the previous mapping.
pub fn map_high(address: u64) -> u64 {
    const LARGE_PAGE: u64 = 2 << 20;
    /// Present, writable, large, not cached.
    const ENTRY_FLAGS: u64 = 0x9b;
    let window = (1u64 << 32) - LARGE_PAGE;
    let entry = &raw mut page_directories as u64 + 8 * (window / LARGE_PAGE);
    write(entry, (address & !(LARGE_PAGE - 1)) | ENTRY_FLAGS);
    // SAFETY: flushes the translation of an address that nothing else uses.
    unsafe { asm!("invlpg [{}]", in(reg) window) }
    window + address % LARGE_PAGE
}

/// Writes `word` wherever [`find_other`] checks: memory is discarded by whole pages, and emulated guests are slow.
pub fn stamp(address: u64, bytes: u64, word: u32) {
    looked_at(address, bytes).for_each(|at| write(at, word));
}

/// Fills `bytes` (a multiple of 4) with `word`, one string instruction.
pub fn fill(address: u64, bytes: u64, word: u32) {
    // SAFETY: as in `write`.
    unsafe {
        asm!("rep stosd", inout("rdi") address => _, inout("rcx") bytes / 4 => _, in("eax") word);
    }
}

/// The first 4-byte word that [`stamp`] writes and that is not `word`.
pub fn find_other(address: u64, bytes: u64, word: u32) -> Option<(u64, u32)> {
    looked_at(address, bytes)
        .map(|at| (at, read::<u32>(at)))
        .find(|(_, found)| *found != word)
}

/// The first and the last word of each page.
fn looked_at(address: u64, bytes: u64) -> impl Iterator<Item = u64> {
    (address..address + bytes)
        .step_by(4096)
        .flat_map(|page| [page, page + 4092])
}

/// Orders all earlier accesses before all later ones. A locked instruction
/// rather than `mfence`, which KVM's emulator may not know.
pub fn barrier() {
    // SAFETY: touches only the word at the top of the stack, with no change.
    unsafe { asm!("lock or dword ptr [rsp], 0") }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range, as for C's memset.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") count => _, in("al") byte as u8)
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges, as for C's memcpy.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _)
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller vouches for both ranges, as for C's memcmp.
        let (a, b) = unsafe { (read_volatile(left.add(at)), read_volatile(right.add(at))) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const core::ffi::c_char) -> usize {
    // SAFETY: the caller vouches for a terminated string, as for C's strlen.
    (0..)
        .take_while(|at| unsafe { read_volatile(text.add(*at)) } != 0)
        .count()
}
