//! VMs in standby: each is a folder with a snapshot, a record and a lock.
//!
//! ```text
//! standby_dir/NAME/record.json   who the VM is: its process or this folder; replaced atomically
//!                  lock          locked by `ch-fleet wake`, and then by the VMM that it starts
//!                  snapshot/     written by the VMM, and owned by its user
//! ```
//! A VM is at each moment either its process or its folder, and the record says which ([`Phase`]). The record is on disk
//! before anything that depends on it is done. Names in the folder that begin with a dot are unfinished or removed VMs.

mod error;
mod files;
mod record;
#[cfg(test)]
mod tests;

pub use error::StandbyError;
pub use files::StandbyFolder;
pub(crate) use files::{clean, names, sync_snapshot};
pub(crate) use record::check_name;
pub use record::{Phase, Record};
