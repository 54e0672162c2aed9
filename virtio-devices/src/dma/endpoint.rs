//! The IOMMU as a device behind it sees it.

use std::sync::{Arc, OnceLock};

use vm_memory::Permissions;

use super::eras::{Era, Eras};
use super::mapping::HostMappings;
use super::shared::{DmaError, Shared};
use super::tables::{Piece, Tables};

/// A device's connection to the IOMMU in front of it. Dropping it detaches the device.
#[derive(Debug)]
pub struct DmaEndpoint {
    shared: Arc<Shared>,
    /// The endpoint's id, and the device's key to it.
    place: OnceLock<(u32, u64)>,
    eras: Arc<Eras>,
    host: Option<Arc<dyn HostMappings>>,
}

impl DmaEndpoint {
    /// With `host`, of a device that accesses memory through the IOMMU of the host.
    pub(crate) fn new(shared: Arc<Shared>, host: Option<Arc<dyn HostMappings>>) -> Self {
        Self {
            shared,
            place: OnceLock::new(),
            eras: Arc::default(),
            host,
        }
    }

    /// Sets the endpoint's id, which depends on the device's place on the bus. Until then every access fails. Called
    /// once; later calls have no effect.
    pub fn place(&self, endpoint: u32) {
        self.place.get_or_init(|| {
            let (eras, host) = (Arc::clone(&self.eras), self.host.clone());
            let plug = |tables: &mut Tables| tables.plug(endpoint, eras, host);
            let owner = self.shared.change(plug);
            (endpoint, owner)
        });
    }

    /// Begins an access to guest memory.
    pub(crate) fn access(self: &Arc<Self>) -> Access {
        Access {
            _era: self.eras.current(),
            endpoint: Arc::clone(self),
        }
    }
}

/// An access of a device to guest memory, in progress. Translated addresses may be used only as long as it exists. It
/// must end without an action of the guest, because the guest can wait for its end.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    endpoint: Arc<DmaEndpoint>,
    _era: Arc<Era>,
}

impl Access {
    /// The guest addresses of `bytes` bytes from `input` on, as at most `pieces_max` pieces.
    pub(crate) fn translate(
        &self,
        input: u64,
        bytes: u64,
        access: Permissions,
        pieces_max: usize,
    ) -> Result<Vec<Piece>, DmaError> {
        let place = self.endpoint.place.get().ok_or(DmaError::Fault)?;
        self.endpoint
            .shared
            .translate(*place, (input, bytes), access, pieces_max)
    }
}

impl Drop for DmaEndpoint {
    fn drop(&mut self) {
        if let Some((endpoint, owner)) = self.place.get() {
            self.shared
                .change(|tables| tables.unplug(*endpoint, *owner));
        }
    }
}
