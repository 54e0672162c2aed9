//! The driver's side of a split virtqueue (virtio 1.2 §2.7), implemented here so that it can also be wrong on purpose.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::ram::TestRam;
use super::wait_until;

/// Descriptor flag: the chain continues.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flag: points to a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

const DESC_BYTES: u64 = 16;
const USED_ELEM_BYTES: u64 = 8;

/// A raw descriptor; any value of any field is allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`] or an invalid value.
    pub flags: u16,
    /// Next slot.
    pub next: u16,
}

impl Desc {
    /// Size of a descriptor in its table.
    pub const BYTES: u64 = DESC_BYTES;

    /// The descriptor's bytes in its table.
    #[must_use]
    pub fn bytes(self) -> [u8; DESC_BYTES as usize] {
        let mut bytes = [0; DESC_BYTES as usize];
        bytes[0..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One part of a well-formed request.
#[derive(Debug, Clone, Copy)]
pub enum Segment<'a> {
    /// The device reads these bytes.
    Readable(&'a [u8]),
    /// The device may write this number of bytes.
    Writable(u32),
    /// The device reads existing RAM.
    ReadableAt(GuestAddress, u32),
    /// The device writes existing RAM.
    WritableAt(GuestAddress, u32),
}

/// Location of a segment in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A chain that was made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Slot of its first descriptor, by which the device completes it.
    pub head: u16,
    /// One per segment, in order.
    pub buffers: Vec<Buffer>,
}

/// An element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u32,
    /// Bytes that the device reports as written.
    pub len: u32,
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct DriverQueue {
    ram: TestRam,
    size: u16,
    desc_table: GuestAddress,
    avail_ring: GuestAddress,
    used_ring: GuestAddress,
    avail_idx: u16,
    used_seen: u16,
    free: Vec<u16>,
    in_flight: HashMap<u16, Vec<u16>>,
}

impl DriverQueue {
    /// Lays out the rings for `size` entries in fresh RAM.
    pub fn new(ram: &TestRam, size: u16) -> Self {
        let entries = u64::from(size);
        Self {
            ram: ram.clone(),
            size,
            desc_table: ram.alloc(DESC_BYTES * entries, 16),
            avail_ring: ram.alloc(6 + 2 * entries, 2),
            used_ring: ram.alloc(6 + USED_ELEM_BYTES * entries, 4),
            avail_idx: 0,
            used_seen: 0,
            free: (0..size).rev().collect(),
            in_flight: HashMap::new(),
        }
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Address of the descriptor table.
    pub fn desc_table(&self) -> GuestAddress {
        self.desc_table
    }

    /// Address of the available ring.
    pub fn avail_ring(&self) -> GuestAddress {
        self.avail_ring
    }

    /// Address of the used ring.
    pub fn used_ring(&self) -> GuestAddress {
        self.used_ring
    }

    /// The device's side of this queue, as a transport would pass it on.
    pub fn device_queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).expect("size is a power of two");
        queue
            .try_set_desc_table_address(self.desc_table)
            .expect("aligned");
        queue
            .try_set_avail_ring_address(self.avail_ring)
            .expect("aligned");
        queue
            .try_set_used_ring_address(self.used_ring)
            .expect("aligned");
        queue.set_ready(true);
        queue
    }

    /// Makes a well-formed chain available.
    ///
    /// # Panics
    /// There are not enough free descriptors.
    pub fn push(&mut self, segments: &[Segment<'_>]) -> Chain {
        let placed = self.place(segments);
        let slots: Vec<u16> = placed.iter().map(|_| self.take_slot()).collect();
        for (at, (buffer, flags)) in placed.iter().enumerate() {
            let next = slots.get(at + 1);
            self.write_desc(
                slots[at],
                Desc {
                    addr: buffer.address.0,
                    len: buffer.len,
                    flags: flags | next.map_or(0, |_| NEXT),
                    next: next.copied().unwrap_or(0),
                },
            );
        }
        self.finish(slots, &placed)
    }

    /// Makes a well-formed chain available through an indirect table.
    pub fn push_indirect(&mut self, segments: &[Segment<'_>]) -> Chain {
        let placed = self.place(segments);
        let table_bytes = DESC_BYTES * placed.len() as u64;
        let table = self.ram.alloc(table_bytes, 16);
        for (at, (buffer, flags)) in placed.iter().enumerate() {
            let last = at + 1 == placed.len();
            let desc = Desc {
                addr: buffer.address.0,
                len: buffer.len,
                flags: flags | if last { 0 } else { NEXT },
                next: if last { 0 } else { at as u16 + 1 },
            };
            self.ram.write(
                GuestAddress(table.0 + DESC_BYTES * at as u64),
                &desc.bytes(),
            );
        }
        let slot = self.take_slot();
        self.write_desc(
            slot,
            Desc {
                addr: table.0,
                len: table_bytes as u32,
                flags: INDIRECT,
                next: 0,
            },
        );
        self.finish(vec![slot], &placed)
    }

    /// Makes raw descriptors available. They are written to consecutive free
    /// slots, and `next` is taken relative to the first of them, so a loop is
    /// `next: 0`. Returns the head.
    pub fn push_raw(&mut self, descs: &[Desc]) -> u16 {
        let slots: Vec<u16> = descs.iter().map(|_| self.take_slot()).collect();
        for (slot, desc) in slots.iter().zip(descs) {
            let next = slots
                .get(usize::from(desc.next))
                .copied()
                .unwrap_or(desc.next);
            self.write_desc(*slot, Desc { next, ..*desc });
        }
        let head = slots[0];
        self.in_flight.insert(head, slots);
        self.offer(head);
        head
    }

    /// Overwrites a descriptor slot.
    pub fn write_desc(&self, slot: u16, desc: Desc) {
        let address = self.desc_table.0 + DESC_BYTES * u64::from(slot);
        self.ram.write(GuestAddress(address), &desc.bytes());
    }

    /// Puts any head, valid or not, into the available ring.
    pub fn offer(&mut self, head: u16) {
        let at = u64::from(self.avail_idx % self.size);
        self.ram.write(
            GuestAddress(self.avail_ring.0 + 4 + 2 * at),
            &head.to_le_bytes(),
        );
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index to any value, for example further ahead than the ring's size.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.ram
            .mem()
            .memory()
            .store(
                idx.to_le(),
                GuestAddress(self.avail_ring.0 + 2),
                Ordering::Release,
            )
            .expect("ring is in test RAM");
    }

    /// The next chain that the device has completed, if there is one.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.used_seen {
            return None;
        }
        let at = u64::from(self.used_seen % self.size);
        let bytes = self
            .ram
            .read(GuestAddress(self.used_ring.0 + 4 + USED_ELEM_BYTES * at), 8);
        self.used_seen = self.used_seen.wrapping_add(1);
        let word =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let used = Used {
            head: word(0),
            len: word(4),
        };
        if let Some(slots) = u16::try_from(used.head)
            .ok()
            .and_then(|head| self.in_flight.remove(&head))
        {
            self.free.extend(slots);
        }
        Some(used)
    }

    /// Waits for the device to complete a chain.
    ///
    /// # Panics
    /// No chain is completed within [`super::DEADLINE`].
    pub fn wait_used(&mut self) -> Used {
        let mut used = None;
        wait_until("a used buffer", || {
            used = self.pop_used();
            used.is_some()
        });
        used.expect("the wait ended with one")
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        let idx: u16 = self
            .ram
            .mem()
            .memory()
            .load(GuestAddress(self.used_ring.0 + 2), Ordering::Acquire)
            .expect("ring is in test RAM");
        u16::from_le(idx)
    }

    /// The current content of a buffer.
    pub fn read_buffer(&self, buffer: Buffer) -> Vec<u8> {
        self.ram.read(buffer.address, buffer.len as usize)
    }

    /// Clears everything, as after a device reset; the rings keep their addresses.
    pub fn clear(&mut self) {
        self.free = (0..self.size).rev().collect();
        self.in_flight.clear();
        self.used_seen = 0;
        self.ram.write(self.used_ring, &[0; 4]);
        self.ram.write(self.avail_ring, &[0; 4]);
        self.avail_idx = 0;
    }

    fn take_slot(&mut self) -> u16 {
        self.free.pop().expect("a free descriptor")
    }

    fn place(&self, segments: &[Segment<'_>]) -> Vec<(Buffer, u16)> {
        segments
            .iter()
            .map(|segment| match *segment {
                Segment::Readable(data) => {
                    let address = self.ram.alloc(data.len() as u64, 8);
                    self.ram.write(address, data);
                    (buffer(address, data.len() as u32), 0)
                }
                Segment::Writable(len) => (buffer(self.ram.alloc(u64::from(len), 8), len), WRITE),
                Segment::ReadableAt(address, len) => (buffer(address, len), 0),
                Segment::WritableAt(address, len) => (buffer(address, len), WRITE),
            })
            .collect()
    }

    fn finish(&mut self, slots: Vec<u16>, placed: &[(Buffer, u16)]) -> Chain {
        let head = slots[0];
        self.in_flight.insert(head, slots);
        self.offer(head);
        Chain {
            head,
            buffers: placed.iter().map(|(buffer, _)| *buffer).collect(),
        }
    }
}

fn buffer(address: GuestAddress, len: u32) -> Buffer {
    Buffer { address, len }
}
