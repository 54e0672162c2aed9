//! The migration under way, as the life cycle of the VM sees it.

use std::sync::Arc;

use api::VmConfig;
use machine::memory::on_demand::Faults;
use machine::pc::BarePc;

use super::error::Done;
use crate::migration::{Cancel, SendProgress};

/// The migration under way.
pub(super) struct Migration {
    pub(super) cancel: Cancel,
    /// The machine may belong to the other side, or permanently to this one.
    pub(super) is_committed: bool,
    pub(super) role: Role,
}

pub(super) enum Role {
    Source {
        /// Number of the machine that is sent.
        machine: u64,
        was_running: bool,
        progress: Arc<SendProgress>,
    },
    Target {
        /// Known once the source has sent it.
        prepared: Option<Box<Prepared>>,
        /// For RAM that comes after the machine, if that is permitted.
        faults: Option<Faults>,
        done: Option<Done>,
    },
}

/// What the target knows and has created before the source pauses the machine.
pub(super) struct Prepared {
    pub(super) config: VmConfig,
    /// Without devices; none without KVM.
    pub(super) pc: Option<BarePc>,
}

impl Migration {
    /// Ends it unless it is too late. Returns whether it was not.
    pub(super) fn cancel(&self) -> bool {
        if !self.is_committed {
            self.cancel.set();
        }
        !self.is_committed
    }

    /// The figures of a migration that is being sent.
    pub(super) fn progress(&self) -> Option<Arc<SendProgress>> {
        match &self.role {
            Role::Source { progress, .. } => Some(Arc::clone(progress)),
            Role::Target { .. } => None,
        }
    }
}
