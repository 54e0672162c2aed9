//! One virtual machine: memory slots, interrupt chip, event descriptors, clock.
#![allow(unsafe_code)]
// UNSAFETY: a memory slot gives the kernel an address range of this process; only the caller knows how long the range
// stays mapped.

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_QUIRK_SLOT_ZAP_ALL, KvmIrqRouting, kvm_clock_data, kvm_create_device,
    kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result, ioctl};
use crate::irq::{GsiRoute, IoAddress, MsiMessage};
use crate::vcpu::Vcpu;

/// A range of guest physical memory backed by memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Slot number, unique in the machine.
    pub slot: u32,
    /// Guest physical address, page aligned.
    pub guest_address: u64,
    /// Length in bytes, page aligned, not zero.
    pub bytes: u64,
    /// Address in this process, page aligned.
    pub host_address: u64,
    /// `KVM_MEM_LOG_DIRTY_PAGES`, `KVM_MEM_READONLY` or 0.
    pub flags: u32,
}

/// A virtual machine. Shared between threads behind an `Arc`; every method is
/// one system call and may be called from any thread.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
}

impl Vm {
    pub(crate) fn new(fd: VmFd) -> Self {
        Self { fd }
    }

    /// Adds a memory slot or changes its flags.
    ///
    /// # Safety
    /// `host_address..host_address + bytes` must be a readable and writable mapping of this process that holds only
    /// guest memory. It must stay mapped until the slot is removed or the machine and all its vCPUs are dropped: the
    /// guest reads and writes it at any time.
    ///
    /// # Errors
    /// `KVM_SET_USER_MEMORY_REGION` failed: overlapping or unaligned ranges.
    pub unsafe fn set_memory_slot(&self, slot: MemorySlot) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: slot.flags,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the caller guarantees that the range is guest memory and stays mapped.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Removes a memory slot. Guest accesses to it fault from then on.
    ///
    /// # Errors
    /// `KVM_SET_USER_MEMORY_REGION` failed: the slot does not exist.
    pub fn remove_memory_slot(&self, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: size zero deletes the slot; the kernel receives no memory.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))
    }

    /// The pages of a slot of `bytes` bytes that the guest or KVM has written since the last call, one bit each, the
    /// first in bit 0 of the first word. The slot must have `KVM_MEM_LOG_DIRTY_PAGES`.
    ///
    /// # Errors
    /// `KVM_GET_DIRTY_LOG` failed: there is no such slot, or it has no log.
    pub fn dirty_pages(&self, slot: u32, bytes: u64) -> Result<Vec<u64>> {
        let bytes = usize::try_from(bytes).expect("a slot is mapped in this process");
        self.fd
            .get_dirty_log(slot, bytes)
            .map_err(ioctl("KVM_GET_DIRTY_LOG"))
    }

    /// The number of memory slots that the machine can have (`KVM_CAP_NR_MEMSLOTS`); slots are numbered from 0.
    #[must_use]
    pub fn memory_slots_max(&self) -> u32 {
        // The documentation's value for kernels that do not answer.
        const WITHOUT_ANSWER: u32 = 32;
        let answer = self.fd.check_extension_int(Cap::NrMemslots);
        u32::try_from(answer).map_or(WITHOUT_ANSWER, |count| count.max(WITHOUT_ANSWER))
    }

    /// Makes the removal of a slot cost the guest only the mappings of that slot (Linux 6.12). By default, KVM drops
    /// the mappings of all slots, and the guest faults them in again. Returns whether KVM can do so.
    ///
    /// # Errors
    /// `KVM_ENABLE_CAP(KVM_CAP_DISABLE_QUIRKS2)` failed.
    pub fn keep_mappings_of_other_slots(&self) -> Result<bool> {
        let known = self.fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
        if known & KVM_X86_QUIRK_SLOT_ZAP_ALL.cast_signed() == 0 {
            return Ok(false);
        }
        self.enable_cap(
            KVM_CAP_DISABLE_QUIRKS2,
            u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL),
            "KVM_ENABLE_CAP(KVM_CAP_DISABLE_QUIRKS2)",
        )?;
        Ok(true)
    }

    /// Creates the object through which KVM learns which groups of VFIO belong to the machine.
    ///
    /// # Errors
    /// `KVM_CREATE_DEVICE` failed: the kernel has no VFIO.
    pub fn create_vfio_device(&self) -> Result<DeviceFd> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        self.fd
            .create_device(&mut device)
            .map_err(ioctl("KVM_CREATE_DEVICE(KVM_DEV_TYPE_VFIO)"))
    }

    /// Creates the local APICs in the kernel and leaves an I/O APIC with `pins` pins to user space. Must come before
    /// the first vCPU.
    ///
    /// # Errors
    /// `KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)` failed.
    pub fn enable_split_irqchip(&self, pins: u32) -> Result<()> {
        self.enable_cap(
            KVM_CAP_SPLIT_IRQCHIP,
            u64::from(pins),
            "KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)",
        )
    }

    /// Makes APIC ids above 254 addressable. Must come before the first vCPU.
    ///
    /// # Errors
    /// `KVM_ENABLE_CAP(KVM_CAP_X2APIC_API)` failed.
    pub fn enable_x2apic_api(&self) -> Result<()> {
        self.enable_cap(
            KVM_CAP_X2APIC_API,
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK),
            "KVM_ENABLE_CAP(KVM_CAP_X2APIC_API)",
        )
    }

    fn enable_cap(&self, cap: u32, argument: u64, operation: &'static str) -> Result<()> {
        let mut request = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        request.args[0] = argument;
        self.fd.enable_cap(&request).map_err(ioctl(operation))
    }

    /// Sets the address where KVM may keep three pages for real mode on Intel (below 4 GiB, not guest RAM).
    ///
    /// # Errors
    /// `KVM_SET_TSS_ADDR` failed.
    pub fn set_tss_address(&self, address: u32) -> Result<()> {
        self.fd
            .set_tss_address(address as usize)
            .map_err(ioctl("KVM_SET_TSS_ADDR"))
    }

    /// Sets the address where KVM may keep one page table for real mode on Intel (below 4 GiB, not guest RAM). Must
    /// come before the first vCPU.
    ///
    /// # Errors
    /// `KVM_SET_IDENTITY_MAP_ADDR` failed.
    pub fn set_identity_map_address(&self, address: u32) -> Result<()> {
        self.fd
            .set_identity_map_address(u64::from(address))
            .map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))
    }

    /// Makes a write to `event` raise `gsi`.
    ///
    /// # Errors
    /// `KVM_IRQFD` failed.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(ioctl("KVM_IRQFD"))
    }

    /// Undoes [`Vm::register_irqfd`]. Returns when no delivery is in flight.
    ///
    /// # Errors
    /// `KVM_IRQFD` failed.
    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(ioctl("KVM_IRQFD(deassign)"))
    }

    /// Replaces the whole interrupt routing table.
    ///
    /// # Errors
    /// [`Error::TooManyRoutes`], or `KVM_SET_GSI_ROUTING` failed.
    pub fn set_gsi_routing(&self, routes: &[GsiRoute]) -> Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = routes.iter().copied().map(Into::into).collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_too_many| Error::TooManyRoutes {
                count: routes.len(),
            })?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(ioctl("KVM_SET_GSI_ROUTING"))
    }

    /// Delivers one message signalled interrupt. `false` when the guest's APIC
    /// blocked it.
    ///
    /// # Errors
    /// `KVM_SIGNAL_MSI` failed.
    pub fn signal_msi(&self, msi: MsiMessage) -> Result<bool> {
        self.fd
            .signal_msi(msi.into())
            .map(|delivered| delivered > 0)
            .map_err(ioctl("KVM_SIGNAL_MSI"))
    }

    /// Makes guest writes to `address` signal `event` instead of causing an exit; with `datamatch` only 4-byte writes
    /// of that value.
    ///
    /// # Errors
    /// `KVM_IOEVENTFD` failed: the address is in use or there are too many.
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: IoAddress,
        datamatch: Option<u32>,
    ) -> Result<()> {
        match datamatch {
            Some(value) => self.fd.register_ioevent(event, &address.into(), value),
            None => self
                .fd
                .register_ioevent(event, &address.into(), NoDatamatch),
        }
        .map_err(ioctl("KVM_IOEVENTFD"))
    }

    /// Undoes [`Vm::register_ioeventfd`] with the same arguments.
    ///
    /// # Errors
    /// `KVM_IOEVENTFD` failed: it was not registered.
    pub fn unregister_ioeventfd(
        &self,
        event: &EventFd,
        address: IoAddress,
        datamatch: Option<u32>,
    ) -> Result<()> {
        match datamatch {
            Some(value) => self.fd.unregister_ioevent(event, &address.into(), value),
            None => self
                .fd
                .unregister_ioevent(event, &address.into(), NoDatamatch),
        }
        .map_err(ioctl("KVM_IOEVENTFD(deassign)"))
    }

    /// The current value of the guest's kvmclock.
    ///
    /// # Errors
    /// `KVM_GET_CLOCK` failed.
    pub fn clock(&self) -> Result<kvm_clock_data> {
        self.fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))
    }

    /// Sets the guest's kvmclock, which advances from this value.
    ///
    /// # Errors
    /// `KVM_SET_CLOCK` failed.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<()> {
        // No flags: with them KVM would add the real time that has passed since.
        let clock = kvm_clock_data {
            clock: clock.clock,
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))
    }

    /// Creates the vCPU with this APIC id.
    ///
    /// # Errors
    /// `KVM_CREATE_VCPU` failed.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        let xsave_bytes = self.fd.check_extension_int(Cap::Xsave2);
        self.fd
            .create_vcpu(u64::from(id))
            .map(|fd| Vcpu::new(fd, xsave_bytes.try_into().unwrap_or(0)))
            .map_err(ioctl("KVM_CREATE_VCPU"))
    }
}
