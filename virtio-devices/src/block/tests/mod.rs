//! Tests a disk with a mock driver, on real files, with both engines.

mod block_device;
mod container;
mod hostile;
mod limits;
mod model;
mod open;
mod requests;
mod resize;
mod turns;

use std::io::Write;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::{Block, BlockError, BlockParams, EngineChoice, ImageFormat, LockGranularity};
use crate::QueueHandler;
use crate::testing::{Chain, DEADLINE, HandlerHarness, Segment, Used};

/// The second one is for direct I/O.
pub(super) const ENGINES: [EngineChoice; 3] =
    [EngineChoice::Sync, EngineChoice::Aio, EngineChoice::Auto];

pub(super) const S_OK: u8 = 0;
pub(super) const S_IOERR: u8 = 1;
pub(super) const S_UNSUPP: u8 = 2;

/// A file of `sectors` sectors, each filled with its number.
pub(super) fn image(sectors: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("temporary files can be made");
    for sector in 0..sectors {
        file.write_all(&[sector as u8; 512]).expect("disk has room");
    }
    file
}

pub(super) fn params(file: &NamedTempFile) -> BlockParams {
    BlockParams {
        id: "_disk0".into(),
        path: file.path().into(),
        num_queues: 1,
        queue_size: 64,
        sparse: true,
        format: Some(ImageFormat::Raw),
        ..BlockParams::default()
    }
}

pub(super) fn header(request_type: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&request_type.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// A disk with one active queue.
pub(super) struct Rig {
    pub(super) block: Block,
    pub(super) harness: HandlerHarness<Box<dyn QueueHandler>>,
}

impl Rig {
    pub(super) fn new(params: BlockParams) -> Self {
        let block = Block::new(params).expect("parameters are good");
        let features = crate::VirtioDevice::features(&block);
        Self::with_features(block, features)
    }

    pub(super) fn with_features(mut block: Block, features: u64) -> Self {
        let handler = crate::VirtioDevice::take_handlers(&mut block).remove(0);
        let mut harness = HandlerHarness::new(handler, features);
        harness.add_queue(0, 64);
        harness.activate().expect("device activates");
        Self { block, harness }
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        crate::VirtioDevice::counters(&self.block)[name]
    }

    /// Serves the device until a chain is completed.
    pub(super) fn wait_used(&mut self) -> Used {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.harness.queue(0).pop_used() {
                return used;
            }
            assert!(Instant::now() < end, "no answer before the deadline");
            self.harness
                .serve_sources(Duration::from_millis(100).as_millis() as i32)
                .expect("device continues");
        }
    }

    /// Sends `segments` and a status byte; returns chain, used element and status.
    pub(super) fn send(&mut self, segments: &[Segment<'_>]) -> (Chain, Used, u8) {
        let mut all = segments.to_vec();
        all.push(Segment::Writable(1));
        let chain = self.harness.queue(0).push(&all);
        self.harness.kick(0).expect("device continues");
        let used = self.wait_used();
        assert_eq!(used.head, u32::from(chain.head));
        let status = chain.buffers[all.len() - 1];
        let status = self.harness.queue(0).read_buffer(status)[0];
        (chain, used, status)
    }

    pub(super) fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let header = header(1, sector);
        self.send(&[Segment::Readable(&header), Segment::Readable(data)])
            .2
    }

    pub(super) fn read(&mut self, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
        let header = header(0, sector);
        let (chain, _, status) = self.send(&[Segment::Readable(&header), Segment::Writable(bytes)]);
        let data = self.harness.queue(0).read_buffer(chain.buffers[1]);
        (status, data)
    }

    pub(super) fn flush(&mut self) -> u8 {
        self.send(&[Segment::Readable(&header(4, 0))]).2
    }

    /// DISCARD (11) or WRITE_ZEROES (13).
    pub(super) fn on_range(&mut self, request_type: u32, range: [u8; 16]) -> u8 {
        let header = header(request_type, 0);
        self.send(&[Segment::Readable(&header), Segment::Readable(&range)])
            .2
    }
}
