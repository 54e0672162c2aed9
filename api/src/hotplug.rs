//! Bodies of the requests that add and remove devices. The body of an added device is its section of the configuration.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The device to remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(extend("example" = json!({"id": "_disk0"})))]
pub struct VmRemoveDevice {
    /// Name of the device.
    pub id: String,
}
