//! Exit reasons of a vCPU, reduced to those of an x86-64 VMM.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

/// The event that `KVM_EXIT_SYSTEM_EVENT` announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// The guest requests power-off.
    Shutdown,
    /// The guest requests a reset.
    Reset,
    /// The guest reports that it crashed.
    Crash,
    /// An event type that x86-64 does not use today.
    Other(u32),
}

impl From<u32> for SystemEvent {
    fn from(kind: u32) -> Self {
        match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => Self::Shutdown,
            KVM_SYSTEM_EVENT_RESET => Self::Reset,
            KVM_SYSTEM_EVENT_CRASH => Self::Crash,
            other => Self::Other(other),
        }
    }
}

/// Why [`crate::Vcpu::run`] returned.
///
/// The caller fills in the data of reads before the next run. A string instruction (`rep insb`) is one exit with
/// several elements of `size` bytes; each element is a separate access.
#[derive(Debug, PartialEq, Eq)]
pub enum VmExit<'a> {
    /// The guest reads from a port.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// Filled in by the caller: a whole number of accesses.
        data: &'a mut [u8],
    },
    /// The guest writes to a port.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// The data written: a whole number of accesses.
        data: &'a [u8],
    },
    /// The guest reads from an address without memory.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// Filled in by the caller, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes to an address without memory.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// The data written, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest acknowledged a vector that came from a level-triggered I/O APIC pin.
    IoapicEoi(u8),
    /// The guest used Hyper-V's interface ([`crate::Vcpu::enable_hyperv_synic`]): it wrote a register that KVM has
    /// handled, or made an unknown hypercall, which its result states.
    Hyperv,
    /// Triple fault.
    Shutdown,
    /// The guest or KVM requests a change of the whole machine.
    SystemEvent(SystemEvent),
    /// `hlt`; occurs only without an in-kernel local APIC.
    Hlt,
    /// A signal or `immediate_exit` ended the run; nothing happened in the guest.
    Interrupted,
    /// KVM cannot continue emulation.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`: 1 emulation, 2 simultaneous exceptions, 3 delivery, 4 unexpected exit.
        suberror: u32,
    },
    /// The processor refused the vCPU's state.
    FailEntry {
        /// Hardware's reason.
        reason: u64,
    },
    /// The guest touched memory that KVM could not provide.
    MemoryFault {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        bytes: u64,
    },
    /// The host cannot provide memory that the guest touched. The guest has not moved: the next run tries again.
    MemoryUnavailable,
    /// An exit reason this crate does not know.
    Unknown(u32),
}
