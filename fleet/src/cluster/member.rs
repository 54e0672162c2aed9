//! A host as a member of the fleet: publishes the memory that can be reserved, and responds to requests.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::records::write;
use super::{
    Answer, FleetHost, FleetPicture, HostRecord, Keys, RemoteReservation, RemoteReservations,
    VmsRecord,
};
use crate::admission::HostHeadroom;
use crate::model::Bytes;
use crate::placement::{HostCapacity, MovableVm};
use crate::store::{Committed, LeaseId, Revision, Store, StoreError, Txn, Write};

/// Maximum number of restarts of a round because of a concurrent change. A placer added or removed a line each time, so
/// restarts are rare; the next round follows a second later.
const TRIES: usize = 16;
/// How long a refusal stays readable.
const REFUSED_STAYS: Duration = Duration::from_secs(10);
/// Maximum interval between two writes of a record.
const REWRITE: Duration = Duration::from_secs(10);
/// A change of free memory by this fraction of the usable memory is published immediately.
const TELL_PART: f64 = 0.02;

/// The store's data about reservations on this host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreView {
    /// Lines without a response.
    pub asked: Vec<RemoteReservation>,
    /// Ids of all lines; absent if the store has no book of this host, as after the end of its lease. With a book, a
    /// remote reservation that is not in it was withdrawn.
    pub lines: Option<Vec<String>>,
}

/// The host's response.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostReport {
    /// Whether the host knows its VMs well enough to be seen by others.
    pub ready: bool,
    /// Age of its figures, ms.
    pub facts_age_ms: u64,
    /// The memory that it can reserve, after subtracting everything in `held`.
    pub headroom: HostHeadroom,
    /// Its VMs.
    pub vms: Vec<MovableVm>,
    /// Remote reservations whose VM has not started yet.
    pub held: Vec<HeldReservation>,
    /// Lines that are refused, with the reason.
    pub refused: BTreeMap<String, String>,
    /// Whether it receives VMs from other hosts.
    pub receives: bool,
}

/// A reservation held for a remote client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldReservation {
    /// Id of the line.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Memory of the VM.
    pub max: Bytes,
    /// Memory that is reserved.
    pub promise: Bytes,
    /// Whether the VM is being started.
    pub starting: bool,
}

/// Reasons why a round failed.
#[derive(Debug, Error)]
pub enum MemberError {
    /// The store.
    #[error("the store did not respond to this host")]
    Store(#[from] StoreError),
    /// Another agent uses the name.
    #[error("another machine is registered as {0:?}: set store.host")]
    NameTaken(String),
    /// The control loop does not respond. Without it the host is not available, and its lease may end.
    #[error("the control loop did not respond")]
    Silent,
    /// Its figures are too old to show that the host is available.
    #[error("the host's figures are {0} ms old")]
    Stale(u64),
    /// Concurrent changes prevented every attempt.
    #[error("the host's reservations changed {TRIES} times during the attempt")]
    Busy,
}

/// The result of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// The host is in the store, with its responses.
    pub registered: bool,
    /// Lines in its book.
    pub lines: usize,
    /// The latest known revision of the store.
    pub revision: Revision,
}

/// Event counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemberCounts {
    /// Leases obtained.
    pub leases: u64,
    /// Leases that ended early.
    pub leases_lost: u64,
    /// Rounds restarted because the book had changed.
    pub conflicts: u64,
}

/// The last values written.
#[derive(Clone, Debug)]
struct LastWrite {
    at: Instant,
    headroom: HostHeadroom,
    vms: usize,
    book: RemoteReservations,
}

/// A host as a member of the fleet.
#[derive(Debug)]
pub struct Member {
    keys: Keys,
    host: String,
    instance: String,
    lasts: Duration,
    call: Duration,
    facts_age_max: Duration,
    lease: Option<LeaseId>,
    pub(super) kept: Option<Instant>,
    generation: u64,
    written: Option<LastWrite>,
    refused_at: BTreeMap<String, Instant>,
    counts: MemberCounts,
}

impl Member {
    /// A host under this name. `instance` distinguishes it from another machine with the name; `lasts` is the lease,
    /// `call` the time limit of a call to the store.
    pub fn new(
        keys: Keys,
        (host, instance): (String, String),
        (lasts, call, facts_age_max): (Duration, Duration, Duration),
    ) -> Self {
        Self {
            keys,
            host,
            instance,
            lasts,
            call,
            facts_age_max,
            lease: None,
            kept: None,
            generation: 0,
            written: None,
            refused_at: BTreeMap::new(),
            counts: MemberCounts::default(),
        }
    }

