//! The configuration half, which contains the guest's address.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::counters::Shared;
use super::handler::VsockHandler;
use super::muxer::Muxer;
use crate::device::{Counters, QueueHandler, VirtioDevice, boxed, read_config_space};
use crate::empty_state::{empty_state, saves_empty_state};
use crate::listening_socket::ListeningSocket;

/// Virtio device id.
const DEVICE_TYPE: u32 = 19;
/// Queues: receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256; 3];

/// Parameters of the device.
#[derive(Debug)]
pub struct VsockParams {
    /// Names the device and its thread.
    pub id: String,
    /// The guest's context id, above 2.
    pub cid: u32,
    /// The socket to which host programs connect. The guest connects to sockets with this path plus `_PORT`.
    pub socket: PathBuf,
}

empty_state! {
    /// The configuration half has no state that a driver could change.
    VsockState = VSOCK
}

/// The configuration half.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    handler: Option<VsockHandler>,
    shared: Arc<Shared>,
}

impl Vsock {
    /// Listens on the socket. When the worker thread ends, it closes the socket and removes its path.
    ///
    /// # Errors
    /// The socket cannot be created, or is in use.
    pub fn new(params: VsockParams) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let cid = u64::from(params.cid);
        let listener = ListeningSocket::bind(&params.socket)?;
        let muxer = Muxer::new(cid, listener, Arc::clone(&shared))?;
        Ok(Self {
            cid,
            handler: Some(VsockHandler::new(params.id, muxer, Arc::clone(&shared))),
            shared,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.cid.to_le_bytes(), offset, data);
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take())
    }

    saves_empty_state!(VsockState);

    fn counters(&self) -> Counters {
        self.shared.read()
    }
}
