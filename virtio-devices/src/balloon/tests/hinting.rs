//! Tests of free page hinting: runs, and which blocks may be discarded at which time.

use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use super::rig::{FREE_PFN, LINUX_FEATURES, PAGE, RAM_BYTES, Rig};
use crate::balloon::spec::{VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_PAGE_POISON};
use crate::balloon::{Balloon, BalloonParams, HintingError, HintingPhase, PathFigures};
use crate::device::VirtioDevice;
use crate::reclaim::SkipReason;
use crate::testing::{MockPciDriver, Segment, TestRam};

/// Linux's numbering with statistics, hinting and reporting.
const HINT: u16 = 3;
const STOP: u32 = 0;
const DONE: u32 = 1;

fn rig(more_features: u64) -> Rig {
    let mut rig = Rig::idle(LINUX_FEATURES | VIRTIO_BALLOON_F_FREE_PAGE_HINT | more_features);
    rig.harness.add_queues(5);
    rig.harness.activate().unwrap();
    rig
}

fn cmd_id(rig: &Rig) -> u32 {
    let mut data = [0; 4];
    rig.balloon.read_config(8, &mut data);
    u32::from_le_bytes(data)
}

fn block(page: u64) -> Segment<'static> {
    Segment::WritableAt(GuestAddress((FREE_PFN + page) * PAGE), PAGE as u32)
}

/// Pushes a chain and notifies the device as a vCPU does.
fn send(rig: &mut Rig, segment: Segment<'_>) {
    rig.harness.queue(HINT).push(&[segment]);
    rig.harness.kick_held(HINT).unwrap();
    let used = rig.harness.queue(HINT).pop_used();
    assert_eq!(used.expect("the chain is answered").len, 0);
}

fn command(rig: &mut Rig, id: u32) {
    send(rig, Segment::Readable(&id.to_le_bytes()));
}

fn figures(rig: &Rig) -> PathFigures {
    rig.snapshot().hint
}

#[test]
fn run_discards_what_is_hinted_and_gives_it_back_at_the_end() {
    let mut rig = rig(0);
    rig.dirty(FREE_PFN, 8);
    let signals = rig.harness.interrupt.config_signals();
    let id = rig.handle.start_hinting().unwrap();
    assert_eq!(cmd_id(&rig), id);
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Requested);
    command(&mut rig, id);
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Running);
    send(&mut rig, block(2));
    send(&mut rig, block(5));
    assert_eq!(rig.gone(FREE_PFN, 8), [FREE_PFN + 2, FREE_PFN + 5]);
    command(&mut rig, STOP);
    assert_eq!(cmd_id(&rig), DONE, "the guest takes its blocks back");
    assert_eq!(rig.harness.interrupt.config_signals(), signals + 2);
    let status = rig.handle.hinting();
    assert_eq!(status.phase, HintingPhase::Idle);
    assert_eq!((status.runs_requested, status.runs_completed), (1, 1));
    let hint = figures(&rig);
    assert_eq!((hint.requested.ranges, hint.discarded.bytes), (2, 2 * PAGE));
    assert_eq!((hint.chains, hint.syscalls), (2, 2));
}

#[test]
fn hint_is_discarded_only_while_its_sender_is_held() {
    let mut rig = rig(0);
    rig.dirty(FREE_PFN, 8);
    let id = rig.handle.start_hinting().unwrap();
    command(&mut rig, id);
    // As if found after a pause: no vCPU is held.
    rig.harness.queue(HINT).push(&[block(0)]);
    rig.harness.kick(HINT).unwrap();
    // Two blocks at once: the kick for the first has returned.
    rig.harness.queue(HINT).push(&[block(1)]);
    rig.harness.queue(HINT).push(&[block(2)]);
    rig.harness.kick_held(HINT).unwrap();
    assert_eq!(rig.gone(FREE_PFN, 8), [FREE_PFN + 2]);
    // The command is the last chain, so the block before it is not.
    rig.harness.queue(HINT).push(&[block(3)]);
    let stop = Segment::Readable(&[0; 4]);
    rig.harness.queue(HINT).push(&[stop]);
    rig.harness.kick_held(HINT).unwrap();
    assert_eq!(rig.gone(FREE_PFN, 8), [FREE_PFN + 2]);
    for _ in 0..5 {
        assert!(rig.harness.queue(HINT).pop_used().is_some());
    }
    let skipped = figures(&rig).skipped;
    assert_eq!(skipped.get(SkipReason::HintNotHeld), 3 * PAGE);
}

#[test]
fn hints_outside_of_a_run_are_answered_and_kept() {
    let mut rig = rig(0);
    rig.dirty(FREE_PFN, 8);
    send(&mut rig, block(0));
    let first = rig.handle.start_hinting().unwrap();
    send(&mut rig, block(1));
    command(&mut rig, first + 1);
    send(&mut rig, block(2));
    command(&mut rig, first);
    rig.handle.stop_hinting().unwrap();
    assert_eq!(cmd_id(&rig), DONE);
    send(&mut rig, block(3));
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Stopping);
    command(&mut rig, STOP);
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Idle);
    command(&mut rig, first);
    send(&mut rig, block(4));
    assert!(rig.gone(FREE_PFN, 8).is_empty());
    let snapshot = rig.snapshot();
    assert_eq!(snapshot.hint.skipped.get(SkipReason::HintStale), 5 * PAGE);
    assert_eq!(snapshot.faults.hint_commands_not_asked_for, 2);
    assert_eq!(snapshot.hinting.runs_completed, 0);
}

