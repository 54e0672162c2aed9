//! A device before and while it is on the bus.

use std::sync::{Arc, Mutex, Weak};

use virtio_devices::dma::DmaEndpoint;
use virtio_devices::pci::{Bar, PciFunction};
use virtio_devices::transport::VirtioPciFunction;
use virtio_devices::{Counters, VirtioDevice};

use super::device_memory::MappedMemory;
use crate::pci::{Bdf, Place};
use crate::threads::DeviceKind;

/// A device and its slot.
pub struct Plug {
    /// Its identifier.
    pub id: String,
    /// Its kind, which determines the permissions of its workers.
    pub kind: DeviceKind,
    /// Its place on the bus.
    pub place: Place,
    /// The device.
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    /// Its connection to the virtual IOMMU, if it is behind it.
    pub dma: Option<Arc<DmaEndpoint>>,
}

virtio_devices::debug_fields!(Plug { id, kind, place });

impl Plug {
    /// Gives the device its number at the virtual IOMMU.
    pub(super) fn place_endpoint(&self, bdf: Bdf) {
        if let Some(dma) = &self.dma {
            dma.place(bdf.endpoint());
        }
    }
}

/// A function as an observer sees it, while it exists. The caller that drops the function must make sure that no thread
/// observes it at that moment: the observer would drop it.
#[derive(Clone)]
pub struct FunctionView(Weak<dyn PciFunction>);

virtio_devices::debug_fields!(FunctionView {});

impl FunctionView {
    /// A view of `function`.
    pub fn new(function: Weak<dyn PciFunction>) -> Self {
        Self(function)
    }

    /// Its BARs with their present addresses.
    pub fn bars(&self) -> Vec<Bar> {
        let function = self.0.upgrade();
        function.map_or(Vec::new(), |function| function.bars())
    }

    /// The identifier and the counters of its device. Takes microseconds.
    pub fn counters(&self) -> Option<(String, Counters)> {
        let function = self.0.upgrade()?;
        Some((function.id().to_owned(), function.counters()))
    }
}

/// A device on the bus.
#[derive(Clone)]
pub struct Plugged {
    /// Its identifier.
    pub id: String,
    /// Its kind.
    pub kind: DeviceKind,
    /// Its address.
    pub bdf: Bdf,
    pub(super) is_behind_iommu: bool,
    pub(super) function: Arc<dyn PciFunction>,
    /// The same function, if it is a virtio device's.
    pub(super) virtio: Option<Arc<VirtioPciFunction>>,
    /// Held for the effect of its drop.
    _memory: Option<Arc<MappedMemory>>,
}

virtio_devices::debug_fields!(Plugged { id, kind, bdf });

impl Plugged {
    /// The device of `plug` once it is on the bus.
    pub(super) fn new(
        plug: Plug,
        bdf: Bdf,
        function: Arc<VirtioPciFunction>,
        memory: Option<MappedMemory>,
    ) -> Self {
        Self {
            id: plug.id,
            kind: plug.kind,
            bdf,
            is_behind_iommu: plug.dma.is_some(),
            function: function.clone(),
            virtio: Some(function),
            _memory: memory.map(Arc::new),
        }
    }

    /// A device of the host that is on the bus.
    pub(super) fn assigned(
        id: String,
        bdf: Bdf,
        function: Arc<dyn PciFunction>,
        is_behind_iommu: bool,
    ) -> Self {
        Self {
            id,
            kind: DeviceKind::Assigned,
            bdf,
            is_behind_iommu,
            function,
            virtio: None,
            _memory: None,
        }
    }

    /// How often this value holds the function.
    pub(super) fn holds(&self) -> usize {
        1 + usize::from(self.virtio.is_some())
    }

    /// A view for observers.
    pub fn view(&self) -> FunctionView {
        FunctionView::new(Arc::downgrade(&self.function))
    }
}
