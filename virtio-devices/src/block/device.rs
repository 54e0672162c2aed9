//! The configuration half of a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use state::{Fields, Part, Saved, State, StateError, parts, require};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::config_space::{self, CONFIG_BYTES, WRITEBACK_AT};
use super::container::Container;
use super::counters::BlockCounters;
use super::disk::{DiskState, SERIAL_BYTES};
use super::engine::new_engine;
use super::flights::Flights;
use super::image::Image;
use super::queue::BlockQueue;
use super::resize::DiskHandle;
use super::{BlockError, BlockParams, QUEUE_SIZE_MAX, QUEUES_MAX};
use crate::config_interrupt::ConfigInterrupt;
use crate::device::{Counters, Interrupt, QueueHandler, VirtioDevice, read_config_space};
use crate::rate_limit::RateLimiterState;
use crate::thread_name::thread_name;
use crate::worker::Throttle;

/// Device id (virtio 1.2 §5).
const VIRTIO_ID_BLOCK: u32 = 2;
const QUEUE_SIZE_MIN: u16 = 4;

/// The saved state of a disk beyond its configuration. The image's content is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Size the guest sees; the image must still have it.
    pub capacity_sectors: u64,
    /// The driver has put the cache in write-back mode.
    pub writeback: bool,
    /// Its rate limit. All disks of a group save the same one.
    pub limit: RateLimiterState,
}

impl State for BlockState {
    const PART: Part = parts::BLOCK;

    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        // Version 1 had no limits.
        RateLimiterState::add_none(fields, "limit");
        Ok(())
    }
}

/// A virtio disk (virtio 1.2 §5.2).
pub struct Block {
    disk: Arc<DiskState>,
    features: u64,
    queue_sizes: Vec<u16>,
    handlers: Vec<Box<dyn QueueHandler>>,
}

crate::debug_fields!(Block { disk });

impl Block {
    /// Opens and locks the image, and creates the I/O engines. Dropping the device releases everything.
    ///
    /// # Errors
    /// See [`BlockError`]; nothing is left behind.
    pub fn new(params: BlockParams) -> Result<Self, BlockError> {
        check(&params)?;
        let image = Arc::new(Image::open(&params)?);
        let serial = params.serial.as_deref().unwrap_or(image.default_serial());
        let disk = Arc::new(DiskState {
            serial: padded(serial),
            capacity_sectors: AtomicU64::new(image.sectors()),
            writeback: AtomicBool::new(true),
            counters: BlockCounters::default(),
            interrupt: ConfigInterrupt::default(),
            image,
            params,
        });
        let params = &disk.params;
        let handlers = (0..params.num_queues)
            .map(|index| new_queue(&disk, index))
            .collect::<Result<_, _>>()
            .map_err(|source| BlockError::Engine {
                path: params.path.clone(),
                source,
            })?;
        Ok(Self {
            features: config_space::features(params),
            queue_sizes: vec![params.queue_size; usize::from(params.num_queues)],
            handlers,
            disk,
        })
    }

    /// The handle by which the VMM resizes the disk.
    pub fn handle(&self) -> DiskHandle {
        DiskHandle::new(Arc::clone(&self.disk))
    }

    /// Size the guest sees, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.disk.capacity_sectors.load(Ordering::Acquire) * super::SECTOR_BYTES
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        config_space::bytes(
            &self.disk.params,
            self.disk.image.topology(),
            self.disk.capacity_sectors.load(Ordering::Acquire),
            self.disk.writeback(),
        )
    }
}

fn check(params: &BlockParams) -> Result<(), BlockError> {
    let BlockParams {
        num_queues,
        queue_size,
        ..
    } = *params;
    if !(1..=QUEUES_MAX).contains(&num_queues) {
        return Err(BlockError::QueueCount { num_queues });
    }
    if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size) {
        return Err(BlockError::QueueSize { queue_size });
    }
    match params.serial.as_ref().map(String::len) {
        Some(bytes) if bytes > SERIAL_BYTES => Err(BlockError::SerialTooLong { bytes }),
        _ => Ok(()),
    }
}

/// A derived serial may be too long; its beginning suffices to distinguish disks.
fn padded(serial: &str) -> [u8; SERIAL_BYTES] {
    let mut padded = [0; SERIAL_BYTES];
    let len = serial.len().min(SERIAL_BYTES);
    padded[..len].copy_from_slice(&serial.as_bytes()[..len]);
    padded
}

fn new_queue(disk: &Arc<DiskState>, index: u16) -> std::io::Result<Box<dyn QueueHandler>> {
    let depth = disk.params.queue_size;
    let engine = new_engine(disk.params.engine, &disk.image, depth)?;
    let flights = Flights::new(engine, depth);
    let name = thread_name(&disk.params.id, &format!("_q{index}"));
    let host_cpus = disk.params.queue_affinity.get(&index).cloned();
    let queue = BlockQueue::new(
        name,
        host_cpus.unwrap_or_default(),
        Arc::clone(disk),
        flights,
        Throttle::new(Arc::clone(&disk.params.limiter))?,
    );
    Ok(Box::new(queue))
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    /// For a driver that cannot flush, the cache is in write-through mode (virtio 1.2 §5.2.5.2); otherwise its writes
    /// could never become stable.
    fn ack_features(&mut self, features: u64) {
        let can_flush = config_space::has(features, VIRTIO_BLK_F_FLUSH);
        self.disk.writeback.store(can_flush, Ordering::Release);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match data {
            [value @ (0 | 1)] if offset == WRITEBACK_AT as u64 => {
                self.disk.writeback.store(*value == 1, Ordering::Release);
            }
            _ => {
                self.disk.counters.counts.bad_requests.count();
            }
        }
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    fn handler_of_queue(&self, queue_index: u16, _features: u64) -> Option<usize> {
        let index = usize::from(queue_index);
        (index < self.queue_sizes.len()).then_some(index)
    }

    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.disk.interrupt.attach(&interrupt);
    }

    fn reset(&mut self) {
        self.disk.writeback.store(true, Ordering::Release);
    }

    fn state(&self) -> Saved {
        Saved::of(&BlockState {
            capacity_sectors: self.disk.capacity_sectors.load(Ordering::Acquire),
            writeback: self.disk.writeback(),
            limit: self.disk.params.limiter.state(),
        })
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let state = state.read::<BlockState>()?;
        let sectors = self.disk.capacity_sectors.load(Ordering::Acquire);
        let found = state.capacity_sectors;
        require(found == sectors, parts::BLOCK, "capacity_sectors", || {
            format!("is {found}, the image has {sectors}")
        })?;
        let limiter = &self.disk.params.limiter;
        limiter.restore(&state.limit, parts::BLOCK, "limit")?;
        self.disk
            .writeback
            .store(state.writeback, Ordering::Release);
        Ok(())
    }

    fn counters(&self) -> Counters {
        let mut counters = self.disk.counters.snapshot();
        let errors = self.disk.image.container().map_or(0, Container::errors);
        counters.insert("image_errors", errors);
        counters
    }
}
