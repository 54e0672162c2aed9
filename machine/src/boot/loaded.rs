//! The result of loading, for the code that describes the machine to the payload.

use std::ops::Range;

use linux_loader::bootparam::setup_header;

use super::EntryPoint;
use crate::memory::E820Entry;

/// A kernel or firmware in guest RAM.
#[derive(Debug)]
pub(super) struct LoadedImage {
    pub(super) entry: EntryPoint,
    /// First address after the image.
    pub(super) end: u64,
    /// The initramfs must end at or before this.
    pub(super) initramfs_end_max: u64,
    /// The setup header of a bzImage, as in the file.
    pub(super) setup_header: Option<setup_header>,
}

/// Parameters that both protocols pass to the payload.
#[derive(Debug)]
pub(super) struct BootData {
    pub(super) e820: Vec<E820Entry>,
    pub(super) cmdline_address: u64,
    pub(super) rsdp_address: u64,
    pub(super) initramfs: Option<Range<u64>>,
}
