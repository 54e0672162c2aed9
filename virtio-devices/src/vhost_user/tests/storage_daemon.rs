//! Tests QEMU's storage daemon, a real back end of disks that completes requests in any order and does not record them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Rig;
use super::disk::disk;
use super::process::{Process, program};
use crate::pci::PciFunction;
use crate::testing::{Buffer, Segment};

pub(super) const PROGRAM: &str = "qemu-storage-daemon";
pub(super) const SECTOR_BYTES: usize = 512;
pub(super) const IMAGE_BYTES: u64 = 8 << 20;
pub(super) const QUEUES: u16 = 2;
const ROUNDS: u32 = 12;
/// Requests of a round, on each queue; three descriptors each.
const DEPTH: u32 = 16;

// Requests and statuses of virtio-blk (virtio 1.2 §5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;

pub(super) fn start(program: &Path, rig: &Rig, image: &Path, writable: bool) -> Process {
    let writable = if writable { "on" } else { "off" };
    let blockdev = format!(
        "driver=file,node-name=disk,read-only=off,discard=unmap,filename={}",
        image.display()
    );
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,writable={writable},num-queues={QUEUES},\
         addr.type=unix,addr.path={}",
        rig.socket().display()
    );
    Process::start(Command::new(program).args(["--blockdev", &blockdev, "--export", &export]))
}

/// A request in flight.
struct Request {
    status: Buffer,
    data: Buffer,
}

/// Offers a request and returns its head.
fn offer(rig: &mut Rig, queue: u16, kind: u32, sector: u64, data: Segment<'_>) -> (u16, Request) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let segments = [Segment::Readable(&header), data, Segment::Writable(1)];
    let chain = rig.driver.queue(queue).push(&segments);
    let request = Request {
        data: chain.buffers[1],
        status: chain.buffers[2],
    };
    (chain.head, request)
}

/// Waits for one request and returns its status and its data.
fn complete(rig: &mut Rig, queue: u16, open: &mut BTreeMap<u16, Request>) -> (u8, Vec<u8>) {
    let queue = rig.driver.queue(queue);
    let head = queue.wait_used().head;
    let request = open.remove(&(head as u16));
    let request = request.unwrap_or_else(|| panic!("request {head} was completed twice"));
    let status = queue.read_buffer(request.status)[0];
    (status, queue.read_buffer(request.data))
}

fn one(rig: &mut Rig, queue: u16, kind: u32, sector: u64, data: Segment<'_>) -> (u8, Vec<u8>) {
    let mut open = BTreeMap::from([offer(rig, queue, kind, sector, data)]);
    rig.driver.kick(queue);
    complete(rig, queue, &mut open)
}

fn flush(rig: &mut Rig) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&FLUSH.to_le_bytes());
    let segments = [Segment::Readable(&header), Segment::Writable(1)];
    let chain = rig.driver.queue(0).push(&segments);
    rig.driver.kick(0);
    let queue = rig.driver.queue(0);
    queue.wait_used();
    assert_eq!(queue.read_buffer(chain.buffers[1]), [OK]);
}

fn content(round: u32, queue: u16, index: u32) -> Vec<u8> {
    let words = (0..SECTOR_BYTES as u32 / 4)
        .map(|at| round << 24 | u32::from(queue) << 20 | index << 10 | at);
    words.flat_map(u32::to_le_bytes).collect()
}

fn sector(queue: u16, index: u32) -> u64 {
    u64::from(u32::from(queue) * DEPTH + index)
}

pub(super) fn image(rig: &Rig) -> PathBuf {
    let path = rig.folder.path().join("image");
    File::create(&path).unwrap().set_len(IMAGE_BYTES).unwrap();
    path
}

pub(super) fn writes_and_reads(rig: &mut Rig) {
    let data = content(1, 1, 1);
    assert_eq!(one(rig, 1, OUT, 7, Segment::Readable(&data)).0, OK);
    let room = Segment::Writable(SECTOR_BYTES as u32);
    assert_eq!(one(rig, 0, IN, 7, room), (OK, data));
}

