//! One order to one VM, and its execution.

use std::mem;
use std::path::PathBuf;
use std::time::Duration;

use api::{Client, ClientError, Endpoint, ReclaimThresholdsChange, VmResize};
use thiserror::Error;

use super::save::{self, SaveError};
use super::{GroupError, GroupFile, GroupFiles};
use crate::host::{Process, holds_vm};
use crate::model::Bytes;
use crate::planner::ActionKind;

/// A request to a VM's thread. Values are absolute, so executing an order twice is harmless.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Request a balloon of this size.
    Balloon(Bytes),
    /// Change how the guest reports free memory.
    Report(ReclaimThresholdsChange),
    /// Stop the vCPUs.
    Pause,
    /// Resume the vCPUs.
    Resume,
    /// Limit the control group.
    Group(GroupFile, Option<Bytes>),
    /// End the VMM.
    Kill,
    /// Pause the vCPUs and save the VM into a folder.
    Save {
        /// The folder, which is empty.
        folder: PathBuf,
        /// Time limit of each request.
        deadline: Duration,
    },
    /// End the VMM of a saved VM, if the VM is still paused.
    End,
}

impl Order {
    /// Whether executing only `later` has the same effect.
    pub(crate) fn is_replaced_by(&self, later: &Self) -> bool {
        match (self, later) {
            (Self::Group(earlier, _), Self::Group(later, _)) => earlier == later,
            _ => mem::discriminant(self) == mem::discriminant(later),
        }
    }

    /// Whether it undoes an earlier order.
    pub(crate) fn undoes(&self) -> bool {
        matches!(
            self,
            Self::Resume
                | Self::Group(GroupFile::MemoryMax | GroupFile::MemoryHigh, None)
                | Self::Group(GroupFile::SwapMax, Some(Bytes::ZERO))
        )
    }

    /// Whether the VMM executes it.
    pub(crate) fn asks_vmm(&self) -> bool {
        !matches!(self, Self::Group(..) | Self::Kill)
    }

    /// The endpoint it calls or the file it writes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Balloon(_) => Endpoint::VmResize.name(),
            // The query has the name of the endpoint.
            Self::Report(_) => "vm.reclaim-thresholds.set",
            Self::Pause => Endpoint::VmPause.name(),
            Self::Resume => Endpoint::VmResume.name(),
            Self::Group(file, _) => file.name(),
            Self::Kill => "kill",
            Self::Save { .. } => "vm.snapshot",
            Self::End => "vmm.shutdown",
        }
    }
}

impl From<&ActionKind> for Order {
    fn from(kind: &ActionKind) -> Self {
        match *kind {
            ActionKind::Balloon { to, .. } => Self::Balloon(to),
            ActionKind::Reporting { policy } => Self::Report(ReclaimThresholdsChange {
                reporting_policy: Some(policy.into()),
                ..ReclaimThresholdsChange::default()
            }),
            ActionKind::MemoryMax { limit } => Self::Group(GroupFile::MemoryMax, limit),
            ActionKind::MemoryHigh { limit } => Self::Group(GroupFile::MemoryHigh, limit),
            ActionKind::SwapMax { limit } => Self::Group(GroupFile::SwapMax, Some(limit)),
            ActionKind::Pause => Self::Pause,
            ActionKind::Resume => Self::Resume,
            ActionKind::Kill => Self::Kill,
        }
    }
}

/// An order and its target process.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Addressed {
    pub(crate) order: Order,
    /// Absent if unknown.
    pub(crate) to: Option<Process>,
}

/// Reasons why an order was not executed.
#[derive(Debug, Error)]
pub enum OrderError {
    /// The VMM rejected it, or did not respond in time.
    #[error(transparent)]
    Vmm(#[from] ClientError),
    /// The host rejected it.
    #[error(transparent)]
    Host(#[from] GroupError),
    /// The process is not known yet, or has ended.
    #[error("the VMM's process is unknown")]
    NoProcess,
    /// Another process serves the VM than at the time of the decision.
    #[error("another process now serves the VM")]
    OtherProcess,
    /// The process does not run a VM, which the order requires.
    #[error("process {pid} has no KVM VM")]
    NoVm {
        /// The process.
        pid: i32,
    },
    /// The VM was not saved, or its VMM must not be ended.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// It is unknown whether the process runs a VM.
    #[error("cannot determine whether process {pid} has a KVM VM")]
    Unseen {
        /// The process.
        pid: i32,
        /// The error from the system.
        #[source]
        source: std::io::Error,
    },
}

impl OrderError {
    /// Whether the VMM itself rejected it.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self.request(), Some(ClientError::Server(_)))
    }

    /// The request that failed, if it was one to the VMM.
    pub(crate) fn request(&self) -> Option<&ClientError> {
        match self {
            Self::Vmm(error) | Self::Save(SaveError::Vmm(error) | SaveError::NotEnded(error)) => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Whether the order may have been executed nevertheless.
    pub(crate) fn is_unknown(&self) -> bool {
        self.request().is_some_and(|error| {
            !matches!(
                error,
                ClientError::NoSocket { .. }
                    | ClientError::Refused { .. }
                    | ClientError::OtherPeer { .. }
                    | ClientError::Server(_)
            )
        })
    }
}

/// The VMM that receives an order.
#[derive(Debug)]
pub(crate) struct OrderTarget<'a> {
    pub(crate) client: &'a Client,
    /// The process that was sampled last, if it is known.
    pub(crate) process: Option<&'a Process>,
    pub(crate) files: &'a GroupFiles,
}

impl OrderTarget<'_> {
    pub(crate) fn carry_out(&self, addressed: &Addressed) -> Result<(), OrderError> {
        let Addressed { order, to } = addressed;
        if let (Some(to), Some(now)) = (to, self.process)
            && to != now
        {
            return Err(OrderError::OtherProcess);
        }
        // The process that responds at an inherited socket may not have been sampled yet.
        if order.asks_vmm() && to.as_ref().is_some_and(Process::has_ended) {
            return Err(OrderError::OtherProcess);
        }
        match order {
            Order::Balloon(bytes) => self.client.resize(&VmResize {
                desired_balloon: Some(bytes.0),
                ..VmResize::default()
            })?,
            Order::Report(change) => drop(self.client.set_reclaim_thresholds(change)?),
            Order::Pause => drop(self.client.call(Endpoint::VmPause, None)?),
            Order::Resume => drop(self.client.call(Endpoint::VmResume, None)?),
            Order::Group(file, limit) => {
                let vmm = self.vmm(to.as_ref())?;
                self.files.limit(vmm.pid(), *file, *limit, || vmm.lives())?;
            }
            Order::Kill => {
                let vmm = self.vmm(to.as_ref())?;
                let pid = vmm.pid();
                vmm.kill()
                    .map_err(|source| GroupError::Kill { pid, source })?;
            }
            Order::Save { folder, deadline } => save::save(self.client, folder, *deadline)?,
            Order::End => save::end(self.client)?,
        }
        Ok(())
    }

    /// The process, if it is alive and runs a VM.
    fn vmm<'b>(&self, to: Option<&'b Process>) -> Result<&'b Process, OrderError> {
        let process = to.ok_or(OrderError::NoProcess)?;
        let pid = process.pid();
        let holds = holds_vm(&self.files.proc, pid);
        // The observation applies to the process only if it has not ended in the meantime.
        if !process.lives() {
            return Err(OrderError::NoProcess);
        }
        match holds {
            Ok(true) => Ok(process),
            Ok(false) => Err(OrderError::NoVm { pid }),
            Err(source) => Err(OrderError::Unseen { pid, source }),
        }
    }
}
