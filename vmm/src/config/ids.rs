//! Names of devices and memory zones: the user's own, or generated.

use std::collections::BTreeSet;

use api::VmConfig;
use api::config::HotplugMethod;

use super::device_list::{GENERATED_PREFIXES, name_devices};
use super::error::ValidationError;
use super::pci_devices::pci_devices;
use crate::device_ids::RESERVED_PREFIX;
use machine::memory::DEFAULT_ZONE_ID;

/// Every name that the user specified.
fn given(config: &VmConfig) -> impl Iterator<Item = &String> {
    let devices = pci_devices(config).filter_map(|device| device.id.as_ref());
    let zones = config.memory.zones.iter().flatten().map(|zone| &zone.id);
    devices.chain(zones)
}

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    let hotplug_device = DEFAULT_ZONE_ID.to_owned();
    let mut seen = BTreeSet::new();
    if config.memory.room_bytes(HotplugMethod::VirtioMem) > 0 {
        seen.insert(&hotplug_device);
    }
    for id in given(config) {
        if id.is_empty() || id.starts_with(RESERVED_PREFIX) || id.chars().any(char::is_control) {
            return Err(ValidationError::InvalidIdentifier { id: id.clone() });
        }
        if !seen.insert(id) {
            return Err(ValidationError::IdentifierNotUnique { id: id.clone() });
        }
    }
    Ok(())
}

fn generated_number(id: &str) -> Option<u64> {
    let mut digits = GENERATED_PREFIXES
        .iter()
        .filter_map(|prefix| id.strip_prefix(prefix));
    digits.next()?.parse().ok()
}

/// Assigns a name to every disk, network device, shared folder, persistent memory and vsock device without one, as
/// upstream does: `_disk0`, `_net1`, `_fs2`, `_pmem3`, `_vsock4`. One counter numbers all kinds, including devices
/// added later: a number that one kind uses is skipped for all kinds.
pub fn assign_ids(config: &mut VmConfig) {
    let taken: BTreeSet<u64> = given(config)
        .filter_map(|id| generated_number(id))
        .collect();
    let mut counter = 0u64;
    name_devices(config, |prefix| {
        while taken.contains(&counter) {
            counter += 1;
        }
        let id = format!("{prefix}{counter}");
        counter += 1;
        id
    });
}
