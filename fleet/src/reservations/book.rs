//! All reservations of a host.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::file::{FileError, Times, read, write};
use super::{Moment, Reservation, ReservationPhase};
use crate::config::Millis;
use crate::model::Bytes;

/// Maximum number of reservations; more would be caused by a faulty client.
const RESERVATIONS_MAX: usize = 4096;
/// A VM that has not been seen for this long has ended. The time exceeds the time that a restarted agent needs to find
/// it again.
const GONE_AFTER: Millis = Millis::seconds(30);

/// Reasons why a reservation was not changed.
#[derive(Debug, Error)]
pub enum ReservationError {
    /// The name is taken by another VM.
    #[error("the VM {vm:?} already has a reservation of {held}")]
    Held {
        /// The VM.
        vm: String,
        /// Memory of the VM for which it was made.
        held: Bytes,
    },
    /// There is no such reservation.
    #[error("the reservation {key:?} does not exist")]
    Unknown {
        /// The requested value.
        key: String,
    },
    /// There are too many reservations.
    #[error("the limit of {RESERVATIONS_MAX} reservations is reached")]
    Full,
    /// It could not be saved.
    #[error("the reservations cannot be saved")]
    Save(#[source] FileError),
}

/// The observed state of a reservation's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenVm {
    /// Memory it has resident.
    pub resident: Bytes,
}

#[derive(Clone, Copy, Debug)]
struct EntryClock {
    times: Times,
    /// When its VM was last seen, ms since the machine started; not saved.
    seen_ms: u64,
}

/// The reservations of a host, on disk and in memory.
#[derive(Debug, Default)]
pub struct Reservations {
    path: PathBuf,
    entries: Vec<Reservation>,
    /// One for each entry.
    clocks: Vec<EntryClock>,
    made: u64,
}

