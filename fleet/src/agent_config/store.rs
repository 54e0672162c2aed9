//! `[store]`: what the hosts of a fleet share.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cluster::{Keys, NameError};
use crate::config::Millis;
use crate::store::{Endpoint, EndpointError, EtcdStore};

/// The shortest lease: three rounds of keeping alive, each with time for a slow member, must fit into it.
const LEASE_MIN: Millis = Millis::seconds(3);
/// The longest: so long a dead host would keep its promises.
const LEASE_MAX: Millis = Millis::seconds(600);

/// `[store]`. Read at start; a reload leaves it as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreSection {
    /// Members of the etcd cluster, `http://host:port`; none: this host is for itself.
    pub endpoints: Vec<String>,
    /// Before all keys; fleets that share a cluster have different ones.
    pub prefix: String,
    /// Name of this host in the fleet; that of the machine when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// For so long a host that is not heard of is still believed to be there.
    pub lease: Millis,
    /// The longest a call to the store may take.
    pub deadline: Millis,
}

impl Default for StoreSection {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            prefix: "/ch-fleet".to_owned(),
            host: None,
            lease: Millis::seconds(10),
            deadline: Millis::seconds(3),
        }
    }
}

/// What is wrong with `[store]`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreFault {
    /// A member.
    #[error("store.endpoints is wrong")]
    Endpoint(#[source] EndpointError),
    /// The host's name or the prefix.
    #[error("store.host or store.prefix is wrong")]
    Name(#[source] NameError),
    /// The lease.
    #[error("store.lease must lie between {LEASE_MIN} and {LEASE_MAX}")]
    Lease,
    /// The deadline.
    #[error("store.deadline must not be zero, nor longer than store.lease")]
    Deadline,
}

impl StoreSection {
    /// The shortest and the longest lease.
    pub(super) const LEASE: (Millis, Millis) = (LEASE_MIN, LEASE_MAX);

    /// Whether there is a store.
    pub fn is_used(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// Checks everything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), StoreFault> {
        self.endpoints()?;
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
    /// The prefix is none.
    pub fn keys(&self) -> Result<Keys, StoreFault> {
        Keys::new(&self.prefix).map_err(StoreFault::Name)
    }

    /// A client of the store. `member` is the one that it asks first, counted round.
    ///
    /// # Errors
    /// An endpoint is none.
    pub fn connect(&self, member: usize) -> Result<Arc<EtcdStore>, StoreFault> {
        Ok(Arc::new(EtcdStore::new(self.endpoints()?, member)))
    }

    fn endpoints(&self) -> Result<Vec<Endpoint>, StoreFault> {
        let endpoints = self.endpoints.iter().map(|text| text.parse());
        endpoints
            .collect::<Result<_, _>>()
            .map_err(StoreFault::Endpoint)
    }
}
