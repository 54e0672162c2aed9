//! An interrupt that only counts.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Interrupt;

/// Records a device's signals.
#[derive(Debug, Default)]
pub struct MockInterrupt {
    queues: Mutex<BTreeMap<u16, u64>>,
    config: AtomicU64,
    needs_reset: AtomicU64,
}

impl MockInterrupt {
    /// Number of used buffer notifications of that queue so far.
    pub fn queue_signals(&self, queue_index: u16) -> u64 {
        let queues = self.queues.lock().expect("no test panicked in here");
        queues.get(&queue_index).copied().unwrap_or(0)
    }

    /// Number of configuration change notifications so far.
    pub fn config_signals(&self) -> u64 {
        self.config.load(Ordering::SeqCst)
    }

    /// Whether the device failed.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst) > 0
    }
}

impl Interrupt for MockInterrupt {
    fn signal_queue(&self, queue_index: u16) {
        let mut queues = self.queues.lock().expect("no test panicked in here");
        *queues.entry(queue_index).or_default() += 1;
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}
