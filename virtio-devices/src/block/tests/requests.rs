//! Tests the effect of each request.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::VirtioDevice;
use crate::testing::disk_images::vhd_footer;

#[test]
fn write_then_read_returns_the_data() {
    for engine in ENGINES {
        let file = image(64);
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        let data: Vec<u8> = (0..4096u32).map(|at| at as u8).collect();
        assert_eq!(rig.write(8, &data), S_OK);
        assert_eq!(rig.read(8, 4096), (S_OK, data.clone()));
        assert_eq!(rig.flush(), S_OK);
        assert_eq!(fs::read(file.path()).unwrap()[4096..8192], data[..]);
        assert_eq!(rig.counter("write_bytes"), 4096);
        assert_eq!(rig.counter("read_ops"), 1);
        assert_eq!(rig.counter("flush_ops"), 1);
        assert!(rig.counter("read_latency_min") <= rig.counter("read_latency_max"));
        assert_eq!(rig.counter("bad_requests"), 0);
    }
}

#[test]
fn read_reports_data_and_status_as_written() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    let (_, used, status) = rig.send(&[
        Segment::Readable(&header(0, 1)),
        Segment::Writable(512),
        Segment::Writable(512),
    ]);
    assert_eq!((used.len, status), (1025, S_OK));
    assert_eq!(rig.harness.interrupt.queue_signals(0), 1);
}

#[test]
fn request_in_any_framing_is_understood() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    // The header is split in two pieces, the second with the data attached; data and status share a descriptor.
    let mut front = header(1, 2).to_vec();
    front.extend([7; 512]);
    let (a, b) = front.split_at(5);
    let (_, _, status) = rig.send(&[Segment::Readable(a), Segment::Readable(b)]);
    assert_eq!(status, S_OK);
    let chain = rig
        .harness
        .queue(0)
        .push_indirect(&[Segment::Readable(&header(0, 2)), Segment::Writable(513)]);
    rig.harness.kick(0).unwrap();
    assert_eq!(rig.wait_used().len, 513);
    let answer = rig.harness.queue(0).read_buffer(chain.buffers[1]);
    assert_eq!(answer[..512], [7; 512]);
    assert_eq!(answer[512], S_OK);
}

#[test]
fn many_requests_at_once_all_come_back() {
    for engine in ENGINES {
        let file = image(256);
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        for sector in 0..21 {
            let header = header(0, sector * 8);
            rig.harness.queue(0).push(&[
                Segment::Readable(&header),
                Segment::Writable(4096),
                Segment::Writable(1),
            ]);
        }
        rig.harness.kick(0).unwrap();
        let mut heads: Vec<u32> = (0..21).map(|_| rig.wait_used().head).collect();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), 21);
        assert_eq!(rig.counter("read_ops"), 21);
    }
}

