//! A region for memory hot-plug: guest and devices can access only its open blocks. Each zone that grows has one.
//!
//! ```text
//!                 block    0     1     2     3     …
//!   VMM           ├──────────── one mapping ────────────┤
//!   KVM           │      slot  slot        slot           one slot per open block
//!   devices       │      ├─ region ─┤      ├ region ┤     one region per run of them
//!   assigned      │      pinned pinned      pinned         one mapping per open block, without a virtual IOMMU
//! ```
//!
//! Slots are only added and removed, never changed. To change a slot, KVM removes it and adds it again, while the guest
//! may be using its other blocks.
#![allow(unsafe_code)]
// UNSAFETY: memory slots hand address ranges of this process to the kernel; regions of devices are parts of one mapping.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use hypervisor::{MemorySlot, Vm};
use virtio_devices::mem::BlockAccess;
use virtio_devices::reclaim::GuestRange;
use virtio_devices::{GuestRam, Unpoisoned};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

use super::MemoryError;
use super::layout::MIB;
use crate::bus::BusDevice;

/// The minimum size of a block: the guest can return a transparent huge page.
const BLOCK_BYTES_MIN: u64 = 2 * MIB;
/// The maximum number of blocks: half of the memory slots that KVM has had since Linux 5.12. The others are for devices.
const BLOCKS_MAX: u64 = 16 << 10;
/// Slots to be left for devices on a host with fewer slots.
const DEVICE_SLOTS_MIN: u64 = 256;

/// Size of the blocks of a region, made of pages of `page_bytes`. All regions together have `bytes`.
pub fn hotplug_block_bytes(bytes: u64, page_bytes: u64) -> u64 {
    let for_slots = bytes.div_ceil(BLOCKS_MAX).checked_next_power_of_two();
    let for_slots = for_slots.unwrap_or(1 << 63);
    for_slots.max(page_bytes).max(BLOCK_BYTES_MIN)
}

/// Accesses to RAM outside of this process's view: the assigned devices that have all of RAM pinned.
pub(crate) trait PinnedBlocks: Send + Sync {
    /// Gives the devices access to an open block, which stays mapped until [`PinnedBlocks::unpin`].
    ///
    /// # Errors
    /// The IOMMU rejects it, or a limit of locked memory does.
    fn pin(&self, guest_address: u64, block: &VolatileSlice<'_>) -> io::Result<()>;

    /// Undoes that. The devices have no access when this returns.
    ///
    /// # Errors
    /// The IOMMU fails; the devices may still have access.
    fn unpin(&self, guest_address: u64, bytes: u64) -> io::Result<()>;
}

/// RAM as devices access it: the RAM that the guest has from the start, and the open blocks of all regions.
#[derive(Debug)]
pub(super) struct DeviceView {
    ram: GuestRam,
    boot: Vec<Arc<GuestRegionMmap>>,
    /// Runs of open blocks, by the start of their region.
    open: Mutex<BTreeMap<u64, Vec<Arc<GuestRegionMmap>>>>,
}

impl DeviceView {
    /// A view without open blocks. `all` has all of RAM.
    pub(super) fn new(all: &GuestRam, boot: Vec<Arc<GuestRegionMmap>>) -> Self {
        let map = GuestMemoryMmap::from_arc_regions(boot.clone());
        let map = map.expect("they are in order, and there is at least one");
        Self {
            ram: all.other_map(map),
            boot,
            open: Mutex::default(),
        }
    }

