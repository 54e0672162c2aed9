//! Memory devices (DIMMs): RAM that is added to a running machine, behind the RAM it booted with.
//!
//! ```text
//!   boot RAM │ gap to 128 MiB or 4 GiB │ dimm 0 │ dimm 1 │ … room left │ 64-bit PCI window
//!                                      └──────── map.hotplug ────────┘
//! ```
//! Each device is a separate zone and mapping, with the backing of boot RAM. Devices stay until a reboot, which makes
//! them part of boot RAM.

use std::ops::Range;
use std::sync::Arc;

use ::state::{StateError, parts};
use api::config::MemoryConfig;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestRegionMmap};

use super::hugetlb_limit::{self, Counts};
use super::layout::SECTION_BYTES;
use super::state::MemoryState;
use super::zone_files::ZoneFiles;
use super::zones::{DEFAULT_ZONE_ID, Zone, ZoneKind};
use super::{GuestMemory, MemoryError};

/// The slots of the controller.
pub const DIMMS_MAX: usize = 8;

/// Reasons why RAM cannot grow.
#[derive(Debug, thiserror::Error)]
pub enum DimmError {
    /// RAM is in zones, or grows by another method.
    #[error("Cannot add a memory device: RAM is in zones, or hotplug_size is not set")]
    NoRoom,
    /// Linux adds memory in whole sections.
    #[error(
        "RAM of {own_bytes} bytes can only grow by a multiple of {SECTION_BYTES} bytes; got {bytes}"
    )]
    NotWhole {
        /// The current size of RAM.
        own_bytes: u64,
        /// The difference to the requested size.
        bytes: u64,
    },
    /// All slots are in use.
    #[error("the guest already has the maximum of {DIMMS_MAX} memory devices: reboot it first")]
    NoSlot,
    /// The region for memory devices is too small.
    #[error("RAM can grow by at most {left_bytes} bytes, the rest of hotplug_size; got {bytes}")]
    TooLarge {
        /// The rest of the region.
        left_bytes: u64,
        /// The difference to the requested size.
        bytes: u64,
    },
    /// The host rejects the memory.
    #[error(transparent)]
    Memory(MemoryError),
}

/// A mapped memory device that the guest does not have yet.
#[derive(Debug)]
pub struct Dimm {
    zone: Zone,
    region: Arc<GuestRegionMmap<()>>,
}

impl Dimm {
    pub(crate) fn region(&self) -> &Arc<GuestRegionMmap<()>> {
        &self.region
    }

    /// Its zone.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }
}

impl GuestMemory {
    /// Whether memory devices can be added.
    pub fn takes_dimms(&self) -> bool {
        self.dimm_backing.is_some()
    }

    /// The addresses of the memory devices, in order.
    pub fn dimms(&self) -> Vec<Range<u64>> {
        let zones = self.zones.iter();
        let dimms = zones.filter(|zone| zone.kind == ZoneKind::Dimm);
        dimms.flat_map(|zone| zone.ranges.clone()).collect()
    }

    /// Maps a memory device that extends RAM to `total_bytes`; none if RAM already has that size.
    ///
    /// # Errors
    /// There is no room for a device of this size, or the host lacks the memory.
    pub fn map_dimm(&self, total_bytes: u64) -> Result<Option<Dimm>, DimmError> {
        self.map_dimm_of(total_bytes, &mut ZoneFiles::New)
    }

    /// The same with pages from `files`.
    fn map_dimm_of(
        &self,
        total_bytes: u64,
        files: &mut ZoneFiles,
    ) -> Result<Option<Dimm>, DimmError> {
        let own_bytes = self.own_bytes();
        if total_bytes <= own_bytes {
            return Ok(None);
        }
        let backing = self.dimm_backing.as_ref().ok_or(DimmError::NoRoom)?;
        let bytes = total_bytes - own_bytes;
        if !bytes.is_multiple_of(SECTION_BYTES) {
            return Err(DimmError::NotWhole { own_bytes, bytes });
        }
        let dimms = self.dimms();
        if dimms.len() == DIMMS_MAX {
            return Err(DimmError::NoSlot);
        }
        let room = &self.map().hotplug;
        let start = dimms.last().map_or(room.start, |last| last.end);
        let left_bytes = room.end.saturating_sub(start);
        if bytes > left_bytes {
            return Err(DimmError::TooLarge { left_bytes, bytes });
        }
        let id = format!("{DEFAULT_ZONE_ID}-dimm{}", dimms.len());
        let mapped = files.open(backing, bytes).and_then(|source| {
            if source.is_hugetlb() {
                let added = bytes.saturating_sub(source.allocated_bytes());
                hugetlb_limit::check(Counts::Used, added, source.page_bytes)?;
            }
            let mapping = backing.map(&source, 0, bytes)?;
            Ok((source, mapping))
        });
        let (source, mapping) = mapped.map_err(|source| {
            let id = id.clone();
            DimmError::Memory(MemoryError::Zone { id, source })
        })?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        let region = region.expect("the room ends below the last address");
        let end = start + bytes;
        let zone = Zone {
            id,
            ranges: std::iter::once(start..end).collect(),
            backing: source.name,
            page_bytes: source.page_bytes,
            kind: ZoneKind::Dimm,
        };
        let region = Arc::new(region);
        Ok(Some(Dimm { zone, region }))
    }

