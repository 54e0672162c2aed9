//! VIOT: lists the PCI functions behind the virtual IOMMU (ACPI 6.5 §5.2.36). A machine without such an IOMMU has no
//! VIOT.

use super::table::table;
use crate::pci::{Bdf, SLOT_COUNT};

const REVISION: u8 = 0;
/// Where the first node starts: after the header, the number of nodes, this offset, and eight reserved bytes.
const NODES_AT: u16 = 48;
const PCI_RANGE: u8 = 1;
const PCI_RANGE_BYTES: u16 = 24;
const VIRTIO_PCI_IOMMU: u8 = 3;
const VIRTIO_PCI_IOMMU_BYTES: u16 = 16;

/// The virtual IOMMU as described to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuEntry {
    /// Its own address.
    pub bdf: Bdf,
    /// The functions behind it.
    pub functions: Vec<Bdf>,
    /// Segments that are behind it as a whole, including functions that are added later.
    pub segments: Vec<u16>,
}

/// Virtual I/O translation table.
pub(super) fn viot(iommu: &IommuEntry) -> Vec<u8> {
    let last = |segment| Bdf {
        segment,
        slot: SLOT_COUNT - 1,
    };
    let whole = iommu.segments.iter().map(|&segment| {
        let first = Bdf { segment, slot: 0 };
        (first, last(segment))
    });
    let single = iommu.functions.iter().map(|&bdf| (bdf, bdf));
    let single = single.filter(|(bdf, _)| !iommu.segments.contains(&bdf.segment));
    let ranges: Vec<_> = whole.chain(single).collect();

    let nodes = u16::try_from(ranges.len() + 1).expect("fewer than 96 segments with 32 slots");
    let mut bytes = Vec::new();
    bytes.extend(nodes.to_le_bytes());
    bytes.extend(NODES_AT.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend([VIRTIO_PCI_IOMMU, 0]);
    bytes.extend(VIRTIO_PCI_IOMMU_BYTES.to_le_bytes());
    bytes.extend(iommu.bdf.segment.to_le_bytes());
    bytes.extend(iommu.bdf.routing_id().to_le_bytes());
    bytes.extend([0; 8]);
    for (first, last) in ranges {
        bytes.extend([PCI_RANGE, 0]);
        bytes.extend(PCI_RANGE_BYTES.to_le_bytes());
        bytes.extend(first.endpoint().to_le_bytes());
        bytes.extend(first.segment.to_le_bytes());
        bytes.extend(last.segment.to_le_bytes());
        bytes.extend(first.routing_id().to_le_bytes());
        bytes.extend(last.routing_id().to_le_bytes());
        bytes.extend(NODES_AT.to_le_bytes());
        bytes.extend([0; 6]);
    }
    table(*b"VIOT", REVISION, *b"CHVIOT  ", &bytes)
}
