//! Tests with real block devices: loop devices over a file, if the test may create them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::VirtioDevice;
use crate::block::engine::new_engine;
use crate::block::image::Image;

/// A loop device, detached when dropped.
struct Loop {
    path: PathBuf,
    _file: NamedTempFile,
}

impl Loop {
    /// A loop device over `sectors` numbered sectors. `None`, which skips the test, if it cannot be created.
    fn new(sectors: u64, logical_block: u32) -> Option<Self> {
        let file = image(sectors);
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size"])
            .arg(logical_block.to_string())
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self {
                path: String::from_utf8(output.stdout).unwrap().trim().into(),
                _file: file,
            }),
            other => {
                test_skip::skip(format!("no loop device: {other:?}"));
                None
            }
        }
    }

    fn params(&self) -> BlockParams {
        BlockParams {
            path: self.path.clone(),
            ..params(&self._file)
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
        assert!(detached.unwrap().success(), "loop device is left behind");
    }
}

#[test]
fn device_is_used_through_the_ring_wherever_its_node_is() {
    let Some(device) = Loop::new(8, 512) else {
        return;
    };
    let image = Arc::new(Image::open(&device.params()).unwrap());
    let has_ring = |choice| {
        let engine = new_engine(choice, &image, 8);
        engine.map(|engine| engine.completion_fd().is_some())
    };
    match has_ring(EngineChoice::IoUring) {
        Ok(has) => assert!(has && has_ring(EngineChoice::Auto).unwrap()),
        Err(error) => test_skip::skip(format!("no io_uring here: {error}")),
    }
}

#[test]
fn device_is_read_written_zeroed_and_discarded() {
    for engine in ENGINES {
        for direct in [false, true] {
            let Some(device) = Loop::new(4096, 512) else {
                return;
            };
            let mut rig = Rig::new(BlockParams {
                engine,
                direct,
                ..device.params()
            });
            assert_eq!(rig.block.size_bytes(), 4096 * 512);
            assert_eq!(rig.write(9, &[7; 1024]), S_OK);
            assert_eq!(rig.flush(), S_OK);
            assert_eq!(rig.read(9, 1024), (S_OK, vec![7; 1024]));
            assert_eq!(rig.read(11, 512), (S_OK, vec![11; 512]));
            for unmap in [0, 1] {
                assert_eq!(rig.on_range(13, range(8, 8, unmap)), S_OK);
                assert_eq!(rig.read(8, 4096), (S_OK, vec![0; 4096]));
                assert_eq!(rig.write(8, &[1; 4096]), S_OK);
            }
            // A discard need not leave zeroes; it must only succeed and leave all other data unchanged.
            assert_eq!(rig.on_range(11, range(16, 16, 0)), S_OK);
            assert_eq!(rig.read(15, 512), (S_OK, vec![1; 512]));
            assert_eq!(rig.read(32, 512), (S_OK, vec![32; 512]));
            assert_eq!(rig.counter("io_errors"), 0);
        }
    }
}

#[test]
fn device_with_4k_blocks_says_so_and_serves_single_sectors() {
    for direct in [false, true] {
        let Some(device) = Loop::new(4096, 4096) else {
            return;
        };
        let mut rig = Rig::new(BlockParams {
            direct,
            ..device.params()
        });
        let mut block_size = [0; 4];
        rig.block.read_config(20, &mut block_size);
        assert_eq!(u32::from_le_bytes(block_size), 4096);
        // A sector of the protocol is an eighth of a block.
        assert_eq!(rig.write(17, &[0xee; 512]), S_OK);
        assert_eq!(rig.read(16, 512), (S_OK, vec![16; 512]));
        assert_eq!(rig.read(17, 512), (S_OK, vec![0xee; 512]));
        assert_eq!(rig.read(18, 512), (S_OK, vec![18; 512]));
        // Crosses a block boundary; both ends are inside a block.
        let data: Vec<u8> = (0..20 * 512u32).map(|at| (at / 512) as u8 ^ 0x55).collect();
        assert_eq!(rig.write(29, &data), S_OK);
        assert_eq!(rig.read(29, 20 * 512), (S_OK, data));
        assert_eq!(rig.read(28, 512), (S_OK, vec![28; 512]));
        assert_eq!(rig.read(49, 512), (S_OK, vec![49; 512]));
        // Zeroes part of a block.
        assert_eq!(rig.on_range(13, range(65, 2, 0)), S_OK);
        assert_eq!(rig.read(64, 512), (S_OK, vec![64; 512]));
        assert_eq!(rig.read(65, 1024), (S_OK, vec![0; 1024]));
        assert_eq!(rig.read(67, 512), (S_OK, vec![67; 512]));
        assert_eq!(rig.counter("io_errors"), 0);
    }
}

