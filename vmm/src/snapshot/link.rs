//! The place of a snapshot in a chain.

use std::io;

use machine::random::random_id;
use serde::{Deserialize, Serialize};

/// Maximum number of snapshots in a chain.
pub const CHAIN_MAX: usize = 8;

/// The place of a snapshot in a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The random id of the snapshot, as hexadecimal digits.
    pub id: String,
    /// Its base. Without a base, it has all of RAM.
    pub base: Option<Base>,
}

/// The snapshot that another one is based on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its id.
    pub id: String,
    /// The name of its folder, in the same parent folder as the other one.
    pub folder: String,
}

impl Link {
    /// A new snapshot on top of `base`, if any.
    ///
    /// # Errors
    /// The host provides no random numbers.
    pub fn new(base: Option<Base>) -> io::Result<Self> {
        let id = random_id()?;
        let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { id, base })
    }
}
