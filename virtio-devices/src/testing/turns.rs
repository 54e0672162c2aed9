//! Tests that a device stops for a command after one piece of work and loses nothing, whatever its rings contain.

use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use super::handler::HandlerHarness;
use super::queue::{Desc, DriverQueue, INDIRECT, NEXT, WRITE};
use super::ram::TestRam;
use crate::device::{QueueHandler, VirtioDevice};
use crate::worker::Work;

pub(super) const RAM_BYTES: usize = 64 << 20;
/// Descriptors of the longest possible indirect table.
pub(super) const TABLE_ENTRIES: u16 = u16::MAX;
/// Address of a worst-case table, and of its buffers. Rings are below.
const TABLE_AT: u64 = 32 << 20;
pub(super) const DATA_AT: u64 = 34 << 20;
const DATA_BYTES: u64 = 16 << 20;
/// Number of chains on each queue: their length matters, not their number.
const CHAINS: u16 = 8;
/// The checks at which a command is announced.
const CALLS_AT: [u64; 4] = [0, 1, 2, 5];

/// The maximum work between two checks for a command: one system call, or one chain.
const PIECE: Work = Work {
    chains: 1,
    descriptors: 1024,
    ranges: 1024,
    bytes: 128 << 20,
    // 64 KiB in pieces of 4 KiB.
    calls: 16,
};

/// The largest allocation that serving any ring may cause.
#[cfg(test)]
const ALLOCATION_BYTES_MAX: usize = 8 << 20;

/// The content of the driver's rings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ring {
    pub(super) name: &'static str,
    /// Length of each descriptor but the first.
    len: u32,
    /// Flag of the second half of the table, if any: the first half is readable.
    later_flags: u16,
    /// Distance of the buffers.
    stride: u64,
}

pub(super) const RINGS: [Ring; 5] = [
    Ring {
        name: "empty readable descriptors",
        len: 0,
        later_flags: 0,
        stride: 0,
    },
    Ring {
        name: "empty writable descriptors",
        len: 0,
        later_flags: WRITE,
        stride: 0,
    },
    Ring {
        name: "readable pages",
        len: 4096,
        later_flags: 0,
        stride: 8192,
    },
    Ring {
        name: "writable pages",
        len: 4096,
        later_flags: WRITE,
        stride: 8192,
    },
    Ring {
        name: "writable buffers of 60 KiB",
        len: 60 << 10,
        later_flags: WRITE,
        stride: 64 << 10,
    },
];

/// Tests every queue of a device with every ring.
pub(super) fn stops_for_commands(make: &dyn Fn(&TestRam) -> Arc<Mutex<dyn VirtioDevice>>) {
    for ring in RINGS {
        for entries in [TABLE_ENTRIES, 64] {
            let (expected, most) = play(make, ring, entries, None);
            println!("  {} × {entries}: at most {most:?} at once", ring.name);
            assert_within_piece(most);
            for call_at in CALLS_AT {
                let (served, most) = play(make, ring, entries, Some(call_at));
                assert_within_piece(most);
                assert_eq!(
                    served, expected,
                    "{} × {entries}, call {call_at}",
                    ring.name
                );
            }
        }
    }
}

fn assert_within_piece(most: Work) {
    assert!(most.chains <= PIECE.chains, "{most:?}");
    assert!(most.descriptors <= PIECE.descriptors, "{most:?}");
    assert!(most.ranges <= PIECE.ranges, "{most:?}");
    assert!(most.bytes <= PIECE.bytes, "{most:?}");
    assert!(most.calls <= PIECE.calls, "{most:?}");
}

