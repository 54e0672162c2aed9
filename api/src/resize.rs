//! Body of `PUT /vm.resize`.

use serde::{Deserialize, Serialize};

/// What to change; a field left out stays as it is. Applied in the order vCPUs, RAM, balloon, without roll-back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct VmResize {
    /// Number of vCPUs the guest shall have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    /// RAM the guest shall have, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Memory the guest shall give up to the balloon, in bytes. Answered at once; the guest follows in its own time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}
