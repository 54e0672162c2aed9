//! The serial port, and the sources and sinks of a guest's text.
//!
//! ```text
//!  vCPU ─ Uart ─┐            ┌─ Output ──► terminal, file, pty, socket client
//!               ├─ Endpoint ─┤    ▲ backlog, when the reader is slow
//!  console's  ──┘            └─ Input ◄── terminal, pty, socket client
//!  worker                         │ bytes that do not fit wait here
//!                          serial-manager thread (epoll)
//! ```
//!
//! Neither direction ever blocks a vCPU or the console's worker. Output that the other side does not accept is kept up
//! to a limit; beyond it the oldest bytes are dropped and counted. Input that the guest does not accept stays with its
//! source.

mod endpoint;
mod input;
mod manager;
mod output;
mod poll;
mod pty;
mod socket;
mod streams;
mod terminal;
mod uart;

use std::io;
use std::path::PathBuf;

pub use endpoint::{Endpoint, EndpointMode};
pub use input::InputSink;
pub use manager::SerialManager;
pub use output::{OUTPUT_BACKLOG_BYTES_MAX, Output};
pub use terminal::restore_terminal;
pub use uart::{Uart, UartState};

/// First port and number of ports of COM1.
pub const SERIAL_PORTS: (u16, u16) = (0x3f8, 8);
/// Its interrupt.
pub const SERIAL_IRQ: u8 = 4;

/// Errors of opening or using an endpoint.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// A mode that needs a path has none.
    #[error("Console mode {mode} needs a path")]
    MissingPath {
        /// The mode's name in the API.
        mode: &'static str,
    },
    /// The file cannot be created or written.
    #[error("Cannot open console file {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The socket cannot be created, often because the path exists.
    #[error("Cannot listen on console socket {}", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A pseudo-terminal cannot be created.
    #[error("Cannot open a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// Standard input or output cannot be used.
    #[error("Cannot use the terminal")]
    Terminal(#[source] io::Error),
    /// The thread that serves consoles cannot start or watch.
    #[error("Cannot watch a console")]
    Manager(#[source] io::Error),
}
