#![allow(clippy::unwrap_used)]
//! The store in memory, and etcd where a test run names one.

use std::time::{Duration, Instant};

use super::*;

#[test]
fn memory_store_does_what_a_store_must() {
    let store = MemoryStore::default();
    conformance::check(&store, "/test", |time| store.advance(time));
}

#[test]
fn memory_store_fails_the_ways_a_cluster_does() {
    let store = MemoryStore::default();
    let until = Instant::now();
    let write = |value: &str| Txn {
        expect: Vec::new(),
        writes: vec![Write::Put {
            key: "k".to_owned(),
            value: value.into(),
            lease: None,
        }],
    };
    let value = || {
        store
            .list("k", until)
            .unwrap()
            .pairs
            .pop()
            .map(|pair| pair.value)
    };
    store.inject(Fault::LostAnswer);
    let error = store.commit(&write("1"), until).unwrap_err();
    assert!(matches!(error, StoreError::Unknown { .. }));
    assert_eq!(value().unwrap(), b"1");
    store.inject(Fault::LostRequest);
    let error = store.commit(&write("2"), until).unwrap_err();
    assert!(matches!(error, StoreError::Unknown { .. }));
    assert_eq!(value().unwrap(), b"1");
    store.inject(Fault::Late);
    store.commit(&write("3"), until).unwrap_err();
    assert_eq!(value().unwrap(), b"1");
    store.deliver();
    assert_eq!(value().unwrap(), b"3");
    store.set_down(true);
    let error = store.list("k", until).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }));
}

#[test]
fn late_change_fails_when_another_came_first() {
    let store = MemoryStore::default();
    let until = Instant::now();
    let write = |value: &str| Txn {
        expect: vec![("k".to_owned(), Revision(0))],
        writes: vec![Write::Put {
            key: "k".to_owned(),
            value: value.into(),
            lease: None,
        }],
    };
    store.inject(Fault::Late);
    store.commit(&write("late"), until).unwrap_err();
    store.commit(&write("second try"), until).unwrap();
    store.deliver();
    assert_eq!(
        store.list("k", until).unwrap().pairs[0].value,
        b"second try"
    );
}

/// Needs a cluster: `cargo xtask fleet-store` starts one and names it.
#[test]
#[ignore = "needs etcd: cargo xtask fleet-store"]
fn etcd_does_what_a_store_must() {
    let named = std::env::var("CH_FLEET_ETCD").expect("CH_FLEET_ETCD names the members");
    let endpoints = named.split(',').map(|one| one.parse().unwrap()).collect();
    let store = EtcdStore::new(endpoints, 0);
    let prefix = format!("/conformance-{}", std::process::id());
    // The demands themselves wait until the keys of a lease are gone.
    conformance::check(&store, &prefix, |_: Duration| {});
}
