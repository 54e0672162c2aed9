//! What the threads of a machine are for, so that who runs it can confine each kind in its own way.

use std::sync::Arc;

use strum::VariantArray;

/// Name of the thread that carries text of the serial port and the console. vCPUs are `vcpu0`, `vcpu1` and so on; a
/// worker is named after its device.
pub const SERIAL_THREAD: &str = "serial-manager";

/// Devices that are served alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, VariantArray)]
pub enum DeviceKind {
    /// The balloon.
    Balloon,
    /// The device that plugs memory in.
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
    /// The socket device.
    Vsock,
}

/// What a thread of the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MachineThread {
    /// Runs the guest.
    Vcpu,
    /// Carries serial port input and output.
    Serial,
    /// Serves queues of a device.
    Worker(DeviceKind),
}

impl MachineThread {
    /// Every kind.
    pub fn all() -> impl Iterator<Item = Self> {
        let workers = DeviceKind::VARIANTS.iter().copied().map(Self::Worker);
        [Self::Vcpu, Self::Serial].into_iter().chain(workers)
    }
}

/// Called first on every thread the machine starts; may confine it for good.
pub type ThreadStart = Arc<dyn Fn(MachineThread) + Send + Sync>;
