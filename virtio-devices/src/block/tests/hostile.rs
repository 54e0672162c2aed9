//! Tests of misbehaving guests. After any invalid request the next valid one works, and the invalid one has been
//! counted.

use super::*;
use crate::WorkerError;
use crate::testing::{Desc, NEXT, WRITE};
use vm_memory::GuestAddress;

/// Sends a raw chain and checks that a valid request works afterwards.
fn survive(descs: &[Desc], expect_used_len: u32) {
    for engine in ENGINES {
        let file = image(8);
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        let head = rig.harness.queue(0).push_raw(descs);
        rig.harness.kick(0).expect("device continues");
        let used = rig.wait_used();
        assert_eq!((used.head, used.len), (u32::from(head), expect_used_len));
        assert_eq!(rig.counter("bad_requests"), 1);
        assert_eq!(rig.read(3, 512), (S_OK, vec![3; 512]));
    }
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

const OUT_OF_RAM: u64 = 1 << 40;

#[test]
fn chain_out_of_ram_is_returned_and_counted() {
    survive(&[desc(OUT_OF_RAM, 16, 0, 0)], 0);
    survive(&[desc(u64::MAX - 4, 16, WRITE, 0)], 0);
    // Begins in RAM (64 MiB) and ends outside.
    survive(&[desc((64 << 20) - 8, 16, WRITE, 0)], 0);
}

#[test]
fn chain_without_status_byte_is_returned_and_counted() {
    survive(&[desc(0x2000, 16, 0, 0)], 0);
    survive(&[desc(0x2000, 16, NEXT, 1), desc(0x3000, 0, WRITE, 0)], 0);
}

#[test]
fn chain_that_loops_is_returned_and_counted() {
    survive(&[desc(0x2000, 16, NEXT, 0)], 0);
    survive(&[desc(0x2000, 16, NEXT, 1), desc(0x3000, 1, NEXT, 0)], 0);
}

#[test]
fn chain_with_wrong_order_is_returned_and_counted() {
    survive(
        &[desc(0x3000, 1, NEXT | WRITE, 1), desc(0x2000, 16, 0, 0)],
        0,
    );
}

#[test]
fn gigantic_lengths_are_returned_and_counted() {
    survive(
        &[desc(0, u32::MAX, NEXT, 1), desc(0, u32::MAX, WRITE, 0)],
        0,
    );
}

#[test]
fn header_too_short_is_an_error() {
    // Only the status is written.
    survive(&[desc(0x2000, 15, NEXT, 1), desc(0x3000, 1, WRITE, 0)], 1);
}

#[test]
fn requests_out_of_range_or_shape_are_io_errors() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    assert_eq!(rig.read(8, 512).0, S_IOERR);
    assert_eq!(rig.read(7, 1024).0, S_IOERR);
    assert_eq!(rig.read(u64::MAX, 512).0, S_IOERR);
    assert_eq!(rig.read(u64::MAX / 512 + 1, 512).0, S_IOERR);
    assert_eq!(rig.read(0, 511).0, S_IOERR);
    assert_eq!(rig.write(u64::MAX - 1, &[0; 2048]), S_IOERR);
    assert_eq!(rig.write(0, &[]), S_IOERR);
    assert_eq!(rig.on_range(11, range(0, 9, 0)), S_IOERR);
    assert_eq!(rig.on_range(11, range(0, 0, 0)), S_IOERR);
    assert_eq!(rig.on_range(13, range(u64::MAX, u32::MAX, 0)), S_IOERR);
    // Data in the wrong direction.
    assert_eq!(rig.send(&[Segment::Readable(&header(0, 0))]).2, S_IOERR);
    let both = [Segment::Readable(&header(1, 0)), Segment::Writable(512)];
    assert_eq!(rig.send(&both).2, S_IOERR);
    // GET_ID without space for the id; two ranges where one is offered.
    assert_eq!(rig.send(&[Segment::Readable(&header(8, 0))]).2, S_IOERR);
    let ranges = [range(0, 1, 0), range(1, 1, 0)].concat();
    let two = [
        Segment::Readable(&header(11, 0)),
        Segment::Readable(&ranges),
    ];
    assert_eq!(rig.send(&two).2, S_IOERR);
    assert_eq!(rig.counter("bad_requests"), 14);
    assert_eq!(rig.counter("io_errors"), 0);
}

