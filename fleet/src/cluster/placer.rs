//! Requests reservations from remote hosts.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use thiserror::Error;

use super::records::write;
use super::{
    Answer, DrainMark, FleetHost, FleetPicture, Keys, RemoteReservation, RemoteReservations,
};
use crate::admission::Request;
use crate::config::Config;
use crate::model::Bytes;
use crate::placement::{HostRefusal, SplitMix64, place};
use crate::store::{Committed, Revision, Store, StoreError, Txn, Write};

/// Maximum time for a host's response before another one is tried.
const ANSWER: Duration = Duration::from_secs(5);
/// Time reserved to remove a line.
const WITHDRAW: Duration = Duration::from_secs(2);
/// Interval between two attempts while the store does not respond.
const PAUSE: Duration = Duration::from_millis(100);
/// A hint of a change may be lost; this is the maximum interval between two checks.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A VM that looks for a host.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Its name.
    pub vm: String,
    /// The memory that it needs.
    pub request: Request,
    /// The user who places it, for display.
    pub placer: String,
}

/// A reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// The host.
    pub host: String,
    /// Id of the reservation there.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Memory that is reserved.
    pub promised: Bytes,
}

/// No host accepts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PlaceRefusal {
    /// Hosts by the reason why they were no candidates.
    pub hosts: BTreeMap<HostRefusal, usize>,
    /// The responses of the hosts that were tried.
    pub said: BTreeMap<String, String>,
}

impl fmt::Display for PlaceRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hosts.is_empty() && self.said.is_empty() {
            return f.write_str("no host is registered");
        }
        let counts = self.hosts.iter().map(|(refusal, count)| {
            let hosts = if *count == 1 { "host" } else { "hosts" };
            format!("{count} {hosts} {}", refusal.words())
        });
        let said = self
            .said
            .iter()
            .map(|(host, text)| format!("{host}: {text}"));
        let all: Vec<String> = counts.chain(said).collect();
        write!(f, "no host accepts the VM: {}", all.join("; "))
    }
}

/// Reasons why there is no reservation.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// The store.
    #[error("The store cannot place the VM")]
    Store(#[from] StoreError),
    /// It was refused.
    #[error("{0}")]
    Refused(PlaceRefusal),
    /// The deadline passed, and there is no valid reservation.
    #[error("No host responded in time")]
    Late,
    /// The deadline passed, and it is unknown whether there is a reservation. If there is one, it is released
    /// automatically.
    #[error("Host {host} did not confirm in time; it may hold reservation {id}")]
    Unanswered {
        /// The host.
        host: String,
        /// Id of the reservation.
        id: String,
    },
    /// There is no such line.
    #[error("no host holds a reservation {0:?}")]
    NoReservation(String),
    /// The VM is being started.
    #[error("the VM of {0:?} is starting: stop the VM instead of releasing its reservation")]
    Starting(String),
}

/// The result of a line.
enum Line {
    Promised(RemoteReservation),
    Refused(String),
    Gone,
}

/// Requests reservations.
#[derive(Debug)]
pub struct Placer<'a> {
    store: &'a dyn Store,
    keys: Keys,
    config: Config,
    /// Time limit of a call to the store.
    call: Duration,
    random: Mutex<SplitMix64>,
}

impl<'a> Placer<'a> {
    /// A seed that differs between processes, and between the placers of one.
    #[must_use]
    pub fn seed() -> u64 {
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        hasher.finish()
    }

    /// A placer. `seed` must differ between placers, because ids and choices are derived from it.
    pub fn new(
        store: &'a dyn Store,
        keys: Keys,
        config: Config,
        call: Duration,
        seed: u64,
    ) -> Self {
        Self {
            store,
            keys,
            config,
            call,
            random: Mutex::new(SplitMix64(seed)),
        }
    }

    fn by(&self, until: Instant) -> Instant {
        until.min(Instant::now() + self.call)
    }

    fn draw(&self) -> u64 {
        self.random.lock().next()
    }

