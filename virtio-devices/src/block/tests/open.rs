//! Tests which images can be opened, and the errors of the others.

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::VirtioDevice;

fn refused(params: BlockParams) -> BlockError {
    Block::new(params).expect_err("must be refused")
}

#[test]
fn missing_file_is_named() {
    let file = image(8);
    let error = refused(BlockParams {
        path: "/nonexistent/disk.raw".into(),
        ..params(&file)
    });
    assert_eq!(
        error.to_string(),
        "cannot open disk image /nonexistent/disk.raw"
    );
}

#[test]
fn directory_and_character_device_are_no_disks() {
    let file = image(8);
    for path in ["/tmp", "/dev/null"] {
        let error = refused(BlockParams {
            path: path.into(),
            ..params(&file)
        });
        assert!(matches!(error, BlockError::NotADisk { .. }), "{error}");
    }
}

#[test]
fn odd_size_is_filled_up_to_a_sector() {
    for engine in ENGINES {
        for direct in [false, true] {
            for (sectors, extra) in [(3, 100), (17, 0), (8, 511)] {
                let mut file = image(sectors);
                file.as_file_mut().seek(SeekFrom::End(0)).unwrap();
                file.write_all(&vec![0xee; extra]).unwrap();
                let odd = BlockParams {
                    engine,
                    direct,
                    ..params(&file)
                };
                let block = match Block::new(odd) {
                    Err(BlockError::NoDirectIo { .. }) => {
                        test_skip::skip("the temporary directory has no direct I/O");
                        continue;
                    }
                    block => block.unwrap(),
                };
                let all = sectors + extra.div_ceil(512) as u64;
                assert_eq!(block.size_bytes(), all * 512);
                let features = block.features();
                let mut rig = Rig::with_features(block, features);
                let last = all - 1;
                let mut content = vec![last as u8; 512];
                if extra > 0 {
                    content.fill(0);
                    content[..extra].fill(0xee);
                }
                assert_eq!(rig.read(last, 512), (S_OK, content.clone()));
                // Over the last whole block as well.
                let (status, data) = rig.read(0, all as u32 * 512);
                assert_eq!((status, &data[last as usize * 512..]), (S_OK, &content[..]));
                assert_eq!(rig.read(all, 512).0, S_IOERR);
                assert_eq!(rig.write(last - 1, &[7; 1024]), S_OK);
                assert_eq!(rig.read(last - 1, 1024), (S_OK, vec![7; 1024]));
                assert_eq!(rig.flush(), S_OK);
                let written = std::fs::read(file.path()).unwrap();
                assert_eq!(written.len() as u64, all * 512);
                assert_eq!(written[written.len() - 1024..], [7; 1024]);
                assert_eq!(rig.counter("io_errors"), 0);
            }
        }
    }
}

#[test]
fn image_that_is_not_sparse_is_allocated() {
    for (sparse, readonly) in [(true, false), (false, true), (false, false)] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let block = Block::new(BlockParams {
            sparse,
            readonly,
            ..params(&file)
        });
        block.unwrap();
        let allocated = file.as_file().metadata().unwrap().blocks() * 512;
        assert_eq!(allocated >= 1 << 20, !sparse && !readonly, "{allocated}");
    }
}

#[test]
fn empty_image_is_an_empty_disk() {
    let file = image(0);
    let mut rig = Rig::new(BlockParams {
        format: None,
        ..params(&file)
    });
    assert_eq!(rig.block.size_bytes(), 0);
    assert_eq!(rig.read(0, 512).0, S_IOERR);
}

#[test]
fn second_writer_is_refused_until_the_first_is_gone() {
    for lock_granularity in [LockGranularity::ByteRange, LockGranularity::Full] {
        let file = image(8);
        let writer = || BlockParams {
            lock_granularity,
            ..params(&file)
        };
        let reader = || BlockParams {
            readonly: true,
            ..writer()
        };
        let first = Block::new(writer()).unwrap();
        assert!(matches!(refused(writer()), BlockError::Locked { .. }));
        assert!(matches!(refused(reader()), BlockError::Locked { .. }));
        drop(first);
        let _first = Block::new(reader()).unwrap();
        let _second = Block::new(reader()).expect("readers share");
        let error = refused(writer());
        assert!(error.to_string().contains("for writing"), "{error}");
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let file = image(8);
    for num_queues in [0, 257] {
        let error = refused(BlockParams {
            num_queues,
            ..params(&file)
        });
        assert!(matches!(error, BlockError::QueueCount { .. }));
    }
    for queue_size in [0, 2, 100, 2048] {
        let error = refused(BlockParams {
            queue_size,
            ..params(&file)
        });
        assert!(matches!(error, BlockError::QueueSize { .. }));
    }
    let error = refused(BlockParams {
        serial: Some("x".repeat(21)),
        ..params(&file)
    });
    assert!(matches!(error, BlockError::SerialTooLong { bytes: 21 }));
}

#[test]
fn dropped_disk_gives_its_descriptors_back() {
    fn open_descriptors_of(path: &std::path::Path) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target == path)
            .count()
    }
    let file = image(8);
    let before = open_descriptors_of(file.path());
    let rig = Rig::new(params(&file));
    assert!(open_descriptors_of(file.path()) > before);
    drop(rig);
    assert_eq!(open_descriptors_of(file.path()), before);
}

#[test]
fn worker_names_fit_a_thread() {
    let file = image(8);
    let mut block = Block::new(BlockParams {
        id: "a-very-long-identifier".into(),
        num_queues: 12,
        ..params(&file)
    })
    .unwrap();
    let names: Vec<String> = crate::VirtioDevice::take_handlers(&mut block)
        .iter()
        .map(|handler| handler.name())
        .collect();
    assert!(names.iter().all(|name| name.len() <= 15));
    assert_eq!(names[11], "a-very-long_q11");
}
