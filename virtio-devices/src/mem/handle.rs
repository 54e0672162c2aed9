//! The device as the VMM holds it.

use std::sync::Arc;

use super::shared::Shared;

/// One device; clones are the same. No call waits for the guest.
#[derive(Clone, Debug)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

/// A size that the region cannot have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// Blocks come and go whole.
    #[error("{bytes} bytes of hotplugged memory are no whole blocks of {block_bytes} bytes")]
    NotWholeBlocks {
        /// What was asked for.
        bytes: u64,
        /// Size of a block.
        block_bytes: u64,
    },
    /// More than there is room for.
    #[error(
        "{bytes} bytes of hotplugged memory are more than the {region_bytes} bytes there is room for"
    )]
    BeyondRegion {
        /// What was asked for.
        bytes: u64,
        /// Room.
        region_bytes: u64,
    },
}

impl MemHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the guest to have `bytes` plugged and returns at once; the guest works towards it in its own time, as far
    /// as it can.
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
        self.shared.signal_config();
        Ok(())
    }

    /// What the guest shall have.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.shared.requested_bytes()
    }

    /// What the guest has.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        self.shared.plugged_bytes()
    }

    /// The most it can have.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        self.shared.region.bytes()
    }
}
