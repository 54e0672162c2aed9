//! Runs [`conformance`] for the devices whose creation takes more than one line.

use std::fs;
use std::sync::{Arc, Mutex};

use tempfile::NamedTempFile;

use super::conformance;
use super::disk_images::{empty_qcow2, qcow2_over, vhd_footer};
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
            device_init: false,
        })
        .unwrap();
        Arc::new(Mutex::new(balloon))
    });
}

const DISK_BYTES: u64 = 1 << 20;

/// Runs a disk with this image.
fn block_conforms(name: &str, image: &[u8], params: &BlockParams) {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), image).unwrap();
    conformance(name, |_| {
        let block = Block::new(BlockParams {
            id: "_disk0".into(),
            path: file.path().into(),
            queue_size: 128,
            sparse: true,
            ..params.clone()
        });
        Arc::new(Mutex::new(block.unwrap()))
    });
}

fn params(format: ImageFormat, num_queues: u16) -> BlockParams {
    BlockParams {
        format: Some(format),
        num_queues,
        ..BlockParams::default()
    }
}

#[test]
fn block_with_system_calls_conforms() {
    let params = BlockParams {
        engine: EngineChoice::Sync,
        ..params(ImageFormat::Raw, 1)
    };
    block_conforms("block-1", &[0; DISK_BYTES as usize], &params);
}

#[test]
fn block_with_the_best_engine_and_two_queues_conforms() {
    let params = params(ImageFormat::Raw, 2);
    block_conforms("block-2", &[0; DISK_BYTES as usize], &params);
}

#[test]
fn qcow2_with_two_queues_conforms() {
    let params = params(ImageFormat::Qcow2, 2);
    block_conforms("block-qcow2", &empty_qcow2(DISK_BYTES), &params);
}

#[test]
fn qcow2_over_a_backing_file_conforms() {
    let backing = NamedTempFile::new().unwrap();
    fs::write(backing.path(), [0xbb; DISK_BYTES as usize]).unwrap();
    let params = BlockParams {
        backing_files: true,
        ..params(ImageFormat::Qcow2, 1)
    };
    let image = qcow2_over(backing.path(), DISK_BYTES);
    block_conforms("block-qcow2-over", &image, &params);
}

#[test]
fn fixed_vhd_conforms() {
    const FIXED: u32 = 2;
    let mut image = vec![0; DISK_BYTES as usize];
    image.extend(vhd_footer(FIXED, DISK_BYTES));
    block_conforms("block-vhd", &image, &params(ImageFormat::Vhd, 1));
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
