//! Reasons for rejecting a saved state.

use std::error::Error;

use crate::Part;

/// Why a part cannot be restored from a saved state. Names the part, and the field if there is one.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Written by a version of the part that this program cannot read.
    #[error("state of {part} has version {found}, readable versions are {oldest} to {newest}")]
    UnreadableVersion {
        /// The part's name.
        part: &'static str,
        /// Version in the saved state.
        found: u64,
        /// Oldest readable version.
        oldest: u32,
        /// Newest readable version, the one written.
        newest: u32,
    },
    /// Not a state of this part: a field is missing, unknown or of the wrong type.
    #[error("state of {part} is malformed")]
    Malformed {
        part: &'static str,
        #[source]
        source: serde_json::Error,
    },
    /// A field has a value that this part cannot have.
    #[error("state of {part}: {field} {reason}")]
    Invalid {
        /// The part's name.
        part: &'static str,
        /// The field.
        field: &'static str,
        /// The fault of its value.
        reason: String,
    },
    /// The state is valid, but the host refused a resource it needs.
    #[error("cannot restore {part}")]
    Host {
        part: &'static str,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

impl StateError {
    /// An error for a field with an impossible value.
    pub fn invalid(part: Part, field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            part: part.name,
            field,
            reason: reason.into(),
        }
    }

    /// Whether the host caused the error, as opposed to an invalid state.
    pub fn is_of_host(&self) -> bool {
        matches!(self, Self::Host { .. })
    }

    /// An error caused by the host.
    pub fn host(part: Part, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Host {
            part: part.name,
            source: source.into(),
        }
    }
}

/// Rejects `field` of `part` unless `holds`.
///
/// # Errors
/// [`StateError::Invalid`] with the reason.
pub fn require(
    holds: bool,
    part: Part,
    field: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), StateError> {
    if holds {
        return Ok(());
    }
    Err(StateError::invalid(part, field, reason()))
}
