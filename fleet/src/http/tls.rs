//! Certificates and keys of the page.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

use crate::secret_file::warn_if_exposed;

/// Why there is no TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file without what it should hold.
    #[error("{} holds no {what}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What the reader said.
        #[source]
        source: pem::Error,
    },
    /// The two do not go together.
    #[error("the certificate and the key cannot be used")]
    Pair(#[source] rustls::Error),
}

/// What a server that shows this certificate needs. Its clients show none.
///
/// # Errors
/// A file cannot be read, or they do not go together.
pub fn server_tls(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let failed = |path: &Path, what| {
        let path = path.to_owned();
        move |source| TlsError::File { path, what, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(certificate, "certificate"))?;
    warn_if_exposed(key);
    let key = PrivateKeyDer::from_pem_file(key).map_err(failed(key, "key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(TlsError::Pair)?;
    Ok(Arc::new(config))
}
