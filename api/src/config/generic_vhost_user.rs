//! Devices of any type that a vhost-user back end serves.

use std::path::PathBuf;

use api_macros::section;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionValue, ValueError};

/// One device of any virtio type that a vhost-user back end serves. Needs shared memory.
#[section(
    option = "generic-vhost-user",
    about = "Parameters of a vhost-user device"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenericVhostUserConfig {
    /// Virtio device id (virtio 1.2 §5). The command line also accepts the name of the type.
    #[key("<device_id_or_name>", required)]
    #[serde(alias = "virtio_id")]
    pub device_type: VirtioDeviceType,
    /// UNIX socket on which the back end listens.
    #[key("<socket_path>", required)]
    pub socket: PathBuf,
    /// Entries in each queue, powers of two; one number per queue.
    #[key("<list_of_queue_sizes>", required)]
    #[serde(deserialize_with = "crate::bounded::list")]
    pub queue_sizes: Vec<u16>,
    /// Name of the device; generated when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
}

/// Virtio device id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct VirtioDeviceType(pub u32);

/// Types by name, as Linux calls them (`virtio_ids.h`).
const NAMES: [(&str, u32); 16] = [
    ("net", 1),
    ("block", 2),
    ("console", 3),
    ("rng", 4),
    ("scsi", 8),
    ("9p", 9),
    ("gpu", 16),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("sound", 25),
    ("fs", 26),
    ("scmi", 32),
    ("i2c", 34),
    ("can", 36),
    ("gpio", 41),
];

impl OptionValue for VirtioDeviceType {
    fn values() -> String {
        "<number_or_name>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let named = NAMES.iter().find(|(name, _)| *name == text);
        match named {
            Some((_, number)) => Ok(Self(*number)),
            None => u32::read(text).map(Self),
        }
    }
}
