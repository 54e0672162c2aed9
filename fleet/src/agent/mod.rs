//! The agent of one host: reads, plans, acts, and answers.
//!
//! ```text
//!   one thread a VM ──readings──►┐                      ┌──► orders to the VMs' threads
//!   pressure trigger ──────────► │  control thread:     │
//!   signals ───────────────────► │  inventory ─► plan ──┼──► what is shown (status, metrics, page)
//!   local socket: reserve, … ──► │  ─► executor, book   │
//!                                └──────────────────────┘
//! ```
//!
//! One thread owns everything that changes, so admission needs no lock and two requests can never sell the same memory. It
//! never waits for a VM, a client, a scrape or the store; only the reservations' file makes it wait for the disk.

mod answer;
mod control;
mod counts;
mod journal;
mod publish;
mod remote;
mod request;
mod round;
mod routes;
mod show;
mod signals;
mod status;
mod store_link;
mod vms;

#[cfg(any(test, feature = "test-utils"))]
pub mod fake_vmm;
#[cfg(test)]
mod fleet_tests;
#[cfg(test)]
mod tests;

pub use control::{Agent, AgentError, AgentHandle, AgentOptions};
pub use counts::{AdmissionCounts, DecisionCounts};
pub use journal::{JournalEntry, JournalPage};
pub use publish::{Published, Shown};
pub use request::{ConfirmRequest, PinRequest, ReleaseRequest, ReserveAnswer, ReserveRequest};
pub use routes::{LOCAL_NAMES, handle_page};
pub use status::{HostStatus, ReservationStatus, Status, StoreStatus, VmStatus};
