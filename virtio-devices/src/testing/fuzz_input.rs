//! Interprets bytes of a fuzzer as decisions of a guest.

use vm_memory::GuestAddress;

use super::queue::{Desc, DriverQueue, INDIRECT, NEXT, WRITE};
use super::ram::TestRam;
use crate::reclaim::guarded_ram::{GuardedRam, Kind, PAGE, RamArea};

/// Three kinds of memory: private, then shared directly after it, and private again after a hole. Rings are in the
/// first area.
pub const AREAS: [RamArea; 3] = [
    RamArea {
        guest_page: 0,
        pages: 48,
        kind: Kind::Anonymous,
    },
    RamArea {
        guest_page: 48,
        pages: 16,
        kind: Kind::Memfd,
    },
    RamArea {
        guest_page: 72,
        pages: 8,
        kind: Kind::Anonymous,
    },
];
/// Pages of RAM without a hole, where any byte may be written.
pub const SOLID_PAGES: u8 = 64;
const SOLID_BYTES: u64 = SOLID_PAGES as u64 * PAGE as u64;
/// A page without rings.
pub const SPARE_PFN: u64 = 40;
/// The next page: for well-formed requests.
pub const FORM_START: u64 = (SPARE_PFN + 1) * PAGE as u64;

/// RAM that begins with [`AREAS`], as the driver of a fuzzed guest sees it.
pub fn driver_ram(guarded: &GuardedRam) -> TestRam {
    TestRam::around(guarded.ram.clone(), 0, SOLID_BYTES)
}

/// Number of pages that contain most addresses of an input: RAM, and some beyond it.
const PAGES: u8 = 96;

/// Takes numbers from the front of the input; zeros when it is exhausted.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// Whether the input is exhausted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let (byte, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *byte
    }

    /// The next `bytes` bytes as a number.
    pub fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// The next two bytes as a number.
    pub fn word(&mut self) -> u16 {
        u16::from(self.byte()) << 8 | u16::from(self.byte())
    }

    /// An address: often a page of RAM, otherwise any byte of RAM, otherwise any number.
    pub fn address(&mut self) -> u64 {
        match self.byte() % 4 {
            0 | 1 => u64::from(self.byte() % PAGES) * PAGE as u64,
            2 => self.number(3),
            _ => self.number(8),
        }
    }

    /// A length: often several pages, otherwise a few bytes, otherwise any number.
    pub fn length(&mut self) -> u32 {
        match self.byte() % 4 {
            0 | 1 => u32::from(self.byte() % 8) * PAGE as u32,
            2 => u32::from(self.byte()),
            _ => u32::from(self.word()) << 16 | u32::from(self.word()),
        }
    }

    /// Writes eight bytes anywhere in the RAM without a hole.
    pub fn write_ram(&mut self, ram: &TestRam) {
        let at = self.number(3) % (SOLID_BYTES - 8);
        let bytes = self.number(8).to_le_bytes();
        ram.write(GuestAddress(at), &bytes);
    }

    /// Writes up to eight descriptors starting at some slot, and makes that slot available.
    pub fn offer_chain(&mut self, queue: &mut DriverQueue) {
        let size = queue.size();
        let count = u16::from(self.byte() % 8) + 1;
        let first = u16::from(self.byte()) % size;
        for at in 0..count {
            let shape = self.byte();
            // Mostly the next slot, sometimes a loop or an invalid slot.
            let next = match shape >> 6 {
                0..=2 => (first + at + 1) % size,
                _ => self.word(),
            };
            // One chain in thirty-two uses an indirect table.
            let indirect = if shape & 0x3c == 0x3c { INDIRECT } else { 0 };
            let desc = Desc {
                addr: self.address(),
                len: self.length(),
                flags: u16::from(shape) & (NEXT | WRITE) | indirect,
                next,
            };
            queue.write_desc((first + at) % size, desc);
        }
        queue.offer(first);
    }
}
