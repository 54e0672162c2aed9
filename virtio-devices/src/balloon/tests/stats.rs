//! Tests of guest statistics: parsed by tag, requested on demand; the worker never blocks on them.

use std::time::{Duration, Instant};

use device_facts::GuestReporting;

use super::rig::{Rig, STATS, policy_rig};
use crate::balloon::StatsError;
use crate::testing::{DEADLINE, Segment, wait_until};

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat()
}

fn send(rig: &mut Rig, entries: &[Vec<u8>]) {
    let buffer = entries.concat();
    rig.harness.queue(STATS).push(&[Segment::Readable(&buffer)]);
    rig.harness.kick(STATS).unwrap();
}

/// Acts as worker and driver while callers wait: serves the request, and refills the returned buffer with `value`.
fn refill(rig: &mut Rig, value: u64) {
    wait_until("the buffer to come back", || {
        rig.harness.serve_sources(10).unwrap();
        rig.harness.queue(STATS).pop_used().is_some()
    });
    send(rig, &[entry(4, value)]);
}

#[test]
fn statistics_are_taken_by_tag_and_strange_ones_skipped() {
    let mut rig = Rig::new();
    send(
        &mut rig,
        &[
            entry(5, 512),
            entry(0x8001, 7),
            entry(0x7fff, 8),
            entry(4, 100),
        ],
    );
    let sample = rig.handle.cached_stats().unwrap();
    assert_eq!(sample.stats.total_memory, Some(512));
    assert_eq!(sample.stats.free_memory, Some(100));
    assert_eq!(
        sample.stats.iter().filter(|(_, it)| it.is_some()).count(),
        2
    );
    assert_eq!(rig.snapshot().faults.stats_unknown_tags, 2);
    assert_eq!(
        rig.harness.queue(STATS).pop_used(),
        None,
        "the buffer is kept"
    );
}

#[test]
fn private_tags_are_taken_from_a_driver_that_takes_a_policy() {
    let mut rig = policy_rig();
    let private: Vec<_> = (0x8000..0x8005)
        .map(|tag| entry(tag, u64::from(tag)))
        .collect();
    send(&mut rig, &[vec![entry(4, 100)], private].concat());
    let sample = rig.handle.cached_stats().unwrap();
    assert_eq!(sample.stats.free_memory, Some(100));
    let reporting = GuestReporting {
        pending_bytes: Some(0x8000),
        reported_bytes: Some(0x8001),
        batches: Some(0x8002),
        isolation_failures: Some(0x8003),
    };
    assert_eq!(sample.reporting, reporting);
    assert_eq!(rig.snapshot().faults.stats_unknown_tags, 1);
}

#[test]
fn request_without_a_driver_fails_at_once() {
    let rig = Rig::idle(super::rig::LINUX_FEATURES);
    let refused = rig.handle.request_stats(Instant::now() + DEADLINE);
    assert_eq!(refused.unwrap_err(), StatsError::NotNegotiated);
}

#[test]
fn request_returns_the_buffer_and_brings_a_fresh_sample() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    let handle = rig.handle.clone();
    let caller = std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE));
    refill(&mut rig, 2);
    let sample = caller.join().unwrap().unwrap();
    assert_eq!(sample.stats.free_memory, Some(2));
    assert_eq!(rig.harness.interrupt.queue_signals(STATS), 1);
}

#[test]
fn callers_that_come_together_share_one_refill() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let handle = rig.handle.clone();
            std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE))
        })
        .collect();
    // Callers that arrive after the refill send another request; the guest responds to each.
    let mut value = 1;
    wait_until("all callers to have a sample", || {
        rig.harness.serve_sources(1).unwrap();
        if rig.harness.queue(STATS).pop_used().is_some() {
            value += 1;
            send(&mut rig, &[entry(4, value)]);
        }
        callers.iter().all(std::thread::JoinHandle::is_finished)
    });
    for caller in callers {
        assert!(caller.join().unwrap().unwrap().stats.free_memory >= Some(2));
    }
}

