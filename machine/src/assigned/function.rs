//! An assigned device as a function on the machine's bus.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_devices::counters::counters;
use virtio_devices::dma::DmaEndpoint;
use virtio_devices::pci::{Bar, DoorbellRegister, MsiMessage, MsiVectors, MsixTable, PciFunction};
use virtio_devices::{Counters, Unpoisoned};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config_space::ConfigSpace;
use super::error::AssignError;
use super::host::{HostDevice, HostMapping, InterruptKind};
use super::layout::{BarLayout, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, Layout};

/// The unit of mappings.
const PAGE_BYTES: u64 = 4096;
/// MSI-X message control: enabled.
const MSIX_ENABLE: u16 = 1 << 15;

/// Shows mapped registers to the guest.
pub(crate) trait BarSlots: Send + Sync {
    /// Shows `mapping` at a guest address, and returns the number for [`BarSlots::remove`]. The caller keeps the mapping
    /// until then.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn add(&self, guest_address: u64, mapping: &HostMapping) -> io::Result<u32>;
    /// Hides it again.
    ///
    /// # Errors
    /// The hypervisor refuses: the guest may still see it.
    fn remove(&self, number: u32) -> io::Result<()>;
}

/// The mapped part of a BAR.
struct Window {
    bar: u8,
    offset: u64,
    mapping: Arc<HostMapping>,
}

/// A window that the guest sees: the number of its slot, and what keeps it mapped.
type ShownWindow = (u32, Arc<HostMapping>);

counters! {
    /// Counters of an assigned device, each of which the guest can increase at will.
    AssignedCounters {
        /// Parts of BARs that cannot be mapped, so that each access leaves the guest.
        slow_bars,
        /// Parts of BARs that cannot be unmapped.
        stuck_bars,
        /// Changes of the interrupts that the host refused.
        refused_interrupts,
    }
}

struct Registers {
    config: ConfigSpace,
    msix: Option<MsixTable>,
    /// The message of MSI, while the device uses it.
    msi: Option<MsiMessage>,
    /// The device signals the vectors of MSI-X.
    msix_is_on: bool,
}

/// An assigned device.
pub(crate) struct AssignedFunction {
    id: String,
    layout: Layout,
    registers: Mutex<Registers>,
    /// One for each vector; the device signals them.
    events: Vec<EventFd>,
    vectors: Arc<dyn MsiVectors>,
    slots: Arc<dyn BarSlots>,
    windows: Vec<Window>,
    /// The slots of the windows of each mapped BAR.
    shown: Mutex<BTreeMap<u8, Vec<ShownWindow>>>,
    counters: AssignedCounters,
    /// Behind the virtual IOMMU: its end takes all memory away from the device.
    _dma: Option<Arc<DmaEndpoint>>,
    /// Dropped last: the windows are parts of it, and its container has the mappings of the endpoint.
    host: Arc<dyn HostDevice>,
}

impl fmt::Debug for AssignedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("AssignedFunction");
        fields.field("id", &self.id).finish_non_exhaustive()
    }
}

