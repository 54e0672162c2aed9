//! Binds the pages of a mapping to one NUMA node of the host.
#![allow(unsafe_code)]
// UNSAFETY: `mbind` has no safe wrapper among our dependencies.

use std::io;

use vm_memory::MmapRegion;

/// Highest node an x86-64 kernel can be built for (`MAX_NUMNODES` of 1024, arch/x86/Kconfig).
pub const HOST_NUMA_NODE_MAX: u32 = 1023;

const WORD_BITS: usize = u64::BITS as usize;
const MASK_WORDS: usize = (HOST_NUMA_NODE_MAX as usize + 1) / WORD_BITS;

/// Makes the kernel allocate every page of `region` on `node` and on no other. Existing pages stay where they are.
///
/// # Errors
/// The host has no such node, or the file behind the mapping does not support memory policies.
pub(super) fn bind(region: &MmapRegion<()>, node: u32) -> io::Result<()> {
    let node = usize::try_from(node).unwrap_or(usize::MAX);
    let mut mask = [0_u64; MASK_WORDS];
    let word = mask
        .get_mut(node / WORD_BITS)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    *word |= 1 << (node % WORD_BITS);
    // SAFETY: the range is one mapping, alive through the borrow, and none of its content changes. The mask has as many
    // bits as the call's argument, minus the one that the call ignores.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            mask.as_ptr(),
            MASK_WORDS * WORD_BITS + 1,
            0,
        )
    };
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
