#![allow(clippy::unwrap_used)]
//! Tests reservations through all phases and across a restart.

use tempfile::TempDir;

use super::*;
use crate::config::Millis;

const HOLD: Millis = Millis::seconds(60);
const GIB: Bytes = Bytes::gib(1);

/// Both clocks at this time.
fn at(ms: u64) -> Moment {
    Moment { ms, unix_ms: ms }
}

fn open(folder: &TempDir) -> Reservations {
    Reservations::open(folder.path(), at(0)).unwrap()
}

fn reserve(book: &mut Reservations, vm: &str, now: u64) -> Result<Reservation, ReservationError> {
    book.reserve(vm, (Bytes::gib(4), GIB), false, 0, (at(now), HOLD))
}

fn nobody(_: &str) -> Option<SeenVm> {
    None
}

fn resident(mib: u64) -> impl Fn(&str) -> Option<SeenVm> {
    move |_| {
        Some(SeenVm {
            resident: Bytes::mib(mib),
        })
    }
}

#[test]
fn reservation_outlives_a_restart() {
    let folder = TempDir::new().unwrap();
    let made = reserve(&mut open(&folder), "a", 5).unwrap();
    let mut again = open(&folder);
    assert_eq!(again.entries(), std::slice::from_ref(&made));
    assert_eq!(again.outstanding(at(5), HOLD, nobody), GIB);
    again.release(&made.id).unwrap();
    assert!(open(&folder).entries().is_empty());
}

#[test]
fn reservation_asked_for_twice_is_one() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    let first = reserve(&mut book, "a", 5).unwrap();
    assert_eq!(reserve(&mut book, "a", 9).unwrap(), first);
    let other = book.reserve("a", (Bytes::gib(8), GIB), false, 0, (at(9), HOLD));
    assert!(matches!(other, Err(ReservationError::Held { .. })));
}

#[test]
fn reservation_that_nobody_confirms_is_given_back() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    reserve(&mut book, "a", 0).unwrap();
    assert!(book.follow(at(60_000), nobody).unwrap().is_empty());
    assert_eq!(book.follow(at(60_001), nobody).unwrap().len(), 1);
    assert_eq!(book.outstanding(at(60_001), HOLD, nobody), Bytes::ZERO);
    assert!(open(&folder).entries().is_empty());
}

#[test]
fn promise_shrinks_as_the_vm_grows_into_it() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    reserve(&mut book, "a", 0).unwrap();
    book.confirm("a", at(50_000), HOLD).unwrap();
    assert!(book.follow(at(100_000), nobody).unwrap().is_empty());
    book.follow(at(101_000), resident(24)).unwrap();
    assert_eq!(book.entries()[0].phase, ReservationPhase::Running);
    assert_eq!(
        book.outstanding(at(101_000), HOLD, resident(24)),
        Bytes::mib(1000)
    );
    assert_eq!(
        book.outstanding(at(101_000), HOLD, resident(5000)),
        Bytes::ZERO
    );
    assert_eq!(
        book.outstanding(at(161_001), HOLD, resident(24)),
        Bytes::ZERO
    );
}

#[test]
fn reservation_of_a_vm_that_went_is_dropped_but_not_at_once() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    reserve(&mut book, "a", 0).unwrap();
    book.follow(at(1000), resident(1)).unwrap();
    assert!(book.follow(at(31_000), nobody).unwrap().is_empty());
    assert_eq!(book.follow(at(31_001), nobody).unwrap()[0].vm, "a");
}

#[test]
fn book_that_cannot_be_read_is_not_taken_for_an_empty_one() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("reservations.json"), "{").unwrap();
    assert!(Reservations::open(folder.path(), at(0)).is_err());
    let newer = r#"{"version":2,"reservations":[]}"#;
    std::fs::write(folder.path().join("reservations.json"), newer).unwrap();
    assert!(Reservations::open(folder.path(), at(0)).is_err());
}

#[test]
fn promise_that_cannot_be_saved_is_not_made() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    std::fs::remove_dir_all(folder.path()).unwrap();
    assert!(matches!(
        reserve(&mut book, "a", 0),
        Err(ReservationError::Save(_))
    ));
    assert!(book.entries().is_empty());
}

#[test]
fn wall_clock_that_jumps_neither_shortens_nor_lengthens_a_promise() {
    let folder = TempDir::new().unwrap();
    let mut book = open(&folder);
    let hour = 3_600_000;
    let (begin, ahead, back) = (10 * hour, 11 * hour, 9 * hour);
    let moment = |ms, unix_ms| Moment { ms, unix_ms };
    book.reserve(
        "a",
        (Bytes::gib(4), GIB),
        false,
        0,
        (moment(0, begin), HOLD),
    )
    .unwrap();
    assert!(book.follow(moment(3000, ahead), nobody).unwrap().is_empty());
    assert_eq!(book.outstanding(moment(3000, ahead), HOLD, nobody), GIB);
    // The next agent in the same boot uses the same clock.
    let mut book = Reservations::open(folder.path(), moment(50_000, back)).unwrap();
    assert!(
        book.follow(moment(60_000, back), nobody)
            .unwrap()
            .is_empty()
    );
    assert_eq!(book.follow(moment(60_001, back), nobody).unwrap().len(), 1);
}

#[test]
fn promise_of_an_older_agent_is_held_for_its_whole_time_from_now_on() {
    let folder = TempDir::new().unwrap();
    reserve(&mut open(&folder), "a", 0).unwrap();
    let path = folder.path().join("reservations.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut saved: serde_json::Value = serde_json::from_str(&text).unwrap();
    let saved_table = saved.as_object_mut().unwrap();
    assert!(saved_table.remove("times").is_some() && saved_table.remove("boot").is_some());
    std::fs::write(&path, saved.to_string()).unwrap();
    let mut book = Reservations::open(folder.path(), at(500_000)).unwrap();
    assert!(book.follow(at(560_000), nobody).unwrap().is_empty());
    assert_eq!(book.follow(at(560_001), nobody).unwrap().len(), 1);
}
