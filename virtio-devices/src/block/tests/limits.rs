//! Tests of rate limits with a simulated clock. The timer is real and short: it wakes the queue, which finds no token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::VirtioDevice;
use crate::rate_limit::mock::MockClock;
use crate::rate_limit::{BucketLimit, RateLimiter, RateLimits};

/// `size` tokens per 10 ms.
fn limit(size: u64) -> Option<BucketLimit> {
    Some(BucketLimit {
        size,
        one_time_burst: 0,
        refill: Duration::from_millis(10),
    })
}

fn ops(size: u64) -> RateLimits {
    RateLimits {
        bandwidth: None,
        ops: limit(size),
    }
}

fn rig(file: &NamedTempFile, limiter: &Arc<RateLimiter>) -> Rig {
    Rig::new(BlockParams {
        limiter: Arc::clone(limiter),
        readonly: true,
        ..params(file)
    })
}

fn push_reads(rig: &mut Rig, count: usize, bytes: u32) {
    for _ in 0..count {
        rig.harness.queue(0).push(&[
            Segment::Readable(&header(0, 0)),
            Segment::Writable(bytes),
            Segment::Writable(1),
        ]);
    }
}

/// Serves the queue until its timer has woken it three times without effect. Returns the number of completed requests.
fn until_throttled(rig: &mut Rig) -> usize {
    let end = Instant::now() + DEADLINE;
    let enough = rig.counter("throttled") + 3;
    let mut completed = 0;
    while rig.counter("throttled") < enough {
        assert!(Instant::now() < end, "the timer runs");
        rig.harness.serve_sources(100).expect("device continues");
        while rig.harness.queue(0).pop_used().is_some() {
            completed += 1;
        }
    }
    completed
}

#[test]
fn requests_beyond_the_limit_wait_for_tokens() {
    let file = image(16);
    let clock = MockClock::default();
    let mut rig = rig(&file, &clock.limiter(ops(2)));
    push_reads(&mut rig, 5, 512);
    rig.harness.kick(0).unwrap();
    assert_eq!(until_throttled(&mut rig), 2);
    clock.advance(Duration::from_millis(5));
    assert_eq!(until_throttled(&mut rig), 1);
    clock.advance(Duration::from_millis(10));
    assert_eq!(until_throttled(&mut rig), 2, "nothing is lost");
    assert_eq!(rig.counter("read_ops"), 5);
}

#[test]
fn request_of_every_type_takes_one_operation() {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const FLUSH: u32 = 4;
    const GET_ID: u32 = 8;
    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;
    const UNKNOWN: u32 = 99;
    let file = image(16);
    let one_sector = range(0, 1, 0);
    let data = [0; 512];
    for (kind, readable, writable) in [
        (READ, &[][..], 512),
        (WRITE, &data, 0),
        (FLUSH, &[], 0),
        (GET_ID, &[], 20),
        (DISCARD, &one_sector, 0),
        (WRITE_ZEROES, &one_sector, 0),
        (UNKNOWN, &[], 0),
    ] {
        let clock = MockClock::default();
        let mut rig = Rig::new(BlockParams {
            limiter: clock.limiter(ops(2)),
            ..params(&file)
        });
        for _ in 0..3 {
            rig.harness.queue(0).push(&[
                Segment::Readable(&[&header(kind, 0)[..], readable].concat()),
                Segment::Writable(writable + 1),
            ]);
        }
        rig.harness.kick(0).unwrap();
        assert_eq!(until_throttled(&mut rig), 2, "type {kind}");
    }
}

#[test]
fn zeroes_that_the_host_cannot_make_are_bytes_and_others_are_not() {
    // tmpfs punches holes but zeroes no range.
    let file = NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    for (unmap, is_written) in [(1, false), (0, true)] {
        let limiter = MockClock::default().limiter(RateLimits {
            bandwidth: limit(64 << 10),
            ops: None,
        });
        let mut rig = Rig::new(BlockParams {
            limiter: Arc::clone(&limiter),
            ..params(&file)
        });
        assert_eq!(rig.on_range(13, range(0, 128, unmap)), S_OK);
        assert_eq!(limiter.wait().is_some(), is_written, "unmap {unmap}");
    }
}