    /// Replaces the runs of the region at `start`.
    fn show(&self, start: u64, runs: Vec<Arc<GuestRegionMmap>>) {
        let mut open = self.open.lock().unpoisoned();
        open.insert(start, runs);
        let regions = self.boot.iter().chain(open.values().flatten()).cloned();
        let map = GuestMemoryMmap::from_arc_regions(regions.collect());
        let map = map.expect("regions are behind other RAM, and they and their runs are in order");
        self.ram.lock().unpoisoned().replace(map);
    }
}

/// The region.
#[derive(Debug)]
pub struct HotplugRam {
    /// The name of the zone that grows.
    zone_id: String,
    block_bytes: u64,
    /// All of the region.
    whole: Arc<GuestRegionMmap>,
    view: Arc<DeviceView>,
    blocks: Mutex<Blocks>,
    refused: AtomicU64,
    bypassed: AtomicBool,
}

#[derive(Debug, Default)]
struct Blocks {
    /// The numbers of the open blocks.
    open: BTreeSet<u64>,
    /// Present while there is a machine.
    slots: Option<Slots>,
    /// Regions of devices by first block.
    regions: BTreeMap<u64, Arc<GuestRegionMmap>>,
    /// Mappings of these and former regions, while a device holds them.
    handed: Vec<Weak<MmapRegion<()>>>,
    /// No block is opened or closed: the guest's writes are recorded per slot.
    frozen: bool,
    pinned: Pinned,
}

/// Who pins the open blocks, as long as it exists.
#[derive(Default)]
struct Pinned(Option<Weak<dyn PinnedBlocks>>);

virtio_devices::debug_fields!(Pinned {});

impl Pinned {
    fn get(&self) -> Option<Arc<dyn PinnedBlocks>> {
        self.0.as_ref()?.upgrade()
    }
}

#[derive(Debug)]
struct Slots {
    vm: Arc<Vm>,
    /// Number of the first block's slot.
    first: u32,
}

impl HotplugRam {
    /// All blocks of `whole` are closed.
    pub(super) fn new(
        zone_id: &str,
        view: Arc<DeviceView>,
        whole: Arc<GuestRegionMmap>,
        block_bytes: u64,
    ) -> Self {
        Self {
            zone_id: zone_id.to_owned(),
            block_bytes,
            whole,
            view,
            blocks: Mutex::default(),
            refused: AtomicU64::default(),
            bypassed: AtomicBool::default(),
        }
    }

    /// RAM as devices access it.
    pub(super) fn view(&self) -> &GuestRam {
        &self.view.ram
    }

    /// The name of the zone that grows.
    pub fn zone_id(&self) -> &str {
        &self.zone_id
    }

    /// Lets another process map the whole region from now on.
    pub fn bypass(&self) {
        self.bypassed.store(true, Ordering::Relaxed);
    }

    /// Size of a block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Guest physical addresses of the region.
    pub fn range(&self) -> Range<u64> {
        let start = self.whole.start_addr().0;
        start..start + self.whole.len()
    }

    fn block_count(&self) -> u64 {
        self.whole.len() / self.block_bytes
    }

    /// Opens blocks for the guest of `vm` from now on, with the slots from `first` on. Returns the first slot behind
    /// them.
    ///
    /// # Errors
    /// KVM has too few slots, or rejects one.
    pub(super) fn attach(&self, vm: &Arc<Vm>, first: u32) -> Result<u32, MemoryError> {
        let slots_max = vm.memory_slots_max();
        let wanted = u64::from(first) + self.block_count() + DEVICE_SLOTS_MIN;
        let end = u32::try_from(u64::from(first) + self.block_count());
        let end = end.ok().filter(|_| wanted <= u64::from(slots_max));
        let end = end.ok_or(MemoryError::TooFewSlots {
            blocks: self.block_count(),
            slots_max,
        })?;
        vm.keep_mappings_of_other_slots()
            .map_err(|source| MemoryError::Slot {
                guest_address: self.range().start,
                source,
            })?;
        let mut blocks = self.blocks.lock().unpoisoned();
        blocks.slots = Some(Slots {
            vm: Arc::clone(vm),
            first,
        });
        Ok(end)
    }

    /// Keeps all blocks as they are until [`HotplugRam::thaw`], and returns the slots of the open ones. The guest is
    /// asked to retry later.
    pub(super) fn freeze(&self) -> Vec<MemorySlot> {
        let mut blocks = self.blocks.lock().unpoisoned();
        blocks.frozen = true;
        let open = blocks.open.iter();
        let slots = blocks.slots.as_ref();
        slots.map_or_else(Vec::new, |slots| {
            open.map(|block| self.slot_of(slots, *block)).collect()
        })
    }

    /// Undoes [`HotplugRam::freeze`].
    pub(super) fn thaw(&self) {
        self.blocks.lock().unpoisoned().frozen = false;
    }

