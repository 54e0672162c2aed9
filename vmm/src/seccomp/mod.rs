//! One seccomp filter per thread kind (`--seccomp`).
//!
//! Each thread installs its filter before anything else. The lists of each kind are in [`calls`] and [`ioctls`], and in
//! `docs/seccomp.md`. By default, any other call ends the process with a message.

mod calls;
#[cfg(test)]
mod document;
mod ioctls;
mod program;
mod sigsys;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use seccompiler::{BpfProgram, SeccompAction};
use virtio_devices::Unpoisoned;

use crate::threads::{ThreadKind, ThreadStart};
use calls::Condition;
use program::{Allowed, program};

/// The effect of a forbidden call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// The process logs the call and ends.
    #[default]
    Trap,
    /// No filters are installed.
    Off,
    /// The kernel logs the call and executes it.
    Log,
    /// The call fails with `EPERM`.
    Errno,
}

/// Errors of creating or installing a filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel rejects the filter.
    #[error("Cannot install the seccomp filter of {kind:?} threads")]
    Apply {
        /// The kind of thread.
        kind: ThreadKind,
        /// The reason.
        #[source]
        source: seccompiler::Error,
    },
    /// The handler that logs forbidden calls cannot be installed.
    #[error("Cannot install the handler of SIGSYS")]
    Handler(#[source] vmm_sys_util::errno::Error),
}

/// The filters of all kinds. Each is created when a thread needs it for the first time, because most processes have few
/// kinds of threads.
#[derive(Debug)]
pub struct Seccomp {
    /// The effect of a forbidden call; none if no filters are installed.
    on_mismatch: Option<SeccompAction>,
    filters: Mutex<BTreeMap<ThreadKind, Arc<BpfProgram>>>,
}

impl Seccomp {
    /// Nothing is installed yet except, with [`SeccompMode::Trap`], the handler that logs a forbidden call.
    ///
    /// # Errors
    /// The handler cannot be installed.
    pub fn new(mode: SeccompMode) -> Result<Self, SeccompError> {
        if mode == SeccompMode::Trap {
            sigsys::install().map_err(SeccompError::Handler)?;
        }
        Ok(Self {
            on_mismatch: match mode {
                SeccompMode::Off => None,
                SeccompMode::Trap => Some(SeccompAction::Trap),
                SeccompMode::Log => Some(SeccompAction::Log),
                SeccompMode::Errno => Some(SeccompAction::Errno(libc::EPERM.unsigned_abs())),
            },
            filters: Mutex::default(),
        })
    }

    /// Installs the filter of `kind` on the calling thread, irrevocably.
    ///
    /// # Errors
    /// The kernel rejects the filter.
    pub fn apply(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        match &self.on_mismatch {
            Some(on_mismatch) => seccompiler::apply_filter(&self.filter(kind, on_mismatch))
                .map_err(|source| SeccompError::Apply { kind, source }),
            None => Ok(()),
        }
    }

    fn filter(&self, kind: ThreadKind, on_mismatch: &SeccompAction) -> Arc<BpfProgram> {
        let known = self.filters.lock().unpoisoned().get(&kind).cloned();
        if let Some(filter) = known {
            return filter;
        }
        // Threads of the same kind that start at the same time create the same filter.
        let filter = Arc::new(program(&allowed(kind), on_mismatch));
        let mut filters = self.filters.lock().unpoisoned();
        filters.insert(kind, Arc::clone(&filter));
        filter
    }

    /// The first call of every thread. A thread that cannot be confined must not run, and the process must not continue
    /// without it.
    pub fn hook(self: &Arc<Self>) -> ThreadStart {
        let seccomp = Arc::clone(self);
        Arc::new(move |kind| {
            if let Err(error) = seccomp.apply(kind) {
                log::error!("{}", api::error_line(&error));
                std::process::exit(1);
            }
        })
    }
}

fn allowed(kind: ThreadKind) -> Allowed {
    let mut allowed = Allowed::new();
    let mut allow = |number, conditions: Vec<Condition>| {
        let alternatives = allowed.entry(number).or_default();
        if !alternatives.contains(&conditions) {
            alternatives.push(conditions);
        }
    };
    for member in family(kind) {
        for call in calls::own(member).into_iter().flatten() {
            allow(call.number, call.conditions.to_vec());
        }
        for request in ioctls::own(member) {
            allow(libc::SYS_ioctl, vec![request.condition()]);
        }
    }
    allowed
}

/// The kind and all kinds that it starts, directly or indirectly.
fn family(kind: ThreadKind) -> Vec<ThreadKind> {
    let mut members = vec![kind];
    let mut next = 0;
    while let Some(&member) = members.get(next) {
        next += 1;
        for child in calls::children(member) {
            if !members.contains(&child) {
                members.push(child);
            }
        }
    }
    members
}
