//! Saves a balloon with work of every kind in progress, and restores it behind its transport.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use device_facts::statistics::VIRTIO_BALLOON_S_MEMFREE;
use device_facts::{HintingPhase, PausePhase, ReportingPolicy};
use vm_memory::GuestAddress;

use super::rig::{FREE_PFN, PAGE, pfns};
use crate::balloon::{Balloon, BalloonHandle, BalloonParams};
use crate::device::Counters;
use crate::pci::PciFunction;
use crate::testing::{DEADLINE, MockPciDriver, Segment, TestRam, wait_until};

const RAM_BYTES: usize = 64 << 20;
/// Linux's numbering with all queues.
const INFLATE: u16 = 0;
const STATS: u16 = 2;
const HINT: u16 = 3;
const ACTUAL_OFFSET: u64 = 4;

fn balloon(ram: &TestRam) -> (Arc<Mutex<Balloon>>, BalloonHandle) {
    let (balloon, handle) = Balloon::new(BalloonParams::with_everything(ram.mem())).unwrap();
    (Arc::new(Mutex::new(balloon)), handle)
}

/// A statistics buffer that contains the free memory.
fn free_memory(bytes: u64) -> Vec<u8> {
    let mut entry = VIRTIO_BALLOON_S_MEMFREE.to_le_bytes().to_vec();
    entry.extend(bytes.to_le_bytes());
    entry
}

/// The counters without durations, which are not part of the state.
fn timeless(handle: &BalloonHandle) -> Counters {
    let mut counters = handle.counters();
    counters.retain(|name, _| !name.contains("latency"));
    counters
}

fn hint(driver: &mut MockPciDriver, segment: Segment<'_>) {
    driver.queue(HINT).push(&[segment]);
    driver.kick(HINT);
    assert!(driver.queue(HINT).pop_used().is_some());
}

#[test]
fn balloon_saved_in_the_middle_of_everything_goes_on() {
    let ram = TestRam::new(RAM_BYTES);
    let (device, handle) = balloon(&ram);
    let mut driver = MockPciDriver::new(device, &ram);
    driver.start(u64::MAX);
    handle.set_target_bytes(8 << 20);
    driver.write_device_config(ACTUAL_OFFSET, &2_u32.to_le_bytes());
    let pages = pfns([FREE_PFN, FREE_PFN + 1]);
    driver.queue(INFLATE).push(&[Segment::Readable(&pages)]);
    driver.kick(INFLATE);
    wait_until("inflation", || driver.queue(INFLATE).pop_used().is_some());
    driver
        .queue(STATS)
        .push(&[Segment::Readable(&free_memory(1))]);
    driver.kick(STATS);
    wait_until("a sample", || handle.cached_stats().is_some());
    let run = handle.start_hinting().unwrap();
    hint(&mut driver, Segment::Readable(&run.to_le_bytes()));
    let policy = ReportingPolicy {
        delay_ms_max: 7,
        ..ReportingPolicy::default()
    };
    handle.set_reporting_policy(policy);
    handle.pause_reporting().unwrap();
    let phase = handle.wait_for_pause(Instant::now());
    assert_eq!(phase, PausePhase::PausedByDevice);
    let mut config = [0; 0x60];
    driver.device_config(0, &mut config);

    let (saved, moving) = driver.save();
    let counters = timeless(&handle);
    drop(handle);
    let (device, handle) = balloon(&ram);
    let mut driver = moving.restore(device, &saved).unwrap();
    assert_eq!(handle.target_bytes(), 8 << 20);
    assert_eq!(handle.actual_bytes(), 2 * PAGE);
    assert_eq!(timeless(&handle), counters);
    assert_eq!(handle.hinting().phase, HintingPhase::Running);
    assert_eq!(
        handle.wait_for_pause(Instant::now()),
        PausePhase::PausedByDevice
    );
    let mut restored_config = [0; 0x60];
    driver.device_config(0, &mut restored_config);
    assert_eq!(restored_config, config);
    driver.function.resume();
    // Its answer is behind the resume, which discards no block that it finds: no vCPU is held for it.
    driver.kick(HINT);

    // The run in progress continues to discard.
    let discarded = handle.snapshot().hint.discarded.bytes;
    let block = GuestAddress((FREE_PFN + 16) * PAGE);
    hint(&mut driver, Segment::WritableAt(block, PAGE as u32));
    assert_eq!(handle.snapshot().hint.discarded.bytes, discarded + PAGE);
    // The parked buffer is returned on the next request.
    assert!(driver.queue(STATS).pop_used().is_none());
    let asking = std::thread::spawn({
        let handle = handle.clone();
        move || handle.request_stats(Instant::now() + DEADLINE)
    });
    wait_until("the buffer", || driver.queue(STATS).pop_used().is_some());
    driver
        .queue(STATS)
        .push(&[Segment::Readable(&free_memory(77))]);
    driver.kick(STATS);
    let sample = asking.join().unwrap().unwrap();
    assert_eq!(sample.stats.free_memory, Some(77));
    handle.resume_reporting().unwrap();
    assert!(!driver.needs_reset());
}

#[test]
fn report_that_the_guest_owes_is_owed_after_a_restore() {
    let ram = TestRam::new(RAM_BYTES);
    let (device, handle) = balloon(&ram);
    let mut driver = MockPciDriver::new(device, &ram);
    driver.start(u64::MAX);
    handle.report_now(true).unwrap();
    let owed = handle.report_now_status();
    assert!(owed.pending);
    let mut config = [0; 0x60];
    driver.device_config(0, &mut config);

    let (saved, moving) = driver.save();
    let (device, handle) = balloon(&ram);
    let driver = moving.restore(device, &saved).unwrap();
    assert_eq!(handle.report_now_status(), owed);
    let mut restored_config = [0; 0x60];
    driver.device_config(0, &mut restored_config);
    assert_eq!(restored_config, config);
}

/// Found by fuzzing: the state of such a balloon could be saved but not restored.
#[test]
fn statistics_buffer_that_the_ring_does_not_have_is_not_part_of_the_state() {
    let ram = TestRam::new(RAM_BYTES);
    let (device, handle) = balloon(&ram);
    let mut driver = MockPciDriver::new(device, &ram);
    driver.start(u64::MAX);
    driver.queue(STATS).offer(49862);
    driver.kick(STATS);
    wait_until("the fault", || {
        handle.snapshot().faults.chains_without_head == 1
    });
    let (saved, moving) = driver.save();
    let (device, _handle) = balloon(&ram);
    let driver = moving.restore(device, &saved).unwrap();
    driver.function.resume();
    assert!(!driver.needs_reset());
}
