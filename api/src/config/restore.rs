//! Body of `PUT /vm.restore` and value of `--restore`.

use api_macros::{Words, section};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::options::{OptionValue, ValueError, parse_named_integers, parse_numbered_names};

/// The snapshot to restore, and how.
#[section(option = "restore", about = "Restore from a VM snapshot")]
#[derive(Clone, Debug, PartialEq, Eq)]
#[schemars(extend("example" = json!({"source_url": "file:///var/lib/vm/saved", "resume": true})))]
pub struct RestoreConfig {
    /// Folder of the snapshot, as `file://` and its absolute path.
    #[key("<source_url>", required)]
    pub source_url: String,
    /// Populate all RAM with pages, including those that the guest had returned. Replaces `prefault` of RAM and zones.
    #[key]
    pub prefault: bool,
    /// How RAM is filled.
    #[key]
    pub memory_restore_mode: MemoryRestoreMode,
    /// With restore on demand, also fill RAM while there is no demand. Otherwise pages come only as they are touched.
    #[key(default = true)]
    pub background_fill: bool,
    /// Open taps for the network interfaces that were created from descriptors.
    #[key]
    pub net_fds: Option<Vec<RestoredNetConfig>>,
    /// Resume the VM afterwards.
    #[key]
    pub resume: bool,
    /// Host NUMA nodes that provide memory zones instead of the saved ones.
    #[key]
    pub zone_updates: Option<Vec<ZoneUpdate>>,
}

/// How RAM is filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum MemoryRestoreMode {
    /// All RAM is copied before the VM is created.
    #[default]
    #[word("copy")]
    Copy,
    /// A page is read from the snapshot when it is first touched. The snapshot's files must exist unchanged until event
    /// `memory-filled` or the end of the VM.
    #[word("ondemand")]
    OnDemand,
    /// RAM shows the pages of the snapshot until they are written, and shares them with other VMs. Its files must stay,
    /// unchanged, until the end.
    #[word("copyonwrite")]
    CopyOnWrite,
}

/// The taps of one network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct RestoredNetConfig {
    /// Name of the interface.
    pub id: String,
    /// Number of its descriptors, which come with the request in the order of this list.
    #[serde(default)]
    pub num_fds: usize,
    /// On the command line the process's own descriptors; never on the wire.
    #[serde(skip)]
    pub fds: Vec<i32>,
}

/// The host NUMA node of one memory zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ZoneUpdate {
    /// Name of the zone.
    pub id: String,
    /// Number of the node.
    pub host_numa_node: u32,
}

impl OptionValue for Vec<ZoneUpdate> {
    fn values() -> String {
        "<list_of_zone_ids_with_their_host_nodes>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let zones = parse_numbered_names(text)?.into_iter();
        let zones = zones.map(|(id, host_numa_node)| ZoneUpdate { id, host_numa_node });
        Ok(zones.collect())
    }
}

impl OptionValue for Vec<RestoredNetConfig> {
    fn values() -> String {
        "<list_of_net_ids_with_their_fds>".to_owned()
    }

    fn read(text: &str) -> Result<Self, ValueError> {
        let nets = parse_named_integers(text)?.into_iter();
        let nets = nets.map(|(id, fds)| RestoredNetConfig {
            id,
            num_fds: fds.len(),
            fds,
        });
        Ok(nets.collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn option_is_read_and_its_descriptors_stay_off_the_wire() {
        let text =
            "source_url=file:///d,net_fds=[_net0@[4,5],b@[7]],resume=on,memory_restore_mode=copy";
        let restore = RestoreConfig::parse(text).unwrap();
        let nets = restore.net_fds.as_deref().unwrap();
        assert_eq!(
            (nets[0].id.as_str(), &nets[0].fds[..]),
            ("_net0", &[4, 5][..])
        );
        assert_eq!(
            (nets[1].num_fds, restore.resume, restore.prefault),
            (1, true, false)
        );
        assert_eq!(
            serde_json::to_value(&restore).unwrap()["net_fds"],
            json!([{"id": "_net0", "num_fds": 2}, {"id": "b", "num_fds": 1}])
        );
        let text = "source_url=file:///d,memory_restore_mode=ondemand,background_fill=off";
        let on_demand = RestoreConfig::parse(text).unwrap();
        let wire = serde_json::to_value(&on_demand).unwrap();
        assert_eq!(
            (&wire["memory_restore_mode"], &wire["background_fill"]),
            (&json!("OnDemand"), &json!(false))
        );
        assert!(restore.background_fill && restore.zone_updates.is_none());
        let moved = RestoreConfig::parse("source_url=file:///d,zone_updates=[a@0,b@12]").unwrap();
        assert_eq!(
            serde_json::to_value(&moved).unwrap()["zone_updates"],
            json!([{"id": "a", "host_numa_node": 0}, {"id": "b", "host_numa_node": 12}])
        );
        for text in [
            "source_url=file:///d,zone_updates=[a]",
            "source_url=file:///d,zone_updates=[a@x]",
            "source_url=file:///d,zone_updates=[a@4294967296]",
            "resume=on",
            "source_url=file:///d,memory_restore_mode=lazy",
            "source_url=file:///d,net_fds=[a]",
            "source_url=file:///d,net_fds=[a@[x]]",
        ] {
            assert!(RestoreConfig::parse(text).is_err(), "{text}");
        }
    }
}
