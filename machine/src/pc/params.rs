//! The parameters of a machine.

use api::config::{CpusConfig, NumaConfig};

use crate::pci::{Bdf, SegmentWeights};

/// The properties of a machine besides its memory and its devices.
#[derive(Debug)]
pub struct PcParams {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// NUMA nodes; none if the machine is not divided.
    pub numa: Vec<NumaConfig>,
    /// One item for each PCI segment.
    pub pci_segments: Vec<SegmentWeights>,
    /// PCI slots that devices will request by number.
    pub wished_slots: Vec<Bdf>,
    /// Segments whose devices are all behind the virtual IOMMU.
    pub iommu_segments: Vec<u16>,
}