    /// Makes a memory device part of RAM, also for the guest's virtio devices.
    ///
    /// # Panics
    /// The device was not mapped for this memory, or another device was added since.
    pub fn add_dimm(&mut self, dimm: Dimm) {
        let map = self.ram.lock();
        let map = map.expect("only the owner of the machine replaces the map");
        let grown = self.ram.memory().insert_region(Arc::clone(&dimm.region));
        map.replace(grown.expect("a memory device lies behind all RAM"));
        self.zones.push(dimm.zone);
        self.cover(&dimm.region);
    }

    /// Maps RAM as [`GuestMemory::new`] does, with the memory devices of `state` and pages from `files`.
    ///
    /// # Errors
    /// As [`GuestMemory::new`], such devices cannot exist, or a file cannot be the zone that it is for.
    pub fn with_dimms(
        config: &MemoryConfig,
        phys_bits: u8,
        state: &MemoryState,
        mut files: ZoneFiles,
    ) -> Result<Self, RestoreError> {
        let dimms = state.zones.iter().filter(|it| it.kind == ZoneKind::Dimm);
        let sizes: Vec<u64> = dimms.map(|zone| zone.bytes()).collect();
        let added = sizes.iter().try_fold(0_u64, |sum, it| sum.checked_add(*it));
        let boot_bytes = added.and_then(|added| config.size.checked_sub(added));
        let Some(boot_bytes) = boot_bytes else {
            let reason = format!("has memory devices of more than {} bytes", config.size);
            let invalid = StateError::invalid(parts::MEMORY, "zones", reason);
            return Err(RestoreError::State(invalid));
        };
        let boot = MemoryConfig {
            size: boot_bytes,
            ..config.clone()
        };
        let memory = Self::with_files(&boot, phys_bits, &mut files);
        let mut memory = memory.map_err(RestoreError::Memory)?;
        for bytes in sizes {
            let dimm = memory.map_dimm_of(memory.own_bytes().saturating_add(bytes), &mut files);
            match dimm {
                Ok(Some(dimm)) => memory.add_dimm(dimm),
                Ok(None) => {}
                Err(DimmError::Memory(error)) => return Err(RestoreError::Memory(error)),
                Err(error) => {
                    let invalid = StateError::invalid(parts::MEMORY, "zones", error.to_string());
                    return Err(RestoreError::State(invalid));
                }
            }
        }
        memory.check_state(state).map_err(RestoreError::State)?;
        if files.are_left() {
            let reason =
                "are fewer than those that the other process sent: it has more memory files";
            let invalid = StateError::invalid(parts::MEMORY, "zones", reason);
            return Err(RestoreError::State(invalid));
        }
        Ok(memory)
    }
}

/// Reasons why the RAM of a saved machine cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The configuration is invalid, or the host rejects the memory.
    #[error(transparent)]
    Memory(MemoryError),
    /// The configuration results in another memory map.
    #[error(transparent)]
    State(StateError),
}

#[cfg(test)]
mod tests {
    use ::state::Saved;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::memory::layout::{GIB, MIB};

    fn config(bytes: u64) -> MemoryConfig {
        MemoryConfig {
            size: bytes,
            hotplug_size: Some(GIB),
            ..MemoryConfig::default()
        }
    }

    fn grow(memory: &mut GuestMemory, bytes: u64) -> Range<u64> {
        let dimm = memory.map_dimm(bytes).unwrap().unwrap();
        let range = dimm.zone().ranges[0].clone();
        memory.add_dimm(dimm);
        range
    }