    /// All hosts.
    ///
    /// # Errors
    /// The store does not respond.
    pub fn picture(&self, until: Instant) -> Result<FleetPicture, StoreError> {
        FleetPicture::read(self.store, &self.keys, self.by(until))
    }

    /// The host on which a VM would be placed now. The host itself is not queried.
    ///
    /// # Errors
    /// No host fits.
    pub fn choose<'p>(
        &self,
        request: &Request,
        picture: &'p FleetPicture,
        said: &BTreeMap<String, String>,
    ) -> Result<&'p FleetHost, PlaceRefusal> {
        // Hosts publish the age of their figures, so any time later than all of them works as the current time.
        let now_ms = u64::from(u32::MAX);
        let there: Vec<&FleetHost> = picture
            .hosts
            .iter()
            .filter(|host| host.is_there() && !said.contains_key(&host.host))
            .collect();
        let capacities: Vec<_> = there.iter().map(|host| host.capacity(now_ms)).collect();
        let placement = place(request, &capacities, now_ms, self.draw(), &self.config);
        match placement.candidates.first() {
            Some(candidate) => Ok(there[candidate.index]),
            None => Err(PlaceRefusal {
                hosts: placement.refused,
                said: said.clone(),
            }),
        }
    }

    /// Finds a host and requests a reservation of the memory.
    ///
    /// # Errors
    /// There is no reservation, or it is unknown whether there is one: [`PlaceError::Unanswered`].
    pub fn reserve(&self, wanted: &Wanted, until: Instant) -> Result<Placed, PlaceError> {
        self.reserve_where(wanted, |_| None, until)
    }

    /// The same for a VM that runs on another host and is going to be moved.
    ///
    /// # Errors
    /// As [`Placer::reserve`].
    pub fn reserve_move(&self, wanted: &Wanted, until: Instant) -> Result<Placed, PlaceError> {
        let objection = |host: &FleetHost| {
            let receives = host.record.as_ref().is_some_and(|record| record.receives);
            (host.is_there() && !receives).then_some("it receives no VMs (agent.move_address)")
        };
        self.reserve_where(wanted, objection, until)
    }

    /// The same on hosts to which there is no `objection`.
    fn reserve_where(
        &self,
        wanted: &Wanted,
        objection: impl Fn(&FleetHost) -> Option<&'static str>,
        until: Instant,
    ) -> Result<Placed, PlaceError> {
        let mut said = BTreeMap::new();
        let mut id = self.new_id();
        // The host on which a line may still appear, because the result of adding it is unknown, and the revisions that
        // the line depends on.
        let mut doubt: Option<(String, Revision, Revision)> = None;
        loop {
            let picture = match self.picture(until) {
                Ok(picture) => picture,
                Err(error) => {
                    self.pause(until, error, doubt.as_ref(), &id)?;
                    continue;
                }
            };
            for host in &picture.hosts {
                if let Some(why) = objection(host) {
                    said.insert(host.host.clone(), why.to_owned());
                }
            }
            if let Some(holder) = picture.holder(&id) {
                let host = holder.host.clone();
                doubt = None;
                match self.await_answer(&host, &id, until)? {
                    Line::Promised(entry) => return Ok(placed(&host, entry)),
                    Line::Refused(why) => said.insert(host, why),
                    Line::Gone => said.insert(host, "went away".to_owned()),
                };
                id = self.new_id();
                continue;
            }
            if Instant::now() >= until {
                return Err(late(doubt.as_ref(), &id));
            }
            let host = match self.still_in_doubt(doubt.as_ref(), &picture) {
                // Repeats the same change: whichever attempt arrives first, the other one fails.
                Some(host) => host,
                None => self
                    .choose(&wanted.request, &picture, &said)
                    .map_err(PlaceError::Refused)?,
            };
            doubt = None;
            match self.add_line(host, &self.line(wanted, &id), until) {
                Ok(()) | Err(StoreError::LeaseOver) => {}
                Err(StoreError::Unknown { .. }) => {
                    doubt = Some((host.host.clone(), host.record_changed, host.book_changed));
                }
                Err(error) => self.pause(until, error, None, &id)?,
            }
        }
    }

    fn still_in_doubt<'p>(
        &self,
        doubt: Option<&(String, Revision, Revision)>,
        picture: &'p FleetPicture,
    ) -> Option<&'p FleetHost> {
        let (host, record, book) = doubt?;
        picture
            .find(host)
            .filter(|host| (host.record_changed, host.book_changed) == (*record, *book))
    }

    fn line(&self, wanted: &Wanted, id: &str) -> RemoteReservation {
        RemoteReservation {
            id: id.to_owned(),
            vm: wanted.vm.clone(),
            min: wanted.request.min,
            max: wanted.request.max,
            promise: wanted.request.needs(&self.config),
            placer: wanted.placer.clone(),
            answer: Answer::Asked,
        }
    }

    fn new_id(&self) -> String {
        format!("f-{:016x}{:016x}", self.draw(), self.draw())
    }

    /// Waits a little after a failure, or gives up.
    fn pause(
        &self,
        until: Instant,
        error: StoreError,
        doubt: Option<&(String, Revision, Revision)>,
        id: &str,
    ) -> Result<(), PlaceError> {
        if Instant::now() + PAUSE < until {
            std::thread::sleep(PAUSE);
            return Ok(());
        }
        Err(match doubt {
            Some(_) => late(doubt, id),
            None => PlaceError::Store(error),
        })
    }

    /// Adds a line to the book of a host, if nothing of the picture has changed. Success only means that the change was
    /// attempted; reading again shows whether the line exists.
    fn add_line(
        &self,
        host: &FleetHost,
        line: &RemoteReservation,
        until: Instant,
    ) -> Result<(), StoreError> {
        let mut book = host.book.clone().unwrap_or_default();
        if book.entries.len() >= RemoteReservations::ENTRIES_MAX {
            // The host will soon respond to some of them.
            std::thread::sleep(PAUSE);
            return Ok(());
        }
        book.entries.push(line.clone());
        let txn = Txn {
            expect: vec![
                (self.keys.record(&host.host), host.record_changed),
                (self.keys.book(&host.host), host.book_changed),
                (self.keys.drain(&host.host), host.drain_changed),
            ],
            writes: vec![self.put_book(host, &book)],
        };
        match self.store.commit(&txn, self.by(until))? {
            Committed::Yes(_) | Committed::Conflict => Ok(()),
        }
    }

    fn put_book(&self, host: &FleetHost, book: &RemoteReservations) -> Write {
        Write::Put {
            key: self.keys.book(&host.host),
            value: write(book),
            lease: host.lease,
        }
    }

    /// Waits for the host's response. If there is none, the line is removed.
    fn await_answer(&self, host: &str, id: &str, until: Instant) -> Result<Line, PlaceError> {
        let patience = (Instant::now() + ANSWER).min(until.checked_sub(WITHDRAW).unwrap_or(until));
        loop {
            let read = FleetPicture::read_host(self.store, &self.keys, host, self.by(until));
            match read {
                Ok((revision, found)) => {
                    if let Some(line) = answer_of(&found, id) {
                        return Ok(line);
                    }
                    if Instant::now() >= patience {
                        return self.take_out(host, id, until);
                    }
                    let look = patience.min(Instant::now() + LOOK_AGAIN);
                    // Only a hint; without one, the store is read again a little later.
                    if self
                        .store
                        .await_change(&self.keys.host(host), revision, look)
                        .is_err()
                    {
                        std::thread::sleep(PAUSE);
                    }
                }
                Err(_) if Instant::now() + PAUSE < until => std::thread::sleep(PAUSE),
                Err(_) => return Err(unanswered(host, id)),
            }
        }
    }

    /// Removes a line without a response. If the host has responded by then, its response counts.
    fn take_out(&self, host: &str, id: &str, until: Instant) -> Result<Line, PlaceError> {
        // The removal has its own time limit, so that it does not fail because the search used all of the time.
        let until = until.max(Instant::now() + WITHDRAW);
        loop {
            let read = FleetPicture::read_host(self.store, &self.keys, host, self.by(until));
            if let Ok((_, found)) = read {
                if let Some(line) = answer_of(&found, id) {
                    return Ok(match line {
                        Line::Gone => Line::Refused("no answer in time".to_owned()),
                        line => line,
                    });
                }
                // The result is ignored, because reading again shows it.
                let _ = self.remove_line(&found, id, until);
            }
            if Instant::now() >= until {
                return Err(unanswered(host, id));
            }
        }
    }

    fn remove_line(&self, host: &FleetHost, id: &str, until: Instant) -> Result<(), StoreError> {
        let mut book = host.book.clone().unwrap_or_default();
        book.entries.retain(|entry| entry.id != id);
        let txn = Txn {
            expect: vec![(self.keys.book(&host.host), host.book_changed)],
            writes: vec![self.put_book(host, &book)],
        };
        self.store.commit(&txn, self.by(until)).map(drop)
    }

    /// Releases a reservation whose VM was not started.
    ///
    /// # Errors
    /// There is no such reservation, its VM is being started, or the store does not respond.
    pub fn release(&self, id: &str, until: Instant) -> Result<RemoteReservation, PlaceError> {
        let mut found: Option<RemoteReservation> = None;
        loop {
            let picture = self.picture(until)?;
            let Some(host) = picture.holder(id) else {
                return found.ok_or_else(|| PlaceError::NoReservation(id.to_owned()));
            };
            let entry = host.book.as_ref().and_then(|book| book.find(id)).cloned();
            if entry
                .as_ref()
                .is_some_and(|entry| entry.answer == Answer::Starting)
            {
                return Err(PlaceError::Starting(id.to_owned()));
            }
            found = entry;
            match self.remove_line(host, id, until) {
                Ok(()) | Err(StoreError::Unknown { .. } | StoreError::LeaseOver) => {}
                Err(error) => return Err(error.into()),
            }
            if Instant::now() >= until {
                return Err(PlaceError::Late);
            }
        }
    }

    /// Sets or removes the mark that keeps new VMs from a host.
    ///
    /// # Errors
    /// The store does not answer.
    pub fn mark(
        &self,
        host: &str,
        mark: Option<&DrainMark>,
        until: Instant,
    ) -> Result<(), StoreError> {
        let key = self.keys.drain(host);
        let change = match mark {
            Some(mark) => Write::Put {
                key,
                value: write(mark),
                lease: None,
            },
            None => Write::Delete { key },
        };
        let txn = Txn {
            expect: Vec::new(),
            writes: vec![change],
        };
        // The change is idempotent, so it is repeated if its result is unknown.
        loop {
            match self.store.commit(&txn, self.by(until)) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() + PAUSE >= until => return Err(error),
                Err(StoreError::Unknown { .. } | StoreError::Unreachable { .. }) => {
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// A host's response to a line; `None` if there is none yet.
fn answer_of(host: &FleetHost, id: &str) -> Option<Line> {
    let Some(entry) = host.book.as_ref().and_then(|book| book.find(id)) else {
        return Some(Line::Gone);
    };
    match &entry.answer {
        Answer::Asked => None,
        Answer::Confirmed | Answer::Starting => Some(Line::Promised(entry.clone())),
        Answer::Refused(why) => Some(Line::Refused(why.clone())),
    }
}

fn placed(host: &str, entry: RemoteReservation) -> Placed {
    Placed {
        host: host.to_owned(),
        id: entry.id,
        vm: entry.vm,
        promised: entry.promise,
    }
}

fn late(doubt: Option<&(String, Revision, Revision)>, id: &str) -> PlaceError {
    match doubt {
        Some((host, ..)) => unanswered(host, id),
        None => PlaceError::Late,
    }
}

fn unanswered(host: &str, id: &str) -> PlaceError {
    PlaceError::Unanswered {
        host: host.to_owned(),
        id: id.to_owned(),
    }
}
