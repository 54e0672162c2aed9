//! Simulates a fuzzed guest: any sequence of bytes drives a balloon over real memory.
//!
//! The fuzz targets call [`run`], and so do the ordinary tests with random bytes. The simulated driver writes any
//! descriptor, ring index, field of the configuration space and byte of its own RAM, in any order. Afterwards it checks
//! the invariants:
//!
//! * memory around the guest's RAM is unchanged;
//! * every byte requested was discarded, skipped for a reason, or failed;
//! * the balloon never reports more memory as given up than the guest has;
//! * the device works again after a reset.

use std::time::{Duration, Instant};

use device_facts::policy_space as abi;
use device_facts::{PausePhase, ReportingPolicy};
use vm_memory::GuestAddress;

use super::spec::{
    VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ,
    VIRTIO_F_VERSION_1,
};
use super::{Balloon, BalloonHandle, BalloonParams, BalloonSnapshot};
use crate::device::{QueueHandler, VirtioDevice};
use crate::reclaim::guarded_ram::{GuardedRam, PAGE};
use crate::reclaim::{DiscardEngine, InhibitGuard, InhibitReason};
use crate::testing::fuzz_input::{AREAS, FORM_START, Input, SPARE_PFN, driver_ram};
use crate::testing::{Desc, HandlerHarness, Segment, WRITE};

/// Maximum number of steps per input; further bytes are ignored.
const STEPS_MAX: usize = 64;
const QUEUE_SIZE: u16 = 32;
const QUEUES: u16 = 5;
const HINT: u16 = 3;
const REPORTING: u16 = 4;

/// Runs the steps that the bytes describe and returns the figures.
///
/// # Panics
/// An invariant is violated.
#[must_use]
pub fn run(bytes: &[u8]) -> BalloonSnapshot {
    thread_local! {
        // Mapping dominates the cost of a run, so the memory is reused.
        static TERRAIN: GuardedRam = GuardedRam::new(&AREAS);
    }
    TERRAIN.with(|guarded| {
        guarded.refill();
        run_on(guarded, Input(bytes))
    })
}

fn run_on(guarded: &GuardedRam, mut input: Input<'_>) -> BalloonSnapshot {
    let mut guest = Guest::new(guarded, input.byte());
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input);
    }
    guest.check_books();
    guest.check_service();
    guarded.check_guards();
    guest.handle.snapshot()
}

struct Guest {
    balloon: Balloon,
    handle: BalloonHandle,
    harness: HandlerHarness<Box<dyn QueueHandler>>,
    guard: Option<InhibitGuard>,
    features: u64,
}

impl Guest {
    fn new(guarded: &GuardedRam, options: u8) -> Self {
        let ram = driver_ram(guarded);
        let params = BalloonParams {
            reporting_policy: options & 8 == 0,
            ..BalloonParams::with_everything(ram.mem())
        };
        let engine = if options & 1 == 0 {
            DiscardEngine::new
        } else {
            DiscardEngine::without_vectors
        };
        let (mut balloon, handle) =
            Balloon::with_engine(params, engine).expect("descriptors are to be had");
        let handler = balloon.take_handlers().remove(0);
        let mut features = VIRTIO_F_VERSION_1
            | VIRTIO_BALLOON_F_STATS_VQ
            | VIRTIO_BALLOON_F_FREE_PAGE_HINT
            | VIRTIO_BALLOON_F_REPORTING;
        if options & 2 != 0 {
            features |= VIRTIO_BALLOON_F_PAGE_POISON;
        }
        if options & 4 != 0 {
            features |= abi::VIRTIO_BALLOON_F_REPORTING_POLICY;
        }
        if options & 16 == 0 {
            features |= VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED;
        }
        let mut guest = Self {
            balloon,
            handle,
            harness: HandlerHarness::with_ram(handler, features, ram),
            guard: None,
            features,
        };
        for index in 0..QUEUES {
            // RAM is filled with patterns, including the rings.
            guest.harness.add_queue(index, QUEUE_SIZE).clear();
        }
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.balloon.ack_features(self.features);
        self.harness
            .activate()
            .expect("activation asks for nothing");
    }