    #[test]
    fn dimms_lie_behind_ram_and_one_another_and_are_ram_for_everybody() {
        for (boot, start) in [
            (64 * MIB, 4 * GIB),
            (3 * GIB + 4 * MIB, 4 * GIB + 128 * MIB),
        ] {
            for shared in [false, true] {
                let config = MemoryConfig {
                    shared,
                    ..config(boot)
                };
                let mut memory = GuestMemory::new(&config, 46).unwrap();
                let ram = memory.ram().clone();
                assert!(memory.takes_dimms() && memory.map_dimm(boot).unwrap().is_none());
                assert!(memory.map().devices_64bit.start >= start + GIB);
                let first = grow(&mut memory, boot + 128 * MIB);
                assert_eq!(first, start..start + 128 * MIB);
                let second = grow(&mut memory, boot + GIB);
                assert_eq!(second, first.end..start + GIB);
                assert_eq!(memory.dimms(), [first, second]);
                assert_eq!(memory.own_bytes(), boot + GIB);
                let last = GuestAddress(start + GIB - 1);
                ram.memory().write_obj(7_u8, last).unwrap();
                let ids = memory.zones().iter().map(|zone| zone.id.as_str());
                let ids: Vec<_> = ids.collect();
                assert_eq!(ids, ["mem0", "mem0-dimm0", "mem0-dimm1"]);
                let backing = |at: usize| memory.zones()[at].backing;
                assert_eq!(backing(0), backing(2));
                let refused = memory.map_dimm(boot + GIB + 128 * MIB).unwrap_err();
                assert!(
                    matches!(refused, DimmError::TooLarge { left_bytes: 0, .. }),
                    "{refused}"
                );
                // The guest's boot memory map does not change.
                assert!(memory.e820().iter().all(|it| it.start + it.bytes <= start));
            }
        }
    }

    #[test]
    fn dimms_of_other_sizes_and_too_many_of_them_are_refused() {
        let mut memory = GuestMemory::new(&config(64 * MIB), 46).unwrap();
        for bytes in [64 * MIB + 1, 65 * MIB, u64::MAX] {
            let refused = memory.map_dimm(bytes).unwrap_err();
            assert!(matches!(refused, DimmError::NotWhole { .. }), "{refused}");
        }
        let refused = memory.map_dimm(64 * MIB + (1 << 60)).unwrap_err();
        assert!(
            matches!(
                refused,
                DimmError::TooLarge {
                    left_bytes: GIB,
                    ..
                }
            ),
            "{refused}"
        );
        for number in 1..=DIMMS_MAX as u64 - 1 {
            grow(&mut memory, 64 * MIB + number * 64 * MIB * 2);
        }
        assert_eq!(
            memory
                .map_dimm(64 * MIB + GIB)
                .unwrap()
                .unwrap()
                .zone()
                .bytes(),
            128 * MIB
        );
        grow(&mut memory, 64 * MIB + GIB);
        let refused = memory.map_dimm(64 * MIB + 2 * GIB).unwrap_err();
        assert!(matches!(refused, DimmError::NoSlot), "{refused}");
        for fixed in [
            MemoryConfig {
                hotplug_size: None,
                ..config(64 * MIB)
            },
            MemoryConfig {
                hotplug_method: api::config::HotplugMethod::VirtioMem,
                ..config(64 * MIB)
            },
        ] {
            let memory = GuestMemory::new(&fixed, 46).unwrap();
            assert!(!memory.takes_dimms());
            let refused = memory.map_dimm(GIB + 64 * MIB).unwrap_err();
            assert!(matches!(refused, DimmError::NoRoom), "{refused}");
        }
    }

    #[test]
    fn dimms_are_where_they_were_when_the_machine_is_restored() {
        let mut memory = GuestMemory::new(&config(64 * MIB), 46).unwrap();
        grow(&mut memory, 64 * MIB + 128 * MIB);
        grow(&mut memory, 64 * MIB + 512 * MIB);
        let state: MemoryState = Saved::of(&memory.state()).read().unwrap();
        let restored =
            GuestMemory::with_dimms(&config(576 * MIB), 46, &state, ZoneFiles::New).unwrap();
        assert_eq!(restored.state(), memory.state());
        assert_eq!(restored.ram().memory().num_regions(), 3);
        for (bytes, text) in [
            (64 * MIB, "more than 67108864 bytes"),
            (577 * MIB, "the configuration makes"),
        ] {
            let refused =
                GuestMemory::with_dimms(&config(bytes), 46, &state, ZoneFiles::New).unwrap_err();
            assert!(refused.to_string().contains(text), "{refused}");
        }
        let mut many = state;
        let dimm = many.zones.pop().unwrap();
        many.zones.extend(vec![dimm; 9]);
        let refused =
            GuestMemory::with_dimms(&config(64 * GIB), 46, &many, ZoneFiles::New).unwrap_err();
        assert!(matches!(refused, RestoreError::State(_)), "{refused}");
    }
}
