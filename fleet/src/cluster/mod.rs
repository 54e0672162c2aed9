//! Many hosts as one: who is there, what each can promise, and promises made from afar.
//!
//! ```text
//! <prefix>/hosts/<host>/record   the host's lease   what the host can promise, and in which state it is
//! <prefix>/hosts/<host>/book     the host's lease   promises asked for from afar, and the host's answers
//! <prefix>/hosts/<host>/drain    no lease           nothing new may go there; set and removed by people
//! <prefix>/vms/<host>            the host's lease   the VMs there, for advice
//! ```
//!
//! A placer reads record, book and drain mark of all hosts at one moment, chooses, and adds a line to the book of the host it
//! chose, on the condition that record, book and drain mark are still the ones it read. The host's agent sees the line, decides
//! again by what is true now, books the promise like one that was asked for at its socket, and writes its answer into the
//! line. Only its yes is a promise. So nothing is sold twice, for two reasons of which each is enough:
//!
//! - A line is added only to the very picture it was decided on. What the record has not taken into account yet is
//!   in the book, and both are counted. Of two placers that chose on the same picture one fails and reads again.
//! - One thread of the host's agent says yes, with the ledger of that moment, and a yes is on the host's disk before it is
//!   in the store.
//!
//! Nothing is kept for nobody: record and book go with the host's lease; a line that nobody turns into a VM is given
//! back by the host after `admission.reservation`; a placer that gives up takes its line out again, and one that died is
//! the case before.

mod member;
mod picture;
mod placer;
mod records;

#[cfg(test)]
mod tests;

pub use member::{HeldPromise, HostReport, Member, MemberCounts, MemberError, Round, StoreView};
pub use picture::{FleetHost, FleetPicture};
pub use placer::{PlaceError, PlaceRefusal, Placed, Placer, Wanted};
pub use records::{
    Answer, DrainMark, HostRecord, Keys, NameError, RecordError, RemoteReservation,
    RemoteReservations, VmsRecord,
};
