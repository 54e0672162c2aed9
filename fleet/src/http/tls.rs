//! Certificates and keys of the page.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

use crate::secret_file::warn_if_exposed;

/// Reasons why TLS cannot be set up.
#[derive(Debug, Error)]
pub enum ServerTlsError {
    /// A file lacks the expected content.
    #[error("{} contains no {what}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The expected content.
        what: &'static str,
        /// The parser's error.
        #[source]
        source: pem::Error,
    },
    /// Certificate and key do not match.
    #[error("the certificate and the key cannot be used")]
    Pair(#[source] rustls::Error),
}

/// The configuration of a server with this certificate, without client certificates.
///
/// # Errors
/// A file cannot be read, or certificate and key do not match.
pub fn server_tls(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, ServerTlsError> {
    let failed = |path: &Path, what| {
        let path = path.to_owned();
        move |source| ServerTlsError::File { path, what, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(certificate, "certificate"))?;
    warn_if_exposed(key);
    let key = PrivateKeyDer::from_pem_file(key).map_err(failed(key, "key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(ServerTlsError::Pair)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(ServerTlsError::Pair)?;
    Ok(Arc::new(config))
}
