//! The store that several hosts share: keys with values, conditional changes, and leases.
//!
//! The trait has only the operations that placement and membership need, so that a test can replace the cluster. A key
//! can be tied to a lease. When a lease is no longer kept alive, its keys are removed; this releases the reservations
//! of a failed host. A change is a list of writes that is applied atomically, and only if the named keys have not
//! changed since they were read: [`Txn::expect`].
//!
//! Every call returns by its deadline, with a result or an error. One error is special: after [`StoreError::Unknown`],
//! the change may have been made, or may be made later. The caller must then read again and check for its own writes,
//! and must not simply repeat the change.

mod etcd;
mod etcd_wire;
mod measured;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

use thiserror::Error;

pub use etcd::{Endpoint, EndpointError, EtcdStore, Login};
pub use measured::{Measured, StoreCall, StoreCounters};
#[cfg(test)]
pub use memory::{Fault, MemoryStore};

/// Whether these bytes are an answer of etcd's.
#[cfg(any(test, fuzzing))]
pub(crate) fn reads_answer(body: &[u8]) -> bool {
    etcd_wire::reads_answer(body)
}

/// A lease: keys that are tied to it go when it does. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

/// A point in the store's history; every change has a later one. 0 is before everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// One key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// When it was changed last.
    pub changed: Revision,
    /// The lease it is tied to.
    pub lease: Option<LeaseId>,
}

/// All keys below a prefix at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The moment.
    pub revision: Revision,
    /// By key.
    pub pairs: Vec<Pair>,
}

impl Listing {
    /// A key of the list.
    pub fn get(&self, key: &str) -> Option<&Pair> {
        self.pairs
            .binary_search_by(|pair| pair.key.as_str().cmp(key))
            .ok()
            .map(|index| &self.pairs[index])
    }

    /// Revision of a key's last change, for [`Txn::expect`]. 0 if it does not exist.
    pub fn changed(&self, key: &str) -> Revision {
        self.get(key).map_or(Revision(0), |pair| pair.changed)
    }
}

/// One write.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces a key and its tie to a lease.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Vec<u8>,
        /// The lease to which it is tied.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if it exists.
    Delete {
        /// The key.
        key: String,
    },
}

impl fmt::Debug for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put { key, value, lease } => {
                write!(f, "put {key} ({} bytes, {lease:?})", value.len())
            }
            Self::Delete { key } => write!(f, "delete {key}"),
        }
    }
}

/// Writes that happen atomically if nothing that they depend on has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Keys whose last change must be at these revisions; 0: the key must not exist.
    pub expect: Vec<(String, Revision)>,
    /// The writes.
    pub writes: Vec<Write>,
}

/// The result of a [`Txn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// Everything was written.
    Yes(Revision),
    /// Something it depends on has changed; nothing was written.
    Conflict,
}

/// Reasons why a call failed.
#[derive(Debug, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum StoreError {
    /// No member responded; nothing was changed.
    #[error("the store cannot be reached: {why}")]
    Unreachable {
        /// The last attempt and its error.
        why: String,
    },
    /// The change was sent, but there was no response: it may have been made, or may be made later.
    #[error("cannot determine whether the store made the change: {why}")]
    Unknown {
        /// The reason why the response is missing.
        why: String,
    },
    /// The lease has ended, and its keys were removed; nothing was changed.
    #[error("the lease has expired")]
    LeaseOver,
    /// The store rejected the call; nothing was changed.
    #[error("the store rejected the request: {why}")]
    Refused {
        /// Its reason.
        why: String,
    },
    /// The response does not conform to the store's interface.
    #[error("cannot parse the store's response: {why}")]
    Form {
        /// The reason.
        why: String,
    },
}

impl StoreError {
    /// One word for metrics.
    pub fn name(&self) -> &'static str {
        self.into()
    }
}

/// A store. Can be called from any thread; each call returns by `until`, or shortly after.
pub trait Store: fmt::Debug + Send + Sync {
    /// All keys that begin with `prefix`, at one moment not before the call.
    ///
    /// # Errors
    /// There is no response, or not a list.
    fn list(&self, prefix: &str, until: Instant) -> Result<Listing, StoreError>;

    /// Makes a change atomically.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it may have been made; with any other error it was not.
    fn commit(&self, txn: &Txn, until: Instant) -> Result<Committed, StoreError>;

    /// Creates a lease that lasts `lasts`, rounded up to seconds, after each keep-alive.
    ///
    /// # Errors
    /// No lease was obtained. An unknown one may exist, and ends automatically.
    fn grant(&self, lasts: Duration, until: Instant) -> Result<LeaseId, StoreError>;

    /// Renews a lease.
    ///
    /// # Errors
    /// [`StoreError::LeaseOver`] if it is too late; with any other error it may have been renewed.
    fn keep_alive(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError>;

    /// Ends a lease now. Succeeds if it has already ended.
    ///
    /// # Errors
    /// The lease may last until its time is over.
    fn revoke(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError>;

    /// Waits for a change below `prefix` after `after`, at most until `until`; returns whether there was one. The
    /// result is only a hint: a caller that must not miss a change also lists from time to time.
    ///
    /// # Errors
    /// Waiting is not possible now.
    fn await_change(
        &self,
        prefix: &str,
        after: Revision,
        until: Instant,
    ) -> Result<bool, StoreError>;
}
