//! Bodies of `PUT /vm.resize` and `PUT /vm.resize-disk`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// What to change; a field left out stays as it is. Applied in the order vCPUs, RAM, balloon, without roll-back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"desired_balloon": 1 << 30})))]
pub struct VmResize {
    /// Number of vCPUs the guest shall have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub desired_vcpus: Option<u32>,
    /// RAM the guest shall have, in bytes. That of a running VM can be between `memory.size` and `memory.size` +
    /// `memory.hotplug_size`, in blocks of 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Memory the guest shall give up to the balloon, in bytes. Answered at once; the guest follows in its own time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// The new size of a disk. The image file is extended or cut; a block device must have the new size already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"id": "_disk0", "desired_size": 2_u64 << 30})))]
pub struct VmResizeDisk {
    /// Name of the disk.
    pub id: String,
    /// Size in bytes, a multiple of 512.
    pub desired_size: u64,
}