#[test]
fn request_to_a_guest_that_does_not_answer_times_out_and_stands() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    for _ in 0..3 {
        let soon = Instant::now() + Duration::from_millis(5);
        let late = rig.handle.request_stats(soon);
        assert_eq!(late.unwrap_err(), StatsError::TimedOut);
        rig.harness.serve_sources(0).unwrap();
    }
    assert_eq!(rig.harness.queue(STATS).used_idx(), 1, "asked once");
    let cached = rig.handle.cached_stats().unwrap();
    assert_eq!(cached.stats.free_memory, Some(1));

    // The late response serves the next caller, without another refill.
    let handle = rig.handle.clone();
    let caller = std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE));
    refill(&mut rig, 9);
    wait_until("the caller, or his second request", || {
        rig.harness.serve_sources(1).unwrap();
        if rig.harness.queue(STATS).pop_used().is_some() {
            send(&mut rig, &[entry(4, 9)]);
        }
        caller.is_finished()
    });
    let sample = caller.join().unwrap().unwrap();
    assert_eq!(sample.stats.free_memory, Some(9));
}

#[test]
fn request_before_the_first_buffer_is_answered_by_it() {
    let mut rig = Rig::new();
    let handle = rig.handle.clone();
    let caller = std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE));
    wait_until("the request", || rig.harness.serve_sources(10).unwrap() > 0);
    send(&mut rig, &[entry(4, 3)]);
    let sample = caller.join().unwrap().unwrap();
    assert_eq!(sample.stats.free_memory, Some(3));
}

#[test]
fn reset_wakes_callers_and_forgets_buffer_and_sample() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    let handle = rig.handle.clone();
    let caller = std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE));
    wait_until("the request", || rig.harness.serve_sources(10).unwrap() > 0);
    rig.harness.reset();
    assert_eq!(caller.join().unwrap().unwrap_err(), StatsError::Reset);
    assert!(rig.handle.cached_stats().is_none());

    rig.harness.activate().unwrap();
    send(&mut rig, &[entry(4, 5)]);
    assert_eq!(rig.harness.queue(STATS).used_idx(), 0);
    let handle = rig.handle.clone();
    let caller = std::thread::spawn(move || handle.request_stats(Instant::now() + DEADLINE));
    refill(&mut rig, 6);
    assert!(caller.join().unwrap().is_ok());
}

#[test]
fn surplus_buffer_is_given_back_and_the_newest_kept() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    send(&mut rig, &[entry(4, 2)]);
    assert_eq!(rig.harness.queue(STATS).used_idx(), 1);
    assert_eq!(rig.snapshot().faults.stats_surplus_buffers, 1);
    let cached = rig.handle.cached_stats().unwrap();
    assert_eq!(cached.stats.free_memory, Some(2));
}

#[test]
fn poll_asks_again_and_again_until_it_is_switched_off() {
    let mut rig = Rig::new();
    send(&mut rig, &[entry(4, 1)]);
    rig.handle.set_stats_poll(Duration::from_millis(1));
    for value in 2..5 {
        refill(&mut rig, value);
        let sample = rig.handle.cached_stats().unwrap();
        assert_eq!(sample.stats.free_memory, Some(value));
    }
    rig.handle.set_stats_poll(Duration::ZERO);
    // Processes the change; the timer may already have expired.
    rig.harness.serve_sources(0).unwrap();
    rig.harness.serve_sources(0).unwrap();
    if rig.harness.queue(STATS).pop_used().is_some() {
        send(&mut rig, &[entry(4, 9)]);
    }
    assert_eq!(rig.harness.serve_sources(20).unwrap(), 0);
    assert_eq!(rig.harness.queue(STATS).pop_used(), None);
}

#[test]
fn poll_outlives_the_driver_and_does_nothing_without_one() {
    let mut rig = Rig::new();
    rig.handle.set_stats_poll(Duration::from_millis(1));
    rig.harness.reset();
    for _ in 0..3 {
        rig.harness.serve_sources(10).unwrap();
    }
    assert!(rig.handle.cached_stats().is_none());
    rig.harness.activate().unwrap();
    send(&mut rig, &[entry(4, 1)]);
    refill(&mut rig, 2);
    let sample = rig.handle.cached_stats().unwrap();
    assert_eq!(sample.stats.free_memory, Some(2));
}
