//! VMs in standby: each is a folder with a snapshot, a record and a lock.
//!
//! ```text
//! standby_dir/.lock              locked by the agent
//!             NAME/record.json   whether the VM is its process or this folder; replaced atomically
//!                  lock          locked by `ch-fleet wake`, and then by the VMM that it starts
//!                  snapshot/     written by the VMM, and owned by its user
//! ```
//! At each moment, a VM is either its process or its folder, and the record states which ([`Phase`]). The record is on
//! disk before the agent takes any step that depends on it. Names in the folder that begin with a dot are unfinished or
//! removed VMs.

mod error;
mod files;
mod images;
mod plain;
mod record;
#[cfg(test)]
mod tests;

pub use error::StandbyError;
pub use files::StandbyFolder;
pub(crate) use files::{clean, names, prepare, sync_snapshot};
pub use images::Image;
pub(crate) use images::images;
pub(crate) use record::check_name;
pub use record::{Phase, Record};
