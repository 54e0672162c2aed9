//! An arbitrary back end against the front end, for the fuzz target `back_end`.
//!
//! The input determines the response to each message: correct, modified, noise, or the end of the connection. If the
//! front end could interpret a response as the beginning of a longer message, the connection ends, so that no test
//! waits forever.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::gate::ALL_PAIRS;
use super::profile::Profile;
use super::rings::Rings;
use super::session::Session;
use crate::device::{Activation, ActiveQueue, GuestRam};
use crate::testing::fuzz_input::Input;
use crate::testing::{DriverQueue, MockInterrupt, Segment, TestRam};

const RAM_BYTES: usize = 256 << 10;
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 8;
/// Features of a driver that uses what it can.
const FEATURES: u64 = super::RING_FEATURES;
/// Starts and stops in one connection.
const STARTS_MAX: u8 = 4;
const HEADER_BYTES: usize = 12;
/// No message of a front end is longer.
const BODY_BYTES_MAX: usize = 4096;
/// Changes to an answer.
const EDITS_MAX: u8 = 4;
/// Descriptors with one answer.
const FDS_MAX: u8 = 3;
const REPLY: u32 = 1 | 1 << 2;
const NEEDS_REPLY: u32 = 1 << 3;

// Messages with an answer (vhost-user protocol, "Front-end message types").
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const GET_MAX_MEM_SLOTS: u32 = 36;

fn file(bytes: usize) -> File {
    let file = tempfile::tempfile().expect("files can be made");
    file.set_len(bytes as u64).expect("they can grow");
    file
}

fn ram() -> TestRam {
    let range = (
        GuestAddress(0),
        RAM_BYTES,
        Some(FileOffset::new(file(RAM_BYTES), 0)),
    );
    let map = GuestMemoryMmap::from_ranges_with_files([range]).expect("RAM can be mapped");
    TestRam::around(GuestRam::new(map), 0, RAM_BYTES as u64)
}

/// Plays the bytes; returns how often the back end was started and stopped.
///
/// # Panics
/// The front end has accepted what it must not.
pub fn run(bytes: &[u8]) -> u8 {
    let mut input = Input(bytes);
    let profile = match input.byte() % 3 {
        0 => Profile::block(),
        1 => Profile::of_type(u32::from(input.byte())),
        _ => Profile::of_type(4),
    };
    let starts = input.byte() % STARTS_MAX + 1;
    let (near, far) = UnixStream::pair().expect("sockets");
    std::thread::scope(|scope| {
        let own = input.0;
        scope.spawn(move || back_end(far, Input(own)));
        // An error ends the connection, and with it the other thread.
        let mut stopped = 0;
        front_end(near, &profile, starts, &mut stopped);
        stopped
    })
}

fn front_end(stream: UnixStream, profile: &Profile, starts: u8, stopped: &mut u8) -> Option<()> {
    let mut session = Session::open(stream, QUEUES.into()).ok()?;
    let sizes = [QUEUE_SIZE; QUEUES as usize];
    let config = session.config(profile.config_size()).ok()?;
    let config = profile.complete(config, &sizes);
    assert!(profile.has_config_of(config.len()));
    let ram = ram();
    let mut driver: Vec<_> = sizes.map(|size| DriverQueue::new(&ram, size)).into();
    let queues = (0..).zip(&driver).map(|(index, queue)| ActiveQueue {
        index,
        queue: queue.device_queue(),
        doorbell: Arc::new(EventFd::new(EFD_NONBLOCK).expect("descriptors")),
        dma: None,
    });
    let rings = Rings::new(Activation {
        mem: ram.mem(),
        features: FEATURES,
        queues: queues.collect(),
        interrupt: Arc::new(MockInterrupt::default()),
    });
    let rings = rings.expect("descriptors");
    for _ in 0..starts {
        driver[0].push(&[Segment::Writable(8)]);
        let outcome = session
            .start(&rings, 0, 1)
            // The driver of a network interface uses fewer pairs, then more.
            .and_then(|()| session.set_pairs(&rings, 0, 1))
            .and_then(|()| session.set_pairs(&rings, ALL_PAIRS, 0))
            .and_then(|()| session.stop(&rings));
        if outcome.is_err() {
            rings.continue_after_loss();
        }
        for (position, queue) in rings.positions().iter().zip(&driver) {
            // Nothing was completed, and the next chain is one that the driver has made available.
            assert_eq!(position.next_used, 0);
            let mem = ram.mem().memory();
            let available = queue.device_queue().avail_idx(&*mem, Ordering::Acquire);
            assert!(position.next_avail <= available.expect("in RAM").0);
        }
        outcome.ok()?;
        *stopped += 1;
    }
    Some(())
}

