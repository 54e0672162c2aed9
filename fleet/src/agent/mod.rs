//! The agent of one host: samples, plans, acts, and serves requests.
//!
//! ```text
//!   one thread per VM ─readings─►┐                           ┌──► orders to the VMs' threads
//!   pressure trigger ──────────► │  ControlLoop (one thread) │
//!   signals ───────────────────► │   HostWatch   the host    │
//!   local socket: reserve, … ──► │   VmRounds    VMs, plans  │
//!   store: requests, moves ────► │   Promises    the book    │
//!                                │   Standbys    on disk     │
//!                                │   Publisher ──────────────┼──► status, metrics, page
//!                                └───────────────────────────┘
//! ```
//!
//! One thread owns everything that changes, so admission needs no lock, and two requests can never reserve the same
//! memory. It never waits for a VM, a client, a scrape or the store; it waits for the disk only when it saves
//! reservations. Each part has its own type and sees only the data that it receives. The rounds know only the sum of
//! the reservations. The reservations query the rounds for the current state. The publisher reads all parts and changes
//! none.

mod acts;
mod clock;
mod control;
mod counts;
mod error;
mod event;
mod host_watch;
mod journal;
mod launch;
mod lessons;
mod locks;
mod membership;
mod move_thread;
mod page_guard;
mod promises;
mod published;
mod publisher;
mod request;
mod rounds;
mod routes;
mod signals;
mod standby;
mod status;
mod store_link;
mod vms;

#[cfg(any(test, feature = "test-utils"))]
pub mod fake_vmm;
#[cfg(any(test, feature = "test-utils"))]
pub mod no_harm;
#[cfg(test)]
mod tests;

pub use counts::{AdmissionCounts, DecisionCounts};
pub use error::{AgentError, StopError};
pub use journal::{JournalEntry, JournalPage};
pub use launch::{Agent, AgentOptions};
pub use published::{Published, Snapshot};
pub use request::{
    ConfirmRequest, DiscardRequest, PinRequest, ReleaseRequest, ReserveAnswer, ReserveRequest,
    StandbyRequest, WakeAnswer, WakeRequest, WokenRequest,
};
pub use routes::{LOCAL_NAMES, handle_page};
pub use status::{
    HostStatus, MoveStatus, PoolStatus, PublishedState, ReservationStatus, StandbyStatus, Status,
    StoreStatus, VmStatus,
};
