//! Bodies of the requests that add and remove devices. What is added is a section of the configuration.

use serde::{Deserialize, Serialize};

/// Body of `PUT /vm.remove-device`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct VmRemoveDevice {
    /// Name of the device.
    pub id: String,
}