#[test]
fn requests_of_a_killed_daemon_are_made_again_by_the_next() {
    let Some(program) = program(PROGRAM) else {
        return;
    };
    let mut rig = Rig::idle(disk);
    let image = image(&rig);
    let mut daemon = start(&program, &rig, &image, true);
    rig.driver.start(u64::MAX);
    let mut capacity = [0; 8];
    rig.driver.device_config(0, &mut capacity);
    assert_eq!(
        u64::from_le_bytes(capacity),
        IMAGE_BYTES / SECTOR_BYTES as u64
    );
    for round in 1..=ROUNDS {
        let mut open = BTreeMap::new();
        for queue in 0..QUEUES {
            let requests = open.entry(queue).or_insert_with(BTreeMap::new);
            for index in 0..DEPTH {
                let data = content(round, queue, index);
                let (head, request) = offer(
                    &mut rig,
                    queue,
                    OUT,
                    sector(queue, index),
                    Segment::Readable(&data),
                );
                requests.insert(head, request);
            }
            rig.driver.kick(queue);
        }
        // From before the daemon has seen them to after it has completed some.
        for _ in 1..round {
            let requests = open.get_mut(&0).unwrap();
            assert_eq!(complete(&mut rig, 0, requests).0, OK);
        }
        drop(daemon);
        rig.wait_for("connections_lost", round.into());
        daemon = start(&program, &rig, &image, true);
        for (queue, mut requests) in open {
            while !requests.is_empty() {
                assert_eq!(complete(&mut rig, queue, &mut requests).0, OK);
            }
        }
        for queue in 0..QUEUES {
            for index in 0..DEPTH {
                let room = Segment::Writable(SECTOR_BYTES as u32);
                let (status, data) = one(&mut rig, queue, IN, sector(queue, index), room);
                assert_eq!(status, OK);
                assert!(
                    data == content(round, queue, index),
                    "{round} {queue} {index}"
                );
            }
        }
    }
    flush(&mut rig);
    let mut found = vec![0; SECTOR_BYTES];
    let file = File::open(&image).unwrap();
    file.read_exact_at(&mut found, sector(1, 3) * SECTOR_BYTES as u64)
        .unwrap();
    assert!(found == content(ROUNDS, 1, 3));
    // One that is killed while it is greeted counts as a protocol error.
    assert_eq!(rig.count("uncertain_requests"), 0);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn daemon_returns_the_rings_at_a_pause_and_continues() {
    let Some(program) = program(PROGRAM) else {
        return;
    };
    let mut rig = Rig::idle(disk);
    let image = image(&rig);
    let _daemon = start(&program, &rig, &image, true);
    rig.driver.start(u64::MAX);
    for round in 1..=ROUNDS {
        let mut open = BTreeMap::new();
        for index in 0..DEPTH {
            let data = content(round, 0, index);
            let (head, request) =
                offer(&mut rig, 0, OUT, sector(0, index), Segment::Readable(&data));
            open.insert(head, request);
        }
        rig.driver.kick(0);
        rig.driver.function.pause();
        assert_eq!(rig.count("serving"), 0);
        // The daemon may hold requests that it completes when it has the ring again, so positions are not compared.
        rig.driver.function.resume();
        while !open.is_empty() {
            assert_eq!(complete(&mut rig, 0, &mut open).0, OK);
        }
    }
    assert_eq!(rig.count("rings_taken_away"), 0);
}

#[test]
fn disk_that_the_daemon_exports_read_only_is_read_only() {
    const RO: u64 = 1 << 5;
    let Some(program) = program(PROGRAM) else {
        return;
    };
    let mut rig = Rig::idle(disk);
    let image = image(&rig);
    let _daemon = start(&program, &rig, &image, false);
    rig.driver.start(u64::MAX);
    assert_ne!(rig.driver.offered() & RO, 0);
    let data = content(1, 0, 0);
    assert_eq!(one(&mut rig, 0, OUT, 0, Segment::Readable(&data)).0, IOERR);
    let room = Segment::Writable(SECTOR_BYTES as u32);
    assert_eq!(one(&mut rig, 0, IN, 0, room), (OK, vec![0; SECTOR_BYTES]));
}
