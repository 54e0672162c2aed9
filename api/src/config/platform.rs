//! The platform: PCI segments and what SMBIOS tells the guest.

use serde::{Deserialize, Serialize};

use super::serde_rules::{enabled, is_false};

/// PCI segments of a VM that does not say otherwise.
pub const DEFAULT_NUM_PCI_SEGMENTS: u16 = 1;
/// Address width of the virtual IOMMU that does not say otherwise, bits.
pub const DEFAULT_IOMMU_ADDRESS_WIDTH_BITS: u8 = 64;

/// Platform settings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct PlatformConfig {
    /// Number of PCI segments.
    #[serde(default = "default_num_pci_segments")]
    pub num_pci_segments: u16,
    /// Segments behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address width of the virtual IOMMU, bits.
    #[serde(default = "default_iommu_address_width_bits")]
    pub iommu_address_width_bits: u8,
    /// System serial number in SMBIOS.
    #[serde(
        default,
        alias = "serial_number",
        skip_serializing_if = "Option::is_none"
    )]
    pub system_serial_number: Option<String>,
    /// System UUID in SMBIOS.
    #[serde(default, alias = "uuid", skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// OEM strings in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// System manufacturer in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// System product name in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// System version in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// System family in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// System SKU number in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// Chassis asset tag in SMBIOS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Use iommufd for assigned devices.
    #[serde(default)]
    pub iommufd: bool,
    /// Let assigned devices reach each other's memory.
    #[serde(default = "enabled")]
    pub vfio_p2p_dma: bool,
    /// Intel TDX. Known so that it can be refused.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tdx: bool,
    /// AMD SEV-SNP. Known so that it can be refused.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sev_snp: bool,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: DEFAULT_NUM_PCI_SEGMENTS,
            iommu_segments: None,
            iommu_address_width_bits: DEFAULT_IOMMU_ADDRESS_WIDTH_BITS,
            system_serial_number: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
            iommufd: false,
            vfio_p2p_dma: true,
            tdx: false,
            sev_snp: false,
        }
    }
}

fn default_num_pci_segments() -> u16 {
    DEFAULT_NUM_PCI_SEGMENTS
}

fn default_iommu_address_width_bits() -> u8 {
    DEFAULT_IOMMU_ADDRESS_WIDTH_BITS
}
