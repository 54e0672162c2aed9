//! The record of a VM in standby.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Image, StandbyError};
use crate::host::ProcessIdentity;
use crate::model::Bytes;
use crate::state_file::boot_id;

/// Version of the record; another one is rejected rather than misread.
pub(super) const VERSION: u32 = 1;
/// Maximum length of a name: a file name, with space for the prefix of a removed folder.
const NAME_BYTES_MAX: usize = 200;

/// Who the VM is.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    strum::Display,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Phase {
    /// The VM is its process, which is being paused and saved.
    Saving,
    /// The VM is the folder. Its process has only to be ended.
    Ending,
    /// The VM is the folder.
    Standby,
    /// The VM is the folder. A process that loads it must not run yet.
    Waking,
    /// The VM is its process. It is resumed, and then the folder is removed.
    Running,
}

impl Phase {
    /// The name in responses and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The agent's data about a VM in standby.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of the record.
    pub version: u32,
    /// Name of the VM.
    pub vm: String,
    /// Who it is.
    pub phase: Phase,
    /// When that began, ms since the Unix epoch.
    pub since_unix_ms: u64,
    /// Its API socket.
    pub socket: PathBuf,
    /// Its process.
    pub process: ProcessIdentity,
    /// The boot of the host in which that process was started.
    pub boot_id: String,
    /// The user of the process.
    pub uid: u32,
    /// The group of the process.
    pub gid: u32,
    /// Memory of the VM, which is reserved again before it is woken.
    pub memory: Bytes,
    /// Whether that is memory of the pool of huge pages.
    pub huge_pages: bool,
    /// Its writable images when its VMM had ended.
    pub images: Vec<Image>,
}

impl Record {
    /// The record of a VM that is going to be saved.
    pub(crate) fn saving(
        vm: &str,
        socket: PathBuf,
        (process, uid, gid): (ProcessIdentity, u32, u32),
        (memory, huge_pages): (Bytes, bool),
        since_unix_ms: u64,
    ) -> Self {
        Self {
            version: VERSION,
            vm: vm.to_owned(),
            phase: Phase::Saving,
            since_unix_ms,
            socket,
            process,
            boot_id: boot_id(),
            uid,
            gid,
            memory,
            huge_pages,
            images: Vec::new(),
        }
    }

    /// Its process, if that is of this boot of the host. Identities of different boots can be equal.
    pub(crate) fn process_of_boot(&self) -> Option<ProcessIdentity> {
        (self.boot_id == boot_id()).then_some(self.process)
    }
}

/// A name that can be a folder's.
///
/// # Errors
/// It has a slash or a quote, begins with a dot, or is otherwise unsuitable.
pub(crate) fn check_name(name: &str) -> Result<(), StandbyError> {
    let suits = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        // A quote could not be written in the options of a VMM.
        && !name.chars().any(|char| matches!(char, '/' | '"') || char.is_control());
    match suits {
        true => Ok(()),
        false => Err(StandbyError::Name {
            name: name.chars().take(NAME_BYTES_MAX).collect(),
        }),
    }
}
