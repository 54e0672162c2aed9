//! The platform: PCI segments and what SMBIOS tells the guest.

use serde::{Deserialize, Serialize};

use super::serde_rules::{enabled, is_false};
use crate::options::{OptionError, Options};

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

impl PlatformConfig {
    /// Syntax of `--platform`.
    pub const SYNTAX: &str = "Platform configuration parameters \"num_pci_segments=<num_pci_segments>,\
        iommu_segments=<list_of_segments>,iommu_address_width=<bits>,iommufd=on|off,vfio_p2p_dma=on|off,\
        system_serial_number=<dmi_serial_number>,system_uuid=<dmi_uuid>,oem_strings=<list_of_strings>,\
        system_manufacturer=<text>,system_product_name=<text>,system_version=<text>,system_family=<text>,\
        system_sku_number=<text>,chassis_asset_tag=<text>\"";

    /// Reads the value of `--platform`. `serial_number` and `uuid` are the older names of the `system_` keys.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse("platform", text, PLATFORM_KEYS, &[])?;
        Ok(Self {
            num_pci_segments: options
                .parsed("num_pci_segments")?
                .unwrap_or(DEFAULT_NUM_PCI_SEGMENTS),
            iommu_segments: options.integers("iommu_segments")?,
            iommu_address_width_bits: options
                .parsed("iommu_address_width")?
                .unwrap_or(DEFAULT_IOMMU_ADDRESS_WIDTH_BITS),
            system_serial_number: options
                .string("system_serial_number")
                .or_else(|| options.string("serial_number")),
            system_uuid: options
                .string("system_uuid")
                .or_else(|| options.string("uuid")),
            oem_strings: options.strings("oem_strings"),
            system_manufacturer: options.string("system_manufacturer"),
            system_product_name: options.string("system_product_name"),
            system_version: options.string("system_version"),
            system_family: options.string("system_family"),
            system_sku_number: options.string("system_sku_number"),
            chassis_asset_tag: options.string("chassis_asset_tag"),
            iommufd: options.toggle("iommufd")?.unwrap_or(false),
            vfio_p2p_dma: options.toggle("vfio_p2p_dma")?.unwrap_or(true),
            tdx: options.toggle("tdx")?.unwrap_or(false),
            sev_snp: options.toggle("sev_snp")?.unwrap_or(false),
        })
    }
}

const PLATFORM_KEYS: &[&str] = &[
    "num_pci_segments",
    "iommu_segments",
    "iommu_address_width",
    "iommufd",
    "vfio_p2p_dma",
    "system_serial_number",
    "serial_number",
    "system_uuid",
    "uuid",
    "oem_strings",
    "system_manufacturer",
    "system_product_name",
    "system_version",
    "system_family",
    "system_sku_number",
    "chassis_asset_tag",
    "tdx",
    "sev_snp",
];
