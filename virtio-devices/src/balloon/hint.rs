//! The hinting queue: command ids and free blocks, one after another (virtio 1.2 §5.5.6.5).
//!
//! # When a hinted block may be discarded
//!
//! Reporting isolates pages until the device answers. Hinting does not: the
//! standard lets the driver use a hinted block again whenever it likes, answered
//! or not, and what it writes then must stay. A device that discards a block
//! some time after it was hinted may throw such a write away.
//!
//! Linux (drivers/virtio/virtio_balloon.c, the same order since 4.20) does in
//! `get_free_page_and_send`, for one block at a time:
//!
//! ```text
//!   page = alloc_pages(…)            nobody else has the block
//!   virtqueue_add_inbuf(vq, page)    the device can see it
//!   virtqueue_kick(vq)               ◄── rings our doorbell
//!   balloon_page_push(&vb->free_page_list, page)
//!                                    from here on the shrinker
//!                                    (`virtio_balloon_shrinker_scan`), or DONE
//!                                    (`return_free_pages_to_mm`), may free it
//! ```
//!
//! The shrinker takes the block that was pushed last, and it looks at no used
//! ring, so neither an unanswered chain nor a run still under way protects a
//! block. What does is the kick: while the vCPU that rang has not come back from
//! it, the block is allocated and on no list. Hence the rule:
//!
//! * the doorbell of this queue holds the vCPU that rings it
//!   ([`crate::VirtioDevice::holds_notifier`]), and KVM does not ring it alone;
//! * only then, and of the chains available only the *last* one is discarded: the
//!   kicks of those before it are over. The driver's work item is one thread and no
//!   feature that suppresses kicks is on offer, so there are none as a rule;
//! * everything found in another way, after a pause for example, is answered and
//!   counted as `hint_not_held`;
//! * the run must be acknowledged and not stopped, else it is `hint_stale`.
//!
//! When the guest has sent all it has it ends the run with the id STOP, and is
//! told DONE, upon which it takes its blocks back: they are ordinary free memory
//! again, without host memory behind them.

use vm_memory::GuestMemoryMmap;

use super::accounting::GuestFaults;
use super::chain;
use crate::queue::Chain;
use crate::reclaim::GuestRange;
use crate::worker::Turn;

const COMMAND_BYTES: usize = 4;

/// Adds the blocks of a chain to `claims` and returns the command id in it, if there is one.
///
/// A chain is either; should one be both, the command counts first.
pub(super) fn gather(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) -> Option<u32> {
    let mut command = None;
    chain::each_descriptor(chain, turn, faults, |descriptor, faults| {
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
        match chain::read_u32(mem, descriptor.addr()) {
            Some(id) => command = Some(id),
            None => faults.descriptors_unreadable += 1,
        }
    });
    command
}