impl AssignedFunction {
    /// Reads and resets the device. `dma` is its connection to the virtual IOMMU, if it is behind it. `vectors` makes the interrupts of the guest from one event for each vector.
    ///
    /// # Errors
    /// The device cannot be presented, or the host has no descriptors or address space left.
    pub(crate) fn new<V: MsiVectors + 'static>(
        id: &str,
        (host, dma): (Arc<dyn HostDevice>, Option<Arc<DmaEndpoint>>),
        slots: Arc<dyn BarSlots>,
        vectors: impl FnOnce(Vec<EventFd>) -> V,
    ) -> Result<Arc<Self>, AssignError> {
        host.reset();
        let layout = Layout::read(&*host)?;
        // BARs respond from now on. The guest's own bit only decides whether they are on the bus: an access to a mapped
        // BAR that does not respond would end the virtual machine.
        set_command(&*host, COMMAND_MEMORY);
        let count = layout.msix.map_or(1, |msix| msix.vectors);
        let events = || -> io::Result<Vec<EventFd>> {
            (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect()
        };
        let events = events().map_err(AssignError::Host)?;
        let own = events
            .iter()
            .map(EventFd::try_clone)
            .collect::<Result<_, _>>();
        let vectors: Arc<dyn MsiVectors> = Arc::new(vectors(own.map_err(AssignError::Host)?));
        let mut windows = Vec::new();
        for bar in &layout.bars {
            for area in mapped_areas(&layout, bar, &host.bar_areas(bar.index)) {
                let mapping = host.map(bar.index, &area).map_err(AssignError::Host)?;
                windows.push(Window {
                    bar: bar.index,
                    offset: area.start,
                    mapping: Arc::new(mapping),
                });
            }
        }
        let msix = layout
            .msix
            .map(|msix| MsixTable::new(msix.vectors, Arc::clone(&vectors)));
        Ok(Arc::new(Self {
            id: id.to_owned(),
            registers: Mutex::new(Registers {
                config: ConfigSpace::new(&layout),
                msix,
                msi: None,
                msix_is_on: false,
            }),
            layout,
            events,
            vectors,
            slots,
            windows,
            shown: Mutex::default(),
            counters: AssignedCounters::default(),
            _dma: dma,
            host,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unpoisoned()
    }

    /// Lets the device use the interrupts that the guest has enabled. MSI-X has precedence; a device uses one kind.
    fn apply_interrupts(&self, registers: &mut Registers) {
        let view = registers.config.view();
        let wants_msix = registers.msix.is_some() && view.msix_control & MSIX_ENABLE != 0;
        let msi = view.msi.filter(|_| !wants_msix);
        if registers.msi != msi {
            if registers.msi.take().is_some() && msi.is_none() {
                self.set_interrupts(InterruptKind::Msi, &[]);
                self.note(self.vectors.disable(0));
            }
            if registers.msix_is_on {
                self.set_interrupts(InterruptKind::Msix, &[]);
                registers.msix_is_on = false;
            }
            if let Some(message) = msi {
                self.note(self.vectors.enable(0, message));
                self.set_interrupts(InterruptKind::Msi, &self.events[..1]);
                registers.msi = msi;
            }
        }
        if let Some(msix) = &mut registers.msix {
            if wants_msix != registers.msix_is_on {
                let events: &[EventFd] = if wants_msix { &self.events } else { &[] };
                // Otherwise it is tried again at the guest's next change.
                if self.set_interrupts(InterruptKind::Msix, events) {
                    registers.msix_is_on = wants_msix;
                }
            }
            msix.set_control(view.msix_control);
        }
    }

    /// Returns false if the host refuses.
    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> bool {
        let set = self.host.set_interrupts(kind, events);
        if let Err(error) = &set
            && self.counters.refused_interrupts.count_loudly()
        {
            let (id, count) = (&self.id, events.len());
            log::warn!("{id}: cannot set {count} vectors of {kind:?}: {error}");
        }
        set.is_ok()
    }

    fn note(&self, result: io::Result<()>) {
        if let Err(error) = result {
            log::debug!("{}: interrupt: {error}", self.id);
        }
    }

    /// Shows the windows of a BAR to the guest, or hides them. Without its windows a BAR works, but each access leaves
    /// the guest.
    fn show(&self, index: u8, address: Option<u64>) {
        let mut shown = self.shown.lock().unpoisoned();
        for (number, mapping) in shown.remove(&index).unwrap_or_default() {
            if let Err(error) = self.slots.remove(number) {
                // The guest may still use the range: it stays mapped forever, so that it accesses nothing else.
                if self.counters.stuck_bars.count_loudly() {
                    log::warn!("{}: cannot hide BAR {index}: {error}", self.id);
                }
                std::mem::forget(mapping);
            }
        }
        let Some(address) = address else { return };
        let windows = self.windows.iter().filter(|window| window.bar == index);
        for Window {
            offset, mapping, ..
        } in windows
        {
            match self.slots.add(address + offset, mapping) {
                Ok(number) => {
                    let shown = shown.entry(index).or_default();
                    shown.push((number, Arc::clone(mapping)));
                }
                Err(error) => {
                    if self.counters.slow_bars.count_loudly() {
                        log::warn!("{}: BAR {index} remains slow: {error}", self.id);
                    }
                }
            }
        }
    }

    fn is_msix_table(&self, index: u8, offset: u64, bytes: usize) -> Option<u64> {
        let table = self.layout.msix?.table_in(index);
        let inside = table.start <= offset && offset + bytes as u64 <= table.end;
        inside.then(|| offset - table.start)
    }
}

/// A pause does nothing, because only the guest can stop the device.
impl PciFunction for AssignedFunction {
    fn id(&self) -> &str {
        &self.id
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(&*self.host, offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut registers = self.lock();
        let before = (registers.config.view(), self.bars_of(&registers));
        registers.config.write(&*self.host, offset, data);
        let after = (registers.config.view(), self.bars_of(&registers));
        if before.0.is_bus_master != after.0.is_bus_master {
            let bus_master = if after.0.is_bus_master {
                COMMAND_BUS_MASTER
            } else {
                0
            };
            set_command(&*self.host, COMMAND_MEMORY | bus_master);
        }
        if before.0 != after.0 {
            self.apply_interrupts(&mut registers);
        }
        before.1 != after.1
    }

    fn bars(&self) -> Vec<Bar> {
        self.bars_of(&self.lock())
    }

    fn set_bar_address(&self, index: u8, address: u64) {
        self.lock().config.set_bar_address(index, address);
    }

    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]) {
        if let Some(at) = self.is_msix_table(index, offset, data.len()) {
            if let Some(msix) = &self.lock().msix {
                msix.read_table(at, data);
            }
            return;
        }
        self.host.bar_read(index, offset, data);
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        if let Some(at) = self.is_msix_table(index, offset, data.len()) {
            if let Some(msix) = &mut self.lock().msix {
                msix.write_table(at, data);
            }
            return;
        }
        self.host.bar_write(index, offset, data);
    }

    fn bar_mapped(&self, index: u8, address: Option<u64>) {
        self.show(index, address);
    }

    fn with_doorbells(&self, _visit: &mut dyn FnMut(DoorbellRegister<'_>)) {}

    fn counters(&self) -> Counters {
        let mut counters = self.counters.read();
        counters.insert("unanswered_accesses", self.host.unanswered_accesses());
        counters
    }

    fn resume(&self) {}

    fn reset(&self) {
        let mut registers = self.lock();
        registers.config.reset();
        self.apply_interrupts(&mut registers);
        if let Some(msix) = &mut registers.msix {
            msix.reset();
        }
        drop(registers);
        // May take seconds; in the meantime others may read the BARs.
        self.host.reset();
        set_command(&*self.host, COMMAND_MEMORY);
    }
}

impl AssignedFunction {
    fn bars_of(&self, registers: &Registers) -> Vec<Bar> {
        let decoded = registers.config.view().decoded;
        let bar = |bar: &BarLayout| Bar {
            index: bar.index,
            size_bytes: bar.bytes,
            is_64bit: bar.is_64bit,
            address: registers.config.bar_address(bar),
            decoded,
        };
        self.layout.bars.iter().map(bar).collect()
    }
}

impl Drop for AssignedFunction {
    fn drop(&mut self) {
        let shown: Vec<u8> = self.shown.lock().unpoisoned().keys().copied().collect();
        for index in shown {
            self.show(index, None);
        }
        // No access to RAM follows, whatever becomes of the group.
        set_command(&*self.host, 0);
        for kind in [InterruptKind::Msi, InterruptKind::Msix] {
            // An error: the device does not have this kind, or it is off.
            self.host.set_interrupts(kind, &[]).ok();
        }
    }
}

fn set_command(host: &dyn HostDevice, command: u8) {
    host.config_write(COMMAND as u16, &[command]);
}

/// The parts of a BAR that the guest accesses directly: what can be mapped, without the pages of the MSI-X structures.
fn mapped_areas(layout: &Layout, bar: &BarLayout, areas: &[Range<u64>]) -> Vec<Range<u64>> {
    let trapped = layout
        .msix
        .map(|msix| [msix.table_in(bar.index), msix.pending_in(bar.index)]);
    let page = |range: &Range<u64>| {
        let end = range.end.next_multiple_of(PAGE_BYTES);
        range.start / PAGE_BYTES * PAGE_BYTES..end
    };
    let mut left: Vec<Range<u64>> = areas
        .iter()
        .map(|area| {
            let start = area.start.next_multiple_of(PAGE_BYTES);
            start..area.end.min(bar.bytes) / PAGE_BYTES * PAGE_BYTES
        })
        .collect();
    for cut in trapped
        .iter()
        .flatten()
        .filter(|it| !it.is_empty())
        .map(page)
    {
        left = left
            .into_iter()
            .flat_map(|area| {
                let before = area.start..area.end.min(cut.start);
                let behind = area.start.max(cut.end)..area.end;
                [before, behind]
            })
            .collect();
    }
    left.retain(|area| area.start < area.end);
    left
}
