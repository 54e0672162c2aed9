//! A guest with arbitrary behaviour, for any device: used by the fuzz target `devices`, and by the ordinary tests with
//! random bytes.
//!
//! It writes any descriptor, any ring index, any byte of the configuration space and of its own RAM, in any order. It
//! also sends requests of the usual structure with any header, and resets the device. In between, the device is paused
//! and saved. Afterwards it checks the invariants:
//!
//! * memory around the guest's RAM is unchanged;
//! * a device behind a virtual IOMMU does not change memory that is mapped read-only;
//! * a saved state can be restored;
//! * the device works again after a reset.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, Permissions};

use super::any_device::{self, Made};
use super::any_request;
use super::any_vsock;
use super::fuzz_input::{FORM_START, Input, SOLID_PAGES, SPARE_PFN, driver_ram};
use super::handler::HandlerHarness;
use super::interrupt::MockInterrupt;
use super::queue::{Desc, NEXT, WRITE};
use super::ram::TestRam;
use crate::device::QueueHandler;
use crate::dma::{DmaEndpoint, Shared};
use crate::reclaim::guarded_ram::{GuardedRam, PAGE};
use crate::unpoisoned::Unpoisoned as _;

/// Maximum number of steps per input; further bytes are ignored.
const STEPS_MAX: usize = 64;
const QUEUE_SIZE_MAX: u16 = 32;
const VERSION_1: u64 = 1 << 32;
const HEADER_BYTES_MAX: u8 = 56;
/// The place for a response, behind any header.
const ANSWER_OFFSET: u64 = 128;
/// Pieces of one access through an IOMMU.
const PIECES_MAX: usize = 16;
/// Number of the device at the virtual IOMMU, and its domain.
const ENDPOINT: u32 = 1;
/// A device behind it can write the pages before these, and read these.
const READ_ONLY_PAGES: Range<u64> = SPARE_PFN + 8..SOLID_PAGES as u64;

/// Runs the steps that the bytes describe, the first of which chooses the device; returns the number of chains that the
/// device has completed.
///
/// # Panics
/// An invariant is violated.
#[must_use]
pub fn run(bytes: &[u8]) -> u64 {
    let mut input = Input(bytes);
    let choice = input.byte();
    run_with(choice, input)
}

fn run_with(choice: u8, mut input: Input<'_>) -> u64 {
    any_device::with_ram(choice, |guarded| {
        guarded.refill();
        let mut guest = Guest::new(choice, guarded, &mut input);
        for _ in 0..STEPS_MAX {
            if input.is_empty() {
                break;
            }
            guest.step(&mut input);
        }
        guest.check_service();
        guest.check_read_only_pages();
        guarded.check_guards();
        guest.answered
    })
}

/// A header with a request type and its subject, in the places that most devices use: a sector, an address or a domain.
fn sound_header(input: &mut Input<'_>) -> Vec<u8> {
    let kind = u32::from(input.byte() % 16);
    let domain = u32::from(input.byte() % 3);
    let place = match input.byte() {
        sector @ 0..=127 => u64::from(sector),
        block @ 128..=191 => any_device::mem_block(block % 4),
        page => u64::from(page % SOLID_PAGES) * PAGE as u64,
    };
    let mut header = kind.to_le_bytes().to_vec();
    header.extend(domain.to_le_bytes());
    header.extend(place.to_le_bytes());
    // The field after the address: the number of blocks, or the end of a mapping.
    let more = input.byte();
    if more & 1 != 0 {
        header.extend((place + u64::from(more) * PAGE as u64 - 1).to_le_bytes());
        header.extend(place.to_le_bytes());
        header.extend(u32::from(more >> 1).to_le_bytes());
    } else if more & 2 != 0 {
        header.extend(u64::from(more >> 6).to_le_bytes());
    }
    header
}

type Harness = HandlerHarness<Box<dyn QueueHandler>>;

struct Guest {
    choice: u8,
    made: Made,
    /// One per handler, with the queues it serves.
    harnesses: Vec<Harness>,
    /// The handler of each queue.
    served_by: Vec<Option<usize>>,
    ram: TestRam,
    features: u64,
    /// The read-only pages, if the device is behind an IOMMU.
    read_only: Option<Vec<u8>>,
    answered: u64,
}

