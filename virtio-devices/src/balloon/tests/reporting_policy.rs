//! Tests of the reporting policy with drivers that follow it, do not support it, or misreport.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device_facts::policy_space::{self as abi, VIRTIO_BALLOON_F_REPORTING_POLICY};
use device_facts::{PausePhase, PolicySetting, ReportingPolicy, ReportingPolicyChange};
use vm_memory::GuestAddress;

use super::rig::{FREE_PFN, LINUX_FEATURES, PAGE, RAM_BYTES, REPORTING, Rig, policy_rig};
use crate::balloon::reporting_policy::{ReportingError, SettingState};
use crate::balloon::{Balloon, BalloonParams, ReportingState};
use crate::device::VirtioDevice;
use crate::reclaim::SkipReason;
use crate::testing::{DEADLINE, MockPciDriver, Segment, TestRam, wait_until};

/// The settings of [`policy`], by their offsets in the configuration space.
const SET: [(u64, u64); 4] = [(0x18, 8), (0x1c, 250), (0x20, 100), (0x28, 1 << 33)];

fn policy() -> ReportingPolicy {
    let mut change = ReportingPolicyChange::default();
    for (offset, value) in SET {
        let setting = ReportingPolicy::TABLE.iter().find(|it| it.offset == offset);
        *setting.unwrap().slot(&mut change) = Some(value);
    }
    change.applied_to(ReportingPolicy::default())
}

