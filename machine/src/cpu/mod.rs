//! vCPUs: what processor the guest sees, how it starts, and the threads that run it.
//!
//! ```text
//!   CpusConfig ─► Vcpus::new ─► configure(EntryPoint) ─► start ⇄ pause/resume ─► stop
//!                                                          │
//!      thread vcpuN:  gate ─► KVM_RUN ─► VmExitHandler (buses)
//!                      │                └► GuestEvent (reset, shutdown, failure)
//!                      └ parked while paused; left for good on stop
//! ```

mod core_scheduling;
mod counters;
mod cpuid;
mod gate;
mod registers;
mod run;
mod state;
mod topology;
mod vcpus;

use std::io;

pub use counters::{ExitCounters, ExitCounts};
pub use cpuid::guest_phys_bits;
pub use run::VcpusContext;
pub use state::{IndexedVcpuState, VcpusState};
pub use topology::Topology;
pub use vcpus::Vcpus;

/// What the guest's accesses outside of RAM reach. Implemented by the buses.
///
/// Called on vCPU threads, several at once. Must not block, and must fill
/// `data` of every read: what nobody claims reads as all ones. `data` is one
/// access of 1 to 8 bytes.
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
}

/// What ends a machine from inside. Told at most once by each vCPU, which then
/// stands still until [`Vcpus::stop`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestEvent {
    /// Triple fault, or KVM's own reset event.
    Reset,
    /// KVM's own shutdown event.
    Shutdown,
    /// The vCPU cannot go on: KVM gave up on it, or the VMM did. Logged.
    Failed,
}

/// Why vCPUs cannot be made or steered.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Only vCPUs that stand still have a state.
    #[error("vCPUs can be saved only while they are paused")]
    NotPaused,
    /// No vCPU, fewer than none to spare, or more than KVM can run.
    #[error(
        "{boot} vCPUs at boot and {max} at most: boot must be at least 1 and at most max, max at most {limit}"
    )]
    VcpuCount {
        /// vCPUs at boot.
        boot: u32,
        /// vCPUs at most.
        max: u32,
        /// What KVM allows.
        limit: usize,
    },
    /// The topology has a zero in it or is not as large as the machine.
    #[error("A topology of {product} vCPUs does not fit a machine of at most {max}")]
    Topology {
        /// Threads × cores × dies × packages.
        product: u64,
        /// vCPUs at most.
        max: u32,
    },
    /// The topology needs APIC ids that this host cannot give.
    #[error("APIC id {apic_id} is above the limit {limit} of this host")]
    ApicId {
        /// The highest id needed.
        apic_id: u32,
        /// The highest there is.
        limit: u32,
    },
    /// Something this version does not do.
    #[error("vCPUs with {what} are not supported")]
    NotSupported {
        /// The setting.
        what: &'static str,
    },
    /// An affinity for a vCPU that is not there or a host CPU that cannot be.
    #[error(
        "Affinity of vCPU {vcpu} to host CPU {} is not possible",
        host_cpu.map_or_else(|| "none".to_owned(), |cpu| cpu.to_string())
    )]
    AffinityRange {
        /// The vCPU.
        vcpu: u32,
        /// The host CPU; none given at all is no affinity either.
        host_cpu: Option<usize>,
    },
    /// The host refused an affinity.
    #[error("Cannot set the affinity of vCPU {vcpu}")]
    Affinity {
        /// The vCPU.
        vcpu: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel has no cookies for vCPUs.
    #[error("core_scheduling Vcpu is not possible on this host")]
    CoreScheduling(#[source] io::Error),
    /// More CPUID leaves than KVM takes.
    #[error("The guest's CPUID has {count} leaves, more than KVM takes")]
    CpuidLeaves {
        /// How many.
        count: usize,
    },
    /// KVM refused something for the whole machine.
    #[error("Cannot prepare KVM for vCPUs")]
    Prepare(#[source] hypervisor::Error),
    /// KVM refused something for one vCPU.
    #[error("Cannot {what} vCPU {vcpu}")]
    Vcpu {
        /// The vCPU.
        vcpu: u32,
        /// What was tried: "create", "set up", "pause".
        what: &'static str,
        /// KVM's answer.
        #[source]
        source: hypervisor::Error,
    },
    /// The thread of a vCPU cannot be started.
    #[error("Cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// vCPUs are stuck in the VMM: a device handler does not return.
    #[error("{stuck} vCPUs did not stand still within {deadline_ms} ms")]
    Stuck {
        /// How many.
        stuck: usize,
        /// How long was waited.
        deadline_ms: u128,
    },
}

impl CpuError {
    /// Whether the configuration asks for what this host does not have.
    pub fn is_of_configuration(&self) -> bool {
        matches!(
            self,
            Self::VcpuCount { .. }
                | Self::Topology { .. }
                | Self::ApicId { .. }
                | Self::NotSupported { .. }
                | Self::AffinityRange { .. }
                | Self::Affinity { .. }
                | Self::CoreScheduling(_)
        )
    }
}
