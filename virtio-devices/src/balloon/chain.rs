//! What the chains of each queue name, and how chains are answered, with a bound on everything.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::accounting::GuestFaults;
use super::spec::{VIRTIO_BALLOON_PAGE_BYTES, VIRTIO_BALLOON_PFN_SHIFT};
use crate::device::WorkerError;
use crate::queue::{Chain, ChainEnd, ServedQueue, walk};
use crate::reclaim::{Extent, GuestRange};
use crate::worker::Turn;

/// Descriptors looked at in one chain: the size of our largest queue, so that
/// only a chain through an indirect table, which is not on offer, can have more.
const CHAIN_DESCRIPTORS_MAX: usize = 256;

const PFN_BYTES: usize = 4;

/// Page frame numbers looked at in one chain. Linux sends 256; sixteen times
/// that is room for others, and bounds a batch to 16 MiB of guest memory a chain.
const CHAIN_PFNS_MAX: usize = 4096;

/// A command of the hinting queue is a number.
const COMMAND_BYTES: usize = 4;

/// Reporting (virtio 1.2 §5.5.6.7): adds the ranges of a chain to `claims`. The guest has isolated
/// the pages and waits; nobody uses them until the chain is answered.
///
/// A buffer the device may only read cannot be one of the driver's free pages:
/// to discard it would be to write to it.
pub(super) fn reported(
    chain: Chain<'_>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            claims.push(GuestRange {
                start: descriptor.addr().0,
                bytes: u64::from(descriptor.len()),
            });
        } else {
            faults.descriptors_wrong_direction += 1;
        }
    });
}

/// Inflate (virtio 1.2 §5.5.6.1): adds the pages named in a chain to `claims`, runs of adjacent ones as one.
pub(super) fn inflated(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    bytes: &mut Vec<u8>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    read(chain, mem, CHAIN_PFNS_MAX * PFN_BYTES, bytes, turn, faults);
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

/// Deflate: counts the pages a chain names, by its length alone: nothing needs
/// to be done to them, so nothing needs to be known of them.
pub(super) fn deflated(
    chain: Chain<'_>,
    total: &mut Extent,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    let mut pages = 0_u64;
    each_descriptor(chain, turn, faults, |descriptor, faults| {
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
    total.add(pages * VIRTIO_BALLOON_PAGE_BYTES);
}

/// Hinting (virtio 1.2 §5.5.6.5): adds the blocks of a chain to `claims` and returns the command id in it, if there is one.
///
/// A chain is either; should one be both, the command counts first.
pub(super) fn hinted(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) -> Option<u32> {
    let mut command = None;
    each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            claims.push(GuestRange {
                start: descriptor.addr().0,
                bytes: u64::from(descriptor.len()),
            });
            return;
        }
        if descriptor.len() as usize != COMMAND_BYTES {
            faults.hint_commands_malformed += 1;
            return;
        }
        match read_u32(mem, descriptor.addr()) {
            Some(id) => command = Some(id),
            None => faults.descriptors_unreadable += 1,
        }
    });
    command
}

/// Puts chains into the used ring with length zero: the balloon never writes
/// into a guest's buffers.
///
/// For a report it would be tempting to answer with the length that was
/// discarded. But a device that writes "length" bytes into a reported page says
/// what they are, and one proposed feature (device-initialised pages) reads the
/// length as a promise of zeros. Without that feature nothing is promised.
pub(super) fn answer(
    queue: &mut ServedQueue,
    mem: &GuestMemoryMmap<()>,
    heads: &[u16],
    faults: &mut GuestFaults,
) -> Result<(), WorkerError> {
    let size = queue.size();
    faults.chains_without_head += heads.iter().filter(|head| **head >= size).count() as u64;
    queue.push_used_together(mem, heads.iter().map(|head| (*head, 0)))
}

/// The descriptors of a chain that are not empty, up to the bound.
fn each_descriptor(
    chain: Chain<'_>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
    mut visit: impl FnMut(&Descriptor, &mut GuestFaults),
) {
    let end = walk(chain, CHAIN_DESCRIPTORS_MAX, turn, |descriptor| {
        if descriptor.len() == 0 {
            faults.descriptors_empty += 1;
        } else {
            visit(descriptor, faults);
        }
        true
    });
    match end {
        Some(ChainEnd::Empty) => faults.chains_empty += 1,
        Some(ChainEnd::Broken) => faults.chains_without_end += 1,
        Some(ChainEnd::TooLong) => faults.chains_too_long += 1,
        Some(ChainEnd::Whole) | None => {}
    }
}

/// A little-endian number in RAM.
fn read_u32(mem: &GuestMemoryMmap<()>, at: GuestAddress) -> Option<u32> {
    let mut bytes = [0; 4];
    mem.read_slice(&mut bytes, at).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Copies what the driver has written into a chain, at most `bytes_max` of it.
/// Buffers that are not the driver's to write, or not in RAM, are left out.
pub(super) fn read(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    bytes_max: usize,
    out: &mut Vec<u8>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    out.clear();
    let mut cut = false;
    each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            faults.descriptors_wrong_direction += 1;
            return;
        }
        let filled = out.len();
        let wanted = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let take = wanted.min(bytes_max - filled);
        cut |= take < wanted;
        out.resize(filled + take, 0);
        if mem
            .read_slice(&mut out[filled..], descriptor.addr())
            .is_err()
        {
            out.truncate(filled);
            faults.descriptors_unreadable += 1;
        }
    });
    if cut {
        faults.chains_too_long += 1;
    }
}
