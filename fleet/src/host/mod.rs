//! Reads memory, pressure and swap of the agent's host from the kernel's files.
//!
//! "The host" is what the VMs may use together: the machine, or a control group if its limit is smaller. If an agent
//! read the machine's memory while its VMs ran below a smaller limit, it would admit too many VMs. The kernel would
//! then kill some of them.

mod kernel_file;
mod process;
mod reader;
mod trigger;
mod vm_groups;

#[cfg(test)]
mod tests;

pub use process::{Process, ProcessIdentity};
pub(crate) use process::{ProcessMemory, cpu_ms, has_ended, holds_vm, ids_of};
pub use reader::{CGROUP_ROOT, HostFiles, HostReader};
pub use trigger::{PressureTrigger, TriggerError, TriggerLevel, watch_pressure};
pub(crate) use vm_groups::limiting_groups;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Reasons why the host could not be read.
#[derive(Debug, Error)]
pub enum HostError {
    /// The kernel's file does not exist or cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The kernel's file lacks a figure.
    #[error("{} has no {name}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The figure.
        name: &'static str,
    },
    /// The kernel's file has an unexpected format.
    #[error("cannot parse {}: {text:?}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Its content.
        text: String,
    },
}
