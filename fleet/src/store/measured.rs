//! Counts and times the calls of a store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Committed, LeaseId, Listing, Revision, Store, StoreError, Txn};

/// The operation, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum StoreCall {
    /// [`Store::list`]
    List,
    /// [`Store::commit`]
    Commit,
    /// [`Store::grant`], [`Store::keep_alive`] and [`Store::revoke`]
    Lease,
}

impl StoreCall {
    /// The name in metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Counters of calls.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreCounters {
    /// Calls by operation and result: `ok`, `conflict`, or the name of the error.
    pub calls: BTreeMap<(StoreCall, &'static str), u64>,
    /// Duration of the last call with a response, ms.
    pub latency_ms: f64,
}

/// A store whose calls are counted. Waiting for changes is not counted, because its duration depends only on changes.
#[derive(Debug)]
pub struct Measured {
    store: Arc<dyn Store>,
    // Locked only to increment a counter.
    counters: Mutex<StoreCounters>,
}

impl Measured {
    /// Counts the calls of `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            counters: Mutex::default(),
        }
    }

    /// The counts so far.
    pub fn counters(&self) -> StoreCounters {
        self.counters.lock().clone()
    }

    fn count<T>(
        &self,
        call: StoreCall,
        ask: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
        name: impl FnOnce(&T) -> &'static str,
    ) -> Result<T, StoreError> {
        let start = Instant::now();
        let result = ask(&*self.store);
        let mut counters = self.counters.lock();
        let name = match &result {
            Ok(answer) => {
                counters.latency_ms = start.elapsed().as_secs_f64() * 1e3;
                name(answer)
            }
            Err(error) => error.name(),
        };
        *counters.calls.entry((call, name)).or_default() += 1;
        result
    }

    fn count_lease<T>(
        &self,
        ask: impl FnOnce(&dyn Store) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.count(StoreCall::Lease, ask, |_| "ok")
    }
}

impl Store for Measured {
    fn list(&self, prefix: &str, until: Instant) -> Result<Listing, StoreError> {
        self.count(StoreCall::List, |store| store.list(prefix, until), |_| "ok")
    }

    fn commit(&self, txn: &Txn, until: Instant) -> Result<Committed, StoreError> {
        self.count(
            StoreCall::Commit,
            |store| store.commit(txn, until),
            |committed| match committed {
                Committed::Yes(_) => "ok",
                Committed::Conflict => "conflict",
            },
        )
    }

    fn grant(&self, lasts: Duration, until: Instant) -> Result<LeaseId, StoreError> {
        self.count_lease(|store| store.grant(lasts, until))
    }

    fn keep_alive(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        self.count_lease(|store| store.keep_alive(lease, until))
    }

    fn revoke(&self, lease: LeaseId, until: Instant) -> Result<(), StoreError> {
        self.count_lease(|store| store.revoke(lease, until))
    }

    fn await_change(
        &self,
        prefix: &str,
        after: Revision,
        until: Instant,
    ) -> Result<bool, StoreError> {
        self.store.await_change(prefix, after, until)
    }
}
