//! Body of `PUT /vm.snapshot`. The body of `PUT /vm.restore` is [`crate::config::RestoreConfig`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Where and how to save the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"destination_url": "file:///var/lib/vm/saved"})))]
pub struct VmSnapshotConfig {
    /// An existing folder without a snapshot, as `file://` and its absolute path.
    pub destination_url: String,
    /// Save a running VM. It is paused only for the last pages, and resumed unless `keep_paused` is set.
    #[serde(default)]
    pub live: bool,
    /// With `live`, leave the VM paused afterwards, so that the images of its disks can be copied. Required if an image
    /// is writable.
    #[serde(default)]
    pub keep_paused: bool,
}
