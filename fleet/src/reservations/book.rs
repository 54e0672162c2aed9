//! All reservations of a host.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::file::{FileError, read, write};
use super::{Reservation, ReservationPhase};
use crate::config::Millis;
use crate::model::Bytes;

/// Most reservations held at once; more would be a client gone wild.
const RESERVATIONS_MAX: usize = 4096;
/// A VM that was running and is not seen for so long is gone. Longer than an agent's restart takes to find it again.
const GONE_AFTER: Millis = Millis::seconds(30);

/// Why a reservation was not changed.
#[derive(Debug, Error)]
pub enum BookError {
    /// The name is taken by another VM.
    #[error("the VM {vm:?} has a reservation of {held} already")]
    Held {
        /// The VM.
        vm: String,
        /// Memory of the VM it was made for.
        held: Bytes,
    },
    /// There is none.
    #[error("there is no reservation {key:?}")]
    Unknown {
        /// What was asked for.
        key: String,
    },
    /// Too many.
    #[error("{RESERVATIONS_MAX} reservations are held already")]
    Full,
    /// It could not be made to last.
    #[error("the reservations cannot be saved")]
    Save(#[source] FileError),
}

/// What is there of the VM of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenVm {
    /// Memory it has resident.
    pub resident: Bytes,
}

/// The reservations of a host, on disk and in memory.
#[derive(Debug, Default)]
pub struct ReservationBook {
    path: PathBuf,
    entries: Vec<Reservation>,
    /// When each running one was last seen, ms since the Unix epoch; not saved.
    seen_unix_ms: Vec<u64>,
    made: u64,
}

impl ReservationBook {
    /// Opens the book in `state_dir`, with what it held when it was last written.
    ///
    /// # Errors
    /// There is a book and it cannot be read: starting without it would sell memory twice.
    pub fn open(state_dir: &Path, now_unix_ms: u64) -> Result<Self, BookError> {
        let path = state_dir.join("reservations.json");
        let entries = read(&path).map_err(BookError::Save)?;
        let seen_unix_ms = vec![now_unix_ms; entries.len()];
        Ok(Self {
            path,
            entries,
            seen_unix_ms,
            made: 0,
        })
    }

    /// All of them, oldest first.
    pub fn entries(&self) -> &[Reservation] {
        &self.entries
    }

    /// The reservation with this id or for this VM.
    pub fn find(&self, key: &str) -> Option<&Reservation> {
        self.position(key).map(|index| &self.entries[index])
    }

