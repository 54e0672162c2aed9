//! Taking descriptor chains from a queue and answering them, with a bound on everything.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::accounting::GuestFaults;
use crate::device::WorkerError;

pub(super) type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap<()>>;

/// Descriptors looked at in one chain: the size of our largest queue, so that
/// only a chain through an indirect table, which is not on offer, can have more.
pub(super) const CHAIN_DESCRIPTORS_MAX: usize = 256;

/// A queue that cannot be used any more.
pub(super) fn unusable(index: u16, reason: &QueueError) -> WorkerError {
    WorkerError::Queue {
        index,
        reason: reason.to_string(),
    }
}

/// Chains available now. Working off this many and no more keeps one call
/// finite; a driver that adds others meanwhile rings the doorbell for them.
pub(super) fn available(
    queue: &Queue,
    index: u16,
    mem: &GuestMemoryMmap<()>,
) -> Result<u16, WorkerError> {
    let end = queue
        .avail_idx(mem, std::sync::atomic::Ordering::Acquire)
        .map_err(|e| unusable(index, &e))?;
    let count = end.0.wrapping_sub(queue.next_avail());
    if count > queue.size() {
        return Err(unusable(index, &QueueError::InvalidAvailRingIndex));
    }
    Ok(count)
}

/// The next available chain.
pub(super) fn take<'m>(
    queue: &mut Queue,
    index: u16,
    mem: &'m GuestMemoryMmap<()>,
) -> Result<Option<Chain<'m>>, WorkerError> {
    let mut chains = queue.iter(mem).map_err(|e| unusable(index, &e))?;
    Ok(chains.next())
}

/// Puts a chain into the used ring with length zero: the balloon never writes
/// into a guest's buffers.
///
/// For a report it would be tempting to answer with the length that was
/// discarded. But a device that writes "length" bytes into a reported page says
/// what they are, and one proposed feature (device-initialised pages) reads the
/// length as a promise of zeros. Without that feature nothing is promised.
pub(super) fn answer(
    queue: &mut Queue,
    index: u16,
    mem: &GuestMemoryMmap<()>,
    head: u16,
    faults: &mut GuestFaults,
) -> Result<(), WorkerError> {
    // Not left to the queue code, which writes a line to the log for each.
    if head >= queue.size() {
        faults.chains_without_head += 1;
        return Ok(());
    }
    queue
        .add_used(mem, head, 0)
        .map_err(|e| unusable(index, &e))
}

/// The descriptors of a chain that are not empty, up to the bound.
pub(super) fn each_descriptor(
    chain: Chain<'_>,
    faults: &mut GuestFaults,
    mut visit: impl FnMut(&Descriptor, &mut GuestFaults),
) {
    let mut last_has_next = None;
    for (position, descriptor) in chain.enumerate() {
        if position == CHAIN_DESCRIPTORS_MAX {
            faults.chains_too_long += 1;
            return;
        }
        last_has_next = Some(descriptor.has_next());
        if descriptor.len() == 0 {
            faults.descriptors_empty += 1;
        } else {
            visit(&descriptor, faults);
        }
    }
    match last_has_next {
        None => faults.chains_empty += 1,
        // There should be more, but the queue code will not go on.
        Some(true) => faults.chains_without_end += 1,
        Some(false) => {}
    }
}

/// A little-endian number in RAM.
pub(super) fn read_u32(mem: &GuestMemoryMmap<()>, at: GuestAddress) -> Option<u32> {
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
    faults: &mut GuestFaults,
) {
    out.clear();
    let mut cut = false;
    each_descriptor(chain, faults, |descriptor, faults| {
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
