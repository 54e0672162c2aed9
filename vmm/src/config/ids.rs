//! Names of devices and memory zones: the user's own, or generated.

use std::collections::BTreeSet;

use api::VmConfig;
use state::{StateError, parts, require};

use super::device_list::{GENERATED_PREFIXES, name_devices};
use super::error::ValidationError;
use super::pci_devices::pci_devices;
use crate::device_ids::RESERVED_PREFIX;
use machine::memory::{growing_zones, hotplug_zone_id};

/// Every name that the user specified.
fn given(config: &VmConfig) -> impl Iterator<Item = &String> {
    let devices = pci_devices(config).filter_map(|device| device.id.as_ref());
    let zones = config.memory.zones.iter().flatten().map(|zone| &zone.id);
    devices.chain(zones)
}

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    // RAM that grows is two zones, and has a device with the name of the first.
    let growing = growing_zones(&config.memory);
    let names = growing.iter().map(|zone| hotplug_zone_id(&zone.id));
    let mut names: Vec<String> = names.collect();
    if config.memory.zones.iter().flatten().next().is_none() {
        names.extend(growing.into_iter().map(|zone| zone.id));
    }
    let mut seen: BTreeSet<&String> = names.iter().collect();
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

/// The numbers of generated names in the life of a VM, from its creation to its deletion. Each number is used once:
/// a guest may still hold a removed device, and alerts and events name devices.
#[derive(Debug, Clone, Default)]
pub struct DeviceNumbers {
    next: u64,
}

/// A user's own name with a larger number does not advance the counter, which therefore never overflows.
const USERS_NUMBER_MAX: u64 = u32::MAX as u64;
/// Only a damaged state has this number or a larger one.
const SAVED_END: u64 = 1 << 62;

impl DeviceNumbers {
    /// Continues with the number that [`DeviceNumbers::next`] has returned.
    ///
    /// # Errors
    /// No VM has used so many numbers.
    pub fn from_saved(next: u64) -> Result<Self, StateError> {
        require(
            next < SAVED_END,
            parts::SNAPSHOT,
            "next_device_number",
            || format!("{next} is not below {SAVED_END}"),
        )?;
        Ok(Self { next })
    }

    /// The first number that was never used.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Assigns a name to every disk, network device, shared folder, persistent memory and vsock device without one, as
    /// upstream does: `_disk0`, `_net1`, `_fs2`, `_pmem3`, `_vsock4`. One counter numbers all kinds, including devices
    /// added later: a number that one kind uses is skipped for all kinds.
    pub fn assign(&mut self, config: &mut VmConfig) {
        let taken: BTreeSet<u64> = given(config)
            .filter_map(|id| generated_number(id))
            .collect();
        name_devices(config, |prefix| {
            while taken.contains(&self.next) {
                self.next += 1;
            }
            let id = format!("{prefix}{}", self.next);
            self.next += 1;
            id
        });
    }

    /// Excludes the name of a removed device, which may be the user's own.
    pub fn retire(&mut self, id: &str) {
        if let Some(number) = generated_number(id).filter(|number| *number <= USERS_NUMBER_MAX) {
            self.next = self.next.max(number + 1);
        }
    }
}
