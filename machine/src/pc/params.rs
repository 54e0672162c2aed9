//! The parameters of a machine.

use api::config::{CpusConfig, NumaConfig};

use crate::pci::Bdf;

/// The properties of a machine besides its memory and its devices.
#[derive(Debug)]
pub struct PcParams {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// NUMA nodes; none if the machine is not divided.
    pub numa: Vec<NumaConfig>,
    /// The number of PCI segments.
    pub pci_segments: u16,
    /// PCI slots that devices will request by number.
    pub wished_slots: Vec<Bdf>,
    /// Segments whose devices are all behind the virtual IOMMU.
    pub iommu_segments: Vec<u16>,
}