#[test]
fn request_longer_than_the_bucket_is_served_and_paid_for_afterwards() {
    let file = image(128);
    let clock = MockClock::default();
    let mut rig = rig(
        &file,
        &clock.limiter(RateLimits {
            bandwidth: limit(4096),
            ops: None,
        }),
    );
    push_reads(&mut rig, 2, 64 << 10);
    rig.harness.kick(0).unwrap();
    assert_eq!(until_throttled(&mut rig), 1);
    // 60 KiB are owed: 150 ms, plus time for the next token.
    clock.advance(Duration::from_millis(150));
    assert_eq!(until_throttled(&mut rig), 0);
    clock.advance(Duration::from_millis(1));
    assert_eq!(until_throttled(&mut rig), 1);
}

#[test]
fn disks_of_a_group_share_its_tokens() {
    let file = image(16);
    let clock = MockClock::default();
    let group = clock.limiter(ops(3));
    let (mut one, mut other) = (rig(&file, &group), rig(&file, &group));
    for disk in [&mut one, &mut other] {
        push_reads(disk, 2, 512);
        disk.harness.kick(0).unwrap();
    }
    one.wait_used();
    one.wait_used();
    assert_eq!(until_throttled(&mut other), 1);
    push_reads(&mut one, 1, 512);
    one.harness.kick(0).unwrap();
    assert_eq!(until_throttled(&mut one), 0);
}

#[test]
fn changed_limit_holds_from_the_resume_on() {
    let file = image(16);
    let clock = MockClock::default();
    let limiter = clock.limiter(ops(1));
    let mut rig = rig(&file, &limiter);
    push_reads(&mut rig, 3, 512);
    rig.harness.kick(0).unwrap();
    assert_eq!(until_throttled(&mut rig), 1);
    rig.harness.handler.pause();
    limiter.set(RateLimits::default());
    rig.harness.handler.resume();
    rig.harness.kick(0).unwrap();
    rig.wait_used();
    rig.wait_used();
}

#[test]
fn reset_ends_a_wait_that_would_take_a_day() {
    let file = image(16);
    let limiter = Arc::new(RateLimiter::new(RateLimits {
        bandwidth: None,
        ops: Some(BucketLimit {
            size: 1,
            one_time_burst: 0,
            refill: crate::rate_limit::REFILL_MAX,
        }),
    }));
    let mut rig = rig(&file, &limiter);
    push_reads(&mut rig, 2, 512);
    rig.harness.kick(0).unwrap();
    rig.wait_used();
    rig.harness.serve_sources(0).unwrap();
    assert_eq!(rig.counter("throttled"), 1);
    rig.harness.reset();
    limiter.set(RateLimits::default());
    rig.harness.activate().unwrap();
    assert_eq!(rig.read(3, 512).1, vec![3; 512]);
}

#[test]
fn state_has_the_tokens_that_are_left() {
    let file = image(16);
    let clock = MockClock::default();
    let mut saved = rig(&file, &clock.limiter(ops(3)));
    push_reads(&mut saved, 2, 512);
    saved.harness.kick(0).unwrap();
    saved.wait_used();
    saved.wait_used();
    let state = saved.block.state();
    let mut restored = rig(&file, &clock.limiter(ops(3)));
    restored.block.restore(&state).unwrap();
    assert_eq!(restored.block.state(), state);
    push_reads(&mut restored, 2, 512);
    restored.harness.kick(0).unwrap();
    assert_eq!(until_throttled(&mut restored), 1);
    // A disk without a limit cannot have a saved token count.
    let mut unlimited = rig(&file, &Arc::default());
    assert!(unlimited.block.restore(&state).is_err());
}
