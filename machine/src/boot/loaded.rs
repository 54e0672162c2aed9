//! What loading leaves behind for those who tell the payload about the machine.

use std::ops::Range;

use linux_loader::bootparam::setup_header;

use super::EntryPoint;
use crate::memory::E820Entry;

/// A kernel or firmware in guest RAM.
#[derive(Debug)]
pub(super) struct LoadedImage {
    pub(super) entry: EntryPoint,
    /// First address it does not use.
    pub(super) end: u64,
    /// The initramfs must end at or before this.
    pub(super) initramfs_end_max: u64,
    /// Of a bzImage, as it is in the file.
    pub(super) setup_header: Option<setup_header>,
}

/// What both protocols tell the payload.
#[derive(Debug)]
pub(super) struct BootData {
    pub(super) e820: Vec<E820Entry>,
    pub(super) cmdline_address: u64,
    pub(super) rsdp_address: u64,
    pub(super) initramfs: Option<Range<u64>>,
}
