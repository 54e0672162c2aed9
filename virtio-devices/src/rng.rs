//! Entropy device (virtio 1.2 §5.4): one queue of buffers that the device fills
//! with random bytes from a host file.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::Arc;

use crate::counters::counters;
use crate::device::{Counters, QueueHandler, VirtioDevice, boxed};
use crate::empty_state::{empty_state, saves_empty_state};
use crate::queue::{
    ChainBuffers, ChainError, Driver, GuestBuffers, Reply, SingleQueue, SingleQueueDevice,
};
use crate::worker::Turn;

/// Virtio device id.
const DEVICE_TYPE: u32 = 4;
/// Entries of the one queue. Linux keeps a single request in flight.
const QUEUE_SIZES: [u16; 1] = [256];
/// Maximum number of bytes per request; a longer one is completed short, which §5.4.6 allows. Linux requests 64 at a
/// time.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Bytes read from the source at once.
const CHUNK_BYTES: usize = 4 << 10;

counters! {
    Stats {
        bytes,
        requests,
        bad_requests,
        source_failures,
    }
}

empty_state! {
    /// An entropy device has no state besides its queue.
    RngState = RNG
}

/// The configuration half. There is no device configuration.
#[derive(Debug)]
pub struct Rng {
    handler: Option<RngHandler>,
    stats: Arc<Stats>,
}

impl Rng {
    /// Serves from `source`; `id` names the device and its thread. A source that can run out of data (a FIFO,
    /// `/dev/hwrng`) must be non-blocking; otherwise a pause of the VM waits for it. A request that the source cannot
    /// serve is completed empty.
    pub fn new(id: &str, source: File) -> Self {
        let stats = Arc::new(Stats::default());
        Self {
            handler: Some(RngHandler {
                name: id.to_owned(),
                source,
                stats: Arc::clone(&stats),
                chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
            }),
            stats,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take().map(SingleQueue::new))
    }

    saves_empty_state!(RngState);

    fn counters(&self) -> Counters {
        self.stats.read()
    }
}

/// The queue half.
#[derive(Debug)]
struct RngHandler {
    name: String,
    source: File,
    stats: Arc<Stats>,
    chunk: Box<[u8]>,
}

impl RngHandler {
    /// Fills the front of `buffers` and returns the number of bytes.
    fn fill(&mut self, mut buffers: GuestBuffers, turn: &mut Turn) -> u32 {
        let mut filled = 0;
        let wanted = buffers.bytes().min(REQUEST_BYTES_MAX);
        while filled < wanted {
            let room = self.chunk.len().min(wanted - filled);
            turn.charge_call(1, room as u64);
            match self.source.read(&mut self.chunk[..room]) {
                Ok(count) if count > 0 => {
                    buffers.copy_in(&self.chunk[..count]);
                    buffers.advance(count);
                    filled += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // End of file, no data, or an error: the driver gets the bytes read so far.
                Ok(_) | Err(_) => {
                    self.stats.source_failures.count();
                    break;
                }
            }
        }
        self.stats.bytes.add(filled as u64);
        u32::try_from(filled).expect("at most 64 KiB")
    }
}

impl SingleQueueDevice for RngHandler {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn answer(
        &mut self,
        _driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        self.stats.requests.count();
        Reply::Done(match request {
            Ok(buffers) if buffers.writable.bytes() > 0 => self.fill(buffers.writable, turn),
            _ => {
                self.stats.bad_requests.count();
                0
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Mutex;

    use crate::testing::{Desc, HandlerHarness, NEXT, Segment, WRITE, conformance};

    fn harness(source: File) -> (Rng, HandlerHarness<Box<dyn QueueHandler>>) {
        let mut rng = Rng::new("__rng", source);
        let handler = rng.take_handlers().remove(0);
        let mut harness = HandlerHarness::new(handler, rng.features());
        harness.add_queues(1);
        harness.activate().unwrap();
        (rng, harness)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    #[test]
    fn rng_conforms() {
        conformance("rng", |_| {
            let source = File::open("/dev/urandom").unwrap();
            Arc::new(Mutex::new(Rng::new("__rng", source)))
        });
    }

    #[test]
    fn request_of_several_buffers_gets_the_source_in_order() {
        let (rng, mut harness) = harness(file(b"0123456789"));
        let segments = [
            Segment::Readable(b"no"),
            Segment::Writable(4),
            Segment::Writable(3),
        ];
        let (chain, used) = harness.request(0, &segments).unwrap();
        assert_eq!(used.unwrap().len, 7);
        assert_eq!(harness.queue(0).read_buffer(chain.buffers[1]), b"0123");
        assert_eq!(harness.queue(0).read_buffer(chain.buffers[2]), b"456");
        assert_eq!(harness.interrupt.queue_signals(0), 1);
        assert_eq!(rng.counters()["bytes"], 7);
    }

    #[test]
    fn request_beyond_the_bound_is_answered_short() {
        let (_, mut harness) = harness(File::open("/dev/urandom").unwrap());
        let (_, used) = harness.request(0, &[Segment::Writable(1 << 20)]).unwrap();
        assert_eq!(used.unwrap().len, 64 << 10);
    }

    #[test]
    fn source_that_ends_gives_what_it_has_then_nothing() {
        let (rng, mut harness) = harness(file(b"abc"));
        let (_, used) = harness.request(0, &[Segment::Writable(8)]).unwrap();
        assert_eq!(used.unwrap().len, 3);
        let (_, used) = harness.request(0, &[Segment::Writable(8)]).unwrap();
        assert_eq!(used.unwrap().len, 0);
        assert_eq!(rng.counters()["source_failures"], 2);
    }

    #[test]
    fn requests_without_usable_buffers_are_answered_empty_and_counted() {
        let (rng, mut harness) = harness(file(b"abc"));
        let outside = Desc {
            addr: u64::MAX - 64,
            len: 16,
            flags: WRITE,
            next: 0,
        };
        let inside = Desc {
            addr: 0x10_0000,
            len: 16,
            flags: NEXT | WRITE,
            next: 0,
        };
        for garbage in [outside, inside] {
            harness.queue(0).push_raw(&[garbage]);
        }
        harness.queue(0).push(&[Segment::Readable(b"x")]);
        harness.queue(0).offer(900);
        harness.kick(0).unwrap();
        for _ in 0..3 {
            assert_eq!(harness.queue(0).pop_used().unwrap().len, 0);
        }
        assert_eq!(harness.queue(0).pop_used(), None);
        assert_eq!(rng.counters()["bad_requests"], 4);
        assert_eq!(rng.counters()["bytes"], 0);
    }

    #[test]
    fn requests_beyond_one_call_are_all_served() {
        let (rng, mut harness) = harness(File::open("/dev/urandom").unwrap());
        for _ in 0..60 {
            harness.queue(0).push(&[Segment::Writable(8)]);
        }
        harness.kick(0).unwrap();
        assert_eq!(harness.queue(0).used_idx(), 60);
        assert_eq!(rng.counters()["bytes"], 480);
    }
}
