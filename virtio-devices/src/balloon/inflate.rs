//! The inflate and deflate queues: lists of 32-bit page frame numbers (virtio 1.2 §5.5.6.1).

use vm_memory::GuestMemoryMmap;

use super::accounting::GuestFaults;
use super::chain;
use super::spec::{VIRTIO_BALLOON_PAGE_BYTES, VIRTIO_BALLOON_PFN_SHIFT};
use crate::queue::Chain;
use crate::reclaim::{Extent, GuestRange};
use crate::worker::Turn;

const PFN_BYTES: usize = 4;

/// Page frame numbers looked at in one chain. Linux sends 256; sixteen times
/// that is room for others, and bounds a batch to 16 MiB of guest memory a chain.
const CHAIN_PFNS_MAX: usize = 4096;

/// Adds the pages named in a chain to `claims`, runs of adjacent ones as one.
pub(super) fn gather(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    bytes: &mut Vec<u8>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    chain::read(chain, mem, CHAIN_PFNS_MAX * PFN_BYTES, bytes, turn, faults);
    let pfns = bytes.chunks_exact(PFN_BYTES);
    if !pfns.remainder().is_empty() {
        faults.page_lists_ragged += 1;
    }
    for pfn in pfns {
        let pfn = u32::from_le_bytes(pfn.try_into().expect("chunks of four"));
        claim_page(u64::from(pfn) << VIRTIO_BALLOON_PFN_SHIFT, claims);
    }
}

/// Linux takes pages from its free lists in whatever order they lie there, but
/// often a block at a time, ascending.
fn claim_page(start: u64, claims: &mut Vec<GuestRange>) {
    match claims.last_mut() {
        Some(last) if last.start + last.bytes == start => last.bytes += VIRTIO_BALLOON_PAGE_BYTES,
        _ => claims.push(GuestRange {
            start,
            bytes: VIRTIO_BALLOON_PAGE_BYTES,
        }),
    }
}

/// Counts the pages a deflate chain names, by its length alone: nothing needs
/// to be done to them, so nothing needs to be known of them.
pub(super) fn count_deflated(
    chain: Chain<'_>,
    deflated: &mut Extent,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    let mut pages = 0_u64;
    chain::each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            faults.descriptors_wrong_direction += 1;
        } else {
            pages += u64::from(descriptor.len()) / PFN_BYTES as u64;
        }
    });
    if pages > CHAIN_PFNS_MAX as u64 {
        faults.chains_too_long += 1;
        pages = CHAIN_PFNS_MAX as u64;
    }
    deflated.add(pages * VIRTIO_BALLOON_PAGE_BYTES);
}