#[test]
fn run_of_a_guest_that_poisons_its_pages_discards_nothing() {
    let mut rig = rig(VIRTIO_BALLOON_F_PAGE_POISON);
    rig.balloon.write_config(12, &0xaa_u32.to_le_bytes());
    rig.dirty(FREE_PFN, 1);
    let id = rig.handle.start_hinting().unwrap();
    command(&mut rig, id);
    send(&mut rig, block(0));
    assert!(rig.gone(FREE_PFN, 1).is_empty());
    assert_eq!(figures(&rig).skipped.get(SkipReason::PagePoison), PAGE);
}

#[test]
fn commands_that_are_no_number_are_counted() {
    let mut rig = rig(0);
    let id = rig.handle.start_hinting().unwrap();
    send(&mut rig, Segment::Readable(&id.to_le_bytes()[..3]));
    send(&mut rig, Segment::Readable(&[2, 0, 0, 0, 0]));
    send(
        &mut rig,
        Segment::ReadableAt(GuestAddress(RAM_BYTES - 2), 4),
    );
    let faults = rig.snapshot().faults;
    assert_eq!(faults.hint_commands_malformed, 2);
    assert_eq!(faults.descriptors_unreadable, 1);
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Requested);
}

#[test]
fn driver_that_goes_ends_the_run_and_the_next_finds_no_request() {
    let mut rig = rig(0);
    let id = rig.handle.start_hinting().unwrap();
    command(&mut rig, id);
    rig.harness.reset();
    rig.balloon.reset();
    assert_eq!(cmd_id(&rig), STOP);
    assert_eq!(rig.handle.hinting().phase, HintingPhase::Idle);
    assert_eq!(
        rig.handle.start_hinting(),
        Err(HintingError::DriverNotReady)
    );
    rig.harness.activate().unwrap();
    assert_eq!(rig.handle.start_hinting(), Ok(id + 1));
}

#[test]
fn start_that_cannot_be_tells_why() {
    let rig = Rig::new();
    assert_eq!(rig.handle.start_hinting(), Err(HintingError::GuestDeclined));
    let ram = TestRam::new(1 << 20);
    let params = BalloonParams {
        ram: ram.mem(),
        size_bytes: 0,
        deflate_on_oom: false,
        free_page_reporting: true,
        free_page_hinting: false,
        reporting_policy: false,
        device_init: false,
    };
    let (balloon, handle) = Balloon::new(params).unwrap();
    assert_eq!(handle.start_hinting(), Err(HintingError::NotOffered));
    assert_eq!(handle.stop_hinting(), Err(HintingError::NotOffered));
    assert!((0..5).all(|index| !balloon.holds_notifier(index)));
}

/// Linux relies on this order: when the kick returns, the block is already discarded, and the guest's later writes
/// persist.
#[test]
fn kick_through_the_transport_returns_after_the_discard() {
    let ram = TestRam::new(RAM_BYTES as usize);
    let params = BalloonParams {
        ram: ram.mem(),
        size_bytes: 0,
        deflate_on_oom: false,
        free_page_reporting: true,
        free_page_hinting: true,
        reporting_policy: false,
        device_init: false,
    };
    let (balloon, handle) = Balloon::new(params).unwrap();
    let mut driver = MockPciDriver::new(Arc::new(Mutex::new(balloon)), &ram);
    driver.start(!0);
    // Activation is asynchronous.
    crate::testing::wait_until("the driver", || handle.start_hinting().is_ok());
    let id = handle.hinting().command_id;
    driver
        .queue(HINT)
        .push(&[Segment::Readable(&id.to_le_bytes())]);
    driver.kick(HINT);
    assert_eq!(handle.hinting().phase, HintingPhase::Running);
    let at = GuestAddress(FREE_PFN * PAGE);
    for round in 1..=200_u64 {
        ram.write(at, &[round as u8; PAGE as usize]);
        driver.queue(HINT).push(&[block(0)]);
        driver.kick(HINT);
        assert_eq!(ram.read(at, PAGE as usize), [0; PAGE as usize]);
        assert_eq!(handle.snapshot().hint.discarded.bytes, round * PAGE);
    }
    // A paused worker releases the vCPU, and finds the block too late.
    ram.write(at, &[1; PAGE as usize]);
    use crate::pci::PciFunction;
    driver.function.pause();
    driver.queue(HINT).push(&[block(0)]);
    driver.kick(HINT);
    driver.function.resume();
    crate::testing::wait_until("the late hint", || {
        handle.snapshot().hint.skipped.get(SkipReason::HintNotHeld) == PAGE
    });
    assert_eq!(ram.read(at, PAGE as usize), [1; PAGE as usize]);
}

#[test]
fn doorbell_that_holds_is_not_given_to_the_hypervisor() {
    use crate::pci::PciFunction;
    let ram = TestRam::new(RAM_BYTES as usize);
    for (free_page_hinting, expected) in [(false, vec![0, 1, 2, 3, 4]), (true, vec![0, 1, 4])] {
        let params = BalloonParams {
            ram: ram.mem(),
            size_bytes: 0,
            deflate_on_oom: false,
            free_page_reporting: true,
            free_page_hinting,
            reporting_policy: false,
            device_init: false,
        };
        let (balloon, _handle) = Balloon::new(params).unwrap();
        let driver = MockPciDriver::new(Arc::new(Mutex::new(balloon)), &ram);
        let mut queues = Vec::new();
        driver
            .function
            .with_doorbells(&mut |bell| queues.push((bell.offset - 0x6000) / 4));
        assert_eq!(queues, expected);
    }
}
