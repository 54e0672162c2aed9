//! A guest of one page of real mode code, for the tests with this host's `/dev/kvm`.
#![allow(unsafe_code)]
// UNSAFETY: memory slots point to memory that the guest keeps mapped.

use hypervisor::{Kvm, MemorySlot, Vcpu, Vm};

const CODE_ADDRESS: u64 = 0x1000;
const PAGE_BYTES: usize = 4096;

/// One page at `CODE_ADDRESS`.
#[repr(align(4096))]
pub(crate) struct Page([u8; PAGE_BYTES]);

impl Page {
    /// `code`, followed by `hlt` instructions.
    pub(crate) fn with(code: &[u8]) -> Box<Self> {
        let mut page = Box::new(Self([0xf4; PAGE_BYTES]));
        page.0[..code.len()].copy_from_slice(code);
        page
    }
}

/// A machine with one vCPU and one page, which stays mapped as long as the machine exists.
pub(crate) struct Guest {
    // Drop order: the machine before the memory it uses.
    pub(crate) vcpu: Vcpu,
    #[allow(dead_code, reason = "only one of the test programs rings eventfds")]
    pub(crate) vm: Vm,
    #[allow(dead_code, reason = "only one of the test programs moves it on")]
    pub(crate) page: Box<Page>,
}

/// A page of a file, mapped shared.
#[allow(dead_code, reason = "only one of the test programs has one")]
pub(crate) struct FilePage {
    pub(crate) file: std::fs::File,
    address: *mut libc::c_void,
}

#[allow(dead_code, reason = "only one of the test programs has one")]
impl FilePage {
    pub(crate) fn new() -> Self {
        // SAFETY: the name is a constant; the result is checked below and has no other owner.
        let fd = unsafe { libc::memfd_create(c"page".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "a memory file");
        // SAFETY: as above.
        let file = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping affects no other memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert!(address != libc::MAP_FAILED, "a mapping");
        Self { file, address }
    }

    /// Shows the page to the guest of `vm`. It must outlive the machine.
    pub(crate) fn attach(&self, vm: &Vm, guest_address: u64) {
        let slot = MemorySlot {
            slot: 1,
            guest_address,
            bytes: PAGE_BYTES as u64,
            host_address: self.address as u64,
            flags: 0,
        };
        // SAFETY: the mapping is never removed.
        unsafe { vm.set_memory_slot(slot) }.expect("a slot");
    }
}

/// This host's KVM. Without one the test is skipped.
pub(crate) fn kvm() -> Option<Kvm> {
    Kvm::open().map_err(test_skip::skip).ok()
}

impl Guest {
    /// Adds `page` and a vCPU in its reset state to `vm`.
    pub(crate) fn new(vm: Vm, mut page: Box<Page>) -> Self {
        let slot = MemorySlot {
            slot: 0,
            guest_address: CODE_ADDRESS,
            bytes: PAGE_BYTES as u64,
            host_address: page.0.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the page lives in the same structure as the machine and is dropped after it.
        unsafe { vm.set_memory_slot(slot) }.expect("a slot");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        Self { vcpu, vm, page }
    }

    /// Sets the vCPU to the start of the page, in real mode.
    pub(crate) fn start(&self) {
        let mut sregs = self.vcpu.sregs().expect("sregs");
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        self.vcpu.set_sregs(&sregs).expect("sregs");
        let mut regs = self.vcpu.regs().expect("regs");
        regs.rip = CODE_ADDRESS;
        regs.rflags = 2;
        self.vcpu.set_regs(&regs).expect("regs");
    }
}
