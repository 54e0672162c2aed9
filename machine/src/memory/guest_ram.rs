//! Guest RAM, mapped into this process.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use api::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
use virtio_devices::GuestRam;
use virtio_devices::reclaim::Overlay;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::backing::{self, Backing};
use super::faults::MemoryFaults;
use super::hugetlb_limit::{self, Counts};
use super::layout::AddressMap;
use super::plugged::{DeviceView, HotplugRam, hotplug_block_bytes};
use super::source::Source;
use super::zone_files::ZoneFiles;
use super::zones::{Zone, ZoneKind, hotplug_zones_of, place, zones_of};
use super::{E820Entry, MemoryError, ZoneError, e820_map};
use crate::signals::VmSignals;

/// The RAM of one machine and its address map.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    pub(super) ram: GuestRam,
    /// One for each zone that grows.
    hotplug: Vec<Arc<HotplugRam>>,
    map: AddressMap,
    pub(super) zones: Vec<Zone>,
    /// Where it shows the files of a snapshot, if it does. Set after the machine has been created.
    pub(super) overlay: Arc<OnceLock<Arc<Overlay>>>,
    /// Of memory devices that are added later; none if there is no room for them.
    pub(super) dimm_backing: Option<Backing>,
    /// Once there is a machine for it.
    pub(super) faults: Option<Arc<MemoryFaults>>,
}

/// The checked configuration, before anything is created.
struct Plan {
    map: AddressMap,
    zones: Vec<ZonePlan>,
    dimm_backing: Option<Backing>,
}

struct ZonePlan {
    id: String,
    backing: Backing,
    bytes: u64,
    ranges: Vec<Range<u64>>,
    kind: ZoneKind,
}

impl GuestMemory {
    /// Checks the configuration, then maps RAM accordingly. `phys_bits` is the width of the guest's physical addresses,
    /// or more if [`GuestMemory::narrow`] follows.
    ///
    /// # Errors
    /// An invalid size, reported before anything is created; or the host lacks the memory.
    pub fn new(config: &MemoryConfig, phys_bits: u8) -> Result<Self, MemoryError> {
        Self::with_files(config, phys_bits, &mut ZoneFiles::New)
    }

    /// The same with pages from `files`.
    pub(super) fn with_files(
        config: &MemoryConfig,
        phys_bits: u8,
        files: &mut ZoneFiles,
    ) -> Result<Self, MemoryError> {
        let Plan {
            map,
            zones,
            dimm_backing,
        } = Self::plan(config, phys_bits)?;
        let sources = open(&zones, files)?;
        check_huge_page_limits(&zones, &sources)?;
        let mut regions = Vec::new();
        let mut made = Vec::new();
        for (plan, source) in zones.into_iter().zip(&sources) {
            let mut offset = 0;
            for range in &plan.ranges {
                let bytes = range.end - range.start;
                let mapping = plan.backing.map(source, offset, bytes);
                let mapping = mapping.map_err(|source| plan.error(source))?;
                let region = GuestRegionMmap::new(mapping, GuestAddress(range.start));
                regions.push(Arc::new(region.ok_or(MemoryError::SizeOverflow)?));
                offset += bytes;
            }
            made.push(Zone {
                id: plan.id,
                ranges: plan.ranges,
                backing: source.name,
                page_bytes: source.page_bytes,
                kind: plan.kind,
            });
        }
        let mmap = GuestMemoryMmap::from_arc_regions(regions.clone())
            .expect("the address map has at least one range, in order and without overlap");
        let ram = GuestRam::new(mmap);
        let growing: Vec<_> = made
            .iter()
            .filter(|zone| zone.kind == ZoneKind::VirtioMem)
            .collect();
        // Each of these zones is one region, behind those of other RAM.
        let wholes = regions.split_off(regions.len() - growing.len());
        let view = Arc::new(DeviceView::new(&ram, regions));
        let room_bytes = growing.iter().map(|zone| zone.bytes()).sum();
        let hotplug = growing.into_iter().zip(wholes).map(|(zone, whole)| {
            let block_bytes = hotplug_block_bytes(room_bytes, zone.page_bytes);
            let view = Arc::clone(&view);
            Arc::new(HotplugRam::new(
                zone.configured_id(),
                view,
                whole,
                block_bytes,
            ))
        });
        let hotplug = hotplug.collect();
        Ok(Self {
            ram,
            hotplug,
            map,
            zones: made,
            overlay: Arc::default(),
            dimm_backing,
            faults: None,
        })
    }

