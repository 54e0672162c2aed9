//! Bytes of a fuzzer as decisions of a guest.

use super::queue::{Desc, DriverQueue, INDIRECT, NEXT, WRITE};
use crate::reclaim::guarded_ram::PAGE;

/// Pages that most addresses of an input are in: RAM, and some beyond it.
const PAGES: u8 = 96;

/// Takes numbers from the front of the input; zeros when it is exhausted.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// Nothing is left.
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

    /// An address: often a page of RAM, otherwise any byte of it, otherwise anything.
    pub fn address(&mut self) -> u64 {
        match self.byte() % 4 {
            0 | 1 => u64::from(self.byte() % PAGES) * PAGE as u64,
            2 => self.number(3),
            _ => self.number(8),
        }
    }

    /// A length: often some pages, otherwise a few bytes, otherwise anything.
    pub fn length(&mut self) -> u32 {
        match self.byte() % 4 {
            0 | 1 => u32::from(self.byte() % 8) * PAGE as u32,
            2 => u32::from(self.byte()),
            _ => u32::from(self.word()) << 16 | u32::from(self.word()),
        }
    }

    /// Writes up to eight descriptors from some slot on, and makes that slot available.
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
            // One in thirty-two goes through an indirect table.
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