#[test]
fn get_id_returns_the_serial() {
    let file = image(8);
    let mut rig = Rig::new(BlockParams {
        serial: Some("serial-7".into()),
        ..params(&file)
    });
    let (chain, used, status) =
        rig.send(&[Segment::Readable(&header(8, 0)), Segment::Writable(20)]);
    assert_eq!((used.len, status), (21, S_OK));
    let id = rig.harness.queue(0).read_buffer(chain.buffers[1]);
    assert_eq!(&id, b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discard_makes_a_hole_that_reads_as_zeroes() {
    for engine in ENGINES {
        let file = image(2048);
        let before = fs::metadata(file.path()).unwrap().blocks();
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        assert_eq!(rig.on_range(11, range(0, 1024, 0)), S_OK);
        assert_eq!(rig.read(8, 4096), (S_OK, vec![0; 4096]));
        assert_eq!(rig.read(1025, 512), (S_OK, vec![1; 512]));
        assert!(fs::metadata(file.path()).unwrap().blocks() < before);
        assert_eq!(rig.counter("discard_bytes"), 1024 * 512);
    }
}

#[test]
fn write_zeroes_keeps_or_frees_blocks_as_asked() {
    for engine in ENGINES {
        let file = image(2048);
        let before = fs::metadata(file.path()).unwrap().blocks();
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        assert_eq!(rig.on_range(13, range(0, 512, 0)), S_OK);
        assert_eq!(fs::metadata(file.path()).unwrap().blocks(), before);
        assert_eq!(rig.on_range(13, range(512, 512, 1)), S_OK);
        assert!(fs::metadata(file.path()).unwrap().blocks() < before);
        assert_eq!(rig.read(0, 512 * 128), (S_OK, vec![0; 512 * 128]));
        assert_eq!(rig.read(1000, 512), (S_OK, vec![0; 512]));
        assert_eq!(rig.read(1024, 512), (S_OK, vec![0; 512]));
        assert_eq!(rig.read(1025, 512), (S_OK, vec![1; 512]));
        assert_eq!(rig.counter("write_zeroes_bytes"), 1024 * 512);
    }
}

#[test]
fn sparse_off_never_deallocates() {
    let file = image(2048);
    let before = fs::metadata(file.path()).unwrap().blocks();
    let mut rig = Rig::new(BlockParams {
        sparse: false,
        ..params(&file)
    });
    assert_eq!(rig.block.features() & (1 << 13), 0);
    assert_eq!(rig.on_range(11, range(0, 1024, 0)), S_UNSUPP);
    assert_eq!(rig.on_range(13, range(0, 1024, 1)), S_OK);
    assert_eq!(fs::metadata(file.path()).unwrap().blocks(), before);
    assert_eq!(rig.read(0, 512), (S_OK, vec![0; 512]));
}

#[test]
fn read_only_refuses_every_change() {
    let file = image(8);
    let mut rig = Rig::new(BlockParams {
        readonly: true,
        ..params(&file)
    });
    let offered = rig.block.features();
    assert_eq!(offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(rig.write(1, &[9; 512]), S_IOERR);
    assert_eq!(rig.on_range(11, range(0, 1, 0)), S_IOERR);
    assert_eq!(rig.on_range(13, range(0, 1, 0)), S_IOERR);
    assert_eq!(rig.read(1, 512), (S_OK, vec![1; 512]));
    assert_eq!(rig.counter("bad_requests"), 3);
}

#[test]
fn autodetected_image_takes_every_write_but_signatures() {
    for (autodetect, status) in [(true, S_IOERR), (false, S_OK)] {
        let file = image(64);
        let mut rig = Rig::new(BlockParams {
            format: (!autodetect).then_some(ImageFormat::Raw),
            ..params(&file)
        });
        // A file system with blocks of 4096 bytes writes its superblock, at 1024, with what is before it.
        let data: Vec<u8> = (0..4096_u32).map(|at| (at / 16) as u8).collect();
        assert_eq!(rig.write(0, &data), S_OK);
        assert_eq!(rig.read(0, 4096), (S_OK, data.clone()));
        for magic in [&b"QFI\xfb"[..], b"conectix", b"vhdxfile", b"KDMV"] {
            let mut image = data.clone();
            image[..magic.len()].copy_from_slice(magic);
            for bytes in [512, 4096] {
                assert_eq!(rig.write(0, &image[..bytes]), status);
            }
            // Elsewhere it is not a signature.
            assert_eq!(rig.write(1, &image), S_OK);
        }
        let refused = if autodetect { 8 } else { 0 };
        assert_eq!(rig.counter("refused_signatures"), refused);
        assert_eq!(rig.counter("bad_requests"), 0);
        assert_eq!(rig.on_range(13, range(0, 8, 0)), S_OK);
        assert_eq!(rig.on_range(11, range(0, 8, 0)), S_OK);
        assert_eq!(rig.read(0, 512), (S_OK, vec![0; 512]));
    }
}

#[test]
fn direct_io_serves_aligned_and_misaligned_buffers() {
    for engine in ENGINES {
        let file = image(64);
        let direct = BlockParams {
            engine,
            direct: true,
            ..params(&file)
        };
        let mut rig = match Block::new(direct) {
            Ok(block) => {
                let features = block.features();
                Rig::with_features(block, features)
            }
            Err(BlockError::NoDirectIo { .. }) => {
                test_skip::skip("the temporary directory has no direct I/O");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let ram = rig.harness.ram.clone();
        let aligned = ram.alloc(8192, 4096);
        for skew in [0, 8, 3] {
            let buffer = vm_memory::GuestAddress(aligned.0 + skew);
            ram.write(buffer, &[skew as u8 + 1; 1024]);
            let (_, _, status) = rig.send(&[
                Segment::Readable(&header(1, 3)),
                Segment::ReadableAt(buffer, 1024),
            ]);
            assert_eq!(status, S_OK);
            let (_, _, status) = rig.send(&[
                Segment::Readable(&header(0, 3)),
                Segment::WritableAt(buffer, 1024),
            ]);
            assert_eq!(status, S_OK);
            assert_eq!(ram.read(buffer, 1024), [skew as u8 + 1; 1024]);
            assert_eq!(rig.read(5, 512), (S_OK, vec![5; 512]));
            assert_eq!(rig.read(2, 512), (S_OK, vec![2; 512]));
        }
    }
}

#[test]
fn reset_with_requests_in_flight_leaves_ram_alone_afterwards() {
    let file = image(256);
    let mut rig = Rig::new(params(&file));
    let chain = rig.harness.queue(0).push(&[
        Segment::Readable(&header(0, 8)),
        Segment::Writable(65536),
        Segment::Writable(1),
    ]);
    rig.harness.kick(0).unwrap();
    rig.harness.reset();
    // The read has ended, with or without success: later writes of the driver persist.
    let ram = rig.harness.ram.clone();
    ram.write(chain.buffers[1].address, &[0xa5; 65536]);
    assert_eq!(ram.read(chain.buffers[1].address, 65536), [0xa5; 65536]);
    rig.harness.activate().unwrap();
    assert_eq!(rig.read(3, 512), (S_OK, vec![3; 512]));
}

#[test]
fn pause_finishes_what_is_in_flight() {
    let file = image(256);
    let mut rig = Rig::new(params(&file));
    rig.harness.queue(0).push(&[
        Segment::Readable(&header(0, 8)),
        Segment::Writable(65536),
        Segment::Writable(1),
    ]);
    rig.harness.kick(0).unwrap();
    rig.harness.handler.pause();
    let used = rig.harness.queue(0).pop_used().expect("pause waits");
    assert_eq!(used.len, 65537);
}

#[test]
fn write_through_survives_without_a_flush() {
    // Without FLUSH and CONFIG_WCE the driver cannot flush, so writes must be stable before they complete. The test
    // shows only that this path works.
    let file = image(8);
    let block = Block::new(params(&file)).unwrap();
    let features = block.features() & !(1 << 9 | 1 << 11);
    let mut rig = Rig::with_features(block, features);
    assert_eq!(rig.write(1, &[9; 512]), S_OK);
    assert_eq!(rig.read(1, 512), (S_OK, vec![9; 512]));
    assert_eq!(rig.counter("flush_ops"), 0);
}

#[test]
fn cache_of_a_driver_that_cannot_flush_is_write_through() {
    let file = image(8);
    let mut block = Block::new(params(&file)).unwrap();
    let writeback = |block: &Block| {
        let mut byte = [0xff];
        block.read_config(32, &mut byte);
        byte[0]
    };
    let features = block.features();
    block.ack_features(features & !(1 << 9));
    assert_eq!(writeback(&block), 0, "CONFIG_WCE without FLUSH");
    block.reset();
    block.ack_features(features);
    assert_eq!(writeback(&block), 1);
}

#[test]
fn config_space_tells_capacity_and_takes_writeback() {
    let file = image(100);
    let mut block = Block::new(BlockParams {
        num_queues: 3,
        ..params(&file)
    })
    .unwrap();
    let mut field = [0; 8];
    block.read_config(0, &mut field);
    assert_eq!(u64::from_le_bytes(field), 100);
    let mut field = [0; 4];
    block.read_config(20, &mut field);
    assert_eq!(u32::from_le_bytes(field), 512);
    let mut field = [0; 2];
    block.read_config(34, &mut field);
    assert_eq!(u16::from_le_bytes(field), 3);
    assert_eq!(block.queue_sizes(), [64; 3]);
    assert_eq!(block.take_handlers().len(), 3);

    let writeback = |block: &Block| {
        let mut byte = [0xff];
        block.read_config(32, &mut byte);
        byte[0]
    };
    assert_eq!(writeback(&block), 1);
    block.write_config(32, &[0]);
    assert_eq!(writeback(&block), 0);
    block.write_config(0, &[0; 8]);
    block.write_config(u64::MAX, &[1]);
    assert_eq!(block.counters()["bad_requests"], 2);
    block.reset();
    assert_eq!(writeback(&block), 1);

    let mut past = [0xff; 16];
    block.read_config(u64::MAX - 4, &mut past);
    assert_eq!(past, [0; 16]);
}

/// Set for the process of [`write_beyond_the_limit_of_file_size_is_an_io_error`] that has the limit.
const LIMITED: &str = "TEST_BLOCK_LIMITED";

#[test]
fn write_beyond_the_limit_of_file_size_is_an_io_error() {
    const LIMIT: u64 = 1 << 20;
    const NAME: &str = "block::tests::requests::write_beyond_the_limit_of_file_size_is_an_io_error";
    let Some(path) = std::env::var_os(LIMITED) else {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * LIMIT).unwrap();
        // In units of 512 bytes. The program ignores the signal, too.
        let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", LIMIT / 512);
        let ended = std::process::Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(LIMITED, file.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&ended.stdout).into_owned()
            + &String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{}: {text}", ended.status);
        assert!(text.contains("1 passed"), "{text}");
        return;
    };
    for (engine, index) in ENGINES.into_iter().zip(1_u8..) {
        let mut rig = Rig::new(BlockParams {
            id: "_disk0".into(),
            path: path.clone().into(),
            num_queues: 1,
            queue_size: 64,
            sparse: true,
            engine,
            ..BlockParams::default()
        });
        let last = LIMIT / 512 - 1;
        assert_eq!(rig.write(last + 1, &[index; 512]), S_IOERR);
        assert_eq!(rig.write(last, &[index; 1024]), S_IOERR, "only a part fits");
        assert_eq!(rig.counter("io_errors"), 2);
        assert_eq!(rig.write(last, &[index; 512]), S_OK);
        let content = [[index; 512], [0; 512]].concat();
        assert_eq!(rig.read(last, 1024), (S_OK, content));
    }
}

#[test]
fn footer_of_a_vhd_that_the_guest_of_a_raw_image_writes_changes_nothing() {
    const SECTORS: u64 = 64;
    let file = image(SECTORS);
    let detected = || BlockParams {
        format: None,
        ..params(&file)
    };
    // One that is valid at the end of this file, and one that is damaged.
    let valid = vhd_footer(2, (SECTORS - 1) * 512);
    let mut damaged = valid;
    damaged[100] ^= 1;
    for footer in [valid, damaged] {
        let mut rig = Rig::new(detected());
        let last = SECTORS - 1;
        assert_eq!(rig.write(last, &footer), S_OK);
        drop(rig);
        let mut rig = Rig::new(detected());
        assert_eq!(rig.block.size_bytes(), SECTORS * 512);
        assert_eq!(rig.read(last, 512), (S_OK, footer.to_vec()));
    }
}
