//! Tests with virtiofsd, the real back end of shared folders, driven as Linux drives it.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::process::{Process, program};
use super::{REQUESTS, Rig};
use crate::reclaim::{DiscardEngine, Expected, GuestRange};
use crate::testing::{Buffer, Segment};

const PAGE_BYTES: u32 = 4096;
const CONTENT: &[u8] = b"a file of the host";

// Requests of FUSE (linux/fuse.h).
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const HEADER_BYTES: usize = 40;
const REPLY_BYTES: usize = 16;

fn start(program: &Path, rig: &Rig, folder: &Path) -> Process {
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(rig.socket());
    command.arg("--shared-dir").arg(folder);
    command.args(["--sandbox", "none", "--seccomp", "none", "--cache", "never"]);
    Process::start(&mut command)
}

/// Sends a request with `room` for the response, and returns the response without its header.
fn ask_into(rig: &mut Rig, opcode: u32, node: u64, body: &[u8], room: Buffer) -> Vec<u8> {
    let mut request = vec![0; HEADER_BYTES];
    let bytes = (HEADER_BYTES + body.len()) as u32;
    request[..4].copy_from_slice(&bytes.to_le_bytes());
    request[4..8].copy_from_slice(&opcode.to_le_bytes());
    request[8] = 7;
    request[16..24].copy_from_slice(&node.to_le_bytes());
    request.extend(body);
    let segments = [
        Segment::Readable(&request),
        Segment::Writable(REPLY_BYTES as u32),
        Segment::WritableAt(room.address, room.len),
    ];
    let queue = rig.driver.queue(REQUESTS);
    let chain = queue.push(&segments);
    rig.driver.kick(REQUESTS);
    let queue = rig.driver.queue(REQUESTS);
    let used = queue.wait_used();
    assert_eq!(used.head, u32::from(chain.head));
    let header = queue.read_buffer(chain.buffers[1]);
    assert_eq!(header[4..8], [0; 4], "request {opcode} failed");
    assert_eq!(header[8], 7);
    let mut answer = queue.read_buffer(room);
    answer.truncate(used.len as usize - REPLY_BYTES);
    answer
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Mounts the folder and reads its file into a page that is discarded in between.
fn read_file(rig: &mut Rig) {
    let align = u64::from(PAGE_BYTES);
    let room = Buffer {
        address: rig.driver.ram.alloc(align, align),
        len: PAGE_BYTES,
    };
    let init = ask_into(rig, INIT, ROOT, &words(&[7, 31, 0, 0]), room);
    assert_eq!(init[..4], 7u32.to_le_bytes());
    let entry = ask_into(rig, LOOKUP, ROOT, b"file\0", room);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let open = ask_into(rig, OPEN, node, &words(&[0, 0]), room);
    let handle: [u8; 8] = open[..8].try_into().unwrap();
    let mut read = handle.to_vec();
    read.extend(words(&[0, 0, PAGE_BYTES, 0, 0, 0, 0, 0]));
    for _ in 0..2 {
        assert_eq!(ask_into(rig, READ, node, &read, room), CONTENT);
        // A balloon discards the page, which the back end still has mapped.
        let mut page = [GuestRange {
            start: room.address.0,
            bytes: align,
        }];
        let mem = rig.driver.ram.mem();
        let outcome =
            DiscardEngine::new(Arc::default()).discard(&mem, &mut page, Expected::Anything);
        assert_eq!(outcome.discarded.bytes, align);
        assert_eq!(rig.driver.ram.read(room.address, 64), [0; 64]);
    }
}

#[test]
fn virtiofsd_serves_a_folder_is_killed_and_serves_it_again() {
    let Some(program) = program("virtiofsd") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), CONTENT).unwrap();
    let mut rig = Rig::new();
    for round in 1..=3 {
        let process = start(&program, &rig, folder.path());
        rig.wait_for("connections", round);
        rig.wait_until_served();
        read_file(&mut rig);
        // The driver restarts; the process continues.
        rig.driver.reset();
        rig.driver.start(u64::MAX);
        rig.wait_until_served();
        read_file(&mut rig);
        assert_eq!(rig.count("connections"), round);
        drop(process);
        rig.wait_for("connections_lost", round);
    }
    assert_eq!(rig.count("rings_taken_away"), 0);
    assert!(!rig.driver.needs_reset());
}
