//! Configuration of NUMA nodes of the guest.

use api_macros::section;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::options::{OptionValue, ValueError, parse_integer_pairs};

/// One NUMA node of the guest.
#[section(option = "numa", about = "Guest NUMA node parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaConfig {
    /// Number of the node (its proximity domain), 0 to 255.
    #[key("<node_id>", required)]
    pub guest_numa_id: u32,
    /// vCPUs of the node, by index.
    #[key("<cpus_id>")]
    pub cpus: Option<Vec<u32>>,
    /// Distances to other nodes.
    #[key]
    pub distances: Option<Vec<NumaDistance>>,
    /// Memory zones of the node, by name. RAM without zones is one zone, `mem0`.
    #[key("<list_of_memory_zones>")]
    pub memory_zones: Option<Vec<String>>,
    /// PCI segments of the node.
    #[key("<list_of_pci_segments>")]
    pub pci_segments: Option<Vec<u16>>,
    /// A device that starts memory accesses in the node (ACPI generic initiator). Unsupported.
    #[key("<generic_initiator_device_id>")]
    pub device_id: Option<String>,
}

/// Distance from one node to another, in the unit of the ACPI table. A distance given in only one direction applies to
/// both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// 10 to itself, 11 to 254 to another, 255 if unreachable.
    pub distance: u8,
}

impl OptionValue for Vec<NumaDistance> {
    fn values() -> String {
        "<list_of_distances_to_destination_nodes>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let pairs = parse_integer_pairs(text)?.into_iter();
        let distances = pairs.map(|(destination, distance)| NumaDistance {
            destination,
            distance,
        });
        Ok(distances.collect())
    }
}