/// Serves full rings, with a pause at the given check for commands after each first kick. Returns the number of chains
/// used on each queue, and the maximum work between two checks.
fn play(
    make: &dyn Fn(&TestRam) -> Arc<Mutex<dyn VirtioDevice>>,
    ring: Ring,
    entries: u16,
    call_at: Option<u64>,
) -> (Vec<u16>, Work) {
    let ram = TestRam::new(RAM_BYTES);
    write_table(&ram, ring, entries);
    let device = make(&ram);
    let mut device = device.lock().expect("device lock is sound");
    let features = device.features();
    device.ack_features(features);
    let sizes = device.queue_sizes().to_vec();
    let mut used = Vec::new();
    let mut most = Work::default();
    for (at, handler) in device.take_handlers().into_iter().enumerate() {
        let mine: Vec<u16> = (0..sizes.len() as u16)
            .filter(|index| device.handler_of_queue(*index, features) == Some(at))
            .collect();
        let mut harness = HandlerHarness::with_ram(handler, features, ram.clone());
        device.set_interrupt(harness.interrupt.clone());
        for index in &mine {
            harness.add_queue(*index, CHAINS.min(sizes[usize::from(*index)]));
        }
        harness.activate().expect("the device starts");
        for index in &mine {
            fill(&mut harness, *index, entries);
        }
        for index in &mine {
            if let Some(looks) = call_at {
                harness.turn.call_after(looks);
            }
            within_allocations(|| harness.kick(*index)).expect("the ring is sound");
            // Chains collected from the ring may still be submitted to the kernel once.
            let in_spite = harness.turn.done_in_spite();
            assert!(in_spite.chains == 0 && in_spite.calls <= 1, "{in_spite:?}");
            assert_within_piece(in_spite);
            pause_stands_still(&mut harness, &mine);
        }
        within_allocations(|| serve_out(&mut harness, &mine));
        used.extend(mine.iter().map(|index| harness.queue(*index).used_idx()));
        most = most.max(harness.turn.most_between_looks());
    }
    (used, most)
}

/// Runs `serve`, which must allocate little. Only the tests of this crate have the allocator that records it.
fn within_allocations<T>(serve: impl FnOnce() -> T) -> T {
    #[cfg(not(test))]
    let served = serve();
    #[cfg(test)]
    let served = {
        let (served, allocated) = test_alloc::record(serve);
        assert!(
            allocated.largest_bytes <= ALLOCATION_BYTES_MAX,
            "{allocated:?}"
        );
        served
    };
    served
}

/// Executes the pause as the worker would, and checks that the ring does not change afterwards.
fn pause_stands_still(harness: &mut HandlerHarness<Box<dyn QueueHandler>>, queues: &[u16]) {
    harness.handler.pause();
    let used = used(harness, queues);
    harness.handler.pause();
    assert_eq!(self::used(harness, queues), used);
    harness.turn.set_called(false);
}

/// Kicks and waits until nothing changes any more.
fn serve_out(harness: &mut HandlerHarness<Box<dyn QueueHandler>>, queues: &[u16]) {
    loop {
        let before = used(harness, queues);
        for index in queues {
            harness.kick(*index).expect("the ring is sound");
        }
        harness.serve_sources(0).expect("the device continues");
        harness.handler.pause();
        if used(harness, queues) == before {
            return;
        }
    }
}

fn used(harness: &mut HandlerHarness<Box<dyn QueueHandler>>, queues: &[u16]) -> Vec<u16> {
    let used = queues.iter().map(|index| harness.queue(*index).used_idx());
    used.collect()
}

pub(super) fn write_table(ram: &TestRam, ring: Ring, entries: u16) {
    let descs = (0..entries).flat_map(|at| {
        let last = at + 1 == entries;
        let later = at >= entries / 2;
        let desc = Desc {
            addr: DATA_AT + u64::from(at) * ring.stride % DATA_BYTES,
            len: ring.len,
            flags: if last { 0 } else { NEXT } | if later { ring.later_flags } else { 0 },
            next: if last { 0 } else { at + 1 },
        };
        desc.bytes()
    });
    ram.write(GuestAddress(TABLE_AT), &descs.collect::<Vec<u8>>());
}

fn fill(harness: &mut HandlerHarness<Box<dyn QueueHandler>>, index: u16, entries: u16) {
    let queue = harness.queue(index);
    for _ in 0..queue.size() {
        push_table(queue, entries);
    }
}

/// Offers the table as a chain.
pub(super) fn push_table(queue: &mut DriverQueue, entries: u16) {
    queue.push_raw(&[Desc {
        addr: TABLE_AT,
        len: u32::from(entries) * Desc::BYTES as u32,
        flags: INDIRECT,
        next: 0,
    }]);
}
