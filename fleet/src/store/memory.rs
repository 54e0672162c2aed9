//! A store in this process for tests and simulation, with a clock that advances only on request.
//!
//! It can simulate failures of clusters: no response, a lost response, and a change that is made after the client has
//! given up.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use strum::VariantArray as _;

use super::{Committed, LeaseId, Listing, Pair, Revision, Store, StoreError, Txn, Write};
use crate::placement::SplitMix64;

/// The fault of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::VariantArray)]
pub enum Fault {
    /// Nothing is done, and that is known.
    Unreachable,
    /// It is done, but the response is lost.
    LostAnswer,
    /// It is not done, and the client does not know that.
    LostRequest,
    /// It is done when [`MemoryStore::deliver`] is called; the client does not know that.
    Late,
}

#[derive(Debug, Default)]
struct Inner {
    revision: u64,
    pairs: BTreeMap<String, Pair>,
    /// End and duration of each lease.
    leases: BTreeMap<LeaseId, (Duration, Duration)>,
    leases_made: i64,
    now: Duration,
    faults: VecDeque<Fault>,
    chance: Option<(SplitMix64, u64)>,
    late: Vec<Txn>,
    down: bool,
}

/// A store in memory, see the module.
#[derive(Debug, Default)]
pub struct MemoryStore {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl MemoryStore {
    /// Advances the clock; leases that were not kept alive end.
    pub fn advance(&self, by: Duration) {
        let mut inner = self.lock();
        inner.now += by;
        let now = inner.now;
        let over: BTreeSet<LeaseId> = inner
            .leases
            .iter()
            .filter(|(_, (end, _))| *end <= now)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in over {
            inner.end(lease);
        }
        self.changed.notify_all();
    }

    /// Sets the fault of the next call that changes something; several faults are queued.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push_back(fault);
    }

    /// Makes one in `one_in` calls that change something fail with a random fault.
    pub fn fail_by_lot(&self, seed: u64, one_in: u64) {
        self.lock().chance = (one_in > 0).then_some((SplitMix64(seed), one_in));
    }

    /// Sets whether the store responds to no call.
    pub fn set_down(&self, down: bool) {
        self.lock().down = down;
    }

    /// Makes the [`Fault::Late`] changes that are still possible.
    pub fn deliver(&self) {
        let mut inner = self.lock();
        for txn in std::mem::take(&mut inner.late) {
            // The client has given up, so the result is dropped.
            let _ = inner.commit(&txn);
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    fn reached(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let inner = self.lock();
        if inner.down {
            return Err(StoreError::Unreachable {
                why: "it is down".to_owned(),
            });
        }
        Ok(inner)
    }
}

impl Inner {
    fn end(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease).is_none() {
            return;
        }
        self.revision += 1;
        self.pairs.retain(|_, pair| pair.lease != Some(lease));
    }

    fn next_fault(&mut self) -> Option<Fault> {
        if let Some(fault) = self.faults.pop_front() {
            return Some(fault);
        }
        let (random, one_in) = self.chance.as_mut()?;
        if !random.next().is_multiple_of(*one_in) {
            return None;
        }
        Some(Fault::VARIANTS[(random.next() % Fault::VARIANTS.len() as u64) as usize])
    }

    fn commit(&mut self, txn: &Txn) -> Result<Committed, StoreError> {
        let holds = txn.expect.iter().all(|(key, changed)| {
            let found = self.pairs.get(key).map_or(Revision(0), |pair| pair.changed);
            found == *changed
        });
        if !holds {
            return Ok(Committed::Conflict);
        }
        let tied_to_nothing = txn.writes.iter().any(|write| match write {
            Write::Put { lease, .. } => {
                lease.is_some_and(|lease| !self.leases.contains_key(&lease))
            }
            Write::Delete { .. } => false,
        });
        if tied_to_nothing {
            return Err(StoreError::LeaseOver);
        }
        self.revision += 1;
        let changed = Revision(self.revision);
        for write in txn.writes.clone() {
            match write {
                Write::Put { key, value, lease } => {
                    let pair = Pair {
                        key: key.clone(),
                        value,
                        changed,
                        lease,
                    };
                    self.pairs.insert(key, pair);
                }
                Write::Delete { key } => {
                    self.pairs.remove(&key);
                }
            }
        }
        Ok(Committed::Yes(changed))
    }
}

fn unknown() -> StoreError {
    StoreError::Unknown {
        why: "no answer came".to_owned(),
    }
}

impl Store for MemoryStore {
    fn list(&self, prefix: &str, _until: Instant) -> Result<Listing, StoreError> {
        let inner = self.reached()?;
        let pairs = inner
            .pairs
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, pair)| pair.clone())
            .collect();
        Ok(Listing {
            revision: Revision(inner.revision),
            pairs,
        })
    }

    fn commit(&self, txn: &Txn, _until: Instant) -> Result<Committed, StoreError> {
        let mut inner = self.reached()?;
        let result = match inner.next_fault() {
            None => inner.commit(txn),
            Some(Fault::Unreachable) => Err(StoreError::Unreachable {
                why: "as was asked for".to_owned(),
            }),
            Some(Fault::LostAnswer) => inner.commit(txn).and_then(|_| Err(unknown())),
            Some(Fault::LostRequest) => Err(unknown()),
            Some(Fault::Late) => {
                inner.late.push(txn.clone());
                Err(unknown())
            }
        };
        self.changed.notify_all();
        result
    }

    fn grant(&self, lasts: Duration, _until: Instant) -> Result<LeaseId, StoreError> {
        let mut inner = self.reached()?;
        inner.leases_made += 1;
        let lease = LeaseId(inner.leases_made);
        let end = inner.now + lasts;
        inner.leases.insert(lease, (end, lasts));
        Ok(lease)
    }

    fn keep_alive(&self, lease: LeaseId, _until: Instant) -> Result<(), StoreError> {
        let mut inner = self.reached()?;
        let now = inner.now;
        let (end, lasts) = inner.leases.get_mut(&lease).ok_or(StoreError::LeaseOver)?;
        *end = now + *lasts;
        Ok(())
    }

    fn revoke(&self, lease: LeaseId, _until: Instant) -> Result<(), StoreError> {
        self.reached()?.end(lease);
        self.changed.notify_all();
        Ok(())
    }

    fn await_change(
        &self,
        prefix: &str,
        after: Revision,
        until: Instant,
    ) -> Result<bool, StoreError> {
        let mut inner = self.reached()?;
        // Removed keys leave no trace below the prefix, so any later change counts; hints may be wrong.
        while inner.revision <= after.0 {
            if self.changed.wait_until(&mut inner, until).timed_out() {
                return Ok(false);
            }
        }
        log::trace!("something changed, perhaps below {prefix}");
        Ok(true)
    }
}
