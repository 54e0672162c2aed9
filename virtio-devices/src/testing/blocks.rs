//! Access to the blocks of virtio-mem, without a machine.

use std::collections::BTreeSet;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Unpoisoned;
use crate::mem::BlockAccess;
use crate::reclaim::GuestRange;

/// Remembers which blocks are open.
#[derive(Debug)]
pub struct TestBlocks {
    block_bytes: u64,
    open: Mutex<BTreeSet<u64>>,
    refuses: AtomicBool,
}

impl TestBlocks {
    /// Closed blocks of `block_bytes`.
    #[must_use]
    pub fn new(block_bytes: u64) -> Self {
        Self {
            block_bytes,
            open: Mutex::default(),
            refuses: AtomicBool::default(),
        }
    }

    /// The guest addresses of the open blocks.
    pub fn open(&self) -> Vec<u64> {
        self.open.lock().unpoisoned().iter().copied().collect()
    }

    /// From now on, blocks can or cannot be opened and closed.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::Release);
    }
}

impl BlockAccess for TestBlocks {
    fn set(&self, range: GuestRange, open: bool) -> io::Result<()> {
        if self.refuses.load(Ordering::Acquire) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut blocks = self.open.lock().unpoisoned();
        for block in 0..range.bytes / self.block_bytes {
            let start = range.start + block * self.block_bytes;
            if open {
                blocks.insert(start);
            } else {
                blocks.remove(&start);
            }
        }
        Ok(())
    }

    fn is_bypassed(&self) -> bool {
        false
    }

    fn refused_accesses(&self) -> u64 {
        0
    }
}