    /// Survives missing pages, and notifies the machine's owner of them, from now on.
    pub fn watch(&mut self, signals: &Arc<VmSignals>) -> Arc<MemoryFaults> {
        if let Some(faults) = &self.faults {
            return Arc::clone(faults);
        }
        let faults = Arc::new(MemoryFaults::new(signals));
        self.faults = Some(Arc::clone(&faults));
        let ram = self.ram.memory().into_inner();
        for region in ram.iter() {
            self.cover(region);
        }
        faults
    }

    /// Survives missing pages of `region`.
    pub(super) fn cover(&self, region: &GuestRegionMmap<()>) {
        let address = region.start_addr().0;
        let zone = self.zones.iter().find(|zone| zone.holds(address));
        if let (Some(faults), Some(zone)) = (&self.faults, zone)
            && let Err(error) = faults.cover(region, zone.page_bytes)
        {
            log::warn!(
                "A missing page of memory zone {} would end the process: {error}",
                zone.id
            );
        }
    }

    /// Whether the host may fail to provide a page while the guest runs.
    pub fn may_run_out(&self) -> bool {
        // A copy-on-write restore maps the files of the snapshot.
        self.overlay.get().is_some() || self.zones.iter().any(Zone::may_run_out)
    }

    /// Checks the configuration and creates nothing.
    ///
    /// # Errors
    /// As [`GuestMemory::new`], except for errors that only the host can report.
    pub fn validate(config: &MemoryConfig, phys_bits: u8) -> Result<(), MemoryError> {
        Self::plan(config, phys_bits).map(|_plan| ())
    }