    fn position(&self, key: &str) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.id == key || entry.vm == key)
    }

    /// Enters a reservation that was admitted. Asking again for the same VM of the same size is answered with what it has.
    ///
    /// # Errors
    /// The name is taken, the book is full or cannot be saved.
    pub fn reserve(
        &mut self,
        vm: &str,
        (configured, promised): (Bytes, Bytes),
        owner_uid: u32,
        (now_unix_ms, hold): (u64, Millis),
    ) -> Result<Reservation, BookError> {
        if let Some(held) = self.find(vm) {
            if held.configured == configured && held.owner_uid == owner_uid {
                return Ok(held.clone());
            }
            return Err(BookError::Held {
                vm: vm.to_owned(),
                held: held.configured,
            });
        }
        self.made += 1;
        self.enter(Reservation {
            id: format!("{now_unix_ms:x}-{:x}", self.made),
            vm: vm.to_owned(),
            configured,
            promised,
            phase: ReservationPhase::Promised,
            owner_uid,
            remote: false,
            since_unix_ms: now_unix_ms,
            deadline_unix_ms: Some(now_unix_ms.saturating_add(hold.0)),
        })
    }

    /// Enters a reservation that was asked for through the store, under the id it has there.
    ///
    /// # Errors
    /// The name is taken, the book is full or cannot be saved.
    pub fn reserve_remote(
        &mut self,
        id: &str,
        vm: &str,
        (configured, promised): (Bytes, Bytes),
        owner_uid: u32,
        (now_unix_ms, hold): (u64, Millis),
    ) -> Result<Reservation, BookError> {
        if let Some(held) = self.find(vm) {
            return Err(BookError::Held {
                vm: vm.to_owned(),
                held: held.configured,
            });
        }
        self.enter(Reservation {
            id: id.to_owned(),
            vm: vm.to_owned(),
            configured,
            promised,
            phase: ReservationPhase::Promised,
            owner_uid,
            remote: true,
            since_unix_ms: now_unix_ms,
            deadline_unix_ms: Some(now_unix_ms.saturating_add(hold.0)),
        })
    }

    fn enter(&mut self, reservation: Reservation) -> Result<Reservation, BookError> {
        if self.entries.len() >= RESERVATIONS_MAX {
            return Err(BookError::Full);
        }
        let now_unix_ms = reservation.since_unix_ms;
        self.entries.push(reservation.clone());
        self.seen_unix_ms.push(now_unix_ms);
        if let Err(error) = self.save() {
            // What is not on disk was not promised.
            self.entries.pop();
            self.seen_unix_ms.pop();
            return Err(error);
        }
        Ok(reservation)
    }

    /// The VMM was started.
    ///
    /// # Errors
    /// There is no such reservation, or it cannot be saved.
    pub fn confirm(
        &mut self,
        key: &str,
        now_unix_ms: u64,
        hold: Millis,
    ) -> Result<Reservation, BookError> {
        let index = self.position(key).ok_or_else(|| BookError::Unknown {
            key: key.to_owned(),
        })?;
        let entry = &mut self.entries[index];
        if entry.phase == ReservationPhase::Promised {
            entry.phase = ReservationPhase::Starting;
            entry.since_unix_ms = now_unix_ms;
            entry.deadline_unix_ms = Some(now_unix_ms.saturating_add(hold.0));
        }
        let entry = entry.clone();
        self.save()?;
        Ok(entry)
    }

    /// Gives a reservation back.
    ///
    /// # Errors
    /// There is none, or the book cannot be saved; it is given back all the same, and comes back only with a restart.
    pub fn release(&mut self, key: &str) -> Result<Reservation, BookError> {
        let index = self.position(key).ok_or_else(|| BookError::Unknown {
            key: key.to_owned(),
        })?;
        self.seen_unix_ms.remove(index);
        let entry = self.entries.remove(index);
        self.save()?;
        Ok(entry)
    }

    /// Follows what is there now: VMs that appeared make theirs `running`, deadlines that passed and VMs that went drop
    /// theirs. Returns what was dropped.
    ///
    /// # Errors
    /// The change cannot be saved; it is made all the same, and tried again with the next one.
    pub fn follow(
        &mut self,
        now_unix_ms: u64,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Result<Vec<Reservation>, BookError> {
        let mut changed = false;
        let mut dropped = Vec::new();
        let mut index = 0;
        while index < self.entries.len() {
            let entry = &mut self.entries[index];
            let present = seen(&entry.vm).is_some();
            if present {
                self.seen_unix_ms[index] = now_unix_ms;
                if entry.phase != ReservationPhase::Running {
                    entry.phase = ReservationPhase::Running;
                    entry.since_unix_ms = now_unix_ms;
                    entry.deadline_unix_ms = None;
                    changed = true;
                }
            }
            let over = entry
                .deadline_unix_ms
                .is_some_and(|deadline| now_unix_ms > deadline);
            let gone = entry.phase == ReservationPhase::Running
                && now_unix_ms.saturating_sub(self.seen_unix_ms[index]) > GONE_AFTER.0;
            if over || gone {
                self.seen_unix_ms.remove(index);
                dropped.push(self.entries.remove(index));
                changed = true;
            } else {
                index += 1;
            }
        }
        if changed {
            self.save()?;
        }
        Ok(dropped)
    }

    /// Memory promised and not used yet. A running VM counts for `settle` after it appeared.
    pub fn outstanding(
        &self,
        now_unix_ms: u64,
        settle: Millis,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Bytes {
        self.entries
            .iter()
            .map(|entry| outstanding_of(entry, now_unix_ms, settle, &seen))
            .sum()
    }

    fn save(&self) -> Result<(), BookError> {
        write(&self.path, &self.entries).map_err(BookError::Save)
    }
}

/// What one reservation still counts for.
pub(crate) fn outstanding_of(
    entry: &Reservation,
    now_unix_ms: u64,
    settle: Millis,
    seen: &impl Fn(&str) -> Option<SeenVm>,
) -> Bytes {
    let settled = entry.phase == ReservationPhase::Running
        && now_unix_ms.saturating_sub(entry.since_unix_ms) > settle.0;
    if settled {
        return Bytes::ZERO;
    }
    match seen(&entry.vm) {
        Some(vm) => entry.promised - vm.resident,
        None => entry.promised,
    }
}
