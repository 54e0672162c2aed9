//! Body of `PUT /vm.snapshot`. The body of `PUT /vm.restore` is [`crate::config::RestoreConfig`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The folder to save the VM in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"destination_url": "file:///var/lib/vm/saved"})))]
pub struct VmSnapshotConfig {
    /// An existing folder without a snapshot, as `file://` and its absolute path.
    pub destination_url: String,
}
