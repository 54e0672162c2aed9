//! Tests of disks, whose properties depend on the back end.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::device::VhostUser;
use super::super::{Endpoint, Profile, RING_FEATURES, VhostUserParams};
use super::Rig;
use super::back_end::{About, BackEnd};
use super::by_hand::{
    self, ByHand, GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_VRING_BASE, SET_VRING_ENABLE,
    SET_VRING_KICK,
};
use crate::device::VirtioDevice;
use crate::pci::PciFunction;
use crate::testing::{DEADLINE, Segment, conformance, wait_until};

const CONFIG_BYTES: usize = 60;
const QUEUE_SIZE: u16 = 64;
const QUEUES: usize = 2;
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const NEEDS_RESET: u8 = 0x40;

fn disk_with(socket: &Path, patience: Duration) -> Arc<Mutex<dyn VirtioDevice>> {
    let params = VhostUserParams {
        id: "_disk0".to_owned(),
        profile: Profile::block(),
        endpoint: Endpoint::Connect(socket.to_owned()),
        queue_sizes: vec![QUEUE_SIZE; QUEUES],
    };
    Arc::new(Mutex::new(
        VhostUser::with_patience(params, patience).unwrap(),
    ))
}

pub(super) fn disk(socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    disk_with(socket, DEADLINE)
}

fn config(sectors: u64) -> Vec<u8> {
    let mut config = vec![0; CONFIG_BYTES];
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    // seg_max
    config[12..16].copy_from_slice(&126u32.to_le_bytes());
    // num_queues, which the front end determines.
    config[34] = 9;
    config
}

fn about(features: u64, sectors: u64) -> About {
    About {
        features: RING_FEATURES | features,
        config: config(sectors),
        ..About::default()
    }
}

fn started(about: About) -> (Rig, BackEnd) {
    let mut rig = Rig::idle(disk);
    let back_end = BackEnd::start_as(&rig.socket(), QUEUES, about);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    (rig, back_end)
}

fn sectors(rig: &Rig) -> u64 {
    let mut bytes = [0; 8];
    rig.driver.device_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn word(rig: &Rig, at: u64) -> u16 {
    let mut bytes = [0; 2];
    rig.driver.device_config(at, &mut bytes);
    u16::from_le_bytes(bytes)
}

/// The back end introduces itself, and gets no memory of the suite's guest, which is private.
#[test]
fn disk_that_is_never_served_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut accept = ByHand::listen(&socket);
    std::thread::spawn(move || {
        let record = tempfile::tempfile().unwrap();
        loop {
            accept().serve(&config(7), &record, u32::MAX);
        }
    });
    conformance("vhost-user", |_| disk(&socket));
}

#[test]
fn disk_offers_what_its_back_end_offers_and_has_its_own_queues() {
    for features in [0, RO, FLUSH | DISCARD] {
        let (rig, _back_end) = started(about(features | CONFIG_WCE, 77));
        assert_eq!(rig.driver.offered(), RING_FEATURES | features);
        assert_eq!(sectors(&rig), 77);
        assert_eq!(word(&rig, 34), QUEUES as u16);
        // A request with its header and its status fits a queue.
        assert_eq!(word(&rig, 12), QUEUE_SIZE - 2);
    }
}

#[test]
fn driver_waits_in_its_reset_until_there_is_a_back_end() {
    let mut rig = Rig::idle(disk);
    rig.driver.set_status(0);
    assert_eq!(rig.driver.status(), NEEDS_RESET);
    assert_eq!(rig.driver.offered(), 0);
    let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH, 5));
    wait_until("the reset", || rig.driver.status() == 0);
    assert_eq!(rig.driver.offered(), RING_FEATURES | FLUSH);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
}

#[test]
fn driver_does_not_wait_forever_and_may_try_again() {
    let mut rig = Rig::idle(|socket| disk_with(socket, Duration::ZERO));
    rig.driver.set_status(0);
    assert_eq!(rig.driver.status(), 0);
    assert_eq!(rig.driver.offered(), 0);
    assert!(!rig.driver.try_features(1 << 32));
    let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH, 5));
    rig.wait_for("connected", 1);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
}

#[test]
fn waiting_driver_is_saved_and_waits_elsewhere() {
    let rig = Rig::idle(disk);
    rig.driver.set_status(0);
    let Rig { folder, driver } = rig;
    let (saved, moving) = driver.save();
    let socket = folder.path().join("socket");
    let driver = moving.restore(disk(&socket), &saved).unwrap();
    let mut rig = Rig { folder, driver };
    rig.driver.function.resume();
    assert_eq!(rig.driver.status(), NEEDS_RESET);
    let _back_end = BackEnd::start_as(&socket, QUEUES, about(FLUSH, 5));
    wait_until("the reset", || rig.driver.status() == 0);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
}