/// The connection of a device behind an IOMMU, with its mappings.
fn endpoint() -> Arc<DmaEndpoint> {
    let shared = Arc::new(Shared::new(u64::MAX).expect("descriptors"));
    let endpoint = DmaEndpoint::new(Arc::clone(&shared), None);
    endpoint.place(ENDPOINT);
    let mapped = shared.change(|tables| {
        tables.attach(ENDPOINT, ENDPOINT, false)?;
        let pages = [
            (0..READ_ONLY_PAGES.start, Permissions::ReadWrite),
            (READ_ONLY_PAGES, Permissions::Read),
        ];
        pages.into_iter().try_for_each(|(pages, allows)| {
            let first = pages.start * PAGE as u64;
            let last = pages.end * PAGE as u64 - 1;
            tables.map(ENDPOINT, first..=last, first, allows)
        })
    });
    mapped.expect("sound mappings");
    Arc::new(endpoint)
}

impl Guest {
    fn new(choice: u8, guarded: &GuardedRam, input: &mut Input<'_>) -> Self {
        let ram = driver_ram(guarded);
        let made = any_device::make(choice, &ram);
        let mut device = made.device.lock().unpoisoned();
        device.set_interrupt(Arc::new(MockInterrupt::default()));
        let features = device.features() & input.number(8) | VERSION_1;
        let mut harnesses: Vec<Harness> = device
            .take_handlers()
            .into_iter()
            .map(|handler| HandlerHarness::with_ram(handler, features, ram.clone()))
            .collect();
        let mut served_by = Vec::new();
        let sizes = device.queue_sizes().to_vec();
        for (index, size) in (0..).zip(sizes) {
            let handler = device.handler_of_queue(index, features);
            if let Some(handler) = handler {
                // RAM is filled with patterns, including the rings.
                let queue = harnesses[handler].add_queue(index, size.min(QUEUE_SIZE_MAX));
                queue.clear();
            }
            served_by.push(handler);
        }
        drop(device);
        let circumstances = input.byte();
        let is_behind_iommu = circumstances.is_multiple_of(2) && any_device::uses_dma(choice);
        let ram_memory = ram.mem();
        match circumstances & 2 {
            // A migration is under way.
            0 => ram_memory
                .writes()
                .start(std::iter::once(0..u64::from(SOLID_PAGES) * PAGE as u64)),
            _ => ram_memory.writes().stop(),
        }
        if is_behind_iommu {
            let dma = endpoint();
            for harness in &mut harnesses {
                harness.dma = Some(Arc::clone(&dma));
            }
        }
        let mut guest = Self {
            choice,
            made,
            harnesses,
            served_by,
            ram,
            features,
            read_only: None,
            answered: 0,
        };
        guest.read_only = is_behind_iommu.then(|| guest.read_only_pages());
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let device = &self.made.device;
        device.lock().unpoisoned().ack_features(self.features);
        for harness in &mut self.harnesses {
            harness.activate().expect("the host has what it takes");
        }
    }

    fn read_only_pages(&self) -> Vec<u8> {
        let Range { start, end } = READ_ONLY_PAGES;
        let bytes = (end - start) as usize * PAGE;
        self.ram.read(GuestAddress(start * PAGE as u64), bytes)
    }

    fn check_read_only_pages(&self) {
        if let Some(before) = &self.read_only {
            assert!(
                *before == self.read_only_pages(),
                "a page was only readable"
            );
        }
    }

    /// Resets the device like a driver that starts over.
    fn reset(&mut self) {
        self.count_answers();
        for harness in &mut self.harnesses {
            harness.reset();
        }
        self.made.device.lock().unpoisoned().reset();
        self.activate();
    }

