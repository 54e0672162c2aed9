//! The fleet: its members, the memory that each can reserve, and remote reservations.
//!
//! ```text
//! <prefix>/hosts/<host>/record   the host's lease   memory that the host can reserve, and its state
//! <prefix>/hosts/<host>/book     the host's lease   requests of remote clients, and the host's responses
//! <prefix>/hosts/<host>/drain    no lease           the host accepts no new VMs; set and removed by operators
//! <prefix>/vms/<host>            the host's lease   the VMs there, for advice
//! <prefix>/moves/order/<host>    no lease           all VMs leave the host; given and withdrawn by operators
//! <prefix>/moves/vm/<host>/<vm>  no lease           how far the move of a VM from that host is
//! ```
//!
//! A placer reads the record, book and drain mark of each host at one moment and chooses a host. It adds a line to that
//! host's book, on the condition that the record, book and drain mark are unchanged. The host's agent reads the line,
//! and decides again by its current data. It records the reservation like a local one, and writes its response into the
//! line. Only its acceptance is a reservation. No memory is reserved twice, for two reasons, each sufficient alone:
//!
//! - A line is added only if the picture on which the placer decided is unchanged. Requests that the record does not
//!   reflect yet are in the book, and placers count both. If two placers chose from the same picture, one of them fails
//!   and reads again.
//! - Only one thread of the host's agent accepts requests, based on the current ledger. An acceptance is on the host's
//!   disk before it is in the store.
//!
//! No memory stays reserved without a user. The record and the book end with the host's lease. The host releases a line
//! whose VM does not start within `admission.reservation`. A placer that gives up removes its line.

mod member;
mod moves;
mod picture;
mod placer;
mod records;

#[cfg(test)]
mod tests;

/// Whether these bytes are a record of any kind.
#[cfg(any(test, fuzzing))]
pub(crate) fn reads_record(value: &[u8]) -> bool {
    records::read::<HostRecord>("", value).is_ok()
        || records::read::<RemoteReservations>("", value).is_ok()
        || records::read::<VmsRecord>("", value).is_ok()
        || records::read::<DrainMark>("", value).is_ok()
        || records::read::<MoveRecord>("", value).is_ok()
        || records::read::<MoveOrder>("", value).is_ok()
}

pub use member::{
    HeldReservation, HostReport, Member, MemberCounts, MemberError, Round, StoreView,
};
pub use moves::{
    MoveOrder, MovePhase, MovePicture, MoveRecord, Needs, StoredMove, order_moves, remove_move,
    write_move,
};
pub use picture::{FleetHost, FleetPicture};
pub use placer::{PlaceError, PlaceRefusal, Placed, Placer, Wanted};
pub use records::{
    Answer, DrainMark, HostRecord, Keys, NameError, RecordError, RemoteReservation,
    RemoteReservations, VmsRecord,
};
