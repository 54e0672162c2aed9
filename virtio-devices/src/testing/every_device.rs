//! Runs [`conformance`] for the devices whose creation takes more than a line.

use std::sync::{Arc, Mutex};

use tempfile::NamedTempFile;

use super::conformance;
use crate::balloon::{Balloon, BalloonParams};
use crate::block::{Block, BlockParams, EngineChoice, ImageFormat};
use crate::fs::{Fs, FsParams};

#[test]
fn balloon_conforms() {
    conformance("balloon", |ram| {
        let (balloon, _handle) = Balloon::new(BalloonParams {
            ram: ram.mem(),
            size_bytes: 1 << 20,
            deflate_on_oom: true,
            free_page_reporting: true,
            free_page_hinting: true,
            reporting_policy: true,
        })
        .unwrap();
        Arc::new(Mutex::new(balloon))
    });
}

fn block_conforms(engine: EngineChoice, num_queues: u16) {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    conformance(&format!("block-{num_queues}"), |_| {
        let block = Block::new(BlockParams {
            id: "_disk0".into(),
            path: image.path().into(),
            num_queues,
            queue_size: 128,
            sparse: true,
            format: Some(ImageFormat::Raw),
            engine,
            ..BlockParams::default()
        });
        Arc::new(Mutex::new(block.unwrap()))
    });
}

#[test]
fn block_with_system_calls_conforms() {
    block_conforms(EngineChoice::Sync, 1);
}

#[test]
fn block_with_the_best_engine_and_two_queues_conforms() {
    block_conforms(EngineChoice::Auto, 2);
}

/// Another process serves its queues. The device must conform even if that process does not exist.
#[test]
fn shared_folder_without_a_back_end_conforms() {
    let folder = tempfile::tempdir().unwrap();
    conformance("fs", |_| {
        let fs = Fs::new(FsParams {
            id: "_fs0".into(),
            tag: "folder".into(),
            socket: folder.path().join("nobody"),
            num_queues: 1,
            queue_size: 64,
        });
        Arc::new(Mutex::new(fs.unwrap()))
    });
}