    /// Event counters.
    pub fn counts(&self) -> MemberCounts {
        self.counts
    }

    /// The prefix of the keys that this host watches.
    pub fn watched(&self) -> String {
        self.keys.host(&self.host)
    }

    /// Whether the host has something to report: its ledger has changed, or the interval has passed.
    pub fn has_news(&self, account: &HostReport, now: Instant) -> bool {
        let Some(written) = &self.written else {
            return account.ready || self.lease.is_some();
        };
        let (before, after) = (&written.headroom.ledger, &account.headroom.ledger);
        let moved = before.firm_free.distance(after.firm_free);
        let held: BTreeSet<(&str, bool)> = account
            .held
            .iter()
            .map(|held| (held.id.as_str(), held.starting))
            .collect();
        let lines: BTreeSet<(&str, bool)> = written
            .book
            .entries
            .iter()
            .filter(|entry| !matches!(entry.answer, Answer::Refused(_) | Answer::Asked))
            .map(|entry| (entry.id.as_str(), entry.answer == Answer::Starting))
            .collect();
        written.headroom.state != account.headroom.state
            || moved >= after.usable.scale(TELL_PART)
            || before.configured.distance(after.configured) >= after.usable.scale(TELL_PART)
            || written.vms != account.vms.len()
            || held != lines
            || now.saturating_duration_since(written.at) >= REWRITE
    }

