//! One page of guest memory for the probe.
#![allow(unsafe_code)]
// UNSAFETY: KVM receives an address that it reads and writes directly.

use anyhow::{Context as _, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

const PAGE_BYTES: usize = 4096;
/// Below 64 KiB, where code can run in real mode.
const ADDRESS: u64 = 0x1000;

/// A page that belongs to KVM until the process ends: it is leaked deliberately, because a hanging guest may still use
/// it.
#[derive(Debug)]
pub(crate) struct GuestPage;

impl GuestPage {
    /// Gives `vm` a page that starts with `code`.
    pub(crate) fn new(vm: &VmFd, code: &[u8]) -> Result<Self> {
        if code.len() > PAGE_BYTES {
            bail!("the code does not fit into a page");
        }
        #[repr(align(4096))]
        struct Page([u8; PAGE_BYTES]);
        let page = Box::leak(Box::new(Page([0; PAGE_BYTES])));
        page.0[..code.len()].copy_from_slice(code);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: ADDRESS,
            memory_size: PAGE_BYTES as u64,
            userspace_addr: page.0.as_ptr() as u64,
        };
        // SAFETY: the page is aligned, has the given size, is never freed, and no reference to it is kept here.
        unsafe { vm.set_user_memory_region(region) }.context("giving the VM memory")?;
        Ok(Self)
    }

    /// The page's address in the guest.
    pub(crate) fn address(&self) -> u64 {
        ADDRESS
    }
}
