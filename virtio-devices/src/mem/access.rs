//! Opens and closes blocks: guest and devices can access only plugged ones.

use std::io;

use crate::reclaim::GuestRange;

/// Opens and closes whole blocks for the guest and for its devices. Changes nothing about their content.
pub trait BlockAccess: Send + Sync + std::fmt::Debug {
    /// Opens or closes the blocks in `range`. Blocks that are already so stay so.
    ///
    /// # Errors
    /// The host refuses. Some of the blocks may have changed.
    fn set(&self, range: GuestRange, open: bool) -> io::Result<()>;

    /// Whether the guest can reach closed blocks through another process that has mapped its RAM.
    fn is_bypassed(&self) -> bool;

    /// Accesses of the guest's processors to closed blocks. They read all ones and write nothing.
    fn refused_accesses(&self) -> u64;
}
