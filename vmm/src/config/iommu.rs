//! The virtual IOMMU: which devices are behind it.

use api::VmConfig;
use api::config::DEFAULT_IOMMU_ADDRESS_WIDTH_BITS;
use virtio_devices::iommu::{ADDRESS_WIDTH_BITS_MAX, ADDRESS_WIDTH_BITS_MIN};

use super::error::{DeviceFault, ValidationError};
use super::pci_devices::{iommu_segments, pci_devices, pci_segments};

/// Bits of an address that the IOMMU translates.
pub fn iommu_address_width_bits(config: &VmConfig) -> u8 {
    let platform = config.platform.as_ref();
    platform.map_or(DEFAULT_IOMMU_ADDRESS_WIDTH_BITS, |it| {
        it.iommu_address_width_bits
    })
}

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    let bits = iommu_address_width_bits(config);
    if !(ADDRESS_WIDTH_BITS_MIN..=ADDRESS_WIDTH_BITS_MAX).contains(&bits) {
        return Err(ValidationError::IommuAddressWidth {
            bits,
            min: ADDRESS_WIDTH_BITS_MIN,
            max: ADDRESS_WIDTH_BITS_MAX,
        });
    }
    let count = pci_segments(config);
    let segments = iommu_segments(config);
    // The IOMMU itself is on segment 0.
    if let Some(&segment) = segments.iter().find(|it| !(1..count).contains(*it)) {
        return Err(ValidationError::IommuSegment { segment, count });
    }
    let mut devices = pci_devices(config);
    let exposed = devices.find(|it| segments.contains(&it.segment) && !it.iommu);
    match exposed {
        Some(device) => Err(ValidationError::Device {
            device: device.id.clone().unwrap_or(device.section.to_owned()),
            fault: DeviceFault::OnIommuSegment {
                segment: device.segment,
            },
        }),
        None => Ok(()),
    }
}