fn word(rig: &Rig, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    rig.balloon.read_config(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(rig: &mut Rig, offset: u64, word: u32) {
    rig.balloon.write_config(offset, &word.to_le_bytes());
}

/// Reacts to a changed configuration as a driver does.
fn acknowledge(rig: &mut Rig, settings: u32) {
    let generation = word(rig, abi::POLICY_GENERATION);
    write(rig, abi::GUEST_SETTINGS, settings);
    write(rig, abi::GUEST_GENERATION, generation);
}

fn report_page(rig: &mut Rig) {
    let page = Segment::WritableAt(GuestAddress(FREE_PFN * PAGE), PAGE as u32);
    rig.send(REPORTING, &[page]);
}

#[test]
fn policy_reaches_the_driver_under_a_generation_and_a_signal() {
    let rig = policy_rig();
    assert_eq!(word(&rig, abi::POLICY_GENERATION), 0);
    rig.handle.set_reporting_policy(policy());
    assert_eq!(rig.harness.interrupt.config_signals(), 1);
    for (offset, value) in [
        (abi::POLICY_GENERATION, 1),
        (0xc, 0),
        (0x14, 9),
        (0x18, 8),
        (0x1c, 250),
        (0x20, 100),
        (abi::HOST_FLAGS, 0),
        (0x28, 0),
        (0x2c, 2),
        (abi::REPORT_NOW_ID, 0),
        (abi::REPORT_NOW_DONE, 0),
        (abi::POLICY_END, 0),
    ] {
        assert_eq!(word(&rig, offset), value, "{offset:#x}");
    }
    rig.handle.set_reporting_policy(policy());
    assert_eq!(word(&rig, abi::POLICY_GENERATION), 2);
}

#[test]
fn policy_not_asked_for_is_not_on_the_wire() {
    let ram = TestRam::new(1 << 20);
    for (free_page_reporting, reporting_policy) in [(true, false), (false, true)] {
        let params = BalloonParams {
            ram: ram.mem(),
            size_bytes: 0,
            deflate_on_oom: false,
            free_page_reporting,
            free_page_hinting: false,
            reporting_policy,
            device_init: false,
        };
        let (mut balloon, handle) = Balloon::new(params).unwrap();
        assert_eq!(balloon.features() & VIRTIO_BALLOON_F_REPORTING_POLICY, 0);
        handle.set_reporting_policy(policy());
        balloon.ack_features(!0);
        balloon.write_config(abi::GUEST_SETTINGS, &[1; 4]);
        let mut space = [0xff; 0x80];
        balloon.read_config(0, &mut space);
        assert_eq!(space, [0; 0x80]);
        let status = handle.reporting_policy();
        assert_eq!(status.of(PolicySetting::OrderMin), SettingState::NotOffered);
        assert_eq!(handle.snapshot().faults.config_writes_ignored, 1);
    }
}

#[test]
fn driver_that_follows_makes_its_settings_take_effect() {
    let mut rig = policy_rig();
    rig.handle.set_reporting_policy(policy());
    acknowledge(&mut rig, PolicySetting::OrderMin.mask());
    let status = rig.handle.reporting_policy();
    assert_eq!((status.generation, status.acknowledged), (1, 1));
    assert_eq!(status.of(PolicySetting::OrderMin), SettingState::InEffect);
    assert_eq!(
        status.of(PolicySetting::AgeMsMin),
        SettingState::NotFollowed
    );
    // The next driver starts without any values.
    rig.harness.reset();
    rig.balloon.reset();
    assert_eq!(word(&rig, abi::GUEST_GENERATION), 0);
    assert_eq!(
        word(&rig, abi::POLICY_GENERATION),
        1,
        "the host's wish stands"
    );
    let status = rig.handle.reporting_policy();
    assert_eq!(
        status.of(PolicySetting::OrderMin),
        SettingState::DriverNotReady
    );
}

#[test]
fn driver_that_writes_where_it_must_not_changes_nothing_and_is_counted() {
    let mut rig = policy_rig();
    rig.handle.set_reporting_policy(policy());
    let space = |rig: &Rig| {
        let mut space = [0; abi::POLICY_END as usize];
        rig.balloon.read_config(0, &mut space);
        space
    };
    let before = space(&rig);
    let mut ignored = 0;
    for offset in (0x10..abi::GUEST_GENERATION).chain(abi::POLICY_END..0x90) {
        for bytes in [1, 2, 4, 8] {
            rig.balloon.write_config(offset, &[0xa5; 8][..bytes]);
            ignored += 1;
        }
    }
    for offset in abi::GUEST_GENERATION..abi::POLICY_END {
        for bytes in [0, 1, 2, 3, 5, 8] {
            rig.balloon.write_config(offset, &[0xa5; 8][..bytes]);
            ignored += 1;
        }
    }
    assert_eq!(rig.snapshot().faults.config_writes_ignored, ignored);
    for (offset, value) in [
        (abi::GUEST_GENERATION, 2),
        (abi::GUEST_GENERATION, !0),
        (abi::REPORT_NOW_DONE, 1),
        (abi::REPORT_NOW_DONE, !0),
        (abi::GUEST_SETTINGS, !PolicySetting::MASK),
    ] {
        write(&mut rig, offset, value);
    }
    assert_eq!(space(&rig), before);
    assert_eq!(rig.snapshot().faults.policy_words_invalid, 5);
}

#[test]
fn pause_is_confirmed_by_the_driver_and_reports_are_taken_until_then() {
    let mut rig = policy_rig();
    rig.handle.pause_reporting().unwrap();
    assert_eq!(
        word(&rig, abi::HOST_FLAGS),
        abi::VIRTIO_BALLOON_REPORTING_PAUSED
    );
    rig.dirty(FREE_PFN, 1);
    report_page(&mut rig);
    assert_eq!(
        rig.gone(FREE_PFN, 1).len(),
        1,
        "the pending one is finished"
    );
    assert_eq!(rig.snapshot().pause, PausePhase::Pausing);
    assert_eq!(rig.handle.reporting(), ReportingState::Active);

    let handle = rig.handle.clone();
    let waiter = std::thread::spawn(move || handle.wait_for_pause(Instant::now() + DEADLINE));
    acknowledge(&mut rig, 0xff);
    assert_eq!(waiter.join().unwrap(), PausePhase::PausedByGuest);
    assert_eq!(rig.handle.reporting(), ReportingState::PausedByGuest);

    rig.handle.resume_reporting().unwrap();
    assert_eq!(word(&rig, abi::HOST_FLAGS), 0);
    rig.dirty(FREE_PFN, 1);
    report_page(&mut rig);
    assert_eq!(rig.gone(FREE_PFN, 1).len(), 1);
    assert_eq!(rig.handle.reporting(), ReportingState::Active);
}

#[test]
fn driver_that_reports_after_its_confirmation_gets_nothing_discarded_and_is_counted() {
    let mut rig = policy_rig();
    rig.handle.pause_reporting().unwrap();
    acknowledge(&mut rig, 0xff);
    rig.dirty(FREE_PFN, 1);
    report_page(&mut rig);
    assert!(rig.gone(FREE_PFN, 1).is_empty());
    let snapshot = rig.snapshot();
    let skipped = snapshot.report.skipped.get(SkipReason::ReportingPaused);
    assert_eq!((skipped, snapshot.faults.reports_while_paused), (PAGE, 1));
}

#[test]
fn pause_of_a_guest_that_knows_none_skips_its_reports_and_nothing_else() {
    let mut rig = Rig::new();
    rig.balloon.ack_features(LINUX_FEATURES);
    rig.handle.pause_reporting().unwrap();
    let at_once = rig.handle.wait_for_pause(Instant::now());
    assert_eq!(at_once, PausePhase::PausedByDevice);
    rig.dirty(FREE_PFN, 2);
    report_page(&mut rig);
    let list = super::rig::pfns([FREE_PFN + 1]);
    rig.send(super::rig::INFLATE, &[Segment::Readable(&list)]);
    assert_eq!(rig.gone(FREE_PFN, 2), [FREE_PFN + 1]);
    let snapshot = rig.snapshot();
    assert_eq!(
        snapshot.report.skipped.get(SkipReason::ReportingPaused),
        PAGE
    );
    assert_eq!(snapshot.faults.reports_while_paused, 0, "it was never told");
    assert_eq!(snapshot.reporting, ReportingState::PausedByDevice);
    assert!(
        snapshot
            .reporting
            .to_string()
            .contains("paused by the operator")
    );
    rig.handle.resume_reporting().unwrap();
    report_page(&mut rig);
    assert_eq!(rig.gone(FREE_PFN, 2).len(), 2);
}

#[test]
fn report_now_raises_its_number_and_ends_with_the_guests_word() {
    let mut rig = policy_rig();
    acknowledge_first(&mut rig);
    let signals = rig.harness.interrupt.config_signals();
    let id = rig.handle.report_now(true).unwrap();
    assert_eq!(rig.harness.interrupt.config_signals(), signals + 1);
    assert_eq!(word(&rig, abi::REPORT_NOW_ID), id);
    assert_eq!(
        word(&rig, abi::HOST_FLAGS),
        abi::VIRTIO_BALLOON_REPORTING_AGAIN
    );
    assert!(rig.snapshot().report_now.pending);
    write(&mut rig, abi::REPORT_NOW_DONE, id);
    let status = rig.snapshot().report_now;
    assert_eq!((status.pending, status.done_id), (false, id));
    rig.harness.reset();
    rig.balloon.reset();
    assert_eq!(
        rig.handle.report_now(false),
        Err(ReportingError::GuestDeclined)
    );
}

fn acknowledge_first(rig: &mut Rig) {
    rig.handle.set_reporting_policy(policy());
    acknowledge(rig, 0xff);
}

/// Uses registers, and a worker on its own thread, as with a real kernel.
#[test]
fn policy_is_negotiated_and_followed_through_the_transport() {
    let ram = TestRam::new(RAM_BYTES as usize);
    let params = BalloonParams {
        ram: ram.mem(),
        size_bytes: 0,
        deflate_on_oom: false,
        free_page_reporting: true,
        free_page_hinting: false,
        reporting_policy: true,
        device_init: false,
    };
    let (balloon, handle) = Balloon::new(params).unwrap();
    let mut driver = MockPciDriver::new(Arc::new(Mutex::new(balloon)), &ram);
    driver.start(LINUX_FEATURES | VIRTIO_BALLOON_F_REPORTING_POLICY);
    handle.set_reporting_policy(policy());
    let read = |driver: &MockPciDriver, offset| {
        let mut word = [0; 4];
        driver.device_config(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!(read(&driver, 0x1c), 250);
    let generation = read(&driver, abi::POLICY_GENERATION).to_le_bytes();
    driver.write_device_config(abi::GUEST_SETTINGS, &0x1f_u32.to_le_bytes());
    driver.write_device_config(abi::GUEST_GENERATION, &generation);
    let status = handle.reporting_policy();
    assert_eq!(status.of(PolicySetting::AgeMsMin), SettingState::InEffect);

    // The next kernel does not support the policy.
    driver.reset();
    wait_until("the driver to be forgotten", || {
        let state = handle.reporting_policy().of(PolicySetting::AgeMsMin);
        state == SettingState::DriverNotReady
    });
    driver.start(LINUX_FEATURES);
    let state = || handle.reporting_policy().of(PolicySetting::AgeMsMin);
    assert_eq!(state(), SettingState::GuestDeclined);
    driver.write_device_config(abi::GUEST_GENERATION, &generation);
    assert_eq!(handle.reporting_policy().acknowledged, 0);
    handle.pause_reporting().unwrap();
    let patience = Instant::now() + Duration::from_millis(1);
    assert_eq!(handle.wait_for_pause(patience), PausePhase::PausedByDevice);
}
