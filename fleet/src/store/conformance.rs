#![allow(clippy::unwrap_used)]
//! Conformance tests of stores: the same requirements for the store in memory and for etcd.

use std::time::{Duration, Instant};

use super::{Committed, LeaseId, Revision, Store, StoreError, Txn, Write};

/// A generous deadline, because test machines are shared.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn put(key: &str, value: &str, lease: Option<LeaseId>) -> Write {
    Write::Put {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        lease,
    }
}

fn txn(expect: &[(&str, Revision)], writes: Vec<Write>) -> Txn {
    Txn {
        expect: expect
            .iter()
            .map(|(key, revision)| ((*key).to_owned(), *revision))
            .collect(),
        writes,
    }
}

/// `wait_out` lets time pass for the store.
pub(super) fn check(store: &dyn Store, prefix: &str, wait_out: impl Fn(Duration)) {
    changes_happen_only_as_expected(store, &format!("{prefix}/txn/"));
    pages_are_one_list(store, &format!("{prefix}/pages/"));
    leases_take_their_keys(store, &format!("{prefix}/lease/"), wait_out);
    changes_are_told(store, &format!("{prefix}/watch/"));
}

fn changes_happen_only_as_expected(store: &dyn Store, prefix: &str) {
    let (a, b) = (format!("{prefix}a"), format!("{prefix}b"));
    let create = txn(
        &[(&a, Revision(0))],
        vec![put(&a, "1", None), put(&b, "1", None)],
    );
    let Committed::Yes(made) = store.commit(&create, soon()).unwrap() else {
        panic!("the keys are new");
    };
    assert_eq!(store.commit(&create, soon()).unwrap(), Committed::Conflict);
    let listing = store.list(prefix, soon()).unwrap();
    assert_eq!(listing.changed(&a), made);
    assert_eq!(listing.get(&b).unwrap().value, b"1");
    assert_eq!(listing.changed("/no/such/key"), Revision(0));
    // If one of two expectations fails, nothing is written.
    let half = txn(
        &[(&a, made), (&b, Revision(0))],
        vec![put(&a, "2", None), Write::Delete { key: b.clone() }],
    );
    assert_eq!(store.commit(&half, soon()).unwrap(), Committed::Conflict);
    let whole = txn(
        &[(&a, made), (&b, made)],
        vec![put(&a, "2", None), Write::Delete { key: b.clone() }],
    );
    assert!(matches!(
        store.commit(&whole, soon()).unwrap(),
        Committed::Yes(_)
    ));
    let listing = store.list(prefix, soon()).unwrap();
    assert_eq!(listing.pairs.len(), 1);
    assert_eq!(listing.get(&a).unwrap().value, b"2");
}

fn pages_are_one_list(store: &dyn Store, prefix: &str) {
    let count = 1100;
    for part in 0..11 {
        let writes = (part * 100..(part + 1) * 100)
            .map(|n| put(&format!("{prefix}{n:05}"), "x", None))
            .collect();
        store.commit(&txn(&[], writes), soon()).unwrap();
    }
    let listing = store.list(prefix, soon()).unwrap();
    assert_eq!(listing.pairs.len(), count);
    assert!(listing.pairs.is_sorted_by(|a, b| a.key < b.key));
}

fn leases_take_their_keys(store: &dyn Store, prefix: &str, wait_out: impl Fn(Duration)) {
    let key = format!("{prefix}mine");
    let lasts = Duration::from_secs(2);
    let lease = store.grant(lasts, soon()).unwrap();
    store
        .commit(&txn(&[], vec![put(&key, "x", Some(lease))]), soon())
        .unwrap();
    assert_eq!(
        store.list(prefix, soon()).unwrap().pairs[0].lease,
        Some(lease)
    );
    store.keep_alive(lease, soon()).unwrap();
    wait_out(lasts);
    let over = |lease| matches!(store.keep_alive(lease, soon()), Err(StoreError::LeaseOver));
    let until = soon();
    while !store.list(prefix, soon()).unwrap().pairs.is_empty() {
        assert!(Instant::now() < until, "the key outlives its lease");
        std::thread::yield_now();
    }
    assert!(over(lease));
    let write = txn(&[], vec![put(&key, "x", Some(lease))]);
    assert!(matches!(
        store.commit(&write, soon()),
        Err(StoreError::LeaseOver)
    ));
    let lease = store.grant(Duration::from_secs(60), soon()).unwrap();
    store
        .commit(&txn(&[], vec![put(&key, "x", Some(lease))]), soon())
        .unwrap();
    store.revoke(lease, soon()).unwrap();
    store.revoke(lease, soon()).unwrap();
    assert!(store.list(prefix, soon()).unwrap().pairs.is_empty());
}

fn changes_are_told(store: &dyn Store, prefix: &str) {
    let before = store.list(prefix, soon()).unwrap().revision;
    let nothing = store
        .await_change(prefix, before, Instant::now() + Duration::from_millis(200))
        .unwrap();
    assert!(!nothing, "nothing has changed");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.await_change(prefix, before, soon()));
        let write = txn(&[], vec![put(&format!("{prefix}k"), "x", None)]);
        store.commit(&write, soon()).unwrap();
        assert!(waiting.join().unwrap().unwrap());
    });
    // Changes made before the wait began are reported as well.
    assert!(store.await_change(prefix, before, soon()).unwrap());
}
