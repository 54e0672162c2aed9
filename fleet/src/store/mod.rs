//! What several hosts share: keys with values, changed only together with a comparison, and leases that let them go.
//!
//! The trait is as narrow as placement and membership need it to be, so that a test can stand in for a cluster. A key is
//! tied to a lease or to nothing; a lease that nobody keeps alive takes its keys with it, and that is how the promises of a
//! host that died come back. A change is a list of writes that happens as a whole or not at all, and only if the named keys
//! are as they were when they were read: [`Txn::expect`].
//!
//! Every call has an end: it returns by the time it is told, with an answer or with an error. The one error that needs
//! care is [`StoreError::Unknown`]: the change may have been made, or may even be made later. Whoever gets it reads again
//! and looks for what it wrote; nobody repeats a change blindly.

mod etcd;
mod etcd_wire;
mod measured;
mod memory;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

use thiserror::Error;

pub use etcd::{Endpoint, EndpointError, EtcdStore, Login};
pub use measured::{Measured, StoreCall, StoreCounters};
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

/// One key and what stands behind it.
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

    /// When a key was changed last: what [`Txn::expect`] wants. 0 when it is not there.
    pub fn changed(&self, key: &str) -> Revision {
        self.get(key).map_or(Revision(0), |pair| pair.changed)
    }
}

/// One write.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Makes or replaces a key. Its tie to a lease is replaced as well.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Vec<u8>,
        /// The lease it shall be tied to.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if it is there.
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

/// Writes that happen together, if nothing that they depend on has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// Keys that must have been changed last at these revisions; 0: must not be there.
    pub expect: Vec<(String, Revision)>,
    /// What is written then.
    pub writes: Vec<Write>,
}

/// What became of a [`Txn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// Everything was written.
    Yes(Revision),
    /// Something it depends on has changed; nothing was written.
    Conflict,
}

/// Why a call gave no answer.
#[derive(Debug, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum StoreError {
    /// Nobody answered; nothing was changed.
    #[error("the store cannot be reached: {why}")]
    Unreachable {
        /// What was tried last, and what became of it.
        why: String,
    },
    /// The change was sent and no answer came: it may have been made, or may be made later.
    #[error("it is not known whether the store made the change: {why}")]
    Unknown {
        /// What became of the answer.
        why: String,
    },
    /// The lease is over, and its keys with it; nothing was changed.
    #[error("the lease has expired")]
    LeaseOver,
    /// The store will not do it; nothing was changed.
    #[error("the store refused: {why}")]
    Refused {
        /// Its words.
        why: String,
    },
    /// The answer is not what the store's interface promises.
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

/// A store. Called from any thread; each call returns by `until`, or very little later.
pub trait Store: fmt::Debug + Send + Sync {
    /// All keys that begin with `prefix`, as they were at one moment not before the call.
    ///
    /// # Errors
    /// Nobody answers, or not with a list.
    fn list(&self, prefix: &str, until: Instant) -> Result<Listing, StoreError>;

    /// Makes a change as a whole, or not at all.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when it may have been made; with any other error it was not.
    fn commit(&self, txn: &Txn, until: Instant) -> Result<Committed, StoreError>;

    /// A new lease that lasts `lasts` from each time it is kept alive, rounded up to seconds.
    ///
    /// # Errors
    /// No lease was had. One that nobody knows of may be there, and ends by itself.
    fn grant(&self, lasts: Duration, until: Instant) -> Result<LeaseId, StoreError>;

    /// Lets a lease last its time anew.
    ///
    /// # Errors
    /// [`StoreError::LeaseOver`] when it is too late; with any other error it may have been kept.
    fn keep_alive(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError>;

    /// Ends a lease now. One that is over already is ended.
    ///
    /// # Errors
    /// It may go on until its time is over.
    fn revoke(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError>;

    /// Waits until something below `prefix` was changed after `after`, or until the time is over: whether something was.
    /// A hint, not a promise: who must not miss a change lists from time to time.
    ///
    /// # Errors
    /// It cannot be waited for now.
    fn await_change(
        &self,
        prefix: &str,
        after: Revision,
        until: Instant,
    ) -> Result<bool, StoreError>;
}
