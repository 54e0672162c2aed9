//! Parameters of the machine that the tables describe.

use super::numa::NumaNode;
use super::viot::IommuEntry;
use crate::pci::WindowRanges;

/// A vCPU as described to the guest, in order of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuEntry {
    /// Local APIC id.
    pub apic_id: u32,
    /// Runs from the start; otherwise it may come online later.
    pub enabled: bool,
    /// Its NUMA node.
    pub domain: Option<u32>,
}

/// A PCI segment as described to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciSegmentEntry {
    /// The addresses of its functions' memory.
    pub windows: WindowRanges,
    /// The NUMA node to which it is assigned.
    pub domain: Option<u32>,
}

/// The properties that differ between machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiParams {
    /// Every possible vCPU.
    pub vcpus: Vec<VcpuEntry>,
    /// Every PCI segment, in order of its number.
    pub pci_segments: Vec<PciSegmentEntry>,
    /// The generic event device's register.
    pub ged_address: u64,
    /// The PCI hot-plug controller's registers.
    pub pci_hotplug_address: u64,
    /// The vCPU hot-plug controller's registers.
    pub cpu_hotplug_address: u64,
    /// The memory hotplug controller's registers, if there is one.
    pub memory_hotplug_address: Option<u64>,
    /// Whether there is a serial port.
    pub has_serial: bool,
    /// NUMA nodes; none if the machine is not divided.
    pub numa: Vec<NumaNode>,
    /// The virtual IOMMU, if there is one.
    pub iommu: Option<IommuEntry>,
}

impl AcpiParams {
    /// The number of PCI segments.
    pub(super) fn segment_count(&self) -> u16 {
        u16::try_from(self.pci_segments.len()).expect("segments have 16-bit numbers")
    }
}
