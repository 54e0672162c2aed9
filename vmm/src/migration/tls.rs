//! TLS between source and target: each shows a certificate of the authority that both trust.
//!
//! | File in the folder | Side |
//! | --- | --- |
//! | `ca-cert.pem` | both: the authority |
//! | `client-cert.pem`, `client-key.pem` | source |
//! | `server-cert.pem`, `server-key.pem` | target; its address is a subject alternative name |
//!
//! After the handshake, the target sends a byte: only then does the source know that its certificate was accepted.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use virtio_devices::Unpoisoned;

/// Reasons why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file lacks what it must contain.
    #[error("{} contains no {what}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The missing content.
        what: &'static str,
        /// The parser's error.
        #[source]
        source: pem::Error,
    },
    /// Certificate and key do not belong together.
    #[error("{} and its key cannot be used", path.display())]
    Pair {
        /// The certificate.
        path: PathBuf,
        /// The reason.
        #[source]
        source: rustls::Error,
    },
    /// The peer, which has the same authority, would reject the certificate.
    #[error("{} is not valid for {}", path.display(), authority.display())]
    Own {
        /// The certificate.
        path: PathBuf,
        /// The authority.
        authority: PathBuf,
        /// The reason.
        #[source]
        source: rustls::Error,
    },
    /// The authority cannot be used.
    #[error("{} cannot be used as an authority", path.display())]
    Authority {
        /// Its file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The source's side of TLS.
#[derive(Clone)]
pub struct SourceTls(Arc<ClientConfig>);

/// The target's side of TLS.
#[derive(Clone)]
pub struct TargetTls(Arc<ServerConfig>);

virtio_devices::debug_fields!(SourceTls {});
virtio_devices::debug_fields!(TargetTls {});

/// The content of a folder for one side.
struct Keys {
    authority: PathBuf,
    roots: Arc<RootCertStore>,
    path: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Keys {
    fn read(folder: &Path, side: &str) -> Result<Self, TlsError> {
        let file = |path: &Path, what| {
            let path = path.to_owned();
            move |source| TlsError::File { path, what, source }
        };
        let certificates = |path: &Path| {
            CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .and_then(|found| match found.is_empty() {
                    true => Err(pem::Error::NoItemsFound),
                    false => Ok(found),
                })
                .map_err(file(path, "certificate"))
        };
        let authority = folder.join("ca-cert.pem");
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&authority)? {
            let added = roots.add(certificate);
            added.map_err(|source| TlsError::Authority {
                path: authority.clone(),
                source: Box::new(source),
            })?;
        }
        let path = folder.join(format!("{side}-cert.pem"));
        let chain = certificates(&path)?;
        let key = folder.join(format!("{side}-key.pem"));
        let key = PrivateKeyDer::from_pem_file(&key).map_err(file(&key, "private key"))?;
        Ok(Self {
            authority,
            roots: Arc::new(roots),
            path,
            chain,
            key,
        })
    }

    fn server_verifier(&self) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let roots = Arc::clone(&self.roots);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
        verifier.map_err(|source| self.bad_authority(source))
    }

    fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let roots = Arc::clone(&self.roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        verifier.map_err(|source| self.bad_authority(source))
    }

    fn bad_authority(&self, source: impl std::error::Error + Send + Sync + 'static) -> TlsError {
        TlsError::Authority {
            path: self.authority.clone(),
            source: Box::new(source),
        }
    }

    /// Checks the certificate as the peer will.
    fn check(
        &self,
        verify: impl FnOnce(&CertificateDer<'_>, &[CertificateDer<'_>]) -> Result<(), rustls::Error>,
    ) -> Result<(), TlsError> {
        let own = |source| TlsError::Own {
            path: self.path.clone(),
            authority: self.authority.clone(),
            source,
        };
        match self.chain.split_first() {
            Some((first, rest)) => verify(first, rest).map_err(own),
            None => Err(own(rustls::Error::NoCertificatesPresented)),
        }
    }

    fn pair(path: &Path) -> impl Fn(rustls::Error) -> TlsError + '_ {
        |source| TlsError::Pair {
            path: path.to_owned(),
            source,
        }
    }
}

impl SourceTls {
    /// Reads the keys in `folder`.
    ///
    /// # Errors
    /// A file is missing or unusable, or the target would reject the certificate.
    pub fn read(folder: &Path) -> Result<Self, TlsError> {
        let keys = Keys::read(folder, "client")?;
        let verifier = keys.client_verifier()?;
        keys.check(|first, rest| {
            let verified = verifier.verify_client_cert(first, rest, UnixTime::now());
            verified.map(drop)
        })?;
        let verifier = keys.server_verifier()?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(Keys::pair(&keys.path))?;
        let config = builder
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(keys.chain, keys.key)
            .map_err(Keys::pair(&keys.path))?;
        Ok(Self(Arc::new(config)))
    }

    /// A session with the target at `address`, which its certificate must name.
    pub(super) fn session(&self, address: IpAddr) -> io::Result<Session> {
        let name = ServerName::IpAddress(address.into());
        let session = ClientConnection::new(Arc::clone(&self.0), name);
        let session = session.map_err(io::Error::other)?;
        Ok(Session(rustls::Connection::Client(session)))
    }
}

