//! Clock device (virtio-rtc, virtio 1.4 §5.23; virtio device id 17): a guest reads the host's clock, and so sets its own
//! right after a pause, without a network.
//!
//! There is one queue of requests. The device has one clock: UTC of the host, whose leap seconds may be smeared. It has
//! no alarms and no cross-timestamps, as in Cloud Hypervisor.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::counters::counters;
use crate::device::{Counters, QueueHandler, VirtioDevice, boxed};
use crate::empty_state::{empty_state, saves_empty_state};
use crate::queue::{ChainBuffers, ChainError, Driver, Reply, SingleQueue, SingleQueueDevice};
use crate::worker::Turn;

/// Virtio device id.
const DEVICE_TYPE: u32 = 17;
/// Entries of the request queue.
const QUEUE_SIZES: [u16; 1] = [256];

/// Request types.
const READ: u16 = 0x0001;
const CFG: u16 = 0x1000;
const CLOCK_CAP: u16 = 0x1001;
const CROSS_CAP: u16 = 0x1002;

/// A request has 8 bytes, of which the first two are the type, and most have as many again: the clock (u16) and reserved
/// bytes.
const HEAD_BYTES: usize = 8;
const REQUEST_BYTES: usize = 16;
/// Every response has a head, of which the first byte is the status, and 8 bytes of content.
const RESPONSE_BYTES: usize = 16;

/// `VIRTIO_RTC_CLOCK_UTC_MAYBE_SMEARED`: a host that follows a smearing time server does not tell.
const UTC_MAYBE_SMEARED: u64 = 4;
/// The number of clocks; the first has id 0.
const CLOCKS: u16 = 1;

counters! {
    Stats {
        requests,
        bad_requests,
    }
}

empty_state! {
    /// A clock device has no state besides its queue.
    RtcState = RTC
}

/// Failures of a request, with the status that the driver gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Failure {
    /// `VIRTIO_RTC_S_EOPNOTSUPP`: no such request.
    NotSupported = 2,
    /// `VIRTIO_RTC_S_ENODEV`: no such clock.
    NoClock = 3,
    /// `VIRTIO_RTC_S_EINVAL`: the request or the room for the response is too short.
    Invalid = 4,
    /// `VIRTIO_RTC_S_EIO`: the clock cannot be read.
    Unreadable = 5,
}

/// The configuration half. There is no device configuration.
#[derive(Debug)]
pub struct Rtc {
    handler: Option<Requests>,
    stats: Arc<Stats>,
}

impl Rtc {
    /// `id` names the device and its thread.
    pub fn new(id: &str) -> Self {
        Self::with_clock(id, SystemTime::now)
    }

    fn with_clock(id: &str, now: fn() -> SystemTime) -> Self {
        let stats = Arc::new(Stats::default());
        Self {
            handler: Some(Requests {
                name: id.to_owned(),
                now,
                stats: Arc::clone(&stats),
            }),
            stats,
        }
    }
}

impl VirtioDevice for Rtc {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take().map(SingleQueue::new))
    }

    saves_empty_state!(RtcState);

    fn counters(&self) -> Counters {
        self.stats.read()
    }
}

/// The queue half.
#[derive(Debug)]
struct Requests {
    name: String,
    now: fn() -> SystemTime,
    stats: Arc<Stats>,
}

impl Requests {
    /// The content of the response.
    fn serve(&self, request: &[u8]) -> Result<u64, Failure> {
        let word = |at: usize| {
            let bytes = request.get(at..at + 2).and_then(|it| it.try_into().ok());
            bytes.map(u16::from_le_bytes)
        };
        // The type is the first field of a head that must be whole.
        let head = request.get(..HEAD_BYTES).and_then(|_| word(0));
        let clock = || match request.len() < REQUEST_BYTES {
            true => Err(Failure::Invalid),
            false if word(HEAD_BYTES) < Some(CLOCKS) => Ok(()),
            false => Err(Failure::NoClock),
        };
        match head.ok_or(Failure::Invalid)? {
            CFG => Ok(u64::from(CLOCKS)),
            CLOCK_CAP => clock().map(|()| UTC_MAYBE_SMEARED),
            // No counter is supported.
            CROSS_CAP => clock().map(|()| 0),
            READ => clock().and_then(|()| self.read_clock()),
            _ => Err(Failure::NotSupported),
        }
    }

    /// Nanoseconds since the epoch.
    fn read_clock(&self) -> Result<u64, Failure> {
        let since_epoch = (self.now)().duration_since(UNIX_EPOCH);
        let nanoseconds = since_epoch.map(|it| u64::try_from(it.as_nanos()));
        nanoseconds
            .ok()
            .and_then(Result::ok)
            .ok_or(Failure::Unreadable)
    }
}