    /// Closes all blocks for the guest and forgets the machine.
    pub(super) fn detach(&self) {
        let mut blocks = self.blocks.lock().unpoisoned();
        let Some(slots) = blocks.slots.take() else {
            return;
        };
        for block in &blocks.open {
            if let Err(error) = slots.vm.remove_memory_slot(slots.number(*block)) {
                // KVM would continue to use the range, so it stays mapped.
                log::error!("Cannot remove the memory slot of hot-plugged block {block}: {error}");
                std::mem::forget(Arc::clone(&self.whole));
            }
        }
    }

    /// The blocks in a range of whole blocks.
    fn numbers(&self, range: GuestRange) -> io::Result<Range<u64>> {
        let offset = range.start.checked_sub(self.range().start);
        let first = offset.filter(|offset| offset.is_multiple_of(self.block_bytes));
        let first = first.map(|offset| offset / self.block_bytes);
        let numbers = first.map(|first| first..first + range.bytes / self.block_bytes);
        numbers
            .filter(|numbers| numbers.end <= self.block_count())
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn slot_of(&self, slots: &Slots, block: u64) -> MemorySlot {
        let offset = block * self.block_bytes;
        MemorySlot {
            slot: slots.number(block),
            guest_address: self.range().start + offset,
            bytes: self.block_bytes,
            host_address: self.whole.as_ptr() as u64 + offset,
            flags: 0,
        }
    }

    /// Pins all open blocks, and from now on each block as long as it is open.
    ///
    /// # Errors
    /// A block cannot be pinned. The caller drops what has pinned others.
    pub(crate) fn pin_with(&self, pinned: &Arc<dyn PinnedBlocks>) -> io::Result<()> {
        let mut blocks = self.blocks.lock().unpoisoned();
        let mut open = blocks.open.iter();
        open.try_for_each(|block| self.pin(&**pinned, *block))?;
        blocks.pinned = Pinned(Some(Arc::downgrade(pinned)));
        Ok(())
    }

    fn pin(&self, pinned: &dyn PinnedBlocks, block: u64) -> io::Result<()> {
        let offset = block * self.block_bytes;
        let in_mapping = |bytes| usize::try_from(bytes).expect("a part of a mapping");
        let whole = self.whole.as_volatile_slice().map_err(io::Error::other)?;
        let part = whole.subslice(in_mapping(offset), in_mapping(self.block_bytes));
        pinned.pin(
            self.range().start + offset,
            &part.map_err(io::Error::other)?,
        )
    }

    fn unpin(&self, pinned: &dyn PinnedBlocks, block: u64) -> io::Result<()> {
        pinned.unpin(
            self.range().start + block * self.block_bytes,
            self.block_bytes,
        )
    }

    /// Opens a block for assigned devices and the guest.
    fn open_block(&self, blocks: &Blocks, block: u64) -> io::Result<()> {
        let pinned = blocks.pinned.get();
        if let Some(pinned) = &pinned {
            self.pin(&**pinned, block)?;
        }
        let slots = blocks.slots.as_ref();
        let opened = slots.map_or(Ok(()), |slots| self.open_for_guest(slots, block));
        if let (Err(_), Some(pinned)) = (&opened, pinned)
            && let Err(error) = self.unpin(&*pinned, block)
        {
            log::error!("Hot-plugged block {block} stays pinned: {error}");
        }
        opened
    }

    /// Closes a block for the guest and assigned devices. On an error it is open.
    fn close_block(&self, blocks: &Blocks, block: u64) -> io::Result<()> {
        if let Some(slots) = &blocks.slots {
            let removed = slots.vm.remove_memory_slot(slots.number(block));
            removed.map_err(|error| refused(&error))?;
        }
        let unpinned = blocks.pinned.get();
        let unpinned = unpinned.map_or(Ok(()), |pinned| self.unpin(&*pinned, block));
        if unpinned.is_err()
            && let Some(slots) = &blocks.slots
        {
            self.open_for_guest(slots, block)?;
        }
        unpinned
    }

    fn open_for_guest(&self, slots: &Slots, block: u64) -> io::Result<()> {
        let slot = self.slot_of(slots, block);
        // SAFETY: the range is a part of `whole`, which is readable and writable and for the guest alone. `whole` stays
        // mapped until `detach` has removed the slot again.
        unsafe { slots.vm.set_memory_slot(slot) }.map_err(|error| refused(&error))
    }

    /// Gives devices access to exactly the open blocks.
    fn show(&self, blocks: &mut Blocks) {
        let mut before = std::mem::take(&mut blocks.regions);
        for run in runs(&blocks.open) {
            let bytes = (run.end - run.start) * self.block_bytes;
            let kept = before.remove(&run.start).filter(|it| it.len() == bytes);
            let region = kept.unwrap_or_else(|| {
                let mapping = Arc::new(self.part(run.start, bytes));
                blocks.handed.push(Arc::downgrade(&mapping));
                let start = GuestAddress(self.range().start + run.start * self.block_bytes);
                let region = GuestRegionMmap::with_arc(mapping, start);
                Arc::new(region.expect("the whole region has addresses"))
            });
            blocks.regions.insert(run.start, region);
        }
        drop(before);
        let open = blocks.regions.values().cloned().collect();
        self.view.show(self.range().start, open);
        blocks.handed.retain(|mapping| mapping.strong_count() > 0);
    }

    /// A part of the mapping, from a block on.
    fn part(&self, block: u64, bytes: u64) -> MmapRegion<()> {
        let in_mapping = |bytes| usize::try_from(bytes).expect("a part of a mapping");
        let offset = block * self.block_bytes;
        let mut part = MmapRegionBuilder::new(in_mapping(bytes))
            .with_mmap_prot(self.whole.prot())
            .with_mmap_flags(self.whole.flags());
        if let Some(huge) = self.whole.is_hugetlbfs() {
            part = part.with_hugetlbfs(huge);
        }
        if let Some(file) = self.whole.file_offset() {
            let file = FileOffset::from_arc(Arc::clone(file.arc()), file.start() + offset);
            part = part.with_file_offset(file);
        }
        let start = self.whole.as_ptr().wrapping_add(in_mapping(offset));
        // SAFETY: the part lies in `whole`, which is mapped until `drop` has found that no part is left.
        let part = unsafe { part.with_raw_mmap_pointer(start) };
        part.build().expect("blocks are whole pages")
    }
}

impl BlockAccess for HotplugRam {
    fn set(&self, range: GuestRange, open: bool) -> io::Result<()> {
        let numbers = self.numbers(range)?;
        let mut guard = self.blocks.lock().unpoisoned();
        let blocks = &mut *guard;
        let change: Vec<u64> = numbers
            .filter(|block| blocks.open.contains(block) != open)
            .collect();
        if blocks.frozen && !change.is_empty() {
            let reason = "the VM is being migrated";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
        }
        if open {
            let mut result = Ok(());
            for block in change {
                result = self.open_block(blocks, block);
                if result.is_err() {
                    break;
                }
                blocks.open.insert(block);
            }
            self.show(blocks);
            return result;
        }
        // Devices first: they must not start an access that the guest can no longer see.
        change.iter().for_each(|block| {
            blocks.open.remove(block);
        });
        self.show(blocks);
        let mut left = change.iter();
        let result = left.try_for_each(|block| self.close_block(blocks, *block));
        if result.is_err() {
            // The block that failed, and those behind it.
            let kept = change.len() - left.len() - 1;
            blocks.open.extend(&change[kept..]);
            self.show(blocks);
        }
        result
    }

