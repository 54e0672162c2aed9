//! Common properties of the PCI devices in a configuration: name and slot.

use api::VmConfig;

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
    ($section:literal, $configs:expr) => {
        devices!(@ $section, $configs, config, config.iommu)
    };
    // Devices that upstream cannot put behind the virtual IOMMU.
    ($section:literal, $configs:expr, no iommu) => {
        devices!(@ $section, $configs, config, false)
    };
    (@ $section:literal, $configs:expr, $config:ident, $iommu:expr) => {
        $configs.into_iter().map(|$config| PciDevice {
            section: $section,
            id: &$config.id,
            iommu: $iommu,
            segment: $config.pci_segment,
            slot: $config.pci_device_id,
        })
    };
}

/// Every device that the user can name or assign to a slot. A new section of PCI devices needs one line here.
pub(super) fn pci_devices(config: &VmConfig) -> impl Iterator<Item = PciDevice<'_>> {
    devices!("disks", config.disks.iter().flatten())
        .chain(devices!("net", config.net.iter().flatten()))
        .chain(devices!("fs", config.fs.iter().flatten(), no iommu))
        .chain(devices!("vsock", &config.vsock))
        .chain(devices!("balloon", &config.balloon))
        .chain(devices!("rng", [&config.rng]))
        .chain(devices!("console", [&config.console]))
}
