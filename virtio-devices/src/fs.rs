//! Shared folder (virtio 1.2 §5.11): a file system of the host, which a vhost-user back end such as virtiofsd serves.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::device::{Counters, QueueHandler, VirtioDevice, read_config_space};
use crate::empty_state::{empty_state, saves_empty_state};
use crate::vhost_user::{self, Endpoint, Link, RING_FEATURES, Shared};

/// Virtio device id.
const DEVICE_TYPE: u32 = 26;
/// Maximum length of a tag.
pub const TAG_BYTES_MAX: usize = 36;
/// The tag, and the number of request queues.
const CONFIG_BYTES: usize = TAG_BYTES_MAX + 4;
/// The queue for FORGET and INTERRUPT, which take precedence over other requests.
const PRIORITY_QUEUES: usize = 1;

/// Parameters of the device.
#[derive(Debug)]
pub struct FsParams {
    /// Names the device and its threads.
    pub id: String,
    /// The name under which the guest mounts the folder, at most [`TAG_BYTES_MAX`] bytes.
    pub tag: String,
    /// The socket on which the back end listens.
    pub socket: PathBuf,
    /// Number of request queues.
    pub num_queues: u16,
    /// Entries in each queue.
    pub queue_size: u16,
}

empty_state! {
    /// The configuration half has no state that a driver could change.
    FsState = FS
}

/// The configuration half.
pub struct Fs {
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    handlers: Vec<Box<dyn QueueHandler>>,
    shared: Arc<Shared>,
}

crate::debug_fields!(Fs {
    queue_sizes,
    shared
});

impl Fs {
    /// The device connects to the back end later, and reconnects whenever the connection is lost.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(params: FsParams) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let queues = PRIORITY_QUEUES + usize::from(params.num_queues);
        let mut config = [0; CONFIG_BYTES];
        let tag = params.tag.as_bytes();
        let bytes = tag.len().min(TAG_BYTES_MAX);
        config[..bytes].copy_from_slice(&tag[..bytes]);
        config[TAG_BYTES_MAX..].copy_from_slice(&u32::from(params.num_queues).to_le_bytes());
        let link = Link::new(
            &params.id,
            Endpoint::Connect(params.socket),
            queues,
            Arc::clone(&shared),
        )?;
        Ok(Self {
            config,
            queue_sizes: vec![params.queue_size; queues],
            handlers: vhost_user::handlers(params.id, link, &shared),
            shared,
        })
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    fn ram_is_mapped_elsewhere(&self) -> bool {
        true
    }

    saves_empty_state!(FsState);

    fn counters(&self) -> Counters {
        self.shared.read()
    }
}
