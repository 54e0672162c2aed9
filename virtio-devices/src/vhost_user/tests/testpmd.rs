//! Tests testpmd, a real back end of network interfaces with several pairs of queues. It polls its queues, and answers ARP
//! and echo requests on the pair on which they arrive.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Rig;
use super::net::{PAIRS, listening_with_pairs, set_pairs, with_pairs};
use super::process::{Process, program};
use crate::testing::{Chain, Segment};

/// Of virtio-net (virtio 1.2 §5.1.6); all zero: nothing is offloaded.
const HEADER_BYTES: usize = 12;
const ROOM_BYTES: u32 = 2048;
/// Buffers for frames that each pair has.
const DEPTH: u16 = 8;
const KILLS: u64 = 2;
const OUR_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OUR_IP: [u8; 4] = [192, 0, 2, 1];
const THEIR_IP: [u8; 4] = [192, 0, 2, 2];

/// `connects`: it connects to the socket, instead of listening on it.
fn start(program: &Path, socket: &Path, connects: bool) -> Process {
    let mut command = Command::new(program);
    // Its thread that polls shares a processor with the other one.
    command.arg("--lcores=(0,1)@0");
    // Uses no huge pages and no devices of the host, and shares no files with other processes of DPDK.
    command.args([
        "--no-huge",
        "-m",
        "128",
        "--no-pci",
        "--no-shconf",
        "--no-telemetry",
    ]);
    command.arg("--vdev").arg(format!(
        "net_vhost0,iface={},queues={PAIRS},client={}",
        socket.display(),
        u8::from(connects)
    ));
    command.args(["--", "--forward-mode=icmpecho", "--total-num-mbufs=2048"]);
    // Otherwise, frames that arrive before it is ready are lost.
    command.arg("--no-flush-rx");
    command.args([format!("--rxq={PAIRS}"), format!("--txq={PAIRS}")]);
    Process::start(&mut command)
}

fn ethernet(kind: u16) -> Vec<u8> {
    [&[0xff; 6][..], &OUR_MAC, &kind.to_be_bytes()].concat()
}

fn arp_request() -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    [
        &ethernet(0x0806)[..],
        &head,
        &OUR_MAC,
        &OUR_IP,
        &[0; 6],
        &THEIR_IP,
    ]
    .concat()
}

/// One's complement sum of words (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

fn echo(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, 0, 0, 0, 0, 7, 0, 1], payload].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    message
}

fn echo_request(payload: &[u8]) -> Vec<u8> {
    let message = echo(8, payload);
    let bytes = (20 + message.len()) as u16;
    let [high, low] = bytes.to_be_bytes();
    let mut header = [0x45, 0, high, low, 0, 0, 0, 0, 64, 1, 0, 0].to_vec();
    header.extend([OUR_IP, THEIR_IP].concat());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    [ethernet(0x0800), header, message].concat()
}

/// The driver's side of one pair.
struct Pair {
    rx: u16,
    rooms: Vec<Chain>,
}

impl Pair {
    fn new(rig: &mut Rig, pair: u16) -> Self {
        let mut new = Self {
            rx: 2 * pair,
            rooms: Vec::new(),
        };
        for _ in 0..DEPTH {
            new.add_room(rig);
        }
        new
    }

    fn add_room(&mut self, rig: &mut Rig) {
        let room = rig
            .driver
            .queue(self.rx)
            .push(&[Segment::Writable(ROOM_BYTES)]);
        self.rooms.push(room);
        rig.driver.kick(self.rx);
    }

    /// Sends a frame and returns the answer.
    fn exchange(&mut self, rig: &mut Rig, frame: &[u8]) -> Vec<u8> {
        let tx = self.rx + 1;
        let segments = [
            Segment::Readable(&[0; HEADER_BYTES]),
            Segment::Readable(frame),
        ];
        rig.driver.queue(tx).push(&segments);
        rig.driver.kick(tx);
        let used = rig.driver.queue(self.rx).wait_used();
        let of_used = |room: &Chain| u32::from(room.head) == used.head;
        let at = self
            .rooms
            .iter()
            .position(of_used)
            .expect("one of the rooms");
        let room = self.rooms.remove(at);
        let mut answer = rig.driver.queue(self.rx).read_buffer(room.buffers[0]);
        answer.truncate(used.len as usize);
        self.add_room(rig);
        rig.driver.queue(tx).wait_used();
        answer.split_off(HEADER_BYTES)
    }

    fn expect_answers(&mut self, rig: &mut Rig, round: u64) {
        let answer = self.exchange(rig, &arp_request());
        assert_eq!(answer[..6], OUR_MAC);
        let their_mac = answer[6..12].to_vec();
        assert_eq!(answer[20..22], [0, 2], "an answer");
        assert_eq!(
            answer[22..],
            [&their_mac[..], &THEIR_IP, &OUR_MAC, &OUR_IP].concat()
        );
        for bytes in [0, 64, 1400] {
            let payload: Vec<u8> = (0..bytes)
                .map(|at| at as u8 ^ self.rx as u8 ^ round as u8)
                .collect();
            let answer = self.exchange(rig, &echo_request(&payload));
            assert_eq!(answer[..6], OUR_MAC);
            assert_eq!(answer[26..34], [THEIR_IP, OUR_IP].concat());
            assert_eq!(answer[34..], echo(0, &payload));
        }
    }
}

fn answers_on_all_pairs(mut rig: Rig, connects: bool) {
    let Some(program) = program("dpdk-testpmd") else {
        return;
    };
    let socket = rig.socket();
    let mut testpmd = start(&program, &socket, connects);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    assert_eq!(set_pairs(&mut rig, PAIRS), 0);
    let mut pairs: Vec<Pair> = (0..PAIRS).map(|pair| Pair::new(&mut rig, pair)).collect();
    for round in 1..=KILLS + 1 {
        for pair in &mut pairs {
            pair.expect_answers(&mut rig, round);
        }
        if round > KILLS {
            break;
        }
        // It holds the rooms.
        drop(testpmd);
        rig.wait_for("connections_lost", round);
        if !connects {
            // It does not listen on a socket that exists.
            fs::remove_file(&socket).unwrap();
        }
        testpmd = start(&program, &socket, connects);
        rig.wait_until_served();
    }
    assert_eq!(rig.count("uncertain_requests"), 0);
    assert_eq!(rig.count("protocol_errors"), 0);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn testpmd_that_listens_answers_on_all_pairs_and_so_does_its_successor() {
    answers_on_all_pairs(Rig::idle(with_pairs), false);
}

#[test]
fn testpmd_that_connects_answers_on_all_pairs_and_so_does_its_successor() {
    answers_on_all_pairs(Rig::idle(listening_with_pairs), true);
}
