//! The saved map of guest memory, without the content. Code that saves or sends the content reads it from
//! [`GuestMemory::ram`].

use ::state::{Fields, Part, State, StateError, parts, require};
use serde::{Deserialize, Serialize};

use super::{GuestMemory, Zone, ZoneKind};

const PART: Part = parts::MEMORY;

/// The ranges of RAM and their division.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// Zones in the order of their addresses.
    pub zones: Vec<ZoneState>,
}

impl State for MemoryState {
    const PART: Part = PART;

    /// In version 1, zones were of two kinds.
    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        let zones = fields
            .get_mut("zones")
            .and_then(|zones| zones.as_array_mut());
        for zone in zones.into_iter().flatten() {
            let Some(zone) = zone.as_object_mut() else {
                continue;
            };
            let kind = match zone.remove("hotplug").and_then(|it| it.as_bool()) {
                Some(false) => "boot",
                Some(true) => "virtio-mem",
                None => return Err(StateError::invalid(PART, "zones", "lacks hotplug")),
            };
            zone.insert("kind".to_owned(), kind.into());
        }
        Ok(())
    }
}

/// One zone. Its backing may differ between hosts, but not its page size: the balloon's driver relies on the
/// granularity that the device reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZoneState {
    /// Its name.
    pub id: String,
    /// Guest physical addresses of the zone, in order.
    pub ranges: Vec<MemoryRangeState>,
    /// Size of its pages.
    pub page_bytes: u64,
    /// When the guest has it.
    pub kind: ZoneKind,
}

/// Guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRangeState {
    /// The first address.
    pub start: u64,
    /// The number of bytes.
    pub bytes: u64,
}

impl ZoneState {
    fn of(zone: &Zone) -> Self {
        let range = |range: &std::ops::Range<u64>| MemoryRangeState {
            start: range.start,
            bytes: range.end - range.start,
        };
        Self {
            id: zone.id.clone(),
            ranges: zone.ranges.iter().map(range).collect(),
            page_bytes: zone.page_bytes,
            kind: zone.kind,
        }
    }

    /// Its size, or the largest number if it cannot have one.
    pub(super) fn bytes(&self) -> u64 {
        let sizes = self.ranges.iter().map(|range| range.bytes);
        sizes.fold(0, u64::saturating_add)
    }
}

impl GuestMemory {
    /// The map.
    pub fn state(&self) -> MemoryState {
        MemoryState {
            zones: self.zones().iter().map(ZoneState::of).collect(),
        }
    }

    /// Checks whether this memory, created from the saved machine's configuration, can replace the memory from which
    /// `state` was taken: everything that the guest knows about it must be the same.
    ///
    /// # Errors
    /// The memory differs.
    pub fn check_state(&self, state: &MemoryState) -> Result<(), StateError> {
        let own = self.state();
        let (saved_count, own_count) = (state.zones.len(), own.zones.len());
        require(saved_count == own_count, PART, "zones", || {
            format!("are {saved_count}, the configuration has {own_count}")
        })?;
        for (saved, own) in state.zones.iter().zip(&own.zones) {
            require(saved == own, PART, "zones", || {
                format!("has {saved:x?}, the configuration makes {own:x?}")
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ::state::{Saved, testing};
    use api::config::MemoryConfig;

    use super::*;

    #[test]
    fn memory_of_the_same_configuration_is_accepted_and_any_other_is_refused() {
        let config = MemoryConfig {
            size: 64 << 20,
            hotplug_method: api::config::HotplugMethod::VirtioMem,
            hotplug_size: Some(256 << 20),
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let saved = Saved::of(&memory.state());
        memory.check_state(&saved.read().unwrap()).unwrap();
        let count = testing::damage(&saved, |damaged| {
            let read = damaged.read::<MemoryState>();
            let error = read
                .and_then(|state| memory.check_state(&state))
                .unwrap_err();
            assert!(error.to_string().contains("memory-map"), "{error}");
        });
        assert!(count > 100);
    }

    #[test]
    fn map_of_version_1_is_read() {
        let range = serde_json::json!({"start": 0, "bytes": 4096});
        let zone = |hotplug| serde_json::json!({"id": "a", "ranges": [range], "page_bytes": 4096, "hotplug": hotplug});
        let read = |zones: serde_json::Value| {
            let saved = serde_json::json!({"version": 1, "zones": zones});
            let saved: Saved = serde_json::from_value(saved).unwrap();
            saved.read::<MemoryState>()
        };
        let map = read([zone(false), zone(true)].as_slice().into()).unwrap();
        let kinds: Vec<_> = map.zones.iter().map(|zone| zone.kind).collect();
        assert_eq!(kinds, [ZoneKind::Boot, ZoneKind::VirtioMem]);
        assert!(read(serde_json::json!([{"id": "a"}])).is_err());
    }
}