    fn plan(config: &MemoryConfig, phys_bits: u8) -> Result<Plan, MemoryError> {
        let zones = zones_of(config);
        let sizes: Vec<_> = zones.iter().map(|zone| zone.size).collect();
        let bytes = sizes
            .iter()
            .try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes))
            .ok_or(MemoryError::SizeOverflow)?;
        let mut map = AddressMap::new(bytes, phys_bits)?;
        let ranges = place(&sizes, &map.ram);
        let mut plans = Vec::new();
        for (zone, ranges) in zones.into_iter().zip(ranges) {
            plans.push(ZonePlan::new(zone, config.thp, ranges)?);
        }
        let room_bytes = config.room_bytes(HotplugMethod::VirtioMem);
        for zone in hotplug_zones_of(config) {
            let mut plan = ZonePlan::new(zone, config.thp, Vec::new())?;
            let block_bytes = hotplug_block_bytes(room_bytes, plan.backing.page_bytes());
            map = map.with_hotplug(plan.bytes, block_bytes, phys_bits)?;
            plan.ranges
                .push(map.hotplug.end - plan.bytes..map.hotplug.end);
            plan.kind = ZoneKind::VirtioMem;
            plans.push(plan);
        }
        let room_bytes = config.room_bytes(HotplugMethod::Acpi);
        let mut dimm_backing = None;
        if let (1.., [zone]) = (room_bytes, &plans[..]) {
            map = map.with_hotplug(room_bytes, zone.backing.page_bytes(), phys_bits)?;
            dimm_backing = Some(zone.backing.clone());
        }
        Ok(Plan {
            map,
            zones: plans,
            dimm_backing,
        })
    }

    /// Makes all RAM resident but that of virtio-mem, as `prefault` does. Its content stays.
    ///
    /// # Errors
    /// The host lacks the memory.
    pub fn populate(&self) -> Result<(), MemoryError> {
        let ram = self.ram.memory();
        for zone in self.own_zones() {
            let mut regions = ram.iter().filter(|it| zone.holds(it.start_addr().0));
            let populated = regions.try_for_each(|region| backing::populate(region));
            populated.map_err(|source| MemoryError::Zone {
                id: zone.id.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Limits the guest's addresses to `phys_bits`. RAM stays where it is.
    ///
    /// # Errors
    /// [`MemoryError::AddressSpace`].
    pub fn narrow(&mut self, phys_bits: u8) -> Result<(), MemoryError> {
        self.map = self.map.clone().narrowed(phys_bits)?;
        Ok(())
    }

    /// The zones of RAM, in the order of their addresses.
    pub fn zones(&self) -> &[Zone] {
        &self.zones
    }

    /// The zones that the guest has as a whole.
    fn own_zones(&self) -> impl Iterator<Item = &Zone> {
        let zones = self.zones.iter();
        zones.filter(|zone| zone.kind != ZoneKind::VirtioMem)
    }

    /// The RAM that the guest has, except for what it plugs through virtio-mem.
    pub fn own_bytes(&self) -> u64 {
        self.own_zones().map(Zone::bytes).sum()
    }

    /// All RAM that the VMM maps, including memory that is not plugged. Not for what follows the guest's addresses:
    /// that is [`GuestMemory::device_ram`].
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// RAM as the guest has it now: of memory hot-plug, the blocks that are plugged.
    pub fn device_ram(&self) -> &GuestRam {
        self.hotplug.first().map_or(&self.ram, |it| it.view())
    }

    /// The regions for memory hot-plug, one for each zone that grows, in the order of their addresses.
    pub fn hotplug_ram(&self) -> &[Arc<HotplugRam>] {
        &self.hotplug
    }

    /// Whether an address is in a region for memory hot-plug, of which the guest has only open blocks.
    pub(crate) fn is_in_blocks(&self, address: GuestAddress) -> bool {
        let mut regions = self.hotplug.iter();
        regions.any(|it| it.range().contains(&address.0))
    }

    /// Where it shows the files of a snapshot, if it does.
    pub fn overlay(&self) -> Option<&Arc<Overlay>> {
        self.overlay.get()
    }

    /// The address map.
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// The memory map for the guest.
    pub fn e820(&self) -> Vec<E820Entry> {
        e820_map(&self.map)
    }
}

impl ZonePlan {
    fn new(
        zone: MemoryZoneConfig,
        thp: bool,
        ranges: Vec<Range<u64>>,
    ) -> Result<Self, MemoryError> {
        let backing = Backing::new(&zone, thp);
        let page_bytes = backing.page_bytes();
        if !zone.size.is_multiple_of(page_bytes) {
            return Err(MemoryError::NotPageMultiple {
                bytes: zone.size,
                page_bytes,
            });
        }
        Ok(Self {
            id: zone.id,
            backing,
            bytes: zone.size,
            ranges,
            kind: ZoneKind::Boot,
        })
    }

    fn error(&self, source: ZoneError) -> MemoryError {
        MemoryError::Zone {
            id: self.id.clone(),
            source,
        }
    }
}

/// Opens the backing of every zone, and checks that no two zones share it.
fn open(zones: &[ZonePlan], files: &mut ZoneFiles) -> Result<Vec<Source>, MemoryError> {
    let mut sources: Vec<Source> = Vec::new();
    for zone in zones {
        let source = files.open(&zone.backing, zone.bytes);
        let source = source.map_err(|source| zone.error(source))?;
        if zone.kind == ZoneKind::VirtioMem
            && let Some(other) = sources.iter().position(|other| source.is_same_file(other))
        {
            let id = zones[other].id.clone();
            return Err(MemoryError::GrowsInFile { id });
        }
        if let Some(other) = sources.iter().position(|other| source.conflicts(other)) {
            return Err(MemoryError::FileOfTwoZones {
                first: zones[other].id.clone(),
                second: zone.id.clone(),
            });
        }
        sources.push(source);
    }
    Ok(sources)
}

/// Huge pages beyond the limit of a control group would end the guest when it touches them. Pages that a file has
/// already are charged, and those of virtio-mem come only when they are plugged.
fn check_huge_page_limits(zones: &[ZonePlan], sources: &[Source]) -> Result<(), MemoryError> {
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    for (zone, source) in zones.iter().zip(sources) {
        if !source.is_hugetlb() || zone.kind == ZoneKind::VirtioMem {
            continue;
        }
        let sum = sums.entry(source.page_bytes).or_default();
        *sum = sum.saturating_add(zone.bytes.saturating_sub(source.allocated_bytes()));
        hugetlb_limit::check(Counts::Used, *sum, source.page_bytes)
            .map_err(|source| zone.error(source))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{GIB, MIB};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use vm_memory::Bytes;

    fn config(bytes: u64) -> MemoryConfig {
        MemoryConfig {
            size: bytes,
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn ram_large_is_two_regions_around_the_hole() {
        let memory = GuestMemory::new(&config(5 * GIB), 46).unwrap();
        let ram = memory.ram().memory();
        assert_eq!(ram.num_regions(), 2);
        ram.write_obj(7u32, GuestAddress(6 * GIB - 4)).unwrap();
        assert!(ram.write_obj(7u32, GuestAddress(3 * GIB)).is_err());
    }

    #[test]
    fn ram_not_a_multiple_of_huge_pages_is_refused() {
        let config = MemoryConfig {
            hugepages: true,
            hugepage_size: Some(2 * MIB),
            ..config(63 * MIB)
        };
        assert!(matches!(
            GuestMemory::validate(&config, 46),
            Err(MemoryError::NotPageMultiple { page_bytes, .. }) if page_bytes == 2 * MIB
        ));
    }

    fn zone(id: &str, bytes: u64, file: Option<&Path>, shared: bool) -> MemoryZoneConfig {
        MemoryZoneConfig {
            id: id.to_owned(),
            size: bytes,
            file: file.map(Path::to_owned),
            shared,
            ..MemoryZoneConfig::default()
        }
    }

    fn zoned(zones: Vec<MemoryZoneConfig>) -> MemoryConfig {
        MemoryConfig {
            zones: Some(zones),
            ..config(0)
        }
    }

    #[test]
    fn ram_of_zones_is_one_span_that_ends_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let file = File::create_new(&path).unwrap();
        file.set_len(4 * GIB).unwrap();
        let config = zoned(vec![
            zone("a", GIB, None, false),
            zone("b", 3 * GIB, Some(&path), true),
        ]);
        let memory = GuestMemory::new(&config, 46).unwrap();
        let zones: Vec<_> = memory
            .zones()
            .iter()
            .map(|zone| (zone.id.as_str(), zone.bytes(), zone.backing))
            .collect();
        assert_eq!(
            zones,
            [
                ("a", GIB, "anonymous-private"),
                ("b", 3 * GIB, "file-shared")
            ]
        );
        let ram = memory.ram().memory();
        assert_eq!(ram.num_regions(), 3);
        // Across the boundary of two zones, and after the hole, where the file continues.
        let across = GuestAddress(GIB - 2);
        ram.write_slice(b"abcd", across).unwrap();
        ram.write_slice(b"high", GuestAddress(4 * GIB)).unwrap();
        let file = File::open(&path).unwrap();
        let mut found = [0; 4];
        file.read_exact_at(&mut found, 2 * GIB).unwrap();
        assert_eq!(&found, b"high");
        file.read_exact_at(&mut found[..2], 0).unwrap();
        assert_eq!(&found[..2], b"cd");
        let mut back = [0; 4];
        ram.read_slice(&mut back, across).unwrap();
        assert_eq!(&back, b"abcd");
    }

    #[test]
    fn ram_of_two_zones_in_one_file_is_refused_unless_both_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        File::create_new(&path).unwrap().set_len(4 * MIB).unwrap();
        let memory = |first, second| {
            GuestMemory::new(
                &zoned(vec![
                    zone("a", 4 * MIB, Some(&path), first),
                    zone("b", 4 * MIB, Some(&path), second),
                ]),
                46,
            )
        };
        memory(false, false).unwrap();
        for (first, second) in [(true, true), (false, true), (true, false)] {
            let refused = memory(first, second).unwrap_err();
            assert!(refused.is_of_configuration(), "{refused}");
        }
    }

    #[test]
    fn ram_of_huge_pages_that_would_straddle_the_hole_is_refused() {
        let huge = MemoryZoneConfig {
            hugepages: true,
            hugepage_size: Some(2 * MIB),
            ..zone("b", 4 * MIB, None, false)
        };
        let config = zoned(vec![zone("a", 3 * GIB - MIB, None, false), huge]);
        let refused = GuestMemory::new(&config, 46).unwrap_err();
        let MemoryError::Zone { id, source } = refused else {
            panic!("{refused}");
        };
        assert_eq!(id, "b");
        // Only a kernel without huge pages reports another value.
        assert!(
            matches!(
                source,
                ZoneError::NotPageMultiple { bytes: MIB, .. } | ZoneError::Host { .. }
            ),
            "{source}"
        );
    }

    #[test]
    fn ram_of_a_zone_that_cannot_be_made_names_it() {
        let config = zoned(vec![
            zone("a", 4 * MIB, None, false),
            zone("b", 4 * MIB, Some(Path::new("/no/such/file")), false),
        ]);
        assert!(matches!(
            GuestMemory::new(&config, 46),
            Err(MemoryError::Zone { id, source: ZoneError::Open { .. } }) if id == "b"
        ));
    }

    #[test]
    fn ram_of_zones_that_grow_has_blocks_sized_for_all_of_them() {
        let growing = |id: &str, hotplug_bytes| MemoryZoneConfig {
            hotplug_size: Some(hotplug_bytes),
            ..zone(id, 64 * MIB, None, false)
        };
        let config = MemoryConfig {
            hotplug_method: HotplugMethod::VirtioMem,
            ..zoned(vec![
                growing("a", 20 * GIB),
                zone("b", 64 * MIB, None, false),
                growing("c", 20 * GIB),
            ])
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let ids: Vec<_> = memory
            .zones()
            .iter()
            .map(|zone| (zone.id.as_str(), zone.configured_id()))
            .collect();
        let expected = [
            ("a", "a"),
            ("b", "b"),
            ("c", "c"),
            ("a-hotplug", "a"),
            ("c-hotplug", "c"),
        ];
        assert_eq!(ids, expected);
        let regions = memory.hotplug_ram().iter();
        let regions: Vec<_> = regions.map(|it| (it.range(), it.block_bytes())).collect();
        let (first, second) = (4 * GIB..24 * GIB, 24 * GIB..44 * GIB);
        // With blocks of 2 MiB, both together would have more than 16,384.
        assert_eq!(regions, [(first, 4 * MIB), (second, 4 * MIB)]);
        assert_eq!(memory.map().hotplug, 4 * GIB..44 * GIB);
        assert_eq!(memory.map().devices_64bit.start, 44 * GIB);
    }

    #[test]
    fn ram_that_is_a_file_cannot_grow_but_files_of_a_directory_can() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        File::create_new(&path).unwrap().set_len(GIB).unwrap();
        let memory = |path: &Path, shared| {
            let growing = MemoryZoneConfig {
                hotplug_size: Some(GIB),
                ..zone("a", 64 * MIB, Some(path), shared)
            };
            let config = MemoryConfig {
                hotplug_method: HotplugMethod::VirtioMem,
                ..zoned(vec![growing])
            };
            GuestMemory::new(&config, 46)
        };
        for shared in [false, true] {
            let refused = memory(&path, shared).unwrap_err();
            assert!(
                matches!(&refused, MemoryError::GrowsInFile { id } if id == "a"),
                "{refused}"
            );
            assert!(refused.is_of_configuration());
            memory(folder.path(), shared).unwrap();
        }
    }

    #[test]
    fn ram_more_than_the_host_can_map_is_an_error() {
        // A process has 47 address bits; the guest would occupy all of them.
        assert!(matches!(
            GuestMemory::new(&config(1 << 47), 52),
            Err(MemoryError::Zone {
                source: ZoneError::Map { .. },
                ..
            })
        ));
    }

    #[test]
    fn ram_to_be_plugged_in_lies_behind_ram_and_costs_nothing() {
        let with_room = |bytes, shared| MemoryConfig {
            hotplug_method: HotplugMethod::VirtioMem,
            hotplug_size: Some(GIB),
            prefault: true,
            shared,
            ..config(bytes)
        };
        for (bytes, start) in [
            (64 * MIB, 4 * GIB),
            (3 * GIB + 4 * MIB, 4 * GIB + 128 * MIB),
        ] {
            let map = GuestMemory::plan(&with_room(bytes, false), 46).unwrap().map;
            assert_eq!(map.hotplug, start..start + GIB);
            assert_eq!(map.devices_64bit.start, start + GIB);
        }
        for shared in [false, true] {
            let memory = GuestMemory::new(&with_room(64 * MIB, shared), 46).unwrap();
            assert_eq!(memory.own_bytes(), 64 * MIB);
            let zone = memory.zones().last().unwrap();
            assert_eq!((zone.id.as_str(), zone.bytes()), ("mem0-hotplug", GIB));
            let told: u64 = memory
                .e820()
                .iter()
                .map(|entry| entry.start + entry.bytes)
                .max()
                .unwrap();
            assert!(told <= 4 * GIB, "the guest is told of it at boot");
            memory
                .ram()
                .memory()
                .write_obj(1_u8, GuestAddress(5 * GIB - 1))
                .unwrap();
            let probe = virtio_devices::reclaim::ResidencyProbe::new(memory.ram().clone()).unwrap();
            let sample = probe.measure().unwrap();
            let last = sample.regions.last().unwrap();
            // At most a huge page for the byte that was written.
            assert!(
                last.bytes == GIB && last.resident_bytes <= 2 * MIB,
                "{last:?}"
            );
            assert_eq!(sample.regions[0].resident_bytes, 64 * MIB);
        }
        assert!(matches!(
            GuestMemory::validate(&with_room(5 * GIB, false), 33),
            Err(MemoryError::AddressSpace { bytes, .. }) if bytes == 6 * GIB
        ));
    }
}
