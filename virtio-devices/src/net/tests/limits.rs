//! Tests of the rate limits of both directions, with a simulated clock. The timers are real and short.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::rate_limit::mock::MockClock;
use crate::rate_limit::{BucketLimit, RateLimits};

/// 1000 bytes and 2 frames per 10 ms.
const LIMITS: RateLimits = RateLimits {
    bandwidth: Some(BucketLimit {
        size: 1000,
        one_time_burst: 0,
        refill: Duration::from_millis(10),
    }),
    ops: Some(BucketLimit {
        size: 2,
        one_time_burst: 0,
        refill: Duration::from_millis(10),
    }),
};

fn rig(clock: &MockClock) -> (Rig, NetLimiters) {
    let limiters = NetLimiters {
        receive: clock.limiter(LIMITS),
        transmit: clock.limiter(LIMITS),
    };
    let rig = Rig::with_params(
        0,
        &NetParams {
            limiters: limiters.clone(),
            ..params(2)
        },
    );
    (rig, limiters)
}

/// Serves the pair until its timers have woken it three times without effect. Returns the completed chains of `queue`.
fn until_throttled(rig: &mut Rig, queue: u16) -> usize {
    let end = Instant::now() + DEADLINE;
    let enough = rig.counter("throttled") + 3;
    let mut completed = 0;
    while rig.counter("throttled") < enough {
        assert!(Instant::now() < end, "the timer runs");
        rig.harness.serve_sources(100).expect("device continues");
        while rig.harness.queue(queue).pop_used().is_some() {
            completed += 1;
        }
    }
    completed
}

#[test]
fn frames_from_the_guest_beyond_the_limit_wait() {
    let clock = MockClock::default();
    let (mut rig, limiters) = rig(&clock);
    for _ in 0..5 {
        rig.harness
            .queue(TX)
            .push(&[Segment::Readable(&outgoing(100, 1))]);
    }
    rig.harness.kick(TX).unwrap();
    assert_eq!(until_throttled(&mut rig, TX), 2);
    clock.advance(Duration::from_millis(5));
    assert_eq!(until_throttled(&mut rig, TX), 1);
    assert_eq!(rig.counter("tx_frames"), 3);
    // The other direction has its own tokens.
    rig.offer(2000);
    rig.arrive(1500, 7);
    rig.wait_used(RX);
    limiters.set(RateLimits::default());
    rig.harness.handler.resume();
    rig.harness.kick(TX).unwrap();
    rig.settle();
    assert_eq!(rig.counter("tx_frames"), 5, "nothing is lost");
}

#[test]
fn frames_to_the_guest_beyond_the_limit_wait_in_the_tap() {
    let clock = MockClock::default();
    let (mut rig, _limiters) = rig(&clock);
    for _ in 0..3 {
        rig.offer(4000);
        rig.arrive(3000, 7);
    }
    assert_eq!(until_throttled(&mut rig, RX), 1);
    // 2000 bytes are owed: 20 ms, plus time for the next token.
    clock.advance(Duration::from_millis(20));
    assert_eq!(until_throttled(&mut rig, RX), 0);
    clock.advance(Duration::from_millis(1));
    assert_eq!(until_throttled(&mut rig, RX), 1);
    assert_eq!(rig.counter("rx_drops"), 0);
    // A wait does not outlive a reset.
    rig.harness.reset();
    clock.advance(Duration::from_secs(1));
    rig.harness.activate().unwrap();
    rig.offer(4000);
    rig.settle();
    rig.wait_used(RX);
}

#[test]
fn state_has_the_tokens_of_both_directions() {
    let clock = MockClock::default();
    let (mut saved, _) = rig(&clock);
    saved
        .harness
        .queue(TX)
        .push(&[Segment::Readable(&outgoing(700, 1))]);
    saved.harness.kick(TX).unwrap();
    saved.wait_used(TX);
    let state = saved.net.state();
    let (mut restored, limiters) = rig(&clock);
    restored.net.restore(&state).unwrap();
    assert_eq!(restored.net.state(), state);
    let left = |limiter: &Arc<crate::rate_limit::RateLimiter>| limiter.state().bandwidth;
    assert_eq!(left(&limiters.transmit).unwrap().tokens, 300);
    assert_eq!(left(&limiters.receive).unwrap().tokens, 1000);
}
