//! Bodies of `PUT /vm.resize`, `PUT /vm.resize-zone` and `PUT /vm.resize-disk`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// New sizes; absent fields stay unchanged. Applied in the order vCPUs, RAM, balloon; an error does not undo earlier
/// changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"desired_balloon": 1 << 30})))]
pub struct VmResize {
    /// Number of vCPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub desired_vcpus: Option<u32>,
    /// RAM of the guest, bytes. With `hotplug_method` `VirtioMem`, a running VM can have between `memory.size` and
    /// `memory.size` + `memory.hotplug_size`, in blocks of 2 MiB. With `Acpi`, a running VM gets a memory device for the
    /// difference, a multiple of 128 MiB; it has less RAM only after a reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Target size of the balloon, bytes. The request does not wait for the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

/// The new size of a memory zone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"id": "big", "desired_ram": 2_u64 << 30})))]
pub struct VmResizeZone {
    /// Name of the zone.
    pub id: String,
    /// Size in bytes. A running VM can have between `size` and `size` + `hotplug_size` of the zone, in blocks of 2 MiB.
    pub desired_ram: u64,
}

/// The new size of a disk. The image file is extended or truncated; a block device must already have the new size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"id": "_disk0", "desired_size": 2_u64 << 30})))]
pub struct VmResizeDisk {
    /// Name of the disk.
    pub id: String,
    /// Size in bytes, a multiple of 512.
    pub desired_size: u64,
}
