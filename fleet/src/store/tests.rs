#![allow(clippy::unwrap_used)]
//! Tests the store in memory, and etcd if the test run provides it.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::*;
use crate::agent_config::StoreSection;
use crate::cluster::Keys;

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

/// etcd with one member; dropping it ends it.
struct Etcd {
    child: std::process::Child,
    _folder: tempfile::TempDir,
    address: String,
}

impl Etcd {
    fn start() -> Self {
        Self::start_with("http", &[])
    }

    /// The same over `scheme`, with additional arguments.
    fn start_with(scheme: &str, arguments: &[&OsStr]) -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        // Two ports that were just free.
        let free = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        };
        let client = format!("{scheme}://{}", free());
        let peer = format!("http://{}", free());
        let child = std::process::Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--log-level", "error", "--logger", "zap"])
            .args(arguments)
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
    // The tests themselves wait until the keys of a lease have been removed.
    conformance::check(&store, "/conformance", |_: Duration| {});
}

/// Certificates for one test: a CA, and certificates that it signed for members and clients.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn make() -> Self {
        let made = Self(tempfile::TempDir::new().unwrap());
        let key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ];
        for ca in ["ca", "other"] {
            made.openssl(
                &[
                    &["req", "-x509"],
                    &key[..],
                    &["-subj", "/CN=test CA", "-keyout"],
                ]
                .concat(),
                ca,
            );
        }
        // Members also connect to themselves, so their certificate is valid for both ends. etcd rejects clients of its
        // JSON interface whose certificate has a common name, which it would otherwise interpret as a user.
        for (name, usage, subject) in [
            ("server", "serverAuth,clientAuth", "/CN=test"),
            ("client", "clientAuth", "/O=test"),
        ] {
            let usage = format!("extendedKeyUsage={usage}");
            let (ca, ca_key) = (made.pem("ca.pem"), made.pem("ca.key"));
            let signed = [
                "-CA",
                ca.to_str().unwrap(),
                "-CAkey",
                ca_key.to_str().unwrap(),
                "-addext",
                "subjectAltName=IP:127.0.0.1,DNS:localhost",
                "-addext",
                &usage,
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-subj",
                subject,
                "-keyout",
            ];
            made.openssl(&[&["req", "-x509"], &key[..], &signed].concat(), name);
        }
        made
    }

    fn pem(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &[&str], name: &str) {
        let output = Command::new("openssl")
            .args(arguments)
            .arg(self.pem(&format!("{name}.key")))
            .arg("-out")
            .arg(self.pem(&format!("{name}.pem")))
            .output()
            .expect("openssl is installed");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn put(key: String) -> Txn {
    Txn {
        expect: Vec::new(),
        writes: vec![Write::Put {
            key,
            value: b"1".to_vec(),
            lease: None,
        }],
    }
}

/// Waits until etcd responds.
fn wait_for(store: &EtcdStore) {
    let until = Instant::now() + Duration::from_secs(60);
    while let Err(error) = store.list("/", until) {
        assert!(Instant::now() < until, "etcd does not answer: {error:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
#[ignore = "needs etcd: cargo xtask fleet-store"]
fn etcd_with_tls_and_users_does_what_a_store_must_and_gives_each_user_its_rights_only() {
    let made = Certificates::make();
    let (certificate, key, ca) = (
        made.pem("server.pem"),
        made.pem("server.key"),
        made.pem("ca.pem"),
    );
    let arguments: [&OsStr; 7] = [
        OsStr::new("--cert-file"),
        certificate.as_ref(),
        OsStr::new("--key-file"),
        key.as_ref(),
        OsStr::new("--trusted-ca-file"),
        ca.as_ref(),
        OsStr::new("--client-cert-auth"),
    ];
    let etcd = Etcd::start_with("https", &arguments);
    let password =
        |user: &str, text: &str| fs::write(made.pem(&format!("{user}.password")), text).unwrap();
    let section = |user: Option<&str>| StoreSection {
        endpoints: vec![etcd.address.clone()],
        ca_file: Some(ca.clone()),
        certificate: Some(made.pem("client.pem")),
        key: Some(made.pem("client.key")),
        user: user.map(str::to_owned),
        password_file: user.map(|user| made.pem(&format!("{user}.password"))),
        ..StoreSection::default()
    };
    let connect = |section: &StoreSection| -> Arc<EtcdStore> {
        section.check().unwrap();
        section.connect(0).unwrap()
    };
    let root = connect(&section(None));
    wait_for(&root);
    let until = || Instant::now() + Duration::from_secs(10);
    // Clients without a certificate, and clients that trust another CA, are not served.
    let mut stranger = section(None);
    (stranger.certificate, stranger.key) = (None, None);
    assert!(connect(&stranger).list("/", until()).is_err());
    let mut fooled = section(None);
    fooled.ca_file = Some(made.pem("other.pem"));
    assert!(connect(&fooled).list("/", until()).is_err());

    let administer = |path: &str, body: serde_json::Value| root.administer(path, &body).unwrap();
    // Everything below the fleet's prefix, and nothing else.
    let range = |kind: &str, key: &str| {
        let mut end = key.as_bytes().to_vec();
        *end.last_mut().unwrap() += 1;
        json!({ "permType": kind, "key": STANDARD.encode(key), "range_end": STANDARD.encode(end) })
    };
    for (user, kind, prefix) in [
        ("agent", "READWRITE", "/test/"),
        ("reader", "READ", "/test/"),
        ("elsewhere", "READWRITE", "/other/"),
        ("root", "READWRITE", "/"),
    ] {
        password(user, &format!("{user}'s word\n"));
        administer(
            "/v3/auth/user/add",
            json!({ "name": user, "password": format!("{user}'s word") }),
        );
        administer("/v3/auth/role/add", json!({ "name": user }));
        administer(
            "/v3/auth/role/grant",
            json!({ "name": user, "perm": range(kind, prefix) }),
        );
        administer("/v3/auth/user/grant", json!({ "user": user, "role": user }));
    }
    administer("/v3/auth/enable", json!({}));

    let agent = connect(&section(Some("agent")));
    conformance::check(&*agent, "/test", |_: Duration| {});

    // A host reserves memory because of a line in its book, so a client without write access cannot reserve.
    let book = Keys::new("/test").unwrap().book("node-1");
    let there = || agent.list(&book, until()).unwrap().pairs.len();
    for user in [Some("reader"), Some("elsewhere"), None] {
        let store = connect(&section(user));
        let error = store.commit(&put(book.clone()), until()).unwrap_err();
        assert!(
            matches!(error, StoreError::Refused { .. }),
            "{user:?}: {error:?}"
        );
        assert_eq!(there(), 0, "{user:?}");
    }
    connect(&section(Some("reader")))
        .list("/test/", until())
        .unwrap();
    agent.commit(&put(book.clone()), until()).unwrap();
    assert_eq!(there(), 1);

    // A changed password ends the login, and the file is read again.
    let root = connect(&section(Some("root")));
    let changed = json!({ "name": "agent", "password": "another word" });
    root.administer("/v3/auth/user/changepw", &changed).unwrap();
    let error = agent.list("/test/", until()).unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    password("agent", "another word");
    assert_eq!(there(), 1);
}