    /// Whether the lease should be kept alive by a round now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.kept
            .is_none_or(|kept| now.saturating_duration_since(kept) >= self.lasts / 3)
    }

    /// One round: reads the requests, gets the host's responses through `ask`, writes its data. `ask` returns `None` if
    /// the host's control loop does not respond.
    ///
    /// # Errors
    /// The host is not, or no longer, known to be in the store.
    pub fn round(
        &mut self,
        store: &dyn Store,
        ask: &mut dyn FnMut(StoreView) -> Option<HostReport>,
    ) -> Result<Round, MemberError> {
        for _ in 0..TRIES {
            let until = Instant::now() + self.call;
            let (revision, found) = FleetPicture::read_host(store, &self.keys, &self.host, until)?;
            if let Some(record) = &found.record
                && record.instance != self.instance
            {
                return Err(MemberError::NameTaken(self.host.clone()));
            }
            let account = ask(store_view(&found)).ok_or(MemberError::Silent)?;
            // A host that is already registered stays registered while it learns about a new VM.
            if !account.ready && self.lease.is_none() {
                return Ok(Round {
                    revision,
                    ..Round::default()
                });
            }
            if Duration::from_millis(account.facts_age_ms) > self.facts_age_max {
                return Err(MemberError::Stale(account.facts_age_ms));
            }
            // Renewed only now, because a host that does not respond must not keep its lease.
            let Some(lease) = self.keep(store)? else {
                continue;
            };
            let book = self.answered(&found, &account);
            let lines = book.entries.len();
            let unchanged = found.book.as_ref() == Some(&book)
                && found.lease == Some(lease)
                && found.record.is_some()
                && !self.has_news(&account, Instant::now());
            if unchanged || self.write(store, &found, lease, &account, book)? {
                return Ok(Round {
                    registered: true,
                    lines,
                    revision,
                });
            }
            self.counts.conflicts += 1;
        }
        Err(MemberError::Busy)
    }

    /// Releases everything and leaves.
    ///
    /// # Errors
    /// The data could not be removed, and is removed when the lease ends.
    pub fn leave(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        self.forget();
        match self.lease.take() {
            Some(lease) => store.revoke(lease, Instant::now() + self.call),
            None => Ok(()),
        }
    }

    fn forget(&mut self) {
        self.kept = None;
        self.written = None;
    }

    /// A valid lease; `None` if the previous one has ended, together with everything tied to it.
    fn keep(&mut self, store: &dyn Store) -> Result<Option<LeaseId>, StoreError> {
        let until = Instant::now() + self.call;
        let Some(lease) = self.lease else {
            let asked = Instant::now();
            let lease = store.grant(self.lasts, until)?;
            self.lease = Some(lease);
            self.kept = Some(asked);
            self.counts.leases += 1;
            return Ok(Some(lease));
        };
        if !self.is_due(Instant::now()) {
            return Ok(Some(lease));
        }
        let asked = Instant::now();
        match store.keep_alive(lease, until) {
            Ok(()) => {
                self.kept = Some(asked);
                Ok(Some(lease))
            }
            Err(StoreError::LeaseOver) => {
                self.lose();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn lose(&mut self) {
        self.lease = None;
        self.counts.leases_lost += 1;
        self.forget();
    }

    /// The book with the host's responses.
    fn answered(&mut self, found: &FleetHost, account: &HostReport) -> RemoteReservations {
        let now = Instant::now();
        let mut left: Vec<&HeldReservation> = account.held.iter().collect();
        let mut entries = Vec::new();
        for entry in found.book.iter().flat_map(|book| &book.entries) {
            // A line that has only the id of a reservation in common does not receive it.
            let same = |held: &&HeldReservation| {
                held.id == entry.id && held.vm == entry.vm && held.max == entry.max
            };
            let held = left.iter().position(same);
            let answer = match (held, account.refused.get(&entry.id), &entry.answer) {
                (Some(index), ..) => answer_of(left.remove(index)),
                (None, Some(why), _) => Answer::Refused(why.clone()),
                (None, None, Answer::Refused(why)) => {
                    let since = *self.refused_at.entry(entry.id.clone()).or_insert(now);
                    if now.saturating_duration_since(since) >= REFUSED_STAYS {
                        continue;
                    }
                    Answer::Refused(why.clone())
                }
                // The line was added while the host was responding; the next round handles it.
                (None, None, Answer::Asked) => Answer::Asked,
                // No longer held: its VM runs, or it was released.
                (None, None, Answer::Confirmed | Answer::Starting) => continue,
            };
            entries.push(RemoteReservation {
                answer,
                ..entry.clone()
            });
        }
        // Lines that no longer exist, because the book was removed with the lease, or because a reservation was
        // withdrawn after the start of its VM had begun. The host honours these reservations nevertheless.
        entries.extend(left.into_iter().map(line_of));
        self.refused_at
            .retain(|id, _| entries.iter().any(|entry| entry.id == *id));
        RemoteReservations { entries }
    }

    /// Writes the record, the book and the VMs; false if there was a concurrent change or the lease ended.
    fn write(
        &mut self,
        store: &dyn Store,
        found: &FleetHost,
        lease: LeaseId,
        account: &HostReport,
        book: RemoteReservations,
    ) -> Result<bool, StoreError> {
        self.generation += 1;
        let record = HostRecord {
            schema: HostCapacity::SCHEMA,
            instance: self.instance.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: self.generation,
            facts_age_ms: account.facts_age_ms,
            headroom: account.headroom,
            vms: account.vms.len(),
            receives: account.receives,
        };
        let vms = VmsRecord {
            vms: account.vms.clone(),
        };
        let put = |key, value| Write::Put {
            key,
            value,
            lease: Some(lease),
        };
        let keys = &self.keys;
        let txn = Txn {
            expect: vec![
                (keys.record(&self.host), found.record_changed),
                (keys.book(&self.host), found.book_changed),
            ],
            writes: vec![
                put(keys.record(&self.host), write(&record)),
                put(keys.book(&self.host), write(&book)),
                put(keys.vms(&self.host), write(&vms)),
            ],
        };
        match store.commit(&txn, Instant::now() + self.call) {
            Ok(Committed::Yes(_)) => {
                self.written = Some(LastWrite {
                    at: Instant::now(),
                    headroom: account.headroom,
                    vms: account.vms.len(),
                    book,
                });
                Ok(true)
            }
            Ok(Committed::Conflict) => Ok(false),
            Err(StoreError::LeaseOver) => {
                self.lose();
                Ok(false)
            }
            Err(error) => {
                // The stored data is unknown: the next round writes again.
                self.written = None;
                Err(error)
            }
        }
    }
}

fn store_view(found: &FleetHost) -> StoreView {
    StoreView {
        asked: found
            .book
            .iter()
            .flat_map(|book| &book.entries)
            .filter(|entry| entry.answer == Answer::Asked)
            .cloned()
            .collect(),
        lines: found.book.as_ref().map(|book| {
            let ids = book.entries.iter().map(|entry| entry.id.clone());
            ids.collect()
        }),
    }
}

fn answer_of(held: &HeldReservation) -> Answer {
    if held.starting {
        Answer::Starting
    } else {
        Answer::Confirmed
    }
}

fn line_of(held: &HeldReservation) -> RemoteReservation {
    RemoteReservation {
        id: held.id.clone(),
        vm: held.vm.clone(),
        min: held.promise,
        max: held.max,
        promise: held.promise,
        placer: String::new(),
        answer: answer_of(held),
    }
}
