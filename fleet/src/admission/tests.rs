//! Tests admission with hand-written ledgers.

use proptest::prelude::*;

use super::*;

fn headroom(firm_free_gib: u64) -> HostHeadroom {
    HostHeadroom {
        ledger: Ledger {
            usable: Bytes::gib(100),
            available: Bytes::gib(firm_free_gib + 5),
            burst: Bytes::gib(5),
            configured: Bytes::gib(150),
            firm_free: Bytes::gib(firm_free_gib),
            ..Ledger::default()
        },
        ..HostHeadroom::default()
    }
}

fn request(min_gib: u64, max_gib: u64) -> Request {
    Request {
        min: Bytes::gib(min_gib),
        max: Bytes::gib(max_gib),
    }
}

#[test]
fn vm_with_room_is_admitted_on_its_minimum() {
    let admission = admit(&request(4, 8), &headroom(20), &Config::default()).unwrap();
    assert_eq!(admission.promise, Bytes::gib(4));
    assert_eq!(admission.left, Bytes::gib(6));
}

#[test]
fn refusal_says_what_is_missing_and_what_would_help() {
    let mut headroom = headroom(13);
    headroom.freeable = Bytes::gib(10);
    headroom.freeable_soon = Bytes::gib(1);
    headroom.ledger.promised = Bytes::gib(2);
    let refusal = admit(&request(4, 8), &headroom, &Config::default()).unwrap_err();
    assert_eq!(refusal.obstacles, [Obstacle::Short(Bytes::gib(1))]);
    assert_eq!(
        refusal.remedies,
        [
            Remedy::Wait {
                for_bytes: Bytes::gib(1),
                about: Millis::seconds(10)
            },
            Remedy::Release(Bytes::gib(1)),
            Remedy::LowerMinimum(Bytes::gib(3)),
            Remedy::MakeRoom(Bytes::gib(1)),
        ]
    );
    let text = refusal.to_string();
    assert!(text.contains("lower --min to 3.00 GiB"), "{text}");
}

#[test]
fn tight_host_admits_nothing_however_small() {
    let mut headroom = headroom(50);
    headroom.state = HostState::Orange;
    let refusal = admit(&request(1, 1), &headroom, &Config::default()).unwrap_err();
    assert_eq!(refusal.obstacles, [Obstacle::State(HostState::Orange)]);
    assert!(!refusal.remedies.is_empty());
}

#[test]
fn overcommit_has_a_limit_that_memory_does_not_lift() {
    let mut headroom = headroom(80);
    headroom.ledger.configured = Bytes::gib(398);
    let refusal = admit(&request(1, 4), &headroom, &Config::default()).unwrap_err();
    assert_eq!(
        refusal.remedies,
        [Remedy::RaiseOvercommit(4.02), Remedy::Shrink(Bytes::gib(2))]
    );
}

#[test]
fn vm_larger_than_the_host_is_told_so() {
    let refusal = admit(&request(101, 101), &headroom(80), &Config::default()).unwrap_err();
    assert_eq!(refusal.obstacles, [Obstacle::TooLarge(Bytes::gib(90))]);
    assert!(refusal.to_string().contains("Nothing would make it fit"));
}

#[test]
fn hundred_requests_for_ten_places_give_ten() {
    let mut headroom = headroom(20);
    let mut admitted = 0;
    for _ in 0..100 {
        if let Ok(admission) = admit(&request(1, 1), &headroom, &Config::default()) {
            admitted += 1;
            headroom.ledger.promised += admission.promise;
            headroom.ledger.firm_free -= admission.promise;
        }
    }
    assert_eq!(admitted, 10);
}

proptest! {
    /// A remedy that reduces the request must work if it is followed.
    #[test]
    fn lower_minimum_that_was_offered_is_admitted(
        free in 0u64..60, min in 1u64..60, more in 0u64..60, above_min in 0.0..0.9f64,
    ) {
        let mut config = Config::default();
        config.admission.above_min = Fraction(above_min);
        let mut request = request(min, min + more);
        if let Err(refusal) = admit(&request, &headroom(free), &config) {
            for remedy in &refusal.remedies {
                if let Remedy::LowerMinimum(lower) = remedy {
                    // Parts are rounded down to bytes.
                    request.min = *lower - Bytes(4);
                    prop_assert!(admit(&request, &headroom(free), &config).is_ok());
                }
            }
        }
    }

    #[test]
    fn admission_never_promises_what_is_not_there(free in 0u64..60, min in 1u64..60, more in 0u64..60) {
        let headroom = headroom(free);
        if let Ok(admission) = admit(&request(min, min + more), &headroom, &Config::default()) {
            prop_assert!(admission.promise + admission.left <= headroom.ledger.firm_free);
        }
    }
}
