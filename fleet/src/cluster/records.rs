//! The keys and values in the store.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::admission::{HostHeadroom, Request};
use crate::model::Bytes;
use crate::placement::MovableVm;

/// Maximum length of a host's name, the same as DNS's limit.
const NAME_BYTES_MAX: usize = 253;

/// Reasons why a name cannot be part of a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The name of a host.
    #[error("{0:?} is not a host name: use letters, digits, dot, dash and underscore")]
    Host(String),
    /// The prefix of all keys.
    #[error("{0:?} is not a prefix: it must start with a slash and not end with one")]
    Prefix(String),
}

/// The reason why a value in the store is invalid.
#[derive(Debug, Error)]
#[error("cannot parse {key} in the store")]
pub struct RecordError {
    /// The key.
    pub key: String,
    /// The parser's error.
    #[source]
    pub source: serde_json::Error,
}

/// The names of the keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// All keys below `prefix`.
    ///
    /// # Errors
    /// The prefix is invalid.
    pub fn new(prefix: &str) -> Result<Self, NameError> {
        let good = prefix.len() > 1 && prefix.starts_with('/') && !prefix.ends_with('/');
        if !good || prefix.chars().any(char::is_control) {
            return Err(NameError::Prefix(prefix.to_owned()));
        }
        Ok(Self {
            prefix: prefix.to_owned(),
        })
    }

    /// Whether a host may have this name.
    ///
    /// # Errors
    /// The name is invalid.
    pub fn check_host(host: &str) -> Result<(), NameError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if host.is_empty() || host.len() > NAME_BYTES_MAX || !host.chars().all(good) {
            return Err(NameError::Host(host.to_owned()));
        }
        Ok(())
    }

    /// Prefix of the keys of all hosts that placement needs.
    pub fn hosts(&self) -> String {
        format!("{}/hosts/", self.prefix)
    }

    /// Prefix of the keys of one host that placement needs.
    pub fn host(&self, host: &str) -> String {
        format!("{}/hosts/{host}/", self.prefix)
    }

    /// [`HostRecord`]
    pub fn record(&self, host: &str) -> String {
        format!("{}/hosts/{host}/record", self.prefix)
    }

    /// [`RemoteReservations`]
    pub fn book(&self, host: &str) -> String {
        format!("{}/hosts/{host}/book", self.prefix)
    }

    /// [`DrainMark`]
    pub fn drain(&self, host: &str) -> String {
        format!("{}/hosts/{host}/drain", self.prefix)
    }

    /// Prefix of the VMs of all hosts.
    pub fn all_vms(&self) -> String {
        format!("{}/vms/", self.prefix)
    }

    /// Prefix of all moves and of the orders for them.
    pub fn moves(&self) -> String {
        format!("{}/moves/", self.prefix)
    }

    /// [`super::MoveOrder`]
    pub fn move_order(&self, host: &str) -> String {
        format!("{}/moves/order/{host}", self.prefix)
    }

    /// [`super::MoveRecord`]
    pub fn vm_move(&self, from: &str, vm: &str) -> String {
        format!("{}/moves/vm/{from}/{vm}", self.prefix)
    }

    /// [`VmsRecord`]
    pub fn vms(&self, host: &str) -> String {
        format!("{}/vms/{host}", self.prefix)
    }
}

/// A host's published data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// [`crate::placement::HostCapacity::SCHEMA`]; placers ignore hosts with other schemas.
    pub schema: u32,
    /// Distinguishes two machines with the same name.
    pub instance: String,
    /// Version of the agent.
    pub version: String,
    /// Counts the records of this instance.
    pub generation: u64,
    /// Age of the figures when they were written, ms. The lease guarantees that they are not much older now.
    pub facts_age_ms: u64,
    /// The data for admission. It includes every reservation with a response in the same write.
    #[serde(rename = "books")]
    pub headroom: HostHeadroom,
    /// Number of VMs.
    pub vms: usize,
    /// Whether it receives VMs from other hosts.
    #[serde(default)]
    pub receives: bool,
}

/// The remote requests for reservations on a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RemoteReservations {
    /// Oldest first.
    pub entries: Vec<RemoteReservation>,
}

impl RemoteReservations {
    /// Maximum number of lines. More would be caused by a faulty client, and the value must stay far below the store's
    /// size limit.
    pub const ENTRIES_MAX: usize = 256;

    /// The line with this id.
    pub fn find(&self, id: &str) -> Option<&RemoteReservation> {
        self.entries.iter().find(|entry| entry.id == id)
    }
}

/// One requested reservation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoteReservation {
    /// Its id; that of the host's reservation as well.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Its guaranteed memory.
    pub min: Bytes,
    /// Memory of the VM.
    pub max: Bytes,
    /// Memory to be reserved.
    pub promise: Bytes,
    /// The user who requested it, for display.
    pub placer: String,
    /// The host's response.
    pub answer: Answer,
}

impl RemoteReservation {
    /// The request for admission.
    pub fn request(&self) -> Request {
        Request {
            min: self.min,
            max: self.max,
        }
    }
}

/// A host's response to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "lowercase", tag = "is", content = "because")]
#[strum(serialize_all = "lowercase")]
pub enum Answer {
    /// No response yet.
    Asked,
    /// The memory is reserved.
    Confirmed,
    /// The memory is reserved, and the VM is being started.
    Starting,
    /// Refused, with the reason.
    Refused(String),
}

impl Answer {
    /// The name in tables.
    pub fn name(&self) -> &'static str {
        self.into()
    }
}

/// Marks a host that accepts no new VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainMark {
    /// The user who set it, for display.
    pub by: String,
    /// When, ms since the Unix epoch.
    pub unix_ms: u64,
}

/// The VMs of a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmsRecord {
    /// By name.
    pub vms: Vec<MovableVm>,
}

pub(super) fn read<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, RecordError> {
    serde_json::from_slice(value).map_err(|source| RecordError {
        key: key.to_owned(),
        source,
    })
}

/// A record that was read. One that cannot be read is only logged.
pub(super) fn logged<T>(read: Result<T, RecordError>) -> Option<T> {
    read.map_err(|error| log::warn!("{}", api::error_line(&error)))
        .ok()
}

pub(super) fn write(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("the records are plain structures with text keys")
}
