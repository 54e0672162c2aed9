//! The VMM's handle to the device.

use std::sync::Arc;

use super::shared::Shared;

/// One device; clones refer to the same device. No call waits for the guest.
#[derive(Clone, Debug)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

/// A size that the region cannot have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// Only whole blocks can be plugged.
    #[error(
        "{bytes} bytes of hot-plugged memory are not a multiple of the block size of {block_bytes} bytes"
    )]
    NotWholeBlocks {
        /// The requested value.
        bytes: u64,
        /// Size of a block.
        block_bytes: u64,
    },
    /// More than the size of the region.
    #[error("{bytes} bytes of hot-plugged memory exceed the region of {region_bytes} bytes")]
    BeyondRegion {
        /// The requested value.
        bytes: u64,
        /// The region's size.
        region_bytes: u64,
    },
}

impl MemHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Requests that the guest plugs `bytes`, and returns immediately. The guest works towards this size at its own
    /// pace, as far as it can.
    ///
    /// # Errors
    /// The region cannot have that size.
    pub fn set_requested_bytes(&self, bytes: u64) -> Result<(), ResizeError> {
        let region = &self.shared.region;
        if bytes > region.bytes() {
            return Err(ResizeError::BeyondRegion {
                bytes,
                region_bytes: region.bytes(),
            });
        }
        if !bytes.is_multiple_of(region.block_bytes()) {
            return Err(ResizeError::NotWholeBlocks {
                bytes,
                block_bytes: region.block_bytes(),
            });
        }
        self.shared.set_requested_bytes(bytes);
        self.shared.interrupt.signal();
        Ok(())
    }

    /// The requested size.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.shared.requested_bytes()
    }

    /// The plugged size.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        self.shared.plugged_bytes()
    }

    /// Memory that the guest can take beyond the plugged size without another request.
    #[must_use]
    pub fn obtainable_bytes(&self) -> u64 {
        let most = match self.shared.access.is_bypassed() {
            true => self.region_bytes(),
            false => self.requested_bytes(),
        };
        most.saturating_sub(self.plugged_bytes())
    }

    /// The maximum size.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        self.shared.region.bytes()
    }
}
