//! Body of `PUT /vm.coredump`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The file to write the guest's core to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"destination_url": "file:///var/lib/vm/core"})))]
pub struct VmCoredumpData {
    /// A file that does not exist yet, as `file://` and its absolute path.
    pub destination_url: String,
}
