//! `[store]`: the store that the hosts of a fleet share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use crate::cluster::{Keys, NameError};
use crate::config::Millis;
use crate::secret_file::warn_if_exposed;
use crate::store::{Endpoint, EndpointError, EtcdStore, Login};

/// Minimum lease: it must allow for three keep-alive rounds, each with time for a slow member.
const LEASE_MIN: Millis = Millis::seconds(3);
/// Maximum lease: a dead host's reservations last this long.
const LEASE_MAX: Millis = Millis::seconds(600);

/// `[store]`. Read at the start; a reload does not change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StoreSection {
    /// Members of the etcd cluster, `http://host:port` or `https://host:port`; if empty, this host is standalone.
    pub endpoints: Vec<String>,
    /// File with the certificates that sign the members'; `https` needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// File with the certificate that this host shows to the members.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// File with the key of the certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// The etcd user of this host; without it, the host does not log in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// File with the user's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Prefix of all keys; fleets that share a cluster need different ones.
    pub prefix: String,
    /// Name of this host in the fleet; by default that of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Time for which a host without contact counts as available.
    pub lease: Millis,
    /// Time limit of a call to the store, at most `lease`.
    pub deadline: Millis,
}

impl Default for StoreSection {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            ca_file: None,
            certificate: None,
            key: None,
            user: None,
            password_file: None,
            prefix: "/ch-fleet".to_owned(),
            host: None,
            lease: Millis::seconds(10),
            deadline: Millis::seconds(3),
        }
    }
}

/// Errors in `[store]`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreFault {
    /// A member's endpoint is invalid.
    #[error("store.endpoints is invalid")]
    Endpoint(#[source] EndpointError),
    /// `https` without a file of CA certificates.
    #[error("store.ca_file is needed for https")]
    NoCa,
    /// Only one of the two files of a certificate is set.
    #[error("store.certificate and store.key are needed together")]
    HalfOfCertificate,
    /// Only one of the two parts of a login is set.
    #[error("store.user and store.password_file are needed together")]
    HalfOfLogin,
    /// A login without TLS would expose the password on the network.
    #[error("store.user needs https: a password would be sent in the clear")]
    PlainLogin,
    /// A file lacks the expected content.
    #[error("{} contains no {what}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The expected content.
        what: &'static str,
    },
    /// The host's name or the prefix is invalid.
    #[error("store.host or store.prefix is invalid")]
    Name(#[source] NameError),
    /// The lease is out of range.
    #[error("store.lease must be between {LEASE_MIN} and {LEASE_MAX}")]
    Lease,
    /// The deadline is out of range.
    #[error("store.deadline must be above zero and at most store.lease")]
    Deadline,
}

impl StoreSection {
    /// Minimum and maximum lease.
    #[cfg(test)]
    pub(super) const LEASE: (Millis, Millis) = (LEASE_MIN, LEASE_MAX);

    /// Whether there is a store.
    pub fn is_used(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// Checks everything.
    ///
    /// # Errors
    /// The first error found.
    pub fn check(&self) -> Result<(), StoreFault> {
        let endpoints = self.endpoints()?;
        if endpoints.iter().any(Endpoint::has_tls) && self.ca_file.is_none() {
            return Err(StoreFault::NoCa);
        }
        if self.certificate.is_some() != self.key.is_some() {
            return Err(StoreFault::HalfOfCertificate);
        }
        if self.user.is_some() != self.password_file.is_some() {
            return Err(StoreFault::HalfOfLogin);
        }
        if self.user.is_some() && !endpoints.iter().all(Endpoint::is_private) {
            return Err(StoreFault::PlainLogin);
        }
        self.keys()?;
        if let Some(host) = &self.host {
            Keys::check_host(host).map_err(StoreFault::Name)?;
        }
        if !(LEASE_MIN..=LEASE_MAX).contains(&self.lease) {
            return Err(StoreFault::Lease);
        }
        if self.deadline == Millis(0) || self.deadline > self.lease {
            return Err(StoreFault::Deadline);
        }
        Ok(())
    }

    /// The keys.
    ///
    /// # Errors
    /// The prefix is invalid.
    pub fn keys(&self) -> Result<Keys, StoreFault> {
        Keys::new(&self.prefix).map_err(StoreFault::Name)
    }

    /// A client of the store. `member` is the index of the member that it tries first, modulo their number.
    ///
    /// # Errors
    /// An endpoint or a file is invalid.
    pub fn connect(&self, member: usize) -> Result<Arc<EtcdStore>, StoreFault> {
        let login = self.user.clone().zip(self.password_file.clone());
        let login = login.map(|(user, password_file)| Login {
            user,
            password_file,
        });
        let store = EtcdStore::with_access(self.endpoints()?, member, self.tls()?, login);
        Ok(Arc::new(store))
    }

    /// The trusted CAs and the client certificate.
    fn tls(&self) -> Result<TlsConfig, StoreFault> {
        let mut tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        if let Some(path) = &self.ca_file {
            let roots = RootCerts::Specific(Arc::new(certificates(path)?));
            tls = tls.root_certs(roots);
        }
        if let (Some(certificate), Some(path)) = (&self.certificate, &self.key) {
            warn_if_exposed(path);
            let key = fs::read(path).ok();
            let key = key.and_then(|bytes| PrivateKey::from_pem(&bytes).ok());
            let key = key.ok_or_else(|| StoreFault::File {
                path: path.clone(),
                what: "key",
            })?;
            let shown = ClientCert::new_with_certs(&certificates(certificate)?, key);
            tls = tls.client_cert(Some(shown));
        }
        Ok(tls.build())
    }

    fn endpoints(&self) -> Result<Vec<Endpoint>, StoreFault> {
        let endpoints = self.endpoints.iter().map(|text| text.parse());
        endpoints
            .collect::<Result<_, _>>()
            .map_err(StoreFault::Endpoint)
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, StoreFault> {
    let bytes = fs::read(path).unwrap_or_default();
    let certificates: Vec<_> = parse_pem(&bytes)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(StoreFault::File {
            path: path.to_owned(),
            what: "certificate",
        });
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn section(endpoint: &str) -> StoreSection {
        StoreSection {
            endpoints: vec![endpoint.to_owned()],
            ..StoreSection::default()
        }
    }

    #[test]
    fn half_of_what_goes_together_is_refused_by_name() {
        let (http, https) = ("http://etcd:2379", "https://etcd:2379");
        let path = || Some(PathBuf::from("/f"));
        let user = || Some("agent".to_owned());
        assert_eq!(section(http).check(), Ok(()));
        assert_eq!(section(https).check(), Err(StoreFault::NoCa));
        let secure = |change: fn(&mut StoreSection)| {
            let mut section = section(https);
            section.ca_file = path();
            change(&mut section);
            section.check()
        };
        assert_eq!(secure(|_| {}), Ok(()));
        let half = secure(|section| section.key = Some("/f".into()));
        assert_eq!(half, Err(StoreFault::HalfOfCertificate));
        let half = secure(|section| section.user = Some("agent".to_owned()));
        assert_eq!(half, Err(StoreFault::HalfOfLogin));
        let mut plain = section(http);
        (plain.user, plain.password_file) = (user(), path());
        assert_eq!(plain.check(), Err(StoreFault::PlainLogin));
    }

    #[test]
    fn file_without_a_certificate_is_named() {
        let mut section = section("https://etcd:2379");
        section.ca_file = Some("/dev/null".into());
        let error = section.connect(0).unwrap_err();
        assert_eq!(error.to_string(), "/dev/null contains no certificate");
    }
}
