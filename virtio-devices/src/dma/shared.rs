//! The tables and pending faults, shared by the IOMMU and the devices behind it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

use vm_memory::Permissions;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::eras::EndedEra;
use super::host_calls::{HostCall, PIECE_MAX, StopsNow};
use super::mapping::Refusal;
use super::tables::{Effects, FaultReason, Piece, Tables};
use crate::Unpoisoned;
use crate::counters::counters;

/// Maximum number of faults that wait for a buffer of the driver. Later ones are only counted.
pub(crate) const FAULTS_MAX: usize = 64;

/// Reasons why an access is not translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DmaError {
    /// The guest has not allowed it. The fault is counted, and the guest is notified of it.
    #[error("the virtual IOMMU does not map it for this access")]
    Fault,
    /// The range consists of more mappings than the caller accepts.
    #[error("the range has too many mappings in the virtual IOMMU")]
    TooManyPieces,
}

counters! {
    Stats {
        requests,
        bad_requests,
        refused_requests,
        faults,
        dropped_faults,
    }
}

/// An access that the guest has not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) reason: FaultReason,
    pub(crate) endpoint: u32,
    pub(crate) address: u64,
    pub(crate) access: Permissions,
}

#[derive(Debug)]
pub(crate) struct Shared {
    /// Applies to endpoints without a domain. Not in the tables, because a vCPU thread changes it.
    bypass: AtomicBool,
    /// Held for one request or one translation, but not while the host provides, pins or releases memory.
    tables: RwLock<Tables>,
    /// Figures of the tables after the last change, for those who do not wait for the next.
    mappings: AtomicU64,
    host_mapped_bytes: AtomicU64,
    faults: Mutex<VecDeque<Fault>>,
    /// Readable while there are faults that the worker has not looked at.
    pub(crate) faulted: EventFd,
    pub(crate) stats: Stats,
}

impl Shared {
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn new(input_last: u64) -> io::Result<Self> {
        Ok(Self {
            bypass: AtomicBool::new(true),
            tables: RwLock::new(Tables::new(input_last)),
            mappings: AtomicU64::new(0),
            host_mapped_bytes: AtomicU64::new(0),
            faults: Mutex::default(),
            faulted: EventFd::new(EFD_NONBLOCK)?,
            stats: Stats::default(),
        })
    }

    pub(crate) fn bypass(&self) -> bool {
        self.bypass.load(Ordering::SeqCst)
    }

    pub(crate) fn set_bypass(&self, bypass: bool) {
        self.bypass.store(bypass, Ordering::SeqCst);
    }

    /// Changes the tables. Accesses of emulated devices in progress may continue. Assigned devices have lost what the
    /// change took away from them; what the host keeps mapped stays pinned, and has been logged.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Tables) -> T) -> T {
        let (result, effects) = self.lock_and_change(change);
        self.call_hosts(&effects, &mut || false).ok();
        result
    }

    /// Changes the tables, and returns when no device uses memory that the change took away from it. Only for the
    /// worker of the IOMMU, because it waits for other workers.
    pub(crate) fn change_and_wait<T>(&self, change: impl FnOnce(&mut Tables) -> T) -> T {
        let (result, effects) = self.lock_and_change(change);
        self.call_hosts(&effects, &mut || false).ok();
        effects.ended.into_iter().for_each(EndedEra::wait);
        result
    }

    /// The same for a request of the driver, which succeeds if the hosts accept it, too. If they do not accept what it
    /// adds, `undo` takes it out of the tables again.
    ///
    /// # Errors
    /// Of the change, or of a host.
    pub(crate) fn request(
        &self,
        change: impl FnOnce(&mut Tables) -> Result<(), Refusal>,
        undo: impl FnOnce(&mut Tables),
        stops_now: StopsNow<'_>,
    ) -> Result<(), Refusal> {
        let (result, effects) = self.lock_and_change(change);
        let called = self.call_hosts(&effects, stops_now);
        effects.ended.into_iter().for_each(EndedEra::wait);
        if called.is_err() {
            self.change_and_wait(undo);
        }
        result.and(called)
    }

    fn lock_and_change<T>(&self, change: impl FnOnce(&mut Tables) -> T) -> (T, Effects) {
        let mut tables = self.tables.write().unpoisoned();
        let result = change(&mut tables);
        self.store_figures(&tables);
        (result, tables.take_effects())
    }

    fn call_hosts(&self, effects: &Effects, stops_now: StopsNow<'_>) -> Result<(), Refusal> {
        if effects.calls.is_empty() {
            return Ok(());
        }
        let read = |place, from| self.read(|tables| tables.mappings_of(place, from, PIECE_MAX));
        let called = HostCall::make_all(&effects.calls, &read, stops_now);
        self.read(|tables| self.store_figures(tables));
        called
    }

    fn store_figures(&self, tables: &Tables) {
        let store = |figure: &AtomicU64, value| figure.store(value, Ordering::Relaxed);
        store(&self.mappings, tables.mappings() as u64);
        store(&self.host_mapped_bytes, tables.host_mapped_bytes());
    }

    /// Number of mappings in all domains.
    pub(crate) fn mappings(&self) -> u64 {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Bytes mapped in the IOMMU of the host, counted for each assigned device.
    pub(crate) fn host_mapped_bytes(&self) -> u64 {
        self.host_mapped_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn read<T>(&self, read: impl FnOnce(&Tables) -> T) -> T {
        read(&self.tables.read().unpoisoned())
    }

    /// As [`super::Access::translate`].
    pub(crate) fn translate(
        &self,
        place: (u32, u64),
        range: (u64, u64),
        access: Permissions,
        pieces_max: usize,
    ) -> Result<Vec<Piece>, DmaError> {
        let bypass = self.bypass();
        let translated =
            self.read(|tables| tables.translate(place, range, access, (bypass, pieces_max)));
        match translated {
            Ok(pieces) => pieces.ok_or(DmaError::TooManyPieces),
            Err((reason, address)) => {
                self.report(Fault {
                    reason,
                    endpoint: place.0,
                    address,
                    access,
                });
                Err(DmaError::Fault)
            }
        }
    }

    fn report(&self, fault: Fault) {
        if self.stats.faults.count_loudly() {
            log::warn!(
                "Virtual IOMMU: endpoint {:#x} may not access {:#x} ({:?})",
                fault.endpoint,
                fault.address,
                fault.access
            );
        }
        let mut faults = self.faults.lock().unpoisoned();
        if faults.len() == FAULTS_MAX {
            self.stats.dropped_faults.count();
            return;
        }
        faults.push_back(fault);
        // Fails only if the counter is full, and then the worker is woken up anyway.
        self.faulted.write(1).ok();
    }

    /// The oldest pending fault.
    pub(crate) fn next_fault(&self) -> Option<Fault> {
        self.faults.lock().unpoisoned().pop_front()
    }

    /// Whether a fault is pending.
    pub(crate) fn has_fault(&self) -> bool {
        !self.faults.lock().unpoisoned().is_empty()
    }

    pub(crate) fn forget_faults(&self) {
        self.faults.lock().unpoisoned().clear();
        // EAGAIN: there was none.
        self.faulted.read().ok();
    }
}
