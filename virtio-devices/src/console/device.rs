//! The configuration half of the console and the VMM's handle.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::endpoint::ConsoleEndpoint;
use super::handler::ConsoleHandler;
use super::shared::Shared;
use crate::config_interrupt::ConfigInterrupt;
use crate::device::{
    Counters, Interrupt, QueueHandler, VirtioDevice, WorkerError, boxed, read_config_space,
};
use crate::empty_state::{empty_state, saves_empty_state};

/// Virtio device id.
const DEVICE_TYPE: u32 = 3;
/// Receive and transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Feature bit: columns and rows are valid.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// Ports without VIRTIO_CONSOLE_F_MULTIPORT.
const MAX_NR_PORTS: u32 = 1;

/// Size of the terminal behind a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Characters in a row.
    pub columns: u16,
    /// Number of rows.
    pub rows: u16,
}

empty_state! {
    /// A console has no state of its own: its size is that of the current terminal, which the driver receives when it is
    /// resumed.
    ConsoleState = CONSOLE
}

/// The configuration half.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    interrupt: Arc<ConfigInterrupt>,
    handler: Option<ConsoleHandler>,
    sized: bool,
}

impl Console {
    /// A console on `endpoint`; `id` names the device and its thread. A `window` is offered to the guest as
    /// VIRTIO_CONSOLE_F_SIZE.
    ///
    /// # Errors
    /// No eventfd is available.
    pub fn new(
        id: &str,
        endpoint: ConsoleEndpoint,
        window: Option<WindowSize>,
    ) -> Result<Self, WorkerError> {
        let shared = Arc::new(Shared::default());
        if let Some(window) = window {
            shared.window.store(pack(window), Ordering::Relaxed);
        }
        Ok(Self {
            handler: Some(ConsoleHandler::new(id, endpoint, Arc::clone(&shared))?),
            shared,
            interrupt: Arc::default(),
            sized: window.is_some(),
        })
    }

    /// The VMM's handle.
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle {
            shared: Arc::clone(&self.shared),
            interrupt: Arc::clone(&self.interrupt),
        }
    }
}

/// Notifies a running console of changes of its terminal.
#[derive(Debug, Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
    interrupt: Arc<ConfigInterrupt>,
}

impl ConsoleHandle {
    /// The terminal has been resized.
    pub fn resize(&self, window: WindowSize) {
        let packed = pack(window);
        if self.shared.window.swap(packed, Ordering::SeqCst) != packed {
            self.interrupt.signal();
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | u64::from(self.sized) << VIRTIO_CONSOLE_F_SIZE
    }

    /// `struct virtio_console_config`: cols, rows, max_nr_ports, emerg_wr.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let window = self.shared.window.load(Ordering::SeqCst);
        let fields = [window, MAX_NR_PORTS, 0].map(u32::to_le_bytes);
        read_config_space(fields.as_flattened(), offset, data);
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        boxed(self.handler.take())
    }

    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.interrupt.attach(&interrupt);
    }

    saves_empty_state!(ConsoleState);

    fn counters(&self) -> Counters {
        self.shared.counters.read()
    }
}

fn pack(window: WindowSize) -> u32 {
    u32::from(window.columns) | u32::from(window.rows) << 16
}
