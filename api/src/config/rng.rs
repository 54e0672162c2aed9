//! The random number device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::serde_rules::is_false;
use crate::options::{OptionError, Options};

/// Where the entropy of a VM that does not say otherwise comes from.
pub const DEFAULT_RNG_SOURCE: &str = "/dev/urandom";

/// The virtio-rng device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct RngConfig {
    /// File the entropy is read from.
    pub src: PathBuf,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Name of the device; `__rng` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: PathBuf::from(DEFAULT_RNG_SOURCE),
            iommu: false,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

impl RngConfig {
    /// Syntax of `--rng`.
    pub const SYNTAX: &str = "Random number generator parameters \"src=<entropy_source_path>,iommu=on|off,\
        id=<device_id>,pci_segment=<segment_id>,pci_device_id=<pci_slot>\"";

    /// Reads the value of `--rng`.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "rng",
            text,
            &["src", "iommu", "id", "pci_segment", "pci_device_id"],
            &[],
        )?;
        Ok(Self {
            src: PathBuf::from(options.text("src").unwrap_or(DEFAULT_RNG_SOURCE)),
            iommu: options.toggle("iommu")?.unwrap_or(false),
            id: options.string("id"),
            pci_segment: options.parsed("pci_segment")?.unwrap_or(0),
            pci_device_id: options.parsed("pci_device_id")?,
        })
    }
}
