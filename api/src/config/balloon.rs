//! The memory balloon.

use serde::{Deserialize, Serialize};

use super::serde_rules::is_false;
use crate::options::{OptionError, Options};

/// The virtio-balloon device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct BalloonConfig {
    /// Bytes the guest shall give up to the balloon.
    pub size: u64,
    /// Let the guest take memory back out of the balloon before it kills a process.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Let the guest report free pages, which are then given back to the host.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Let the operator ask the guest for hints at its free pages. Cloud Hypervisor does not have it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub free_page_hinting: bool,
    /// Offer to tell the guest how to report, see `vm.reclaim-thresholds` and `vm.balloon-reporting`; needs
    /// `free_page_reporting`. Cloud Hypervisor does not have it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reporting_policy: bool,
    /// Milliseconds between two samples of the guest's statistics; 0: only on demand. Cloud Hypervisor does not have it.
    #[serde(default)]
    pub stats_poll_ms: u64,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Name of the device; `__balloon` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl BalloonConfig {
    /// Syntax of `--balloon`.
    pub const SYNTAX: &str = "Balloon parameters \"size=<balloon_size>,deflate_on_oom=on|off,\
        free_page_reporting=on|off,free_page_hinting=on|off,reporting_policy=on|off,stats_poll_ms=<milliseconds>,iommu=on|off,id=<device_id>,pci_segment=<segment_id>,\
        pci_device_id=<pci_slot>\"";

    /// Reads the value of `--balloon`. The size is 0 when it is not given.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "balloon",
            text,
            &[
                "size",
                "deflate_on_oom",
                "free_page_reporting",
                "free_page_hinting",
                "reporting_policy",
                "stats_poll_ms",
                "iommu",
                "id",
                "pci_segment",
                "pci_device_id",
            ],
            &[],
        )?;
        Ok(Self {
            size: options.bytes("size")?.unwrap_or(0),
            deflate_on_oom: options.toggle("deflate_on_oom")?.unwrap_or(false),
            free_page_reporting: options.toggle("free_page_reporting")?.unwrap_or(false),
            free_page_hinting: options.toggle("free_page_hinting")?.unwrap_or(false),
            reporting_policy: options.toggle("reporting_policy")?.unwrap_or(false),
            stats_poll_ms: options.parsed("stats_poll_ms")?.unwrap_or(0),
            iommu: options.toggle("iommu")?.unwrap_or(false),
            id: options.string("id"),
            pci_segment: options.parsed("pci_segment")?.unwrap_or(0),
            pci_device_id: options.parsed("pci_device_id")?,
        })
    }
}
