//! The platform: PCI segments and SMBIOS strings.

use api_macros::section;

/// Default number of PCI segments.
pub const DEFAULT_NUM_PCI_SEGMENTS: u16 = 1;
/// Default address width of the virtual IOMMU, bits.
pub const DEFAULT_IOMMU_ADDRESS_WIDTH_BITS: u8 = 64;

/// Platform settings: PCI segments and SMBIOS strings.
#[section(option = "platform", about = "Platform parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformConfig {
    /// Number of PCI segments, 1 to 96.
    #[key("<num_pci_segments>", default = DEFAULT_NUM_PCI_SEGMENTS)]
    pub num_pci_segments: u16,
    /// Segments behind the virtual IOMMU. Every device on them needs `iommu=on`, and devices can be added later.
    #[key("<list_of_segments>")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address width of the virtual IOMMU, 32 to 64 bits.
    #[key("<bits>", name = "iommu_address_width", default = DEFAULT_IOMMU_ADDRESS_WIDTH_BITS)]
    pub iommu_address_width_bits: u8,
    /// System serial number in SMBIOS. Also read under its older name `serial_number`.
    #[key("<dmi_serial_number>", alias = "serial_number")]
    pub system_serial_number: Option<String>,
    /// System UUID in SMBIOS. Also read under its older name `uuid`.
    #[key("<dmi_uuid>", alias = "uuid")]
    pub system_uuid: Option<String>,
    /// OEM strings in SMBIOS.
    #[key("<list_of_strings>")]
    pub oem_strings: Option<Vec<String>>,
    /// System manufacturer in SMBIOS.
    #[key]
    pub system_manufacturer: Option<String>,
    /// System product name in SMBIOS.
    #[key]
    pub system_product_name: Option<String>,
    /// System version in SMBIOS.
    #[key]
    pub system_version: Option<String>,
    /// System family in SMBIOS.
    #[key]
    pub system_family: Option<String>,
    /// System SKU number in SMBIOS.
    #[key]
    pub system_sku_number: Option<String>,
    /// Chassis asset tag in SMBIOS.
    #[key]
    pub chassis_asset_tag: Option<String>,
    /// Use iommufd for assigned devices. Unsupported.
    #[key]
    pub iommufd: bool,
    /// Has no effect: the memory of an assigned device is never mapped for another one.
    #[key(default = true)]
    pub vfio_p2p_dma: bool,
    /// Intel TDX. Unsupported.
    #[key(hidden, omit_false)]
    pub tdx: bool,
    /// AMD SEV-SNP. Unsupported.
    #[key(hidden, omit_false)]
    pub sev_snp: bool,
}