#[test]
fn saved_disk_is_the_same_before_it_has_a_back_end_again() {
    let (rig, back_end) = started(about(FLUSH, 77));
    let Rig { folder, driver } = rig;
    let (saved, moving) = driver.save();
    back_end.kill();
    let driver = moving.restore(disk(&folder.path().join("other")), &saved);
    let rig = Rig {
        folder,
        driver: driver.unwrap(),
    };
    rig.driver.function.resume();
    assert_eq!(sectors(&rig), 77);
    let other = rig.folder.path().join("other");
    let _back_end = BackEnd::start_as(&other, QUEUES, about(FLUSH, 78));
    rig.wait_until_served();
    assert_eq!(sectors(&rig), 78);
}

#[test]
fn other_capacity_after_a_restart_is_a_change_of_configuration() {
    let (rig, back_end) = started(about(FLUSH, 77));
    let before = rig.driver.vectors.triggered(0);
    back_end.kill();
    let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH, 99));
    rig.driver.vectors.wait_triggered(0, before + 1);
    assert_eq!(sectors(&rig), 99);
}

#[test]
fn back_end_without_a_feature_in_use_is_refused_until_the_driver_starts_again() {
    let (mut rig, back_end) = started(about(FLUSH | DISCARD, 77));
    back_end.kill();
    let poor = BackEnd::start_as(&rig.socket(), QUEUES, about(DISCARD, 77));
    rig.wait_for("protocol_errors", 1);
    assert_eq!(rig.count("serving"), 0);
    poor.kill();
    std::fs::remove_file(rig.socket()).ok();
    let rich = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH | DISCARD, 77));
    rig.wait_until_served();
    rich.kill();
    rig.driver.reset();
    let connections = rig.count("connections");
    let _poor = BackEnd::start_as(&rig.socket(), QUEUES, about(DISCARD, 77));
    rig.wait_for("connections", connections + 1);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    assert_eq!(rig.driver.offered(), RING_FEATURES | DISCARD);
}

/// It has no record of its own, and has completed later requests.
#[test]
fn request_that_was_overtaken_is_served_by_the_successor_and_no_other_twice() {
    let (mut rig, mut back_end) = started(about(FLUSH, 77));
    for round in 1..=3 {
        back_end.forgetful.store(true, Ordering::SeqCst);
        let queue = rig.driver.queue(0);
        let chains: Vec<_> = [b"one", b"two", b"six"]
            .into_iter()
            .map(|text| queue.push(&[Segment::Readable(text), Segment::Writable(8)]))
            .collect();
        rig.driver.kick(0);
        let queue = rig.driver.queue(0);
        for chain in &chains[1..] {
            assert_eq!(queue.wait_used().head, u32::from(chain.head));
        }
        back_end.kill();
        rig.wait_for("connections_lost", round);
        back_end = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH, 77));
        let queue = rig.driver.queue(0);
        assert_eq!(queue.wait_used().head, u32::from(chains[0].head));
        assert_eq!(&queue.read_buffer(chains[0].buffers[1])[..3], b"one");
        rig.driver.function.pause();
        rig.driver.function.resume();
        assert_eq!(rig.driver.queue(0).pop_used(), None);
    }
    assert_eq!(rig.count("uncertain_requests"), 0);
}

/// A file for requests in flight.
fn record() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    file
}

#[test]
fn record_of_requests_in_flight_passes_to_the_successor() {
    let mut rig = Rig::idle(disk);
    let mut accept = ByHand::listen(&rig.socket());
    let mut first_record = record();
    let file = first_record.try_clone().unwrap();
    let first = std::thread::spawn(move || {
        let mut back_end = accept();
        let mut messages = back_end.serve(&config(7), &file, SET_VRING_KICK);
        messages.extend(back_end.serve(&config(7), &file, SET_VRING_KICK));
        messages
    });
    rig.driver.start(u64::MAX);
    let messages = first.join().unwrap();
    let requests: Vec<_> = messages.iter().map(|message| message.request).collect();
    let at = |request| requests.iter().position(|it| *it == request).unwrap();
    assert!(at(GET_INFLIGHT_FD) < at(SET_INFLIGHT_FD));
    assert!(at(SET_INFLIGHT_FD) < at(SET_VRING_KICK));
    let asked = &messages[at(GET_INFLIGHT_FD)].body;
    assert_eq!(asked[16..18], (QUEUES as u16).to_le_bytes());
    assert_eq!(asked[18..20], QUEUE_SIZE.to_le_bytes());

    // The first back end is gone, with this in its record.
    first_record.write_all(b"in flight").unwrap();
    std::fs::remove_file(rig.socket()).unwrap();
    let mut accept = ByHand::listen(&rig.socket());
    let other = record();
    let messages = accept().serve(&config(7), &other, SET_VRING_KICK);
    let of = |request: u32| messages.iter().find(|message| message.request == request);
    assert!(of(GET_INFLIGHT_FD).is_none());
    let mut passed = of(SET_INFLIGHT_FD).unwrap().file.as_ref().unwrap();
    passed.rewind().unwrap();
    let mut content = [0; 9];
    passed.read_exact(&mut content).unwrap();
    assert_eq!(&content, b"in flight");
    assert_eq!(of(SET_VRING_BASE).unwrap().body, [0; 8]);
}

