//! The table of all parts: their names, and the readable versions of their state.

/// A part of a machine that has a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Name in errors and documentation.
    pub name: &'static str,
    /// Oldest readable version.
    pub oldest: u32,
    /// Newest readable version; the one that is written.
    pub newest: u32,
}

macro_rules! parts {
    ($($(#[$doc:meta])* $part:ident = $name:literal, $oldest:literal..=$newest:literal;)+) => {
        $($(#[$doc])* pub const $part: Part = Part { name: $name, oldest: $oldest, newest: $newest };)+

        /// Every part.
        pub const ALL: &[Part] = &[$($part,)+];
    };
}

parts! {
    /// Conventional configuration space of one PCI function.
    PCI_CONFIG = "pci-config-space", 1..=1;
    /// MSI-X table and pending bits of one PCI function.
    MSIX = "msix", 1..=1;
    /// A virtio-pci function: registers, queues, and the device behind them.
    VIRTIO_PCI = "virtio-pci", 1..=1;
    /// Balloon.
    BALLOON = "balloon", 1..=1;
    /// The balloon's queue half.
    BALLOON_WORKER = "balloon-worker", 1..=1;
    /// Block device.
    BLOCK = "block", 1..=2;
    /// Console.
    CONSOLE = "console", 1..=1;
    /// Console output that its destination has not accepted yet.
    CONSOLE_OUTPUT = "console-output", 1..=1;
    /// Shared folder.
    FS = "fs", 1..=1;
    /// Virtual IOMMU: domains, endpoints and mappings.
    IOMMU = "iommu", 1..=1;
    /// Memory device.
    MEM = "mem", 1..=1;
    /// Blocks of a memory device.
    MEM_BLOCKS = "mem-blocks", 1..=1;
    /// Network device.
    NET = "net", 1..=2;
    /// Persistent memory.
    PMEM = "pmem", 1..=1;
    /// Entropy device.
    RNG = "rng", 1..=1;
    /// Clock device.
    RTC = "rtc", 1..=1;
    /// Device whose features and configuration space come from a vhost-user back end.
    VHOST_USER = "vhost-user", 1..=2;
    /// Socket device.
    VSOCK = "vsock", 1..=1;
    /// Connections of a socket device.
    VSOCK_CONNECTIONS = "vsock-connections", 1..=1;
    /// Watchdog.
    WATCHDOG = "watchdog", 1..=1;
    /// The watchdog's queue half.
    WATCHDOG_TIMER = "watchdog-timer", 1..=1;
    /// One vCPU.
    VCPU = "vcpu", 1..=1;
    /// The clock that all vCPUs of a machine share.
    CLOCK = "clock", 1..=2;
    /// All vCPUs of a machine.
    VCPUS = "vcpus", 1..=1;
    /// I/O APIC.
    IOAPIC = "ioapic", 1..=1;
    /// Guest physical memory map.
    MEMORY = "memory-map", 1..=2;
    /// A snapshot: a PC, the operator's settings, and the table of each memory file.
    SNAPSHOT = "snapshot", 2..=6;
    /// PCI buses: location of each function.
    PCI_BUS = "pci-bus", 1..=2;
    /// A PC: an envelope for each of its parts.
    PC = "pc", 1..=4;
    /// vCPU hot-plug controller.
    CPU_HOTPLUG = "cpu-hotplug", 1..=1;
    /// Memory hotplug controller.
    MEMORY_HOTPLUG = "memory-hotplug", 1..=1;
    /// PCI hot-plug controller.
    PCI_HOTPLUG = "pci-hotplug", 1..=2;
    /// Serial port.
    SERIAL = "serial", 1..=1;
    /// Real time clock and CMOS memory.
    CMOS = "cmos", 1..=1;
    /// ACPI power management timer.
    PM_TIMER = "pm-timer", 1..=1;
    /// ACPI generic event device.
    GED = "ged", 1..=1;
}

const _: () = {
    let mut at = 0;
    while at < ALL.len() {
        assert!(ALL[at].oldest >= 1 && ALL[at].oldest <= ALL[at].newest);
        at += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_names_are_unique() {
        let mut names: Vec<&str> = ALL.iter().map(|part| part.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
