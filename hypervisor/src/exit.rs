//! Exit reasons of a vCPU, reduced to those of an x86-64 VMM.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

/// What `KVM_EXIT_SYSTEM_EVENT` announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// The guest wants to be powered off.
    Shutdown,
    /// The guest wants to be reset.
    Reset,
    /// The guest says that it crashed.
    Crash,
    /// A kind that x86-64 does not have today.
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
/// Data of reads is filled in by the caller before the next run. A string
/// instruction (`rep insb`) is one exit with several elements of `size` bytes,
/// each of which is an access of its own.
#[derive(Debug, PartialEq, Eq)]
pub enum VmExit<'a> {
    /// The guest reads from a port.
    IoIn {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// To be filled in: a whole number of accesses.
        data: &'a mut [u8],
    },
    /// The guest writes to a port.
    IoOut {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// What it writes: a whole number of accesses.
        data: &'a [u8],
    },
    /// The guest reads where no memory is.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// To be filled in, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// The guest writes where no memory is.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What it writes, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A vector that came from a level-triggered I/O APIC pin was acknowledged.
    IoapicEoi(u8),
    /// Triple fault.
    Shutdown,
    /// The guest or KVM asks for a change of the whole machine.
    SystemEvent(SystemEvent),
    /// `hlt`; only seen while no local APIC is in the kernel.
    Hlt,
    /// A signal or `immediate_exit` ended the run; nothing happened in the guest.
    Interrupted,
    /// KVM cannot go on emulating.
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
    /// An exit reason nobody asked for.
    Unknown(u32),
}
