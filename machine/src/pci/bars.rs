//! Keeps the bus mappings of a function's BARs consistent with the addresses that the guest programmed.

use std::fmt;
use std::sync::Arc;

use virtio_devices::pci::{Bar, PciFunction};

use super::{DoorbellBackend, MemoryWindows};
use crate::bus::{Bus, BusDevice};

/// A BAR on the MMIO bus.
struct BarDevice {
    function: Arc<dyn PciFunction>,
    index: u8,
}

impl BusDevice for BarDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.index, offset, data);
    }
}

/// The parts needed to map a BAR.
pub(super) struct Fabric<'a> {
    pub(super) mmio: &'a Bus,
    pub(super) doorbells: &'a dyn DoorbellBackend,
    pub(super) windows: &'a MemoryWindows,
}

/// The result of an update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Remapped {
    /// BARs that cannot be mapped at their address.
    pub(super) refused: u64,
    /// Addresses became free, which another function's unmapped BAR may need.
    pub(super) released: bool,
}

/// The mapped BARs of one function.
#[derive(Default)]
pub(super) struct Mappings {
    mapped: Vec<Bar>,
    /// A decoded BAR is not mapped: it is outside the windows or overlaps another one.
    has_refused: bool,
    /// The function is off the bus; a write still in progress no longer maps anything.
    detached: bool,
}

impl fmt::Debug for Mappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.mapped).finish()
    }
}

impl Mappings {
    /// Unmaps BARs that moved or are no longer decoded, then maps new ones.
    ///
    /// A BAR that the guest placed outside the windows or over another one is not mapped until one of the two is moved.
    pub(super) fn update(
        &mut self,
        function: &Arc<dyn PciFunction>,
        fabric: &Fabric<'_>,
    ) -> Remapped {
        if self.detached {
            return Remapped::default();
        }
        let before = self.mapped.len();
        let wanted: Vec<Bar> = function
            .bars()
            .into_iter()
            .filter(|bar| bar.decoded)
            .collect();
        self.mapped.retain(|bar| {
            let stays = wanted.contains(bar);
            if !stays {
                unmap(function, bar, fabric);
            }
            stays
        });
        let released = self.mapped.len() < before;
        let mut refused = 0;
        for bar in wanted {
            if self.mapped.contains(&bar) {
                continue;
            }
            if map(function, &bar, fabric) {
                self.mapped.push(bar);
            } else {
                refused += 1;
            }
        }
        self.has_refused = refused > 0;
        Remapped { refused, released }
    }

    /// Whether a BAR waits for addresses.
    pub(super) fn has_refused(&self) -> bool {
        self.has_refused
    }

    /// Unmaps everything permanently.
    pub(super) fn detach(&mut self, function: &Arc<dyn PciFunction>, fabric: &Fabric<'_>) {
        self.detached = true;
        self.has_refused = false;
        for bar in self.mapped.drain(..) {
            unmap(function, &bar, fabric);
        }
    }
}

fn map(function: &Arc<dyn PciFunction>, bar: &Bar, fabric: &Fabric<'_>) -> bool {
    if !fabric.windows.forwards(bar.address, bar.size_bytes) {
        return false;
    }
    let device = Arc::new(BarDevice {
        function: Arc::clone(function),
        index: bar.index,
    });
    if let Err(error) = fabric.mmio.insert(bar.address, bar.size_bytes, device) {
        log::debug!("BAR {} of {}: {error}", bar.index, function.id());
        return false;
    }
    function.bar_mapped(bar.index, Some(bar.address));
    function.with_doorbells(&mut |doorbell| {
        if doorbell.bar_index == bar.index
            && let Err(error) = fabric
                .doorbells
                .register_doorbell(bar.address + doorbell.offset, doorbell.event)
        {
            // Not fatal: the write then reaches `bar_write`, which signals the doorbell.
            log::warn!(
                "Cannot register the doorbell of {} with KVM, notifications remain slow: {error}",
                function.id()
            );
        }
    });
    true
}

fn unmap(function: &Arc<dyn PciFunction>, bar: &Bar, fabric: &Fabric<'_>) {
    function.bar_mapped(bar.index, None);
    function.with_doorbells(&mut |doorbell| {
        if doorbell.bar_index == bar.index
            && let Err(error) = fabric
                .doorbells
                .unregister_doorbell(bar.address + doorbell.offset, doorbell.event)
        {
            log::warn!(
                "Cannot unregister the doorbell of {}: {error}",
                function.id()
            );
        }
    });
    fabric.mmio.remove(bar.address);
}
