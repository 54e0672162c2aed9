//! Common properties of the PCI devices in a configuration: name, segment and slot.

use std::collections::{BTreeMap, BTreeSet};

use api::VmConfig;
use api::config::{ConsoleOutputMode, DEFAULT_NUM_PCI_SEGMENTS};
use machine::memory::growing_zones;
use machine::pci::{Bdf, SEGMENT_COUNT_MAX, SLOT_COUNT, SegmentWeights};

use super::error::{DeviceFault, SegmentFault, ValidationError};

/// Maximum weight of a segment. The smallest share of the 32-bit window is then about 100 bytes.
const WEIGHT_MAX: u32 = u16::MAX as u32;

/// Name and slot of one device.
pub(super) struct PciDevice<'a> {
    /// The section of the configuration that describes it.
    pub(super) section: &'static str,
    pub(super) id: &'a Option<String>,
    pub(super) iommu: bool,
    pub(super) segment: u16,
    pub(super) slot: Option<u8>,
}

macro_rules! devices {
    ($section:expr, $configs:expr) => {
        devices!(@ $section, $configs, config, config.iommu)
    };
    // Devices that upstream cannot put behind the virtual IOMMU.
    ($section:expr, $configs:expr, no iommu) => {
        devices!(@ $section, $configs, config, false)
    };
    (@ $section:expr, $configs:expr, $config:ident, $iommu:expr) => {
        $configs.into_iter().map(|$config| PciDevice {
            section: $section,
            id: &$config.id,
            iommu: $iommu,
            segment: $config.pci_segment,
            slot: $config.pci_device_id,
        })
    };
}

/// The section of a device that can be disabled.
const CONSOLE: &str = "console";

/// Every device that the user can name or assign to a slot. A new section of PCI devices needs one line here.
pub(super) fn pci_devices(config: &VmConfig) -> impl Iterator<Item = PciDevice<'_>> {
    devices!("disks", config.disks.iter().flatten())
        .chain(devices!("net", config.net.iter().flatten()))
        .chain(devices!("fs", config.fs.iter().flatten(), no iommu))
        .chain(devices!(
            "generic_vhost_user",
            config.generic_vhost_user.iter().flatten(),
            no iommu
        ))
        .chain(devices!("devices", config.devices.iter().flatten()))
        .chain(devices!("pmem", config.pmem.iter().flatten()))
        .chain(devices!("vsock", &config.vsock))
        .chain(devices!("balloon", &config.balloon))
        .chain(devices!("rng", [&config.rng]))
        .chain(devices!("rtc", &config.rtc))
        .chain(devices!(CONSOLE, [&config.console]))
}

/// The number of PCI segments.
pub(super) fn pci_segments(config: &VmConfig) -> u16 {
    let platform = config.platform.as_ref();
    platform.map_or(DEFAULT_NUM_PCI_SEGMENTS, |it| it.num_pci_segments)
}

/// The share of each PCI segment in the windows of addresses for devices.
pub fn segment_weights(config: &VmConfig) -> Vec<SegmentWeights> {
    let mut weights = vec![SegmentWeights::default(); pci_segments(config).into()];
    for segment in config.pci_segments.iter().flatten() {
        if let Some(weights) = weights.get_mut(usize::from(segment.pci_segment)) {
            weights.mmio32 = segment.mmio32_aperture_weight;
            weights.mmio64 = segment.mmio64_aperture_weight;
        }
    }
    weights
}

/// Every segment with weights exists, and is named once.
fn check_weights(config: &VmConfig, count: u16) -> Result<(), ValidationError> {
    let mut seen = BTreeSet::new();
    for it in config.pci_segments.iter().flatten() {
        let segment = it.pci_segment;
        let fault = |fault| Err(ValidationError::PciSegment { segment, fault });
        if segment >= count {
            return fault(SegmentFault::Missing { count });
        }
        if !seen.insert(segment) {
            return fault(SegmentFault::Twice);
        }
        for (key, weight) in [
            ("mmio32_aperture_weight", it.mmio32_aperture_weight),
            ("mmio64_aperture_weight", it.mmio64_aperture_weight),
        ] {
            if !(1..=WEIGHT_MAX).contains(&weight) {
                return fault(SegmentFault::Weight {
                    key,
                    weight,
                    max: WEIGHT_MAX,
                });
            }
        }
    }
    Ok(())
}

/// Whether the machine has an IOMMU: a device or a segment is behind it, or it is requested separately.
pub fn has_iommu(config: &VmConfig) -> bool {
    let mut devices = pci_devices(config);
    config.iommu || !iommu_segments(config).is_empty() || devices.any(|device| device.iommu)
}

/// Segments whose devices are all behind the IOMMU, including those that are added later.
pub fn iommu_segments(config: &VmConfig) -> &[u16] {
    let platform = config.platform.as_ref();
    let segments = platform.and_then(|it| it.iommu_segments.as_deref());
    segments.unwrap_or_default()
}

/// The slots that the configuration requests, in no particular order.
pub fn wished_slots(config: &VmConfig) -> impl Iterator<Item = Bdf> {
    pci_devices(config).filter_map(|device| {
        let segment = device.segment;
        device.slot.map(|slot| Bdf { segment, slot })
    })
}

/// Every device needs a slot, on a segment that exists.
pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    let count = pci_segments(config);
    if !(1..=SEGMENT_COUNT_MAX).contains(&count) {
        return Err(ValidationError::PciSegmentCount {
            count,
            max: SEGMENT_COUNT_MAX,
        });
    }
    check_weights(config, count)?;
    if let Some(device) = pci_devices(config).find(|it| it.segment >= count) {
        return Err(ValidationError::Device {
            device: device.id.clone().unwrap_or(device.section.to_owned()),
            fault: DeviceFault::PciSegment {
                segment: device.segment,
                count,
            },
        });
    }
    slot_counts(config)?;
    let mut seen = BTreeSet::from([HOST_BRIDGE]);
    for place in wished_slots(config) {
        let slot = place.slot;
        if slot >= SLOT_COUNT {
            return Err(ValidationError::Device {
                device: format!("PCI slot {slot}"),
                fault: DeviceFault::PciSlot { slot },
            });
        }
        if !seen.insert(place) {
            return Err(ValidationError::DuplicatePciSlot { place });
        }
    }
    Ok(())
}

const HOST_BRIDGE: Bdf = Bdf {
    segment: 0,
    slot: 0,
};

fn slot_counts(config: &VmConfig) -> Result<(), ValidationError> {
    // These devices are always on segment 0.
    let singles = [config.watchdog, config.pvpanic, has_iommu(config)];
    let singles = singles.iter().filter(|there| **there).count();
    let singles = singles + growing_zones(&config.memory).len();
    let mut counts = BTreeMap::from([(HOST_BRIDGE.segment, 1 + singles)]);
    let console_off = config.console.mode == ConsoleOutputMode::Off;
    for device in pci_devices(config).filter(|it| !(console_off && it.section == CONSOLE)) {
        *counts.entry(device.segment).or_default() += 1;
    }
    let max = usize::from(SLOT_COUNT);
    match counts.into_iter().find(|(_, count)| *count > max) {
        Some((segment, count)) => Err(ValidationError::TooManyDevices {
            segment,
            count: count - usize::from(segment == HOST_BRIDGE.segment),
            max: max - usize::from(segment == HOST_BRIDGE.segment),
        }),
        None => Ok(()),
    }
}
