//! The driver's side of a split virtqueue (virtio 1.2 §2.7). All fields are public, so that hostile scenarios can write
//! arbitrary values.

use crate::memory::{barrier, fill, read, write};

pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;

/// One descriptor.
#[derive(Clone, Copy)]
pub struct Desc {
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

/// How often the used index is read before a device counts as unresponsive. One read is an ordinary memory access, so
/// the limit is generous.
const POLLS_MAX: u64 = 20_000_000;

/// One queue's three rings in one 64 KiB area.
pub struct Queue {
    pub base: u64,
    pub size: u16,
    next_available: u16,
    last_used: u16,
}

impl Queue {
    /// Room each queue takes.
    pub const AREA_BYTES: u64 = 0x1_0000;

    pub fn new(base: u64, size: u16) -> Self {
        let queue = Self {
            base,
            size,
            next_available: 0,
            last_used: 0,
        };
        let entries = u64::from(size);
        fill(queue.descriptors(), entries * 16, 0);
        // Each ring has two more 16-bit words before its entries and one after them; rounded up to 32-bit words.
        fill(queue.available(), entries * 2 + 8, 0);
        fill(queue.used(), entries * 8 + 8, 0);
        queue
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn set_desc(&self, index: u16, desc: Desc) {
        let at = self.descriptors() + u64::from(index) * 16;
        write(at, desc.address);
        write(at + 8, desc.bytes);
        write(at + 12, desc.flags);
        write(at + 14, desc.next);
    }

    /// Links `(address, bytes)` pairs from descriptor 0 on, all with `flags`.
    pub fn set_chain(&self, buffers: &[(u64, u32)], flags: u16) {
        for (index, (address, bytes)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            self.set_desc(
                index as u16,
                Desc {
                    address: *address,
                    bytes: *bytes,
                    flags: if more { flags | DESC_NEXT } else { flags },
                    next: index as u16 + 1,
                },
            );
        }
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.next_available % self.size;
        write(self.available() + 4 + u64::from(slot) * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.publish(self.next_available);
    }

    /// Writes the available index, valid or not.
    pub fn publish(&self, index: u16) {
        barrier();
        write(self.available() + 2, index);
        barrier();
    }

    pub fn used_index(&self) -> u16 {
        read(self.used() + 2)
    }

    /// Waits for the next used element: its descriptor id and length.
    pub fn wait_used(&mut self) -> Option<(u32, u32)> {
        for _ in 0..POLLS_MAX {
            if self.used_index() != self.last_used {
                barrier();
                let slot = u64::from(self.last_used % self.size);
                self.last_used = self.last_used.wrapping_add(1);
                let at = self.used() + 4 + slot * 8;
                return Some((read(at), read(at + 4)));
            }
        }
        None
    }
}
