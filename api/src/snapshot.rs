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
    /// Record from now on what the guest writes, so that a differential snapshot can follow. Recording slows the guest
    /// down. A full snapshot without this setting ends the record.
    #[serde(default)]
    pub track_writes: bool,
    /// Write a differential snapshot based on this one, which must be the VM's last. Both folders must have the same
    /// parent, and this one must stay unchanged. The record of writes continues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
}

impl VmSnapshotConfig {
    /// Whether writes are recorded after the snapshot.
    pub fn keeps_recording(&self) -> bool {
        self.track_writes || self.base_url.is_some()
    }
}

/// Snapshots to merge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"source_url": "file:///var/lib/vm/third", "destination_url": "file:///var/lib/vm/merged"})))]
pub struct VmSnapshotMergeConfig {
    /// The last snapshot of a chain, as `file://` and the absolute path of its folder.
    pub source_url: String,
    /// An existing folder without a snapshot, as `file://` and its absolute path.
    pub destination_url: String,
}