/// A back end that is not ready for a doorbell may lose it.
#[test]
fn doorbells_wait_for_a_back_end_that_acknowledges_nothing() {
    let mut rig = Rig::idle(disk);
    let mut accept = ByHand::listen(&rig.socket());
    let back_end = std::thread::spawn(move || {
        let mut back_end = accept();
        let mut messages = Vec::new();
        for _ in 0..QUEUES {
            messages.extend(back_end.serve(&config(7), &record(), SET_VRING_ENABLE));
        }
        let kicks = messages.into_iter();
        let kicks = kicks.filter(|message| message.request == SET_VRING_KICK);
        let mut doorbells: Vec<_> = kicks.map(|message| message.file.unwrap()).collect();
        assert_eq!(doorbells.len(), QUEUES);
        let last = back_end.read().unwrap().request;
        assert_eq!(last, by_hand::GET_FEATURES);
        let mut count = [0; 8];
        for doorbell in &mut doorbells {
            let too_early = doorbell.read(&mut count).unwrap_err();
            assert_eq!(too_early.kind(), std::io::ErrorKind::WouldBlock);
        }
        let features = RING_FEATURES | by_hand::PROTOCOL_FEATURES;
        back_end.reply(last, &features.to_le_bytes(), None);
        for doorbell in &mut doorbells {
            wait_until("the doorbell", || doorbell.read(&mut count).is_ok());
        }
    });
    rig.driver.start(u64::MAX);
    back_end.join().unwrap();
}

#[test]
fn wrong_configuration_space_is_refused_and_counted() {
    // Size in the answer, and its content.
    let lies: [(&str, u64, Option<usize>, usize); 6] = [
        ("cannot share it", by_hand::MQ, None, 0),
        ("refuses like QEMU", by_hand::CONFIG, None, 0),
        ("refuses like rust-vmm", by_hand::CONFIG, Some(0), 0),
        (
            "too short",
            by_hand::CONFIG,
            Some(CONFIG_BYTES),
            CONFIG_BYTES - 1,
        ),
        (
            "too long",
            by_hand::CONFIG,
            Some(CONFIG_BYTES),
            CONFIG_BYTES + 1,
        ),
        (
            "another size",
            by_hand::CONFIG,
            Some(CONFIG_BYTES - 1),
            CONFIG_BYTES,
        ),
    ];
    for (name, protocol, size, content) in lies {
        println!("{name}");
        let rig = Rig::idle(disk);
        let mut accept = ByHand::listen(&rig.socket());
        let liar = std::thread::spawn(move || {
            let mut back_end = accept();
            while let Some(message) = back_end.read() {
                let number = |value: u64| value.to_le_bytes().to_vec();
                let answer = match message.request {
                    by_hand::GET_FEATURES => number(RING_FEATURES | by_hand::PROTOCOL_FEATURES),
                    by_hand::GET_PROTOCOL_FEATURES => number(protocol),
                    by_hand::GET_QUEUE_NUM => number(QUEUES as u64),
                    by_hand::GET_CONFIG => size.map_or(Vec::new(), |size| {
                        let words = [0, size as u32, 1].map(u32::to_le_bytes);
                        [words.as_flattened(), &vec![0; content]].concat()
                    }),
                    _ => continue,
                };
                back_end.reply(message.request, &answer, None);
            }
        });
        rig.wait_for("protocol_errors", 1);
        liar.join().unwrap();
        rig.driver.set_status(0);
        assert_eq!(rig.driver.status(), NEEDS_RESET);
        std::fs::remove_file(rig.socket()).unwrap();
        let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about(FLUSH, 5));
        wait_until("the reset", || rig.driver.status() == 0);
    }
}
