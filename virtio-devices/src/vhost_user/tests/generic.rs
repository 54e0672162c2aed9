//! Tests a device whose type is all that the front end knows about it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use super::super::{Endpoint, Profile, RING_FEATURES, VhostUser, VhostUserParams};
use super::Rig;
use super::back_end::{About, BackEnd};
use super::process::{Process, program};
use super::storage_daemon::{self, IMAGE_BYTES, SECTOR_BYTES};
use crate::device::VirtioDevice;
use crate::testing::{Chain, Segment};

const QUEUES: usize = 3;
const SOUND: u32 = 25;
const BLOCK: u32 = 2;
const ENTROPY: u32 = 4;

fn device(device_type: u32, queues: usize, socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    let device = VhostUser::new(VhostUserParams {
        id: "_generic0".to_owned(),
        profile: Profile::of_type(device_type),
        endpoint: Endpoint::Connect(socket.to_owned()),
        queue_sizes: vec![64; queues],
    });
    Arc::new(Mutex::new(device.unwrap()))
}

#[test]
fn device_has_the_features_and_the_configuration_of_its_back_end() {
    const OWN: u64 = 1 << 3 | 1 << 23 | 1 << 50;
    const OF_THE_RING: u64 = 1 << 26 | 1 << 33 | 1 << 40;
    for bytes in [0, 4, 12, 36, 256] {
        println!("{bytes}");
        let mut rig = Rig::idle(|socket| device(SOUND, QUEUES, socket));
        let config: Vec<u8> = (1..=bytes).map(|byte| byte as u8).collect();
        let about = About {
            features: RING_FEATURES | OWN | OF_THE_RING,
            config: config.clone(),
            ..About::default()
        };
        let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about);
        rig.driver.start(u64::MAX);
        rig.wait_until_served();
        assert_eq!(rig.driver.offered(), RING_FEATURES | OWN);
        let mut read = vec![0xff; 260];
        rig.driver.device_config(0, &mut read);
        assert_eq!(read[..bytes], config);
        assert!(read[bytes..].iter().all(|byte| *byte == 0));
        assert_eq!(rig.count("protocol_errors"), 0);
    }
}

/// QEMU's daemon has a larger configuration space than the front end knows of a disk.
#[test]
fn disk_of_the_storage_daemon_works_as_a_device_of_any_type() {
    let Some(program) = program(storage_daemon::PROGRAM) else {
        return;
    };
    let queues = usize::from(storage_daemon::QUEUES);
    let mut rig = Rig::idle(|socket| device(BLOCK, queues, socket));
    let image = storage_daemon::image(&rig);
    let _daemon = storage_daemon::start(&program, &rig, &image, true);
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    let mut capacity = [0; 8];
    rig.driver.device_config(0, &mut capacity);
    let sectors = IMAGE_BYTES / SECTOR_BYTES as u64;
    assert_eq!(u64::from_le_bytes(capacity), sectors);
    storage_daemon::writes_and_reads(&mut rig);
    assert_eq!(rig.count("protocol_errors"), 0);
}

/// vhost-device-rng appends a number to the path of its socket.
fn numbered(socket: &Path) -> PathBuf {
    PathBuf::from(format!("{}0", socket.display()))
}

fn ask(rig: &mut Rig, bytes: u32) -> Chain {
    let chain = rig.driver.queue(0).push(&[Segment::Writable(bytes)]);
    rig.driver.kick(0);
    chain
}

fn answer(rig: &mut Rig, chain: &Chain) -> Vec<u8> {
    let queue = rig.driver.queue(0);
    let used = queue.wait_used();
    let buffer = chain.buffers[0];
    assert_eq!((used.head, used.len), (chain.head.into(), buffer.len));
    queue.read_buffer(buffer)
}

/// A back end without acknowledgements, without a configuration space and without a record of its requests.
#[test]
fn entropy_daemon_is_killed_and_its_successor_answers_what_waits() {
    const KILLS: u64 = 5;
    let Some(program) = program("vhost-device-rng") else {
        return;
    };
    let mut rig = Rig::idle(|socket| device(ENTROPY, 1, &numbered(socket)));
    let socket = rig.socket();
    let start = || Process::start(Command::new(&program).arg("--socket-path").arg(&socket));
    let mut daemon = start();
    rig.driver.start(u64::MAX);
    let mut seen = BTreeSet::new();
    for kills in 1..=KILLS {
        for bytes in [16, 64, 4096] {
            let chain = ask(&mut rig, bytes);
            assert!(seen.insert(answer(&mut rig, &chain)));
        }
        drop(daemon);
        rig.wait_for("connections_lost", kills);
        let waiting = [ask(&mut rig, 64), ask(&mut rig, 64)];
        daemon = start();
        for chain in waiting {
            assert!(seen.insert(answer(&mut rig, &chain)));
        }
    }
    assert_eq!(rig.count("uncertain_requests"), 0);
    assert!(!rig.driver.needs_reset());
}
