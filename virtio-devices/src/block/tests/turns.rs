//! Tests that a pause takes only a short time and loses nothing.

use tempfile::NamedTempFile;
use vm_memory::GuestAddress;

use super::{ENGINES, Rig, S_OK, header, image, params, range};
use crate::block::{Block, BlockParams, ImageFormat};
use crate::pci::PciFunction;
use crate::testing::{MockPciDriver, Segment, TestRam};
use crate::worker::Work;

const MIB: u64 = 1 << 20;
/// Guest RAM for the requests' data; the rings are below.
const DATA_AT: GuestAddress = GuestAddress(16 * MIB);
const DATA_BYTES: u32 = 20 << 20;
const CHAINS: usize = 4;

/// Submits a ring full of requests, pauses at the given check for commands, resumes and waits for all.
fn pause_at(rig: &mut Rig, look: u64, request: &[Segment<'_>]) {
    let mut segments = request.to_vec();
    segments.push(Segment::Writable(1));
    let chains: Vec<_> = (0..CHAINS)
        .map(|_| rig.harness.queue(0).push(&segments))
        .collect();
    rig.harness.turn.call_after(look);
    rig.harness.kick(0).expect("device continues");
    assert_eq!(rig.harness.turn.done_in_spite(), Work::default());
    rig.harness.handler.pause();
    rig.harness.turn.set_called(false);
    rig.harness.kick(0).expect("device continues");
    for chain in &chains {
        assert_eq!(rig.wait_used().head, u32::from(chain.head));
        let status = chain.buffers[segments.len() - 1];
        assert_eq!(rig.harness.queue(0).read_buffer(status), [S_OK]);
    }
}

#[test]
fn pause_interrupts_long_transfers_which_are_then_done_in_full() {
    for engine in ENGINES {
        let file = image(0);
        file.as_file().set_len(u64::from(DATA_BYTES)).unwrap();
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        let pattern: Vec<u8> = (0..DATA_BYTES / 4).flat_map(u32::to_le_bytes).collect();
        for look in 0..8 {
            rig.harness.ram.write(DATA_AT, &pattern);
            file.as_file().set_len(0).unwrap();
            file.as_file().set_len(u64::from(DATA_BYTES)).unwrap();
            let write = [
                Segment::Readable(&header(1, 0)),
                Segment::ReadableAt(DATA_AT, DATA_BYTES),
            ];
            pause_at(&mut rig, look, &write);
            assert!(std::fs::read(file.path()).unwrap() == pattern);
            rig.harness.ram.write(DATA_AT, &vec![0; pattern.len()]);
            let read = [
                Segment::Readable(&header(0, 0)),
                Segment::WritableAt(DATA_AT, DATA_BYTES),
            ];
            pause_at(&mut rig, look, &read);
            assert!(rig.harness.ram.read(DATA_AT, pattern.len()) == pattern);
        }
        let most = rig.harness.turn.most_between_looks();
        println!("{engine:?}: at most {most:?} at once");
        assert!(most.bytes <= 4 * MIB && most.calls <= 1, "{most:?}");
    }
}

#[test]
fn pause_interrupts_long_discards_and_zeroes_which_are_then_done_in_full() {
    const SECTORS: u32 = (4_u64 << 30 >> 9) as u32;
    for engine in ENGINES {
        let file = image(0);
        file.as_file().set_len(u64::from(SECTORS) << 9).unwrap();
        let mut rig = Rig::new(BlockParams {
            engine,
            ..params(&file)
        });
        for look in 0..8 {
            assert_eq!(rig.write(u64::from(SECTORS) - 1, &[7; 512]), S_OK);
            assert_eq!(rig.write(8, &[7; 512]), S_OK);
            let discard = [
                Segment::Readable(&header(11, 0)),
                Segment::Readable(&range(0, SECTORS, 0)),
            ];
            pause_at(&mut rig, look, &discard);
            assert_eq!(rig.read(8, 512), (S_OK, vec![0; 512]));
            let last = rig.read(u64::from(SECTORS) - 1, 512);
            assert_eq!(last, (S_OK, vec![0; 512]));
            for unmap in [0, 1] {
                assert_eq!(rig.write(0x7fff, &[7; 512]), S_OK);
                let zeroes = [
                    Segment::Readable(&header(13, 0)),
                    Segment::Readable(&range(0, 0x8000, unmap)),
                ];
                pause_at(&mut rig, look, &zeroes);
                assert_eq!(rig.read(0x7fff, 512), (S_OK, vec![0; 512]));
            }
        }
        let most = rig.harness.turn.most_between_looks();
        println!("{engine:?}: at most {most:?} at once");
        assert!(most.bytes <= 256 * MIB && most.calls <= 1, "{most:?}");
    }
}

#[test]
fn pause_of_a_worker_leaves_long_requests_in_the_ring() {
    for engine in ENGINES {
        let file = image(0);
        file.as_file().set_len(64 * MIB).unwrap();
        let ram = TestRam::new(64 << 20);
        let block = Block::new(BlockParams {
            engine,
            queue_size: 1024,
            ..params(&file)
        });
        let block = std::sync::Arc::new(std::sync::Mutex::new(block.unwrap()));
        let mut driver = MockPciDriver::new(block, &ram);
        driver.start(u64::MAX);
        let queue = driver.queue(0);
        let requests = queue.size() / 3;
        for _ in 0..requests {
            queue.push(&[
                Segment::Readable(&header(1, 0)),
                Segment::ReadableAt(DATA_AT, 40 << 20),
                Segment::Writable(1),
            ]);
        }
        driver.kick(0);
        crate::testing::wait_until("the first answer", || driver.queue(0).used_idx() > 0);
        let started = std::time::Instant::now();
        driver.function.pause();
        let used = driver.queue(0).used_idx();
        println!(
            "{engine:?}: pause took {:?}, {used} of {requests} answered",
            started.elapsed()
        );
        assert!(used < requests, "the pause has waited for the whole ring");
        assert_eq!(driver.queue(0).used_idx(), used, "the ring stands still");
    }
}

/// Each cluster has an entry in a table, so the number of clusters matters as well as that of bytes.
#[test]
fn discards_of_small_clusters_are_done_in_smaller_pieces() {
    const SECTORS: u32 = ((128 * MIB) >> 9) as u32;
    let image = crate::testing::qcow2::Qcow2 {
        version: 3,
        cluster_bits: 9,
        refcount_order: 4,
        disk_bytes: 128 * MIB,
        backing: None,
        clusters: &[],
    };
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image.file()).unwrap();
    let mut rig = Rig::new(BlockParams {
        format: Some(ImageFormat::Qcow2),
        ..params(&file)
    });
    for look in [0, 3] {
        assert_eq!(rig.write(u64::from(SECTORS) - 1, &[7; 512]), S_OK);
        let discard = [
            Segment::Readable(&header(11, 0)),
            Segment::Readable(&range(0, SECTORS, 0)),
        ];
        pause_at(&mut rig, look, &discard);
        let last = rig.read(u64::from(SECTORS) - 1, 512);
        assert_eq!(last, (S_OK, vec![0; 512]));
    }
    let most = rig.harness.turn.most_between_looks();
    assert!(most.bytes <= 32 * MIB && most.calls <= 1, "{most:?}");
}
