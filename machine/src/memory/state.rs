//! The saved map of guest memory. Its content is not part of it: code that saves or sends the content reads it from
//! [`GuestMemory::ram`].

use ::state::{Part, State, StateError, parts, require};
use serde::{Deserialize, Serialize};

use super::{GuestMemory, Zone};

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
    /// Whether the guest has only the plugged part (memory hot-plug).
    pub hotplug: bool,
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
            hotplug: zone.hotplug,
        }
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
}
