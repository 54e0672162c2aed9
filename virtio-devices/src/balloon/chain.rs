//! Reads the chains of each queue into claims and completes them, with a bound on every input.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::accounting::GuestFaults;
use super::spec::{VIRTIO_BALLOON_PAGE_BYTES, VIRTIO_BALLOON_PFN_SHIFT};
use crate::device::WorkerError;
use crate::queue::{Chain, ChainEnd, ServedQueue, walk};
use crate::reclaim::{Extent, GuestRange};
use crate::worker::Turn;

/// Maximum number of descriptors read in one chain: the size of our largest queue. Only a chain through an indirect
/// table, which is not offered, can have more.
const CHAIN_DESCRIPTORS_MAX: usize = 256;

const PFN_BYTES: usize = 4;

/// Maximum number of page frame numbers read in one chain. Linux sends 256. Sixteen times that leaves headroom for
/// other drivers, and limits a chain to 16 MiB of guest memory.
const CHAIN_PFNS_MAX: usize = 4096;

/// A command of the hinting queue is one number.
const COMMAND_BYTES: usize = 4;

/// Reporting (virtio 1.2 §5.5.6.7): adds the ranges of a chain to `claims`. The guest has isolated the pages and does
/// not use them until the chain is completed.
///
/// A buffer that is read-only for the device cannot be one of the driver's free pages: discarding it would write to it.
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

/// Inflate (virtio 1.2 §5.5.6.1): adds the pages named in a chain to `claims`, merging runs of adjacent ones.
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

/// Linux takes pages from its free lists in any order, but often as ascending blocks.
fn claim_page(start: u64, claims: &mut Vec<GuestRange>) {
    match claims.last_mut() {
        Some(last) if last.start + last.bytes == start => last.bytes += VIRTIO_BALLOON_PAGE_BYTES,
        _ => claims.push(GuestRange {
            start,
            bytes: VIRTIO_BALLOON_PAGE_BYTES,
        }),
    }
}

/// Deflate: counts the pages in a chain by its length. The device does nothing with them, so it need not read their
/// numbers.
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

/// Hinting (virtio 1.2 §5.5.6.5): adds the blocks of a chain to `claims` and returns the command id in it, if any.
///
/// A chain should hold only one of the two; if it holds both, the command is processed first.
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

/// Puts chains into the used ring with length zero: the balloon never writes into a guest's buffers.
///
/// The discarded length might seem natural for a report. But a device that writes "length" bytes into a reported page
/// defines their content. Only a driver with `VIRTIO_BALLOON_F_DEVICE_INIT_REPORTED` gets such a guarantee
/// ([`answer_with`]).
pub(super) fn answer(
    queue: &mut ServedQueue,
    mem: &GuestMemoryMmap<()>,
    heads: &[u16],
    faults: &mut GuestFaults,
) -> Result<(), WorkerError> {
    answer_with(queue, mem, heads, &[], faults)
}

/// As [`answer`], with these lengths; a missing one is zero.
pub(super) fn answer_with(
    queue: &mut ServedQueue,
    mem: &GuestMemoryMmap<()>,
    heads: &[u16],
    lengths: &[u32],
    faults: &mut GuestFaults,
) -> Result<(), WorkerError> {
    let size = queue.size();
    faults.chains_without_head += heads.iter().filter(|head| **head >= size).count() as u64;
    let lengths = lengths.iter().copied().chain(std::iter::repeat(0));
    queue.push_used_together(mem, heads.iter().copied().zip(lengths))
}

/// The non-empty descriptors of a chain, up to the limit.
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

/// Copies the driver's data from a chain, at most `bytes_max` of it. Buffers of the wrong direction or outside of RAM
/// are skipped.
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
