//! NUMA nodes of the guest.

use serde::{Deserialize, Serialize};

use crate::options::{OptionError, OptionFault, Options};

/// One NUMA node of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct NumaConfig {
    /// Number of the node (its proximity domain).
    pub guest_numa_id: u32,
    /// vCPUs of the node, by index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// How far other nodes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// Memory zones of the node, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// PCI segments of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<u16>>,
    /// A device that starts memory accesses in the node (ACPI generic initiator).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// How far one node is from another, in the unit of the ACPI table: 10 is a node's distance to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// The distance; 255 is unreachable.
    pub distance: u8,
}

impl NumaConfig {
    /// Syntax of `--numa`.
    pub const SYNTAX: &str = "Settings related to a given NUMA node \"guest_numa_id=<node_id>,cpus=<cpus_id>,\
        distances=<list_of_distances_to_destination_nodes>,memory_zones=<list_of_memory_zones>,\
        pci_segments=<list_of_pci_segments>,device_id=<generic_initiator_device_id>\"";

    /// Reads the value of one `--numa`.
    ///
    /// # Errors
    /// An unknown key, a malformed value, or no `guest_numa_id`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse(
            "numa",
            text,
            &[
                "guest_numa_id",
                "cpus",
                "distances",
                "memory_zones",
                "pci_segments",
                "device_id",
            ],
            &[],
        )?;
        let guest_numa_id = options.parsed("guest_numa_id")?.ok_or_else(|| {
            options.refuse(OptionFault::MissingKey {
                key: "guest_numa_id",
            })
        })?;
        let distances = options.integer_pairs("distances")?.map(|pairs| {
            pairs
                .into_iter()
                .map(|(destination, distance)| NumaDistance {
                    destination,
                    distance,
                })
                .collect()
        });
        Ok(Self {
            guest_numa_id,
            cpus: options.integers("cpus")?,
            distances,
            memory_zones: options.strings("memory_zones"),
            pci_segments: options.integers("pci_segments")?,
            device_id: options.string("device_id"),
        })
    }
}