#[test]
fn zeroing_more_than_a_request_may_is_an_io_error() {
    let file = image(1);
    file.as_file().set_len((32 << 20) + 512).unwrap();
    let mut rig = Rig::new(params(&file));
    let mut field = [0; 4];
    crate::VirtioDevice::read_config(&rig.block, 48, &mut field);
    let sectors_max = u32::from_le_bytes(field);
    assert!(sectors_max <= 1 << 15, "16 MiB, written out at worst");
    assert_eq!(rig.on_range(13, range(0, sectors_max + 1, 0)), S_IOERR);

    assert_eq!(rig.counter("write_zeroes_bytes"), 0);
    assert_eq!(rig.on_range(13, range(0, sectors_max, 0)), S_OK);
}

#[test]
fn unknown_requests_and_flags_are_unsupported() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    for request_type in [2, 3, 5, 14, 15, u32::MAX] {
        assert_eq!(
            rig.send(&[Segment::Readable(&header(request_type, 0))]).2,
            S_UNSUPP
        );
    }
    assert_eq!(rig.on_range(11, range(0, 1, 1)), S_UNSUPP);
    assert_eq!(rig.on_range(13, range(0, 1, 2)), S_UNSUPP);
    assert_eq!(rig.counter("bad_requests"), 8);
}

#[test]
fn head_out_of_table_is_dropped() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    rig.harness.queue(0).offer(64);
    rig.harness.queue(0).offer(u16::MAX);
    rig.harness.kick(0).expect("device continues");
    assert!(rig.harness.queue(0).pop_used().is_none());
    assert_eq!(rig.counter("bad_requests"), 2);
    assert_eq!(rig.read(3, 512).0, S_OK);
}

#[test]
fn same_head_in_every_entry_stays_bounded() {
    for engine in ENGINES {
        let file = image(256);
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        let header = header(0, 0);
        let chain = rig.harness.queue(0).push(&[
            Segment::Readable(&header),
            Segment::Writable(4096),
            Segment::Writable(1),
        ]);
        for _ in 1..64 {
            rig.harness.queue(0).offer(chain.head);
        }
        rig.harness.kick(0).expect("device continues");
        for _ in 0..64 {
            rig.wait_used();
        }
        assert_eq!(rig.counter("read_ops"), 64);
    }
}

#[test]
fn available_index_too_far_ahead_stops_the_device_until_reset() {
    let file = image(8);
    let mut rig = Rig::new(params(&file));
    rig.harness.queue(0).set_avail_idx(65);
    let error = rig.harness.kick(0).unwrap_err();
    assert!(matches!(error, WorkerError::Queue { index: 0, .. }));
    rig.harness.reset();
    rig.harness.activate().unwrap();
    assert_eq!(rig.read(3, 512).0, S_OK);
}

#[test]
fn image_that_shrinks_is_an_io_error_not_a_hang() {
    for engine in ENGINES {
        let file = image(64);
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        file.as_file().set_len(512).unwrap();
        assert_eq!(rig.read(8, 4096).0, S_IOERR);
        assert_eq!(rig.counter("io_errors"), 1);
    }
}

/// Another process has truncated the image in the middle of a read.
#[test]
fn read_of_a_truncated_image_is_an_error_and_fills_nothing() {
    for engine in ENGINES {
        for direct in [false, true] {
            let file = image(16);
            let block = Block::new(BlockParams {
                engine,
                direct,
                ..params(&file)
            });
            let block = match block {
                Err(BlockError::NoDirectIo { .. }) => {
                    test_skip::skip("the temporary directory has no direct I/O");
                    continue;
                }
                block => block.expect("a sound image"),
            };
            let features = crate::VirtioDevice::features(&block);
            let mut rig = Rig::with_features(block, features);
            let ram = rig.harness.ram.clone();
            let aligned = ram.alloc(8192, 4096);
            file.as_file().set_len(12 * 512).expect("files can shrink");
            // Aligned for direct I/O, and not.
            for skew in [0, 3] {
                let buffer = GuestAddress(aligned.0 + skew);
                ram.write(buffer, &[0xee; 8 * 512]);
                let (_, _, status) = rig.send(&[
                    Segment::Readable(&header(0, 8)),
                    Segment::WritableAt(buffer, 8 * 512),
                ]);
                assert_eq!(status, S_IOERR, "{engine:?}, direct: {direct}, {skew}");
                let rest = ram.read(GuestAddress(buffer.0 + 4 * 512), 4 * 512);
                // The kernel reads whole blocks of the file system into an aligned buffer.
                let is_kernels = direct && skew == 0;
                let is_unchanged = rest.iter().all(|byte| *byte == 0xee);
                assert!(is_kernels || is_unchanged, "filled with zeros");
            }
        }
    }
}