    fn is_bypassed(&self) -> bool {
        self.bypassed.load(Ordering::Relaxed)
    }

    fn refused_accesses(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Slots {
    fn number(&self, block: u64) -> u32 {
        let block = u32::try_from(block).expect("`attach` has found a number for every block");
        self.first + block
    }
}

/// The guest's accesses to closed blocks arrive here, because there is no memory slot.
impl BusDevice for HotplugRam {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        data.fill(u8::MAX);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for HotplugRam {
    fn drop(&mut self) {
        self.detach();
        let blocks = self.blocks.get_mut().unpoisoned();
        blocks.open.clear();
        let mut blocks = std::mem::take(blocks);
        self.show(&mut blocks);
        if !blocks.handed.is_empty() {
            // Never happens, because all users of guest RAM end before it. If it does, the memory stays mapped.
            log::error!("Hot-plugged memory is still in use and stays mapped");
            std::mem::forget(Arc::clone(&self.whole));
        }
    }
}

fn refused(error: &hypervisor::Error) -> io::Error {
    io::Error::other(::api::error_line(error))
}

/// Runs of consecutive numbers.
fn runs(numbers: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == *number => run.end += 1,
            _ => runs.push(*number..number + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use api::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig};
    use hypervisor::Kvm;
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::memory::GuestMemory;
    use crate::memory::layout::GIB;

    const BLOCK: u64 = 2 * MIB;
    const START: u64 = 4 * GIB;

    fn memory(shared: bool) -> GuestMemory {
        let config = MemoryConfig {
            size: 64 * MIB,
            hotplug_method: HotplugMethod::VirtioMem,
            hotplug_size: Some(128 * MIB),
            shared,
            ..MemoryConfig::default()
        };
        GuestMemory::new(&config, 46).unwrap()
    }

    fn set(memory: &GuestMemory, blocks: Range<u64>, open: bool) -> io::Result<()> {
        let range = GuestRange {
            start: START + blocks.start * BLOCK,
            bytes: (blocks.end - blocks.start) * BLOCK,
        };
        memory.hotplug_ram()[0].set(range, open)
    }

    /// The numbers of the blocks that devices can write to.
    fn reachable(memory: &GuestMemory) -> Vec<u64> {
        let ram = memory.device_ram().memory();
        let writes = |block: &u64| {
            let start = GuestAddress(START + block * BLOCK);
            ram.write_obj(7_u8, start).is_ok()
                && ram
                    .write_obj(7_u8, GuestAddress(start.0 + BLOCK - 1))
                    .is_ok()
        };
        (0..128).filter(writes).collect()
    }

    /// The IOMMU in front of assigned devices: the pinned blocks.
    #[derive(Default)]
    struct Iommu {
        pinned: Mutex<BTreeMap<u64, usize>>,
        fails: AtomicBool,
    }

    impl Iommu {
        fn blocks(&self) -> Vec<u64> {
            let pinned = self.pinned.lock().unwrap();
            pinned.keys().map(|start| (start - START) / BLOCK).collect()
        }

        fn check(&self) -> io::Result<()> {
            match self.fails.load(Ordering::Relaxed) {
                true => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
                false => Ok(()),
            }
        }
    }

    impl PinnedBlocks for Iommu {
        fn pin(&self, guest_address: u64, block: &VolatileSlice<'_>) -> io::Result<()> {
            self.check()?;
            let mut pinned = self.pinned.lock().unwrap();
            assert_eq!(block.len() as u64, BLOCK);
            let before = pinned.insert(guest_address, block.ptr_guard_mut().as_ptr() as usize);
            assert!(before.is_none(), "{guest_address:#x} is pinned");
            Ok(())
        }

        fn unpin(&self, guest_address: u64, bytes: u64) -> io::Result<()> {
            self.check()?;
            assert_eq!(bytes, BLOCK);
            let removed = self.pinned.lock().unwrap().remove(&guest_address);
            assert!(removed.is_some(), "{guest_address:#x} is not pinned");
            Ok(())
        }
    }

    #[test]
    fn assigned_devices_have_exactly_the_open_blocks_pinned() {
        let memory = memory(false);
        set(&memory, 1..3, true).unwrap();
        let iommu = Arc::new(Iommu::default());
        let pinned = iommu.clone() as Arc<dyn PinnedBlocks>;
        memory.hotplug_ram()[0].pin_with(&pinned).unwrap();
        assert_eq!(iommu.blocks(), [1, 2]);
        set(&memory, 0..6, true).unwrap();
        assert_eq!(iommu.blocks(), [0, 1, 2, 3, 4, 5]);
        set(&memory, 2..4, false).unwrap();
        assert_eq!(iommu.blocks(), [0, 1, 4, 5]);
        // The IOMMU fails: nothing changes.
        iommu.fails.store(true, Ordering::Relaxed);
        set(&memory, 0..2, false).unwrap_err();
        set(&memory, 3..4, true).unwrap_err();
        assert_eq!(iommu.blocks(), [0, 1, 4, 5]);
        assert_eq!(reachable(&memory), [0, 1, 4, 5]);
        iommu.fails.store(false, Ordering::Relaxed);
        // The last device goes, and another one comes.
        drop(pinned);
        drop(iommu);
        set(&memory, 0..1, false).unwrap();
        let iommu = Arc::new(Iommu::default());
        let pinned = iommu.clone() as Arc<dyn PinnedBlocks>;
        memory.hotplug_ram()[0].pin_with(&pinned).unwrap();
        assert_eq!(iommu.blocks(), [1, 4, 5]);
    }

    #[test]
    fn devices_reach_open_blocks_and_no_others() {
        for shared in [false, true] {
            let memory = memory(shared);
            let boot = memory.own_bytes();
            assert_eq!(reachable(&memory), [0; 0]);
            let ram = memory.device_ram().memory();
            ram.write_obj(1_u8, GuestAddress(boot - 1)).unwrap();
            set(&memory, 1..3, true).unwrap();
            set(&memory, 3..4, true).unwrap();
            set(&memory, 63..64, true).unwrap();
            assert_eq!(reachable(&memory), [1, 2, 3, 63]);
            let ram = memory.device_ram().memory();
            assert_eq!(ram.num_regions(), 3, "neighbours are one region");
            // It is the memory that the VMM has mapped, and discards.
            let at = GuestAddress(START + 3 * BLOCK - 2);
            ram.write_slice(b"abcd", at).unwrap();
            let mut found = [0; 4];
            memory.ram().memory().read_slice(&mut found, at).unwrap();
            assert_eq!(&found, b"abcd");
            set(&memory, 2..3, false).unwrap();
            set(&memory, 0..2, true).unwrap();
            assert_eq!(reachable(&memory), [0, 1, 3, 63]);
            // A user that holds the old regions keeps them until it reads the regions again.
            ram.read_slice(&mut found, at).unwrap();
            set(&memory, 0..64, false).unwrap();
            assert_eq!(reachable(&memory), [0; 0]);
        }
    }

    #[test]
    fn regions_of_two_zones_open_and_close_apart_and_devices_see_both() {
        let zone = |id: &str, shared| MemoryZoneConfig {
            id: id.to_owned(),
            size: 64 * MIB,
            shared,
            hotplug_size: Some(128 * MIB),
            ..MemoryZoneConfig::default()
        };
        let config = MemoryConfig {
            size: 0,
            hotplug_method: HotplugMethod::VirtioMem,
            zones: Some(vec![zone("a", false), zone("b", true)]),
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let regions = memory.hotplug_ram();
        let found = regions.iter().map(|it| (it.zone_id(), it.range()));
        let second = START + 128 * MIB;
        let expected = [("a", START..second), ("b", second..second + 128 * MIB)];
        assert_eq!(found.collect::<Vec<_>>(), expected);
        let set = |index: usize, start, open| {
            let bytes = BLOCK;
            regions[index].set(GuestRange { start, bytes }, open)
        };
        // The last block of one and the first of the other: two mappings.
        set(1, second, true).unwrap();
        set(0, second - BLOCK, true).unwrap();
        set(0, second, true).unwrap_err();
        assert_eq!(reachable(&memory), [63, 64]);
        let ram = memory.device_ram().memory();
        assert_eq!(ram.num_regions(), 4);
        ram.write_slice(b"abcd", GuestAddress(second - 2)).unwrap();
        drop(ram);
        set(0, second - BLOCK, false).unwrap();
        assert_eq!(reachable(&memory), [64]);
        set(1, second, false).unwrap();
        assert_eq!(reachable(&memory), [0; 0]);
        assert_eq!(memory.own_bytes(), 128 * MIB);
    }

    #[test]
    fn two_regions_have_slots_one_behind_the_other() {
        let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let zone = |id: &str| MemoryZoneConfig {
            id: id.to_owned(),
            size: 64 * MIB,
            hotplug_size: Some(128 * MIB),
            ..MemoryZoneConfig::default()
        };
        let config = MemoryConfig {
            size: 0,
            hotplug_method: HotplugMethod::VirtioMem,
            zones: Some(vec![zone("a"), zone("b")]),
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).unwrap();
        let slots = memory.attach(&vm).unwrap();
        assert_eq!(slots.end(), 2 + 2 * 64);
        for region in memory.hotplug_ram() {
            let Range { start, end } = region.range();
            let bytes = end - start;
            region.set(GuestRange { start, bytes }, true).unwrap();
        }
        drop(slots);
        // Neither has left a slot behind.
        memory.attach(&vm).unwrap();
    }

    #[test]
    fn ranges_that_are_no_blocks_are_refused() {
        let memory = memory(false);
        let hotplug = &memory.hotplug_ram()[0];
        for (start, bytes) in [
            (START - BLOCK, BLOCK),
            (START + 4096, BLOCK),
            (START + 63 * BLOCK, 2 * BLOCK),
            (0, BLOCK),
        ] {
            assert!(hotplug.set(GuestRange { start, bytes }, true).is_err());
        }
        assert_eq!(reachable(&memory), [0; 0]);
    }

    #[test]
    fn part_in_use_keeps_the_memory_mapped() {
        let memory = memory(false);
        set(&memory, 0..1, true).unwrap();
        let ram = memory.device_ram().memory();
        ram.write_obj(7_u8, GuestAddress(START)).unwrap();
        drop(memory);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(START)).unwrap(), 7);
    }

    #[test]
    fn blocks_are_as_large_as_the_slots_require() {
        for (bytes, page_bytes, block_bytes) in [
            (128 * MIB, 4096, 2 * MIB),
            (32 * GIB, 4096, 2 * MIB),
            (33 * GIB, 4096, 4 * MIB),
            (64 * GIB, 2 * MIB, 4 * MIB),
            (GIB, GIB, GIB),
            (u64::MAX, 4096, 1 << 50),
        ] {
            assert_eq!(hotplug_block_bytes(bytes, page_bytes), block_bytes);
        }
    }

    #[test]
    fn guest_has_a_slot_for_each_open_block() {
        let Ok(kvm) = Kvm::open().map_err(test_skip::skip) else {
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let memory = memory(false);
        let slots = memory.attach(&vm).unwrap();
        assert_eq!(slots.end(), 1 + 64);
        let other = MmapRegion::<()>::new(BLOCK as usize).unwrap();
        // KVM rejects a slot that overlaps another.
        let has_slot = |block: u64| {
            let slot = MemorySlot {
                slot: slots.end(),
                guest_address: START + block * BLOCK,
                bytes: BLOCK,
                host_address: other.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the mapping outlives the slot, which is removed immediately.
            let refused = unsafe { vm.set_memory_slot(slot) }.is_err();
            if !refused {
                vm.remove_memory_slot(slots.end()).unwrap();
            }
            refused
        };
        let open = || (0..64).filter(|block| has_slot(*block)).collect::<Vec<_>>();
        assert_eq!(open(), [0; 0]);
        set(&memory, 5..8, true).unwrap();
        set(&memory, 6..7, false).unwrap();
        // A second request changes nothing.
        set(&memory, 7..9, true).unwrap();
        assert_eq!(open(), [5, 7, 8]);
        // Another slot in the way: the first block is open, the second is not.
        let intruder = MemorySlot {
            slot: slots.end(),
            guest_address: START + 21 * BLOCK,
            bytes: BLOCK,
            host_address: other.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: as above.
        unsafe { vm.set_memory_slot(intruder) }.unwrap();
        let error = set(&memory, 20..22, true).unwrap_err().to_string();
        assert!(error.contains("KVM_SET_USER_MEMORY_REGION"), "{error}");
        assert_eq!(reachable(&memory), [5, 7, 8, 20]);
        vm.remove_memory_slot(slots.end()).unwrap();
        assert_eq!(open(), [5, 7, 8, 20]);
        drop(slots);
        // The machine has left no slot behind.
        set(&memory, 0..64, false).unwrap();
        let slots = memory.attach(&vm).unwrap();
        set(&memory, 0..64, true).unwrap();
        drop(slots);
    }
}
