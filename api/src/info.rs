//! Responses that describe the VMM and the VM.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::VmConfig;

/// `GET /vm.counters`: device id, then counter name, then value. Values only grow during the life of a device.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;

/// Name (`comm`) of the process that waits for a VMM in a jail. It is the parent of the VMM, and in its control group.
pub const WAITER_NAME: &str = "vmm-waiter";

/// The VMM that responds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "build_version": "v1.0.0-abcdef", "version": "1.0.0", "pid": 4711, "features": ["kvm"]
})))]
pub struct VmmPingResponse {
    /// Version with the commit it was built from.
    #[serde(default)]
    pub build_version: String,
    /// Version of the program.
    pub version: String,
    /// Process id of the VMM, in the pid namespace where it was started.
    #[serde(default)]
    pub pid: i64,
    /// Optional features of this build.
    #[serde(default)]
    pub features: Vec<String>,
}

/// State of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
pub enum VmState {
    /// A configuration is stored; nothing runs.
    Created,
    /// The vCPUs run.
    Running,
    /// For clients of Cloud Hypervisor. A VM that was shut down is `Created` here, because its configuration can be
    /// booted again.
    Shutdown,
    /// The vCPUs are stopped and can be resumed.
    Paused,
    /// Stopped by a debugger.
    BreakPoint,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The VM.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({
    "config": {"payload": {"kernel": "/boot/vmlinux"}},
    "state": "Created",
    "memory_actual_size": 512 << 20,
})))]
pub struct VmInfo {
    /// The configuration as it is now, with generated ids and changes by `vm.resize`.
    pub config: VmConfig,
    /// State of the VM.
    pub state: VmState,
    /// Bytes of RAM that the guest can use: RAM at boot and plugged RAM, less the balloon's size as the guest reports
    /// it.
    #[serde(default)]
    pub memory_actual_size: u64,
    /// Devices of a booted VM by id; absent before boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
    /// Progress of the snapshot that is being written; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_progress: Option<SnapshotProgress>,
    /// Progress of the migration that is being sent; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_progress: Option<MigrationProgress>,
}

/// Progress of a migration, on its source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"passes": 2, "wire_bytes": 268435456, "left_bytes": 1048576, "throttle_percent": 20})))]
pub struct MigrationProgress {
    /// Completed passes over RAM.
    pub passes: u32,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// RAM to be examined in the current pass, bytes. Only pages that hold data are sent.
    pub left_bytes: u64,
    /// Part of the time for which vCPUs are held by `auto_converge`, percent.
    #[serde(default)]
    pub throttle_percent: u8,
}

/// Progress of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"done_bytes": 268435456, "total_bytes": 536870912})))]
pub struct SnapshotProgress {
    /// RAM that has been examined, bytes. Only pages that hold data are written.
    pub done_bytes: u64,
    /// All RAM, including memory that can be hot-plugged, bytes.
    pub total_bytes: u64,
}

/// One device in `device_tree`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct DeviceNode {
    /// The device's id, equal to its key in the map.
    pub id: String,
    /// Bus resources the device holds now, in upstream's form (an enum with data, for example
    /// `{"PciBar":{"index":0,"base":…,"size":…,"type_":"Mmio64","prefetchable":false}}`).
    #[serde(default)]
    #[schemars(with = "Vec<Map<String, Value>>")]
    pub resources: Vec<Value>,
    /// The device to which this one is attached, for example its PCI function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The devices that are attached to this one.
    #[serde(default)]
    pub children: Vec<String>,
    /// PCI address as `0000:00:05.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// The device that was added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"id": "_disk0", "bdf": "0000:00:05.0"})))]
pub struct PciDeviceInfo {
    /// Name of the device, given in the request or generated.
    pub id: String,
    /// PCI address as `0000:00:05.0`.
    pub bdf: String,
}
