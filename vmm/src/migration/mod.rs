//! Live migration: moves a running VM to another process, over a UNIX socket or TCP.
//!
//! ```text
//!  source                                              target
//!  Hello, Config, State ───────────────────────────►   checks processor, devices, RAM; creates RAM,
//!                                                     and the machine without devices
//!                       ◄─────────────── Accepted
//!  PassBegin, Pages, Clear, PassEnd (the VM runs) ─►   writes RAM
//!  pauses, releases the locks of disks
//!  PassBegin, Pages, Clear, PassEnd, State ────────►   adds the devices, takes the locks of disks
//!                       ◄─────────────── Prepared
//!  Commit ─────────────────────────────────────────►   resumes
//!                       ◄────────────── Committed
//!  Released ───────────────────────────────────────►   the source ends
//! ```
//! With several connections, the source opens the others after Accepted, and the target answers Joined. Each pass then
//! begins with PassBegin on the first connection, and ends with PassEnd on all. The target starts a pass only after the
//! previous one is complete.
//!
//! If memory files are handed over, they follow the state, and there are no passes: both sides map the same pages. The
//! target does not write to them before the commit.
//!
//! If RAM is postponed, the source need not send the rest before the commit: it announces the pages by Absent before the
//! final state, and the target asks for them on the second connection ([`postponed`]), also while it adds the devices.
//! The source ends when the target has all of them.
//!
//! Until it sends Commit, the source owns the VM: after any failure it resumes, and the target, which has received no
//! Commit, drops its copy. After that, only the target may run the VM. A source without a response queries the outcome
//! on a new connection. Until the target knows that the source has its response, it answers such queries for a limited
//! time. A source that cannot learn the outcome stays paused, and reports that. The two machines never run at the same
//! time.
//!
//! Each side runs in a separate thread. It requests each step from the owner of the machine ([`SourceOwner`],
//! [`TargetOwner`]).

mod converge;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod limits;
mod movable;
mod pace;
mod peer;
mod postponed;
mod progress;
mod receive;
mod send;
#[cfg(test)]
mod tests;
mod tls;
mod together;
pub mod wire;

pub use converge::Brake;
pub use error::MigrationError;
pub use limits::Limits;
pub use movable::movable;
pub use peer::{Address, Cancel, Destination, Listener};
pub use progress::{SendProgress, SendReport};
pub use receive::{Incoming, TargetOwner};
pub use send::{Convergence, Outgoing, Ram, SourceEnd, SourceOwner};
pub use tls::{SourceTls, TargetTls, TlsError};
pub use wire::CONNECTIONS_MAX;
