//! Errors of starting and stopping an agent.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

use crate::agent_config::StoreFault;
use crate::cluster::NameError;
use crate::host::HostError;
use crate::http::ServerTlsError;
use crate::reservations::ReservationError;
use crate::sample::PatternError;
use crate::standby::StandbyError;

/// Reasons why the agent does not run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// A socket pattern is invalid.
    #[error("Cannot search for sockets")]
    Pattern(#[source] PatternError),
    /// The host cannot be read.
    #[error("Cannot read the state of the host")]
    Host(#[source] HostError),
    /// The reservations cannot be opened.
    #[error("Cannot open the reservations")]
    Book(#[source] ReservationError),
    /// The list of acts on VMs cannot be opened.
    #[error("Cannot open the list of actions on VMs")]
    Acts(#[source] io::Error),
    /// The VMs in standby cannot be found.
    #[error("Cannot read agent.standby_dir")]
    Standby(#[source] StandbyError),
    /// Another agent uses the folder.
    #[error("{} is used by another agent: stop it, or set another folder in [agent]", path.display())]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// A folder cannot be created.
    #[error("Cannot use {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The local socket cannot be created.
    #[error("Cannot listen at {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The token of the page cannot be read.
    #[error("{} contains no token for the page", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// TLS of the page cannot be set up.
    #[error("Cannot serve the page with TLS")]
    Tls(#[source] ServerTlsError),
    /// The page's address cannot be used.
    #[error("Cannot serve the page and the metrics at {address}")]
    Page {
        /// The address.
        address: SocketAddr,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The host's name in the fleet is invalid.
    #[error("The host cannot join the fleet under this name: set store.host")]
    Name(#[source] NameError),
    /// The settings of the store are invalid.
    #[error("Cannot use the store")]
    Store(#[source] StoreFault),
    /// A thread or a signal handler cannot be created.
    #[error("Cannot start the agent's threads")]
    Thread(#[source] io::Error),
}

/// Reasons why an agent did not end cleanly.
#[derive(Debug, Error)]
pub enum StopError {
    /// An internal error.
    #[error("the control loop panicked")]
    Panicked,
    /// VMs rejected `on_stop = "restore"` or did not respond.
    #[error("the memory of these VMs was not returned: {}", vms.join(", "))]
    NotRestored {
        /// The VMs.
        vms: Vec<String>,
    },
}