fn back_end(mut stream: UnixStream, mut input: Input<'_>) -> Option<()> {
    let record = file(BODY_BYTES_MAX);
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("a word"));
        let (request, flags) = (word(0), word(4));
        let mut body = vec![0; (word(8) as usize).min(BODY_BYTES_MAX)];
        stream.read_exact(&mut body).ok()?;
        let Some(mut answer) = proper_answer(request, flags, &body, &mut input) else {
            continue;
        };
        let mut fds = usize::from(request == GET_INFLIGHT_FD);
        let mut ends = false;
        match input.byte() % 8 {
            0..=3 => {}
            // A lie of the right size.
            4 | 5 => {
                for _ in 0..=input.byte() % EDITS_MAX {
                    let at = usize::from(input.word()) % answer.len();
                    answer[at] = input.byte();
                }
                ends = answer[8..12] != ((answer.len() - HEADER_BYTES) as u32).to_le_bytes();
            }
            6 => {
                let bytes = usize::from(input.word()) % (2 * BODY_BYTES_MAX);
                answer = (0..bytes).map(|_| input.byte()).collect();
                ends = true;
            }
            _ => {
                answer.truncate(usize::from(input.byte()) % answer.len());
                fds = usize::from(input.byte() % FDS_MAX);
                ends = true;
            }
        }
        let fds = vec![record.as_raw_fd(); fds];
        if !answer.is_empty() {
            let sent = stream.send_with_fds(&[&answer[..]], &fds).ok()?;
            stream.write_all(&answer[sent..]).ok()?;
        }
        if ends {
            stream.shutdown(Shutdown::Write).ok()?;
        }
    }
}

/// Header and body; `None` if the message has no answer.
fn proper_answer(request: u32, flags: u32, body: &[u8], input: &mut Input<'_>) -> Option<Vec<u8>> {
    let number = |value: u64| value.to_le_bytes().to_vec();
    let body = match request {
        GET_FEATURES => number(FEATURES | 1 << 30 | input.number(4)),
        GET_PROTOCOL_FEATURES => number(input.number(4)),
        GET_QUEUE_NUM => number(u64::from(QUEUES) + u64::from(input.byte() % 8)),
        GET_MAX_MEM_SLOTS => number(input.number(2)),
        GET_VRING_BASE => {
            let index = body.get(..4).unwrap_or_default();
            [index, &(input.number(4) as u32).to_le_bytes()].concat()
        }
        GET_CONFIG => body.to_vec(),
        GET_INFLIGHT_FD => {
            let size = number(input.number(8));
            let offset = number(input.number(8));
            [&size[..], &offset, body.get(16..).unwrap_or_default()].concat()
        }
        _ if flags & NEEDS_REPLY != 0 => number(u64::from(input.byte() % 2)),
        _ => return None,
    };
    let header = [request, REPLY, body.len() as u32].map(u32::to_le_bytes);
    Some([header.as_flattened(), &body].concat())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    #[test]
    fn back_end_of_random_bytes_breaks_no_front_end() {
        let mut runner = TestRunner::deterministic();
        for _ in 0..500 {
            let bytes = prop::collection::vec(any::<u8>(), 0..300);
            let _stopped = super::run(&bytes.new_tree(&mut runner).expect("bytes").current());
        }
    }

    /// Zeros are the proper answers, so a whole dialogue is reached.
    #[test]
    fn back_end_of_zeros_is_served_to_the_end() {
        assert_eq!(super::run(&[1, 4, 3]), 4);
    }
}
