//! Tests of a disk that is resized while its queue is active.

use super::*;
use crate::VirtioDevice;
use crate::block::DiskResizeError;

/// Size in sectors as the driver reads it.
fn capacity(rig: &Rig) -> u64 {
    let mut field = [0; 8];
    rig.block.read_config(0, &mut field);
    u64::from_le_bytes(field)
}

fn rig(params: BlockParams) -> Rig {
    let mut rig = Rig::new(params);
    let interrupt = rig.harness.interrupt.clone();
    rig.block.set_interrupt(interrupt);
    rig
}

#[test]
fn disk_resized_has_its_new_size_and_notifies_the_driver() {
    for engine in ENGINES {
        let file = image(8);
        let mut rig = rig(BlockParams {
            engine,
            ..params(&file)
        });
        let disk = rig.block.handle();
        assert_eq!(rig.write(15, &[7; 512]), S_IOERR);
        disk.resize(16 * 512).unwrap();
        assert_eq!(
            (capacity(&rig), rig.harness.interrupt.config_signals()),
            (16, 1)
        );
        assert_eq!(file.as_file().metadata().unwrap().len(), 16 * 512);
        assert_eq!(rig.write(15, &[7; 512]), S_OK);
        assert_eq!(rig.read(15, 512), (S_OK, vec![7; 512]));
        assert_eq!(rig.read(7, 512), (S_OK, vec![7; 512]));
        assert_eq!(rig.read(8, 512), (S_OK, vec![0; 512]));

        disk.resize(4 * 512).unwrap();
        assert_eq!(
            (capacity(&rig), rig.harness.interrupt.config_signals()),
            (4, 2)
        );
        assert_eq!(file.as_file().metadata().unwrap().len(), 4 * 512);
        assert_eq!(rig.read(4, 512).0, S_IOERR);
        assert_eq!(rig.read(3, 512), (S_OK, vec![3; 512]));
    }
}

#[test]
fn disk_cannot_have_a_size_of_no_whole_sectors_or_none() {
    let file = image(8);
    let rig = rig(params(&file));
    for bytes in [0, 1, 511, 513, u64::MAX] {
        let error = rig.block.handle().resize(bytes).unwrap_err();
        assert!(matches!(error, DiskResizeError::NotWholeBlocks { .. }));
        assert!(error.is_of_request());
    }
    // Larger than the maximum file size.
    let error = rig.block.handle().resize(u64::MAX - 511).unwrap_err();
    assert!(!error.is_of_request(), "{error}");
    assert_eq!(
        (capacity(&rig), rig.harness.interrupt.config_signals()),
        (8, 0)
    );
}

#[test]
fn disk_that_is_read_only_keeps_its_size() {
    let file = image(8);
    let rig = rig(BlockParams {
        readonly: true,
        ..params(&file)
    });
    let error = rig.block.handle().resize(16 * 512).unwrap_err();
    assert!(matches!(error, DiskResizeError::Readonly { .. }));
    assert_eq!(file.as_file().metadata().unwrap().len(), 8 * 512);
}

#[test]
fn disk_that_grew_is_locked_in_its_new_size() {
    let file = image(8);
    let first = Block::new(params(&file)).unwrap();
    let disk = first.handle();
    disk.resize(16 * 512).unwrap();
    // The handle keeps the lock, which includes the added part.
    drop(first);
    assert!(matches!(
        Block::new(params(&file)),
        Err(BlockError::Locked { .. })
    ));
    drop(disk);
    Block::new(params(&file)).expect("free again");
}