#[test]
fn device_in_use_is_locked_against_a_second_writer() {
    let Some(device) = Loop::new(64, 512) else {
        return;
    };
    let first = Block::new(device.params()).unwrap();
    let second = Block::new(device.params());
    assert!(matches!(second, Err(BlockError::Locked { .. })));
    drop(first);
    Block::new(device.params()).expect("free again");
}

#[test]
fn device_that_was_resized_by_its_owner_gets_its_new_size() {
    let Some(device) = Loop::new(64, 512) else {
        return;
    };
    let block = Block::new(device.params()).unwrap();
    let error = block.handle().resize(128 * 512).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the block device has 32768 bytes"),
        "{error}"
    );
    device._file.as_file().set_len(128 * 512).unwrap();
    let status = Command::new("losetup")
        .arg("--set-capacity")
        .arg(&device.path)
        .status();
    assert!(status.unwrap().success());
    block.handle().resize(128 * 512).unwrap();
    assert_eq!(block.size_bytes(), 128 * 512);
}

/// A file system of 4096-byte blocks on a loop device whose sectors have 4096 bytes, unmounted when dropped.
struct FileSystem {
    folder: tempfile::TempDir,
    device: Loop,
}

impl FileSystem {
    const SECTORS: u64 = 32 << 11;

    /// `None`, which skips the test, if it cannot be made.
    fn new() -> Option<Self> {
        let device = Loop::new(Self::SECTORS, 4096)?;
        let folder = tempfile::tempdir().unwrap();
        let done = |command: &mut Command| {
            let output = command.output();
            let done = output.as_ref().is_ok_and(|it| it.status.success());
            if !done {
                test_skip::skip(format!("{command:?}: {output:?}"));
            }
            done
        };
        let mut make = Command::new("mkfs.ext4");
        make.args(["-q", "-b", "4096"]).arg(&device.path);
        let mut mount = Command::new("mount");
        mount.arg(&device.path).arg(folder.path());
        (done(&mut make) && done(&mut mount)).then(|| Self { folder, device })
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.folder.path()).status();
        assert!(unmounted.unwrap().success(), "it is still mounted");
    }
}

/// Direct I/O needs blocks of 4096 bytes there, and the image may end within one.
#[test]
fn image_on_a_file_system_of_4k_blocks_has_blocks_that_show_all_of_it() {
    let Some(file_system) = FileSystem::new() else {
        return;
    };
    let path = file_system.folder.path().join("disk");
    for engine in ENGINES {
        for (extra, logical, physical_exponent) in [(0, 4096_u32, 0), (512, 512, 3), (100, 512, 3)]
        {
            let mut content: Vec<u8> = (0..64 * 512_u32).map(|at| (at / 512) as u8).collect();
            content.resize(content.len() + extra, 0xee);
            std::fs::write(&path, &content).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            if crate::block::disk_sys::dio_alignment(&file).is_none_or(|(_, offset)| offset != 4096)
            {
                test_skip::skip("the file system does not report the alignment of direct I/O");
                return;
            }
            let mut rig = Rig::new(BlockParams {
                path: path.clone(),
                engine,
                direct: true,
                ..file_system.device.params()
            });
            let mut sizes = [0; 5];
            rig.block.read_config(20, &mut sizes);
            assert_eq!(sizes[..4], logical.to_le_bytes(), "{extra}");
            assert_eq!(sizes[4], physical_exponent, "{extra}");
            content.resize(content.len().next_multiple_of(512), 0);
            let all = content.len() as u64 / 512;
            assert_eq!(rig.block.size_bytes(), all * 512);
            assert_eq!(
                rig.read(all - 3, 3 * 512),
                (S_OK, content[content.len() - 3 * 512..].to_vec())
            );
            assert_eq!(rig.write(all - 2, &[7; 1024]), S_OK);
            assert_eq!(rig.read(all - 2, 1024), (S_OK, vec![7; 1024]));
            assert_eq!(rig.read(all, 512).0, S_IOERR);
            assert_eq!(rig.flush(), S_OK);
            assert_eq!(rig.counter("io_errors"), 0);
            drop(rig);
            content[(all as usize - 2) * 512..].fill(7);
            assert!(std::fs::read(&path).unwrap() == content);
        }
    }
}
