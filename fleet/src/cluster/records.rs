//! The keys and values in the store.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::admission::{HostHeadroom, Request};
use crate::model::Bytes;
use crate::placement::MovableVm;

/// Longest name of a host; DNS allows no longer one.
const NAME_BYTES_MAX: usize = 253;

/// Why a name cannot be part of a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The name of a host.
    #[error("{0:?} is not a host name: use letters, digits, dot, dash and underscore")]
    Host(String),
    /// The prefix of all keys.
    #[error("{0:?} is not a prefix: it must start with a slash and not end with one")]
    Prefix(String),
}

/// Why a value in the store is not understood.
#[derive(Debug, Error)]
#[error("cannot parse {key} in the store")]
pub struct RecordError {
    /// The key.
    pub key: String,
    /// What the parser said.
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
    /// It is no prefix.
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
    /// It may not.
    pub fn check_host(host: &str) -> Result<(), NameError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if host.is_empty() || host.len() > NAME_BYTES_MAX || !host.chars().all(good) {
            return Err(NameError::Host(host.to_owned()));
        }
        Ok(())
    }

    /// Below it: what placing needs of all hosts.
    pub fn hosts(&self) -> String {
        format!("{}/hosts/", self.prefix)
    }

    /// Below it: what placing needs of one host.
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

    /// Below it: the VMs of all hosts.
    pub fn all_vms(&self) -> String {
        format!("{}/vms/", self.prefix)
    }

    /// [`VmsRecord`]
    pub fn vms(&self, host: &str) -> String {
        format!("{}/vms/{host}", self.prefix)
    }
}

/// What a host says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostRecord {
    /// [`crate::placement::HostCapacity::SCHEMA`]; placers leave hosts of other forms alone.
    pub schema: u32,
    /// Tells two machines of the same name apart.
    pub instance: String,
    /// Version of the agent.
    pub version: String,
    /// Counts the records of this instance.
    pub generation: u64,
    /// Age of the figures when they were written, ms. The lease says that they are not much older than that.
    pub facts_age_ms: u64,
    /// What admission needs to know. Every reservation of the same write that has been answered is counted.
    #[serde(rename = "books")]
    pub headroom: HostHeadroom,
    /// How many VMs there are.
    pub vms: usize,
}

/// The promises asked of a host from afar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RemoteReservations {
    /// Oldest first.
    pub entries: Vec<RemoteReservation>,
}

impl RemoteReservations {
    /// Most lines; more would be a client gone wild, and the value must stay far below the store's largest.
    pub const ENTRIES_MAX: usize = 256;

    /// The line with this id.
    pub fn find(&self, id: &str) -> Option<&RemoteReservation> {
        self.entries.iter().find(|entry| entry.id == id)
    }
}

/// One promise asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RemoteReservation {
    /// Its id; that of the host's reservation as well.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Memory it is guaranteed.
    pub min: Bytes,
    /// Memory of the VM.
    pub max: Bytes,
    /// Memory to be promised.
    pub promise: Bytes,
    /// Who asked, for people.
    pub placer: String,
    /// What the host says to it.
    pub answer: Answer,
}

impl RemoteReservation {
    /// What is asked for.
    pub fn request(&self) -> Request {
        Request {
            min: self.min,
            max: self.max,
        }
    }
}

/// What a host says to a promise that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "lowercase", tag = "is", content = "because")]
#[strum(serialize_all = "lowercase")]
pub enum Answer {
    /// Nothing yet.
    Asked,
    /// It is promised.
    Confirmed,
    /// It is promised, and the VM is being started.
    Starting,
    /// No, and why.
    Refused(String),
}

impl Answer {
    /// The name in tables.
    pub fn name(&self) -> &'static str {
        self.into()
    }
}

/// Nothing new may go to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainMark {
    /// Who set it, for people.
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

pub(super) fn write(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("the records are plain structures with text keys")
}
