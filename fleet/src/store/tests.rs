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

/// etcd with one member, for as long as it is held.
struct Etcd {
    child: std::process::Child,
    _folder: tempfile::TempDir,
    address: String,
}

impl Etcd {
    fn start() -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        // Two ports that were free a moment ago.
        let free = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        let (client, peer) = (format!("http://{}", free()), format!("http://{}", free()));
        let child = std::process::Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--log-level", "error", "--logger", "zap"])
            .spawn()
            .expect("etcd-server is installed");
        Self {
            child,
            _folder: folder,
            address: client,
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
#[ignore = "needs etcd: cargo xtask fleet-store"]
fn etcd_does_what_a_store_must() {
    let etcd = Etcd::start();
    let store = EtcdStore::new(vec![etcd.address.parse().unwrap()], 0);
    let until = Instant::now() + Duration::from_secs(60);
    while store.list("/", until).is_err() {
        assert!(Instant::now() < until, "etcd does not answer");
    }
    // The demands themselves wait until the keys of a lease are gone.
    conformance::check(&store, "/conformance", |_: Duration| {});
}
