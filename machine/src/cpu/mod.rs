//! vCPUs: their processor model, initial state and threads.
//!
//! ```text
//!   CpusConfig ─► Vcpus::new ─► configure(EntryPoint) ─► start ⇄ pause/resume ─► stop
//!                                                          │
//!      thread vcpuN:  gate ─► KVM_RUN ─► VmExitHandler (buses)
//!                      │                └► GuestEvent (reset, shutdown, failure)
//!                      └ parked while paused; ends on stop, and after the guest has ejected the vCPU
//! ```

mod brake;
mod clock;
mod core_scheduling;
mod counters;
mod cpuid;
mod exception_path;
mod gate;
mod host;
mod hotplug;
mod hyperv;
mod registers;
mod run;
mod stall;
mod state;
mod thread_number;
mod topology;
mod vcpus;

use std::io;

pub use brake::VcpuBrake;
pub use counters::{ExitCounters, ExitCounts};
pub use cpuid::guest_phys_bits;
pub use exception_path::ExceptionPath;
pub(crate) use host::HostCpu;
pub use hotplug::{CPU_HOTPLUG_BYTES, CpuHotplug, CpuHotplugState};
pub use run::VcpusContext;
pub use stall::STALL_CHECK_INTERVAL;
pub use state::{IndexedVcpuState, VcpusState};
pub use topology::Topology;
pub use vcpus::Vcpus;

/// The target of the guest's accesses outside of RAM. Implemented by the buses.
///
/// Called on vCPU threads, several at once. It must not block and must fill `data` on every read: an unclaimed address
/// reads as all ones. `data` is one access of 1 to 8 bytes.
pub trait VmExitHandler: Send + Sync {
    /// `in` from a port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `out` to a port.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// Load from guest physical memory that is not RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Store to guest physical memory that is not RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// The guest acknowledged a level-triggered interrupt of the I/O APIC.
    fn ioapic_eoi(&self, vector: u8);
    /// After a triple fault, or if KVM cannot emulate an instruction: whether the host cannot provide RAM, in particular
    /// that of `path`. The handler has then notified the machine's owner.
    fn lacks_ram(&self, path: &ExceptionPath) -> bool;
}

/// Events inside the guest that end or pause a machine. A vCPU reports one and then parks: until the next pause or
/// [`Vcpus::stop`] if it lacks memory, until [`Vcpus::stop`] otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestEvent {
    /// Triple fault, or KVM's own reset event.
    Reset,
    /// KVM's own shutdown event.
    Shutdown,
    /// The vCPU cannot continue because of an error in KVM or the VMM. Logged.
    Failed,
    /// The host cannot provide memory that the vCPU touched.
    MemoryUnavailable {
        /// The vCPU.
        vcpu: u32,
    },
}

/// Errors of creating and controlling vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The state of vCPUs that are not paused was requested.
    #[error("vCPUs can be saved only while they are paused")]
    NotPaused,
    /// No vCPU, more at boot than the maximum, or more than KVM supports.
    #[error(
        "cpus.boot must be between 1 and cpus.max, and cpus.max at most {limit}; got boot={boot} and max={max}"
    )]
    VcpuCount {
        /// vCPUs at boot.
        boot: u32,
        /// The maximum number of vCPUs.
        max: u32,
        /// KVM's limit.
        limit: usize,
    },
    /// The topology contains a zero or does not match the number of vCPUs.
    #[error("topology has {product} vCPUs, but the maximum number of vCPUs is {max}")]
    Topology {
        /// Threads × cores × dies × packages.
        product: u64,
        /// The maximum number of vCPUs.
        max: u32,
    },
    /// The topology needs APIC ids that this host does not support.
    #[error("APIC id {apic_id} is above the limit {limit} of this host")]
    ApicId {
        /// The highest id needed.
        apic_id: u32,
        /// The highest id supported.
        limit: u32,
    },
    /// A setting that the host's processor or kernel does not support.
    #[error("This host has no support for {what}")]
    NotSupported {
        /// The setting.
        what: &'static str,
    },
    /// Linux permits AMX only to a process that has had no vCPU.
    #[error("This process has had a VM without features=amx; a VM with it needs a new process")]
    AmxTooLate,
    /// An affinity for a vCPU that does not exist, or with an invalid host CPU.
    #[error(
        "Cannot pin vCPU {vcpu} to host CPU {}",
        host_cpu.map_or_else(|| "none".to_owned(), |cpu| cpu.to_string())
    )]
    AffinityRange {
        /// The vCPU.
        vcpu: u32,
        /// The host CPU; an empty list is invalid, too.
        host_cpu: Option<usize>,
    },
    /// The host refused an affinity.
    #[error("Cannot set the affinity of vCPU {vcpu}")]
    Affinity {
        vcpu: u32,
        #[source]
        source: io::Error,
    },
    /// The kernel does not support cookies for vCPUs.
    #[error("core_scheduling=vcpu is not supported by this host")]
    CoreScheduling(#[source] io::Error),
    /// More CPUID leaves than KVM accepts.
    #[error("The guest's CPUID has {count} leaves, more than KVM accepts")]
    CpuidLeaves {
        /// The number of leaves.
        count: usize,
    },
    /// KVM rejected an operation on the whole machine.
    #[error("Cannot prepare KVM for vCPUs")]
    Prepare(#[source] hypervisor::Error),
    /// KVM rejected an operation on one vCPU.
    #[error("Cannot {what} vCPU {vcpu}")]
    Vcpu {
        vcpu: u32,
        /// The operation: "create", "set up", "pause".
        what: &'static str,
        #[source]
        source: hypervisor::Error,
    },
    /// The thread of a vCPU cannot be started.
    #[error("Cannot start the thread of vCPU {vcpu}")]
    Thread {
        vcpu: u32,
        #[source]
        source: io::Error,
    },
    /// vCPUs are stuck in the VMM: a device handler does not return.
    #[error("{stuck} vCPUs did not stop within {deadline_ms} ms")]
    Stuck {
        /// The number of vCPUs.
        stuck: usize,
        /// The time waited.
        deadline_ms: u128,
    },
}

impl CpuError {
    /// Whether the configuration requires a feature that this host does not have.
    pub fn is_of_configuration(&self) -> bool {
        matches!(
            self,
            Self::VcpuCount { .. }
                | Self::Topology { .. }
                | Self::ApicId { .. }
                | Self::NotSupported { .. }
                | Self::AmxTooLate
                | Self::AffinityRange { .. }
                | Self::Affinity { .. }
                | Self::CoreScheduling(_)
        )
    }
}