    /// Resets the device like a driver that starts over.
    fn reset(&mut self) {
        self.harness.reset();
        self.balloon.reset();
        self.activate();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let queue = u16::from(choice >> 4) % QUEUES;
        match choice % 15 {
            0..=2 => {
                input.offer_chain(self.harness.queue(queue));
                self.kick(queue);
            }
            3 => self.offer_list(queue % 2, input),
            4 | 5 => self.kick(queue),
            6 => {
                let idx = input.word();
                self.harness.queue(queue).set_avail_idx(idx);
            }
            7 => {
                let head = input.word();
                self.harness.queue(queue).offer(head);
            }
            8 => input.write_ram(&self.harness.ram),
            9 => self.touch_config(input),
            10 => self.reset(),
            11 => self.steer_hinting(input),
            12 => self.hint(input),
            13 => self.steer_reporting(input),
            _ => {
                let inhibit = self.guard.is_none();
                self.guard = inhibit.then(|| self.handle.inhibit(InhibitReason::AssignedDevice));
            }
        }
    }

    /// Inflates or deflates like a driver, with numbers near and inside RAM.
    fn offer_list(&mut self, queue: u16, input: &mut Input<'_>) {
        let count = input.byte() % 32;
        let list: Vec<u8> = (0..count)
            .flat_map(|_| u32::from(input.byte() % 96).to_le_bytes())
            .collect();
        self.harness.ram.write(GuestAddress(FORM_START), &list);
        let desc = Desc {
            addr: FORM_START,
            len: u32::from(count) * 4,
            flags: 0,
            next: 0,
        };
        self.harness.queue(queue).write_desc(0, desc);
        self.harness.queue(queue).offer(0);
        self.kick(queue);
    }

    /// Acts as the host; the results depend on the previous steps.
    fn steer_hinting(&mut self, input: &mut Input<'_>) {
        let answer = match input.byte() % 3 {
            0 => self.handle.stop_hinting(),
            _ => self.handle.start_hinting().map(drop),
        };
        answer.err();
    }