impl TargetTls {
    /// Reads the keys in `folder`.
    ///
    /// # Errors
    /// A file is missing or unusable, or every source would reject the certificate.
    pub fn read(folder: &Path) -> Result<Self, TlsError> {
        let keys = Keys::read(folder, "server")?;
        let verifier = keys.server_verifier()?;
        keys.check(|first, rest| {
            // The source compares the address, which may differ from that of the listener.
            let any = ServerName::IpAddress(IpAddr::from([0, 0, 0, 0]).into());
            let verified = verifier.verify_server_cert(first, rest, &any, &[], UnixTime::now());
            match verified {
                Err(rustls::Error::InvalidCertificate(error)) if is_of_name(&error) => Ok(()),
                verified => verified.map(drop),
            }
        })?;
        let verifier = keys.client_verifier()?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(Keys::pair(&keys.path))?;
        let mut config = builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(keys.chain, keys.key)
            .map_err(Keys::pair(&keys.path))?;
        // No session is resumed.
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// A session with a source.
    pub(super) fn session(&self) -> io::Result<Session> {
        let session = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        Ok(Session(rustls::Connection::Server(session)))
    }
}

fn is_of_name(error: &rustls::CertificateError) -> bool {
    use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
    matches!(error, NotValidForName | NotValidForNameContext { .. })
}

/// A session that has not begun.
pub(super) struct Session(rustls::Connection);

/// An encrypted connection. Its calls fail with `WouldBlock` when the socket's time is over, and may be repeated.
pub(super) struct TlsStream(Mutex<(rustls::Connection, TcpStream)>);

impl fmt::Debug for TlsStream {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("TlsStream")
    }
}

impl TlsStream {
    pub(super) fn new(session: Session, socket: TcpStream) -> Self {
        Self(Mutex::new((session.0, socket)))
    }

    /// A step of the handshake; returns whether it is complete.
    pub(super) fn shake_hands(&self) -> io::Result<bool> {
        let (session, socket) = &mut *self.0.lock().unpoisoned();
        if session.is_handshaking() {
            session.complete_io(socket).map_err(explained)?;
        }
        Ok(!session.is_handshaking())
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (session, socket) = &mut *self.0.lock().unpoisoned();
        finish_writes(session, socket)?;
        while session.wants_read() {
            if session.complete_io(socket)?.0 == 0 {
                break;
            }
        }
        session.reader().read(buffer)
    }

    /// Accepts bytes, which [`TlsStream::flush`] sends.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        let (session, socket) = &mut *self.0.lock().unpoisoned();
        finish_writes(session, socket)?;
        session.writer().write(data)
    }

    /// Sends what was accepted.
    pub(super) fn flush(&self) -> io::Result<()> {
        let (session, socket) = &mut *self.0.lock().unpoisoned();
        finish_writes(session, socket)
    }

    /// Whether the source, rather than the target, has this end.
    pub(super) fn is_of_source(&self) -> bool {
        matches!(self.0.lock().unpoisoned().0, rustls::Connection::Client(_))
    }
}

/// Names the most likely cause of what no side of TLS sends.
fn explained(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|it| it.downcast_ref());
    match inner {
        Some(rustls::Error::InvalidMessage(_)) => {
            let kind = error.kind();
            io::Error::new(kind, "the peer does not use TLS: it needs tls_dir, too")
        }
        _ => error,
    }
}

/// Sends all that the session has accepted.
fn finish_writes(session: &mut rustls::Connection, socket: &mut TcpStream) -> io::Result<()> {
    while session.wants_write() {
        if session.write_tls(socket)? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn keys(name: &str) -> PathBuf {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/migration/tests");
        tests.join("keys").join(name)
    }

    fn error<T>(read: Result<T, TlsError>) -> String {
        let error = read.map(drop).unwrap_err();
        api::error_line(&error)
    }

    #[test]
    fn own_keys_are_checked_before_anything_is_sent() {
        SourceTls::read(&keys("good")).unwrap();
        TargetTls::read(&keys("good")).unwrap();
        // Another address than the listener's may be the right one.
        TargetTls::read(&keys("elsewhere")).unwrap();
        let source = error(SourceTls::read(&keys("expired")));
        let target = error(TargetTls::read(&keys("expired")));
        for (error, file) in [(source, "client-cert.pem"), (target, "server-cert.pem")] {
            assert!(error.contains(file) && error.contains("xpired"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let missing = error(SourceTls::read(folder.path()));
        assert!(
            missing.contains("ca-cert.pem contains no certificate"),
            "{missing}"
        );
        let copy = |from: &str, file: &str| {
            std::fs::copy(keys(from).join(file), folder.path().join(file)).unwrap()
        };
        copy("good", "ca-cert.pem");
        copy("good", "client-cert.pem");
        let missing = error(SourceTls::read(folder.path()));
        assert!(
            missing.contains("client-key.pem contains no private key"),
            "{missing}"
        );
        copy("expired", "client-key.pem");
        let pair = error(SourceTls::read(folder.path()));
        assert!(pair.contains("client-cert.pem and its key"), "{pair}");
        copy("other", "client-cert.pem");
        copy("other", "client-key.pem");
        let foreign = error(SourceTls::read(folder.path()));
        assert!(
            foreign.contains("is not valid for") && foreign.contains("ca-cert.pem"),
            "{foreign}"
        );
        std::fs::write(folder.path().join("ca-cert.pem"), "text").unwrap();
        let garbage = error(TargetTls::read(folder.path()));
        assert!(
            garbage.contains("ca-cert.pem contains no certificate"),
            "{garbage}"
        );
    }
}