impl Reservations {
    /// Opens the book in `state_dir` with the reservations last written.
    ///
    /// # Errors
    /// The book exists but cannot be read. Starting without it would reserve memory twice.
    pub fn open(state_dir: &Path, now: Moment) -> Result<Self, ReservationError> {
        let path = state_dir.join("reservations.json");
        let read = read(&path, now).map_err(ReservationError::Save)?;
        let clock = |(entry, times)| {
            let seen_ms = now.ms;
            (entry, EntryClock { times, seen_ms })
        };
        let (entries, clocks) = read.into_iter().map(clock).unzip();
        Ok(Self {
            path,
            entries,
            clocks,
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

    /// Records an admitted reservation. A repeated request for the same VM and size returns the existing reservation.
    ///
    /// # Errors
    /// The name is taken, the book is full or cannot be saved.
    pub fn reserve(
        &mut self,
        vm: &str,
        (configured, promised): (Bytes, Bytes),
        huge_pages: bool,
        owner_uid: u32,
        (now, hold): (Moment, Millis),
    ) -> Result<Reservation, ReservationError> {
        if let Some(held) = self.find(vm) {
            if held.configured == configured
                && held.huge_pages == huge_pages
                && held.owner_uid == owner_uid
            {
                return Ok(held.clone());
            }
            return Err(ReservationError::Held {
                vm: vm.to_owned(),
                held: held.configured,
            });
        }
        self.made += 1;
        self.enter(
            Reservation {
                id: format!("{:x}-{:x}", now.unix_ms, self.made),
                vm: vm.to_owned(),
                configured,
                promised,
                phase: ReservationPhase::Promised,
                owner_uid,
                remote: false,
                huge_pages,
                since_unix_ms: now.unix_ms,
                deadline_unix_ms: Some(now.unix_ms.saturating_add(hold.0)),
            },
            (now, hold),
        )
    }

    /// Records a reservation that was requested through the store, with its id there.
    ///
    /// # Errors
    /// The name is taken, the book is full or cannot be saved.
    pub fn reserve_remote(
        &mut self,
        id: &str,
        vm: &str,
        (configured, promised): (Bytes, Bytes),
        owner_uid: u32,
        (now, hold): (Moment, Millis),
    ) -> Result<Reservation, ReservationError> {
        if let Some(held) = self.find(vm).or_else(|| self.find(id)) {
            return Err(ReservationError::Held {
                vm: held.vm.clone(),
                held: held.configured,
            });
        }
        self.enter(
            Reservation {
                id: id.to_owned(),
                vm: vm.to_owned(),
                configured,
                promised,
                phase: ReservationPhase::Promised,
                owner_uid,
                remote: true,
                huge_pages: false,
                since_unix_ms: now.unix_ms,
                deadline_unix_ms: Some(now.unix_ms.saturating_add(hold.0)),
            },
            (now, hold),
        )
    }

    fn enter(
        &mut self,
        reservation: Reservation,
        (now, hold): (Moment, Millis),
    ) -> Result<Reservation, ReservationError> {
        if self.entries.len() >= RESERVATIONS_MAX {
            return Err(ReservationError::Full);
        }
        self.entries.push(reservation.clone());
        self.clocks.push(EntryClock {
            times: Times::until(now, hold),
            seen_ms: now.ms,
        });
        if let Err(error) = self.save() {
            // Without being on disk, it is not granted.
            self.entries.pop();
            self.clocks.pop();
            return Err(error);
        }
        Ok(reservation)
    }

    /// Records that the VMM was started.
    ///
    /// # Errors
    /// There is no such reservation, or it cannot be saved.
    pub fn confirm(
        &mut self,
        key: &str,
        now: Moment,
        hold: Millis,
    ) -> Result<Reservation, ReservationError> {
        let index = self
            .position(key)
            .ok_or_else(|| ReservationError::Unknown {
                key: key.to_owned(),
            })?;
        let entry = &mut self.entries[index];
        if entry.phase == ReservationPhase::Promised {
            entry.phase = ReservationPhase::Starting;
            entry.since_unix_ms = now.unix_ms;
            entry.deadline_unix_ms = Some(now.unix_ms.saturating_add(hold.0));
            self.clocks[index].times = Times::until(now, hold);
        }
        let entry = entry.clone();
        self.save()?;
        Ok(entry)
    }

    /// Records that the VM is being started, and that this may take another `hold` from now.
    ///
    /// # Errors
    /// As [`Reservations::confirm`].
    pub fn prolong(
        &mut self,
        key: &str,
        now: Moment,
        hold: Millis,
    ) -> Result<(), ReservationError> {
        let index = self
            .position(key)
            .ok_or_else(|| ReservationError::Unknown {
                key: key.to_owned(),
            })?;
        let entry = &mut self.entries[index];
        let clock = &mut self.clocks[index];
        let left = |deadline: u64| deadline.saturating_sub(now.ms);
        let lasts = clock
            .times
            .deadline_ms
            .is_none_or(|at| left(at) > hold.0 / 2);
        if entry.phase == ReservationPhase::Running
            || entry.phase == ReservationPhase::Starting && lasts
        {
            return Ok(());
        }
        if entry.phase == ReservationPhase::Promised {
            entry.phase = ReservationPhase::Starting;
            entry.since_unix_ms = now.unix_ms;
        }
        entry.deadline_unix_ms = Some(now.unix_ms.saturating_add(hold.0));
        clock.times = Times::until(now, hold);
        self.save()
    }

    /// Releases a reservation.
    ///
    /// # Errors
    /// There is no such reservation, or the book cannot be saved. In the latter case it is released nevertheless, and
    /// reappears only after a restart.
    pub fn release(&mut self, key: &str) -> Result<Reservation, ReservationError> {
        let index = self
            .position(key)
            .ok_or_else(|| ReservationError::Unknown {
                key: key.to_owned(),
            })?;
        self.clocks.remove(index);
        let entry = self.entries.remove(index);
        self.save()?;
        Ok(entry)
    }

    /// Updates the reservations: those of VMs that appeared become `running`; expired ones and those of ended VMs are
    /// dropped. Returns the dropped reservations.
    ///
    /// # Errors
    /// The change cannot be saved. It is made nevertheless, and saved with the next one.
    pub fn follow(
        &mut self,
        now: Moment,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Result<Vec<Reservation>, ReservationError> {
        let mut changed = false;
        let mut dropped = Vec::new();
        let mut index = 0;
        while index < self.entries.len() {
            let entry = &mut self.entries[index];
            let clock = &mut self.clocks[index];
            let present = seen(&entry.vm).is_some();
            if present {
                clock.seen_ms = now.ms;
                if entry.phase != ReservationPhase::Running {
                    entry.phase = ReservationPhase::Running;
                    entry.since_unix_ms = now.unix_ms;
                    entry.deadline_unix_ms = None;
                    clock.times = Times {
                        since_ms: now.ms,
                        deadline_ms: None,
                    };
                    changed = true;
                }
            }
            let over = clock
                .times
                .deadline_ms
                .is_some_and(|deadline| now.ms > deadline);
            let gone = entry.phase == ReservationPhase::Running
                && now.ms.saturating_sub(clock.seen_ms) > GONE_AFTER.0;
            if over || gone {
                self.clocks.remove(index);
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

    /// Memory reserved and not used yet. A running VM counts for `settle` after it appeared.
    pub fn outstanding(
        &self,
        now: Moment,
        settle: Millis,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Bytes {
        self.outstanding_of(false, now, settle, seen)
    }

    /// Memory of the pool of huge pages that is reserved and not taken yet.
    pub fn outstanding_pool(
        &self,
        now: Moment,
        settle: Millis,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Bytes {
        self.outstanding_of(true, now, settle, seen)
    }

    fn outstanding_of(
        &self,
        huge_pages: bool,
        now: Moment,
        settle: Millis,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> Bytes {
        self.outstanding_each(now, settle, seen)
            .filter(|(entry, _)| entry.huge_pages == huge_pages)
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// All reservations with the memory that each still reserves.
    pub fn outstanding_each(
        &self,
        now: Moment,
        settle: Millis,
        seen: impl Fn(&str) -> Option<SeenVm>,
    ) -> impl Iterator<Item = (&Reservation, Bytes)> {
        let entries = self.entries.iter().zip(&self.clocks);
        entries.map(move |(entry, clock)| {
            let age_ms = now.ms.saturating_sub(clock.times.since_ms);
            let settled = entry.phase == ReservationPhase::Running && age_ms > settle.0;
            let bytes = match seen(&entry.vm) {
                _ if settled => Bytes::ZERO,
                Some(vm) => entry.promised - vm.resident,
                None => entry.promised,
            };
            (entry, bytes)
        })
    }

    fn save(&self) -> Result<(), ReservationError> {
        let times = self.clocks.iter().map(|clock| clock.times);
        write(&self.path, self.entries.iter().zip(times)).map_err(ReservationError::Save)
    }
}

impl Times {
    fn until(now: Moment, hold: Millis) -> Self {
        Self {
            since_ms: now.ms,
            deadline_ms: Some(now.ms.saturating_add(hold.0)),
        }
    }
}