    fn count_answers(&mut self) {
        for index in 0..self.served_by.len() {
            if let Some(harness) = self.served_by[index] {
                let queue = self.harnesses[harness].queue(index as u16);
                self.answered += u64::from(queue.used_idx());
            }
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let index = u16::from(choice >> 4) % self.served_by.len() as u16;
        let Some(harness) = self.served_by[usize::from(index)] else {
            return;
        };
        let harness = &mut self.harnesses[harness];
        match choice % 16 {
            0..=2 => {
                input.offer_chain(harness.queue(index));
                self.kick(index);
            }
            3..=7 => self.offer_request(index, input),
            8 => self.kick(index),
            9 => harness.queue(index).set_avail_idx(input.word()),
            10 => harness.queue(index).offer(input.word()),
            11 => {
                self.check_read_only_pages();
                input.write_ram(&self.ram);
                self.read_only = self.read_only.take().map(|_| self.read_only_pages());
            }
            12 => self.touch_config(input),
            13 => self.reset(),
            14 => self.save(),
            _ => {
                self.send_frame(input);
                self.access_through_iommu(input);
                if let Some(programs) = &mut self.made.programs {
                    programs.act(input);
                }
                self.serve_sources();
            }
        }
    }

    /// Sends a frame for the device to receive, and empties the socket of frames that it has sent.
    fn send_frame(&mut self, input: &mut Input<'_>) {
        let Some(wire) = &self.made.wire else {
            return;
        };
        let mut taken = [0; 256];
        while wire.recv(&mut taken).is_ok() {}
        let mut frame = vec![0; usize::from(input.word() % 2048)];
        for byte in frame.iter_mut().take(32) {
            *byte = input.byte();
        }
        // A full socket is a host condition, as with a tap.
        wire.send(&frame).ok();
    }

    /// Lets devices behind the IOMMU, if this is one, access memory.
    fn access_through_iommu(&self, input: &mut Input<'_>) {
        for endpoint in &self.made.endpoints {
            let access = match input.byte() % 3 {
                0 => Permissions::Read,
                1 => Permissions::Write,
                _ => Permissions::ReadWrite,
            };
            let address = u64::from(input.byte()) * PAGE as u64;
            let translated = endpoint
                .access()
                .translate(address, PAGE as u64, access, PIECES_MAX);
            assert!(translated.is_err() || translated.is_ok_and(|pieces| !pieces.is_empty()));
        }
    }

    /// Reads everything that the host can, as statistics and logs do.
    fn look(&self) {
        let device = self.made.device.lock().unpoisoned();
        assert!(device.device_type() > 0);
        let _counters = device.counters();
        let _memory = device.memory();
        for harness in &self.harnesses {
            assert!(!harness.handler.name().is_empty());
        }
    }

    /// Offers a request as the device's driver makes it.
    fn offer_own_request(&mut self, index: u16, input: &mut Input<'_>) -> bool {
        let Some(request) = any_request::request(any_device::name(self.choice), index, input)
        else {
            return false;
        };
        self.ram.write(GuestAddress(FORM_START), &request.head);
        let place = input.byte();
        // Not always as aligned as direct I/O must be.
        let data =
            u64::from(place % SOLID_PAGES) * PAGE as u64 + u64::from(place / SOLID_PAGES) * 4;
        let answer = FORM_START + ANSWER_OFFSET;
        let flags = if request.is_data_writable { WRITE } else { 0 };
        let parts = [
            (FORM_START, request.head.len() as u32, 0),
            (data, request.data_bytes, flags),
            (answer, request.answer_bytes, WRITE),
        ];
        self.offer_parts(
            index,
            parts
                .into_iter()
                .filter(|(_, bytes, _)| *bytes > 0)
                .collect(),
        );
        true
    }

    /// Offers a request with the structure that most devices use: a readable header, data, and space for the response.
    fn offer_request(&mut self, index: u16, input: &mut Input<'_>) {
        let bytes = input.byte();
        if bytes < 0x60 && self.offer_own_request(index, input) {
            return;
        }
        let is_packet = self.made.programs.is_some() && bytes < 0xe0;
        let header: Vec<u8> = if is_packet {
            any_vsock::header(input)
        } else if bytes < 0xa0 {
            sound_header(input)
        } else {
            (0..=bytes % HEADER_BYTES_MAX)
                .map(|_| input.byte())
                .collect()
        };
        self.ram.write(GuestAddress(FORM_START), &header);
        let shape = input.byte();
        let is_sound = shape & 0x40 == 0;
        let mut parts = vec![(FORM_START, header.len() as u32, 0)];
        for bit in 0..shape & 3 {
            let writable = shape >> (bit + 2) & 1 != 0;
            let page = u64::from(input.byte() % SOLID_PAGES);
            let length = u32::from(input.word() % (4 * PAGE as u16));
            let length = if is_sound { length & !511 } else { length };
            parts.push((page * PAGE as u64, length, if writable { WRITE } else { 0 }));
        }
        if shape & 0x80 == 0 {
            let answer = FORM_START + ANSWER_OFFSET;
            let length = match shape >> 3 & 7 {
                length if !is_sound => u32::from(length),
                // The status of a disk, or another response.
                0..=4 => 1,
                _ => 16,
            };
            parts.push((answer, length, WRITE));
        }
        if is_packet {
            let readable = parts.iter().skip(1).filter(|(_, _, flags)| *flags == 0);
            let len: u32 = readable.map(|(_, len, _)| len).sum();
            let field = GuestAddress(FORM_START + any_vsock::LEN_OFFSET);
            self.ram.write(field, &len.to_le_bytes());
        }
        self.offer_parts(index, parts);
    }

    /// Offers a chain of these parts: address, length and flags.
    fn offer_parts(&mut self, index: u16, parts: Vec<(u64, u32, u16)>) {
        let harness = self.served_by[usize::from(index)].expect("a queue that is served");
        let queue = self.harnesses[harness].queue(index);
        let count = (parts.len() as u16).min(queue.size());
        for (slot, (addr, len, flags)) in (0..count).zip(parts) {
            let more = if slot + 1 < count { NEXT } else { 0 };
            let desc = Desc {
                addr,
                len,
                flags: flags | more,
                next: slot + 1,
            };
            queue.write_desc(slot, desc);
        }
        queue.offer(0);
        self.kick(index);
    }

    fn kick(&mut self, index: u16) {
        let Some(harness) = self.served_by[usize::from(index)] else {
            return;
        };
        if self.harnesses[harness].kick(index).is_err() {
            // DEVICE_NEEDS_RESET: a driver can recover only by a reset.
            self.reset();
        }
    }

    fn serve_sources(&mut self) {
        let served: Result<Vec<_>, _> = self
            .harnesses
            .iter_mut()
            .map(|harness| harness.serve_sources(0))
            .collect();
        if served.is_err() {
            self.reset();
        }
    }

    fn touch_config(&mut self, input: &mut Input<'_>) {
        let offset = match input.byte() {
            near @ 0..=191 => u64::from(near),
            _ => input.number(8),
        };
        let bytes = usize::from(input.byte() % 9);
        let mut data = input.number(8).to_le_bytes();
        let mut device = self.made.device.lock().unpoisoned();
        device.write_config(offset, &data[..bytes]);
        device.read_config(offset, &mut data[..bytes]);
    }

    /// Pauses, saves, restores a second device from the saved state, and continues the first one.
    fn save(&mut self) {
        self.look();
        let second = any_device::make(self.choice, &self.ram);
        let mut other = second.device.lock().unpoisoned();
        for harness in &mut self.harnesses {
            harness.handler.pause();
        }
        let state = self.made.device.lock().unpoisoned().state();
        other.ack_features(self.features);
        other.restore(&state).expect("its own state");
        for (harness, mut handler) in self.harnesses.iter().zip(other.take_handlers()) {
            let state = harness.handler.state();
            handler.restore(state.own.as_ref()).expect("its own state");
        }
        for harness in &mut self.harnesses {
            harness.handler.resume();
        }
        for index in 0..self.served_by.len() {
            self.kick(index as u16);
        }
    }

    /// Checks that after a driver starts over, the device makes no errors with empty rings.
    fn check_service(&mut self) {
        self.reset();
        for index in 0..self.served_by.len() as u16 {
            if let Some(harness) = self.served_by[usize::from(index)] {
                let harness = &mut self.harnesses[harness];
                harness.kick(index).expect("a fresh start is served");
                assert_eq!(harness.queue(index).used_idx(), 0, "nothing was asked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// Every device must complete some chains of random bytes; otherwise the checks mean nothing.
    #[test]
    fn guest_of_random_bytes_breaks_no_device() {
        let mut runner = TestRunner::deterministic();
        for (choice, name) in (0..).zip(any_device::NAMES) {
            let mut answered = 0;
            for _ in 0..60 {
                let bytes = proptest::collection::vec(any::<u8>(), 0..1500)
                    .new_tree(&mut runner)
                    .expect("bytes")
                    .current();
                answered += run_with(choice, Input(&bytes));
            }
            println!("{name}: {answered} answers");
            let is_served = !matches!(name, "fs" | "vhost-user");
            assert!(!is_served || answered > 0, "{name}");
        }
    }
}
