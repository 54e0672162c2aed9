//! Tests migrations over TLS.

use std::path::{Path, PathBuf};

use super::*;

fn keys(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/migration/tests");
    tests.join("keys").join(name)
}

fn target_tls(name: &str) -> Option<TargetTls> {
    Some(TargetTls::read(&keys(name)).unwrap())
}

fn source_tls(name: &str) -> Option<SourceTls> {
    Some(SourceTls::read(&keys(name)).unwrap())
}

#[test]
fn machine_moves_over_encrypted_connections() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    for (any, connections) in [
        ("tcp:127.0.0.1:0", 1),
        ("tcp:[::1]:0", 1),
        ("tcp:127.0.0.1:0", 3),
    ] {
        let mut source = Source::new(&kvm);
        source.tls = source_tls("good");
        source.connections = connections;
        let any = Address::parse(any).unwrap();
        let (received, address, _) = receive_with(&any, "", LIMITS, target_tls("good"));
        let (sent, ..) = source.send(address);
        let (report, _) = expect_arrival(&source, &sent, &received);
        assert_eq!(report.data_bytes, 6 * 4096);
    }
}

/// Text that the bytes of the connection must not contain.
#[test]
fn nothing_readable_is_on_the_wire_and_a_changed_byte_is_found() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let (received, target, cancel) = receive_with(&local(), "", LIMITS, target_tls("good"));
    let Address::Tcp(target) = target else {
        panic!("{target}");
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    let (seen, bytes) = channel();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let target = TcpStream::connect(target).unwrap();
        let (from, to) = (source.try_clone().unwrap(), target.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut &to, &mut &from).ok());
        let (mut buffer, mut all) = ([0; 4096], Vec::<u8>::new());
        while let Ok(count @ 1..) = (&source).read(&mut buffer) {
            // Behind the handshake.
            if all.len() > 16 << 10 {
                buffer[0] ^= 1;
            }
            all.extend(&buffer[..count]);
            if (&target).write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        seen.send(all).unwrap();
    });
    let mut source = Source::new(&kvm);
    source.tls = source_tls("good");
    let (sent, ..) = source.send(address);
    let end = sent.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(end, SourceEnd::Failed(_)), "{end:?}");
    let received = received.recv_timeout(DEADLINE).unwrap();
    let error = received.error.unwrap();
    assert!(!received.runs && error.contains("decrypt"), "{error}");
    let all = bytes.recv_timeout(DEADLINE).unwrap();
    for text in [&b"CHBM"[..], b"memory"] {
        assert!(!all.windows(text.len()).any(|it| it == text));
    }
    drop(cancel);
}

/// How a source fails that has these keys and meets a target with those. The target waits for another one.
fn mismatch(kvm: &Kvm, source_keys: Option<&str>, target_keys: Option<&str>) -> String {
    let mut source = Source::new(kvm);
    source.tls = source_keys.and_then(source_tls);
    let limits = Limits {
        hello: Duration::from_secs(2),
        connect: Duration::from_secs(2),
        ..LIMITS
    };
    source.limits = limits;
    let tls = target_keys.and_then(target_tls);
    let (received, address, cancel) = receive_with(&local(), "", limits, tls);
    let (sent, steps, _) = source.send(address.clone());
    let error = expect_failure(&sent, DEADLINE);
    assert!(steps.lock().unwrap().is_empty(), "the machine was touched");
    assert!(received.try_recv().is_err(), "the target has ended");
    let mut right = Source::new(kvm);
    right.tls = target_keys.and_then(|it| match it {
        "elsewhere" => None,
        it => source_tls(it),
    });
    if target_keys != Some("elsewhere") {
        let (sent, ..) = right.send(address);
        let end = sent.recv_timeout(DEADLINE).unwrap();
        assert!(matches!(end, SourceEnd::Finished(_)), "{end:?}");
        assert!(received.recv_timeout(DEADLINE).unwrap().runs);
    }
    cancel.set();
    error
}

#[test]
fn peers_without_the_right_certificate_are_refused_by_name_before_anything_is_sent() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    // The source rejects the target's certificate.
    let error = mismatch(&kvm, Some("other"), Some("good"));
    assert!(
        error.contains("TLS handshake") && error.contains("UnknownIssuer"),
        "{error}"
    );
    let error = mismatch(&kvm, Some("good"), Some("elsewhere"));
    assert!(error.contains("not valid for name"), "{error}");
    // One side has no TLS.
    let error = mismatch(&kvm, Some("good"), None);
    assert!(error.contains("the peer does not use TLS"), "{error}");
    let error = mismatch(&kvm, None, Some("good"));
    assert!(error.contains("use tls_dir"), "{error}");
}

/// A client that trusts the target, and shows this certificate.
fn client(address: &Address, certificate: Option<&str>) -> String {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};

    let Address::Tcp(address) = *address else {
        panic!("{address}");
    };
    let mut roots = rustls::RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(keys("good").join("ca-cert.pem"));
    roots.add(authority.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let config = match certificate {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = CertificateDer::from_pem_file(keys(name).join("client-cert.pem"));
            let key = PrivateKeyDer::from_pem_file(keys(name).join("client-key.pem"));
            builder
                .with_client_auth_cert(vec![chain.unwrap()], key.unwrap())
                .unwrap()
        }
    };
    let name = ServerName::IpAddress(address.ip().into());
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = rustls::StreamOwned::new(session, TcpStream::connect(address).unwrap());
    let verdict = stream.read_exact(&mut [0]);
    verdict.unwrap_err().to_string()
}

#[test]
fn source_is_refused_for_a_wrong_an_expired_and_no_certificate() {
    let (received, address, cancel) = receive_with(&local(), "", LIMITS, target_tls("good"));
    for (certificate, text) in [
        (None, "CertificateRequired"),
        (Some("other"), "UnknownCA"),
        (Some("expired"), "CertificateExpired"),
    ] {
        let error = client(&address, certificate);
        assert!(error.contains(text), "{certificate:?}: {error}");
    }
    assert!(received.try_recv().is_err(), "the target has ended");
    cancel.set();
    let error = received.recv_timeout(DEADLINE).unwrap().error.unwrap();
    assert!(error.contains("cancelled"), "{error}");
}
