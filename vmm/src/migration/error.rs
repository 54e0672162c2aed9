//! Errors of a migration.

use std::error::Error;
use std::io;

use machine::memory::{ContentError, MemoryError, PrivateZone};

use super::tls::TlsError;
use super::wire::WireError;

/// Reasons why a migration failed.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// An unsupported URL.
    #[error(
        "{url:?} is not the address of a migration: tcp:ADDRESS:PORT with a numeric IP address, or unix:PATH with an absolute path"
    )]
    Url {
        /// The URL.
        url: String,
    },
    /// Settings that exclude each other, or that this program does not support.
    #[error("{0}")]
    Request(&'static str),
    /// RAM that cannot be handed over.
    #[error(transparent)]
    PrivateRam(PrivateZone),
    /// A device that cannot move.
    #[error("{device} cannot be migrated: {reason}")]
    Device {
        /// Which one.
        device: String,
        /// Why.
        reason: &'static str,
    },
    /// The socket of the target.
    #[error("Cannot listen on {address}")]
    Listen {
        /// Its address.
        address: String,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The target.
    #[error("Cannot connect to {address}")]
    Connect {
        /// Its address.
        address: String,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The source did not open all connections.
    #[error("The source opened {opened} of {expected} connections in time")]
    TooFewConnections {
        /// Those that are here.
        opened: u32,
        /// The number that it has announced.
        expected: u32,
    },
    /// The source opened a connection that it has not announced.
    #[error(
        "The source opened connection {number} {reason}; it has announced {expected}, counted from 0"
    )]
    WrongConnection {
        /// Its number.
        number: u32,
        /// The fault.
        reason: &'static str,
        /// The number of connections that it has announced.
        expected: u32,
    },
    /// The keys of this side.
    #[error("TLS cannot be used")]
    Keys(#[source] Box<TlsError>),
    /// The certificates of the two sides.
    #[error("The TLS handshake with {address} failed")]
    Handshake {
        /// The peer's address.
        address: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The thread of the migration.
    #[error("Cannot start the thread of the migration")]
    Thread(#[source] io::Error),
    /// The peer or the connection to it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The configuration or state from the source.
    #[error("The {what} from the source is invalid")]
    Json {
        /// Which one.
        what: &'static str,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// RAM.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The record of the guest's writes.
    #[error("Cannot track the guest's writes")]
    Track(#[source] MemoryError),
    /// The guest writes faster than the connection transfers.
    #[error(
        "The migration timed out after {seconds} s and {passes} passes with {left_bytes} bytes left to send: the connection is too slow, or the guest writes memory too fast"
    )]
    Timeout {
        /// The limit.
        seconds: u64,
        /// Passes so far.
        passes: u32,
        /// The remaining bytes.
        left_bytes: u64,
    },
    /// On request.
    #[error("The migration was cancelled")]
    Cancelled,
    /// The owner of the machine refused or failed a step.
    #[error(transparent)]
    Owner(Box<dyn Error + Send + Sync>),
    /// The target has the VM, and has not confirmed that it has all of its RAM.
    #[error(
        "The VM has moved, but the target has not confirmed that it has all of its memory; without it, the target ends the VM, which cannot be resumed here because it has run there"
    )]
    Incomplete(#[source] Box<MigrationError>),
    /// The other side may run the VM.
    #[error(
        "It is unknown whether the target runs the VM: it stays paused here; delete it if the target runs it, and resume it only if not"
    )]
    Unconfirmed(#[source] Box<MigrationError>),
}

impl MigrationError {
    /// True if the request is at fault; false if the host or the peer failed.
    pub fn is_of_request(&self) -> bool {
        matches!(
            self,
            Self::Url { .. }
                | Self::Keys(_)
                | Self::Request(_)
                | Self::PrivateRam(_)
                | Self::Device { .. }
        )
    }
}