impl SingleQueueDevice for Requests {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn answer(
        &mut self,
        _driver: &Driver,
        request: Result<ChainBuffers, ChainError>,
        turn: &mut Turn,
    ) -> Reply {
        turn.charge_call(1, 0);
        self.stats.requests.count();
        let Ok(buffers) = request else {
            self.stats.bad_requests.count();
            return Reply::Done(0);
        };
        let mut bytes = [0; REQUEST_BYTES];
        let count = buffers.readable.copy_out(&mut bytes);
        let outcome = match buffers.writable.bytes() < RESPONSE_BYTES {
            true => Err(Failure::Invalid),
            false => self.serve(&bytes[..count]),
        };
        let mut response = [0; RESPONSE_BYTES];
        match outcome {
            Ok(content) => response[HEAD_BYTES..].copy_from_slice(&content.to_le_bytes()),
            Err(failure) => {
                self.stats.bad_requests.count();
                response[0] = failure as u8;
            }
        }
        let written = buffers.writable.copy_in(&response);
        Reply::Done(u32::try_from(written).expect("at most 16"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Duration;

    use crate::testing::{HandlerHarness, Segment, conformance};

    const ROOM: u32 = RESPONSE_BYTES as u32;
    /// 2001-09-09 01:46:40 UTC and one nanosecond.
    const NOW: u64 = 1_000_000_000_000_000_001;

    struct Rig {
        rtc: Rtc,
        harness: HandlerHarness<Box<dyn QueueHandler>>,
    }

    impl Rig {
        fn new() -> Self {
            Self::at(|| UNIX_EPOCH + Duration::from_nanos(NOW))
        }

        fn at(now: fn() -> SystemTime) -> Self {
            let mut rtc = Rtc::with_clock("_rtc", now);
            let handler = rtc.take_handlers().remove(0);
            let mut harness = HandlerHarness::new(handler, rtc.features());
            harness.add_queues(1);
            harness.activate().unwrap();
            Self { rtc, harness }
        }

        /// What the device writes into `room` bytes.
        fn request(&mut self, request: &[u8], room: u32) -> Vec<u8> {
            let segments = [Segment::Readable(request), Segment::Writable(room)];
            let (chain, used) = self.harness.request(0, &segments).unwrap();
            let mut response = self.harness.queue(0).read_buffer(chain.buffers[1]);
            response.truncate(used.unwrap().len as usize);
            response
        }

        fn ask(&mut self, kind: u16, clock: u16) -> Vec<u8> {
            self.request(&message(kind, clock), ROOM)
        }
    }

    fn message(kind: u16, clock: u16) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..10].copy_from_slice(&clock.to_le_bytes());
        bytes
    }

    fn response(status: u8, content: u64) -> Vec<u8> {
        [u64::from(status), content].map(u64::to_le_bytes).concat()
    }

    #[test]
    fn rtc_conforms() {
        conformance("rtc", |_| Arc::new(Mutex::new(Rtc::new("_rtc"))));
    }

    #[test]
    fn driver_finds_one_clock_and_reads_it() {
        let mut rig = Rig::new();
        let head = &message(CFG, 0)[..HEAD_BYTES];
        assert_eq!(rig.request(head, ROOM), response(0, 1));
        // The type is the first byte: no smearing is named, and there is no alarm.
        assert_eq!(rig.ask(CLOCK_CAP, 0), response(0, 4));
        assert_eq!(rig.ask(CROSS_CAP, 0), response(0, 0));
        assert_eq!(rig.ask(READ, 0), response(0, NOW));
        assert_eq!(rig.rtc.counters()["requests"], 4);
        assert_eq!(rig.rtc.counters()["bad_requests"], 0);
    }

    #[test]
    fn clock_is_that_of_the_host() {
        let mut rig = Rig::at(SystemTime::now);
        let read = |rig: &mut Rig| {
            let response = rig.ask(READ, 0);
            u64::from_le_bytes(response[8..].try_into().unwrap())
        };
        let since_epoch = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let before = since_epoch();
        let told = Duration::from_nanos(read(&mut rig));
        assert!(before <= told && told <= since_epoch());
    }

    #[test]
    fn requests_that_cannot_be_served_get_their_status() {
        let mut rig = Rig::new();
        for kind in [CLOCK_CAP, CROSS_CAP, READ] {
            assert_eq!(rig.ask(kind, 1), response(3, 0));
            assert_eq!(rig.ask(kind, u16::MAX), response(3, 0));
            let short = &message(kind, 0)[..REQUEST_BYTES - 1];
            assert_eq!(rig.request(short, ROOM), response(4, 0));
        }
        // Cross-timestamps, alarms, and what nobody has defined.
        for kind in [0, 2, 0x1003, 0x1004, 0x2000, u16::MAX] {
            assert_eq!(rig.ask(kind, 0), response(2, 0));
        }
        for bytes in [0, 1, HEAD_BYTES - 1] {
            let cut = &message(CFG, 0)[..bytes];
            assert_eq!(rig.request(cut, ROOM), response(4, 0));
        }
        let requests = rig.rtc.counters()["requests"];
        assert_eq!(rig.rtc.counters()["bad_requests"], requests);
    }

    #[test]
    fn response_without_room_says_so_as_far_as_it_fits() {
        let mut rig = Rig::new();
        for room in [1, HEAD_BYTES, RESPONSE_BYTES - 1] {
            let written = rig.request(&message(READ, 0), room.try_into().unwrap());
            assert_eq!(written, response(4, 0)[..room]);
        }
        let more = rig.request(&message(READ, 0), 100);
        assert_eq!(more, response(0, NOW));
    }

    #[test]
    fn clock_before_the_epoch_or_beyond_64_bits_is_an_error() {
        let mut rig = Rig::at(|| UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!(rig.ask(READ, 0), response(5, 0));
        let mut rig = Rig::at(|| UNIX_EPOCH + Duration::from_secs(1 << 40));
        assert_eq!(rig.ask(READ, 0), response(5, 0));
    }
}
