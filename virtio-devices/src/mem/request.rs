//! Requests and responses in guest memory (virtio 1.2 §5.15.6): little endian, a type and its parameters.

use super::spec::{
    VIRTIO_MEM_REQ_PLUG, VIRTIO_MEM_REQ_STATE, VIRTIO_MEM_REQ_UNPLUG, VIRTIO_MEM_REQ_UNPLUG_ALL,
    VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_RESP_BUSY, VIRTIO_MEM_RESP_ERROR, VIRTIO_MEM_RESP_NACK,
    VIRTIO_MEM_STATE_MIXED, VIRTIO_MEM_STATE_PLUGGED, VIRTIO_MEM_STATE_UNPLUGGED,
};

/// Bytes of `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// Bytes of `struct virtio_mem_resp`.
pub(super) const ANSWER_BYTES: usize = 10;

/// Blocks as the driver named them; not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Guest physical address.
    pub(super) address: u64,
    /// Number of blocks.
    pub(super) count: u16,
}

/// A request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Named),
    Unplug(Named),
    UnplugAll,
    State(Named),
    /// A request of an undefined type.
    Unknown,
}

impl Request {
    /// Type at 0, address at 8, number of blocks at 16; the rest is padding.
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let named = Named {
            address: u64::from_le_bytes(address),
            count: u16_at(16),
        };
        match u16_at(0) {
            VIRTIO_MEM_REQ_PLUG => Self::Plug(named),
            VIRTIO_MEM_REQ_UNPLUG => Self::Unplug(named),
            VIRTIO_MEM_REQ_UNPLUG_ALL => Self::UnplugAll,
            VIRTIO_MEM_REQ_STATE => Self::State(named),
            _ => Self::Unknown,
        }
    }
}

/// Whether blocks are plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

/// The response to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    State(BlockState),
    Nack,
    Busy,
    Error,
}

impl Answer {
    /// Type at 0 and, for a state, the state at 8.
    pub(super) fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (VIRTIO_MEM_RESP_ACK, 0),
            Self::State(BlockState::Plugged) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_PLUGGED),
            Self::State(BlockState::Unplugged) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_UNPLUGGED),
            Self::State(BlockState::Mixed) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_MIXED),
            Self::Nack => (VIRTIO_MEM_RESP_NACK, 0),
            Self::Busy => (VIRTIO_MEM_RESP_BUSY, 0),
            Self::Error => (VIRTIO_MEM_RESP_ERROR, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..2].copy_from_slice(&u16::to_le_bytes(kind));
        bytes[8..].copy_from_slice(&u16::to_le_bytes(state));
        bytes
    }
}