    /// Acts as the host for the reporting policy, and acknowledges as a driver that follows it.
    fn steer_reporting(&mut self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => self.handle.pause_reporting().expect("on offer"),
            1 => self.handle.resume_reporting().expect("on offer"),
            2 => {
                let again = input.byte().is_multiple_of(2);
                self.handle.report_now(again).err();
            }
            3 => self.handle.set_reporting_policy(ReportingPolicy {
                bytes_per_second_max: input.number(8),
                ..ReportingPolicy::default()
            }),
            4 => {
                let patience = Instant::now();
                let phase = self.handle.wait_for_pause(patience);
                assert_ne!(phase, PausePhase::Pausing, "no batch is under way");
                self.look(patience);
            }
            5 | 6 => self.copy_word(input),
            _ => {
                self.copy_word(input);
                let report = Desc {
                    addr: SPARE_PFN * PAGE as u64,
                    len: PAGE as u32,
                    flags: WRITE,
                    next: 0,
                };
                self.harness.queue(REPORTING).write_desc(0, report);
                self.harness.queue(REPORTING).offer(0);
                self.kick(REPORTING);
            }
        }
        if self.handle.snapshot().pause.is_paused() {
            assert!(!self.handle.reporting().is_active(), "paused is not active");
        }
    }

    /// Reads every figure as the host, and requests statistics, for which it does not wait.
    fn look(&mut self, deadline: Instant) {
        let snapshot = self.handle.snapshot();
        for path in [&snapshot.report, &snapshot.inflate, &snapshot.hint] {
            let buckets = path.latency.buckets();
            let counted: u64 = buckets.iter().map(|bucket| bucket.count).sum();
            assert_eq!(counted, path.latency.count());
            assert!(path.latency.percentile_us(99) <= path.latency.max_us());
        }
        // The results depend on the guest.
        let _policy = self.handle.reporting_policy();
        let _orders = self.handle.report_now_status();
        let _counters = self.handle.counters();
        self.handle.set_stats_poll(Duration::from_millis(100));
        self.handle.request_stats(deadline).err();
        let _cached = self.handle.cached_stats();
        if self.harness.serve_sources(0).is_err() {
            self.check_books();
            self.reset();
        }
    }

    /// Acknowledges the host's fields.
    fn copy_word(&mut self, input: &mut Input<'_>) {
        let (from, to) = match input.byte() % 2 {
            0 => (abi::POLICY_GENERATION, abi::GUEST_GENERATION),
            _ => (abi::REPORT_NOW_ID, abi::REPORT_NOW_DONE),
        };
        let settings = u32::from(input.byte()).to_le_bytes();
        self.balloon.write_config(abi::GUEST_SETTINGS, &settings);
        let mut word = [0; 4];
        self.balloon.read_config(from, &mut word);
        self.balloon.write_config(to, &word);
    }

    /// Hints like a driver: the requested id, the end of a run, or a page.
    fn hint(&mut self, input: &mut Input<'_>) {
        let id = match input.byte() % 3 {
            0 => 0,
            _ => self.handle.hinting().command_id,
        };
        self.harness
            .ram
            .write(GuestAddress(FORM_START), &id.to_le_bytes());
        let (addr, len, flags) = match input.byte() % 2 {
            0 => (FORM_START, 4, 0),
            _ => (u64::from(input.byte() % 96) * PAGE as u64, PAGE as u32, 2),
        };
        let desc = Desc {
            addr,
            len,
            flags,
            next: 0,
        };
        self.harness.queue(HINT).write_desc(0, desc);
        self.harness.queue(HINT).offer(0);
        if self.harness.kick_held(HINT).is_err() {
            self.check_books();
            self.reset();
        }
    }

    fn kick(&mut self, queue: u16) {
        if self.harness.kick(queue).is_err() {
            // DEVICE_NEEDS_RESET: a driver can recover only by a reset.
            self.check_books();
            self.reset();
        }
    }

    fn touch_config(&mut self, input: &mut Input<'_>) {
        // Mostly a whole field, sometimes any piece of anything.
        let (offset, bytes) = match input.byte() {
            field @ 0..=95 => (u64::from(field % 5) * 4, 4),
            field @ 96..=191 => (abi::POLICY_OFFSET + u64::from(field % 13) * 4, 4),
            _ => (input.number(8), usize::from(input.byte() % 9)),
        };
        let mut data = input.number(8).to_le_bytes();
        self.balloon.write_config(offset, &data[..bytes]);
        self.balloon.read_config(offset, &mut data[..bytes]);
    }

    fn check_books(&self) {
        let snapshot = self.handle.snapshot();
        for path in [&snapshot.report, &snapshot.inflate, &snapshot.hint] {
            assert_eq!(
                path.requested.bytes,
                path.discarded.bytes + path.failed.bytes + path.skipped.total(),
                "a byte is lost"
            );
            assert_eq!(path.failed.bytes, 0, "the kernel refused a valid range");
            assert_eq!(path.latency.count(), path.batches);
        }
        assert!(snapshot.actual_bytes <= snapshot.ram_bytes);
    }

    /// Checks that a page is discarded for a driver that starts over and behaves well.
    fn check_service(&mut self) {
        self.guard = None;
        self.handle.resume_reporting().expect("on offer");
        self.reset();
        let before = self.handle.snapshot().report.discarded.bytes;
        let page = Segment::WritableAt(GuestAddress(SPARE_PFN * PAGE as u64), PAGE as u32);
        let (_, used) = self
            .harness
            .request(REPORTING, &[page])
            .expect("the ring is sound");
        assert!(used.is_some(), "the device does not answer any more");
        let after = self.handle.snapshot().report.discarded.bytes;
        assert_eq!(after - before, PAGE as u64);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn guest_of_random_bytes_breaks_nothing(bytes in vec(any::<u8>(), 0..1500)) {
            let _figures = run(&bytes);
        }
    }

    /// Regression test: the rig itself once ran out of descriptors.
    #[test]
    fn guest_that_only_reports_breaks_nothing() {
        let figures = run(&[0x67; 400]);
        assert!(figures.report.batches > 1, "only the check at the end");
    }

    /// Without this, the test above could pass because no claim ever arrives.
    #[test]
    fn random_bytes_reach_every_path() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mut discarded = (0, 0, 0);
        let mut skipped = 0;
        let mut faults = super::super::GuestFaults::default();
        for _ in 0..150 {
            let bytes = vec(any::<u8>(), 1500)
                .new_tree(&mut runner)
                .expect("bytes")
                .current();
            let figures = run(&bytes);
            // `check_service` contributes one page to each run.
            discarded.0 += figures.report.discarded.bytes - PAGE as u64;
            discarded.1 += figures.inflate.discarded.bytes;
            discarded.2 += figures.hint.discarded.bytes;
            skipped += figures.report.skipped.total();
            faults.add_all(&figures.faults);
        }
        assert!(discarded.0 > 0 && discarded.1 > 0 && skipped > 0);
        assert!(discarded.2 > 0, "no hint was discarded");
        let never: Vec<_> = faults.iter().filter(|(_, count)| *count == 0).collect();
        // The rig negotiates every queue it enables.
        assert_eq!(never, [("queues_unexplained", 0)]);
    }
}
