//! The purpose of each thread of a machine, so that the owner can apply a seccomp filter to each kind separately.

use std::sync::Arc;

use strum::{EnumIter, IntoEnumIterator, VariantArray};

/// Name of the thread that transfers text of the serial port and the console. vCPU threads are named `vcpu0`, `vcpu1`
/// and so on; a worker has the name of its device.
pub const SERIAL_THREAD: &str = "serial-manager";

/// Name of the thread that fills guest RAM on demand.
pub const FILL_THREAD: &str = "memory-fill";

/// Kinds of devices, by the permissions that their workers need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, VariantArray)]
pub enum DeviceKind {
    /// The balloon.
    Balloon,
    /// The memory hot-plug device.
    Mem,
    /// A disk.
    Block,
    /// A network device.
    Net,
    /// The random number device.
    Rng,
    /// The console.
    Console,
    /// The watchdog.
    Watchdog,
    /// The clock device.
    Rtc,
    /// Any device that a vhost-user back end serves.
    VhostUser,
    /// The vsock device.
    Vsock,
    /// Persistent memory.
    Pmem,
    /// The virtual IOMMU.
    Iommu,
    /// A device of the host. It has no worker.
    Assigned,
}

/// The purpose of a thread of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter)]
pub enum MachineThread {
    /// Runs the guest.
    Vcpu,
    /// Transfers serial port input and output.
    Serial,
    /// Fills guest RAM on demand.
    Fill,
    /// Serves queues of a device.
    #[strum(disabled)]
    Worker(DeviceKind),
}

impl MachineThread {
    /// Every kind.
    pub fn all() -> impl Iterator<Item = Self> {
        let kinds = DeviceKind::VARIANTS.iter().copied();
        let workers = kinds
            .filter(|kind| *kind != DeviceKind::Assigned)
            .map(Self::Worker);
        Self::iter().chain(workers)
    }
}

/// Called first on every thread that the machine starts; may restrict the thread permanently.
pub type MachineThreadStart = Arc<dyn Fn(MachineThread) + Send + Sync>;
