//! Tests of network interfaces: decisions of the front end, and a back end that connects to it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use state::Saved;

use super::super::{
    Endpoint, NetProfile, Profile, RING_FEATURES, VhostUser, VhostUserParams, VhostUserState,
};
use super::Rig;
use super::back_end::{About, BackEnd};
use crate::ListeningSocket;
use crate::device::VirtioDevice;
use crate::pci::PciFunction;
use crate::testing::Segment;

const QUEUES: usize = 2;
pub(super) const PAIRS: u16 = 3;
/// Without the control queue.
const QUEUES_OF_PAIRS: u16 = 2 * PAIRS;
const CTRL: u16 = QUEUES_OF_PAIRS;
const TX: u16 = 1;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const CSUM: u64 = 1 << 0;
const MTU: u64 = 1 << 3;
const MAC_BIT: u64 = 1 << 5;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

fn net(endpoint: Endpoint, mtu: Option<u16>, offload: bool) -> Arc<Mutex<dyn VirtioDevice>> {
    net_with(endpoint, QUEUES, mtu, offload)
}

fn net_with(
    endpoint: Endpoint,
    queues: usize,
    mtu: Option<u16>,
    offload: bool,
) -> Arc<Mutex<dyn VirtioDevice>> {
    let device = VhostUser::new(VhostUserParams {
        id: "_net0".to_owned(),
        profile: Profile::net(&NetProfile {
            mac: MAC,
            mtu,
            pairs: queues as u16 / 2,
            offload_tso: offload,
            offload_ufo: offload,
            offload_csum: offload,
        }),
        endpoint,
        queue_sizes: vec![64; queues],
    });
    Arc::new(Mutex::new(device.unwrap()))
}

fn about() -> About {
    About {
        features: RING_FEATURES | CSUM | HOST_TSO4 | MRG_RXBUF | CTRL_VQ,
        ..About::default()
    }
}

/// Whatever the back end supports, address and MTU are those of the configuration.
#[test]
fn interface_has_the_address_of_the_front_end_and_the_offloads_of_both() {
    for (mtu, offload, expected) in [
        (None, true, CSUM | HOST_TSO4 | MRG_RXBUF | MAC_BIT | STATUS),
        (Some(9000), false, MRG_RXBUF | MAC_BIT | STATUS | MTU),
    ] {
        let mut rig = Rig::idle(|socket| net(Endpoint::Connect(socket.to_owned()), mtu, offload));
        let _back_end = BackEnd::start_as(&rig.socket(), QUEUES, about());
        rig.driver.start(u64::MAX);
        rig.wait_until_served();
        assert_eq!(rig.driver.offered(), RING_FEATURES | expected);
        let mut config = [0; 12];
        rig.driver.device_config(0, &mut config);
        assert_eq!(config[..6], MAC);
        assert_eq!(config[6..8], [1, 0], "the link is up");
        assert_eq!(config[10..], mtu.unwrap_or(0).to_le_bytes());
    }
}

fn listening(socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    let bound = ListeningSocket::bind(socket).unwrap();
    net(Endpoint::Listen(bound), None, true)
}

#[test]
fn back_ends_that_connect_are_served_one_after_the_other() {
    let mut rig = Rig::idle(listening);
    let mut waiting = None;
    for round in 1..=3 {
        let back_end = waiting
            .take()
            .unwrap_or_else(|| BackEnd::connect_as(&rig.socket(), QUEUES, about()));
        rig.wait_for("connections", round);
        if round == 1 {
            rig.driver.start(u64::MAX);
        }
        rig.wait_until_served();
        let segments = [Segment::Readable(b"frame"), Segment::Writable(8)];
        let chain = rig.driver.queue(TX).push(&segments);
        rig.driver.kick(TX);
        let used = rig.driver.queue(TX).wait_used();
        assert_eq!((used.head, used.len), (u32::from(chain.head), 5));
        if round == 2 {
            // It waits in the backlog.
            waiting = Some(BackEnd::connect_as(&rig.socket(), QUEUES, about()));
        }
        back_end.kill();
        rig.wait_for("connections_lost", round);
    }
    let socket = rig.socket();
    assert!(socket.exists());
    let Rig { folder, driver } = rig;
    drop(driver);
    assert!(!socket.exists(), "the VMM removes its socket");
    drop(folder);
}

pub(super) fn listening_with_pairs(socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    let bound = ListeningSocket::bind(socket).unwrap();
    net_with(Endpoint::Listen(bound), QUEUES_OF_PAIRS.into(), None, true)
}

pub(super) fn with_pairs(socket: &Path) -> Arc<Mutex<dyn VirtioDevice>> {
    let endpoint = Endpoint::Connect(socket.to_owned());
    net_with(endpoint, QUEUES_OF_PAIRS.into(), None, true)
}

fn about_pairs() -> About {
    let mut about = about();
    about.features |= MQ;
    about
}

fn command(rig: &mut Rig, command: &[u8]) -> u8 {
    let segments = [Segment::Readable(command), Segment::Writable(1)];
    let chain = rig.driver.queue(CTRL).push(&segments);
    rig.driver.kick(CTRL);
    assert_eq!(rig.driver.queue(CTRL).wait_used().len, 1);
    rig.driver.queue(CTRL).read_buffer(chain.buffers[1])[0]
}

pub(super) fn set_pairs(rig: &mut Rig, pairs: u16) -> u8 {
    let [low, high] = pairs.to_le_bytes();
    command(rig, &[4, 0, low, high])
}

/// Sends a frame through the transmit queue of each pair, and checks which pairs the back end serves.
fn expect_served(rig: &mut Rig, pairs: u16) {
    let tx = |pair: u16| 2 * pair + 1;
    let all = 0..QUEUES_OF_PAIRS / 2;
    for pair in all.clone() {
        let segments = [Segment::Readable(b"frame"), Segment::Writable(8)];
        rig.driver.queue(tx(pair)).push(&segments);
        rig.driver.kick(tx(pair));
    }
    for pair in all.clone().take(pairs.into()) {
        assert_eq!(rig.driver.queue(tx(pair)).wait_used().len, 5);
    }
    for pair in all.skip(pairs.into()) {
        assert_eq!(rig.driver.queue(tx(pair)).pop_used(), None, "pair {pair}");
    }
}

#[test]
fn back_end_serves_as_many_pairs_as_the_driver_sets_and_frames_wait_for_their_pair() {
    let mut rig = Rig::idle(with_pairs);
    let back_end = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    let bits = CSUM | HOST_TSO4 | MRG_RXBUF | MAC_BIT | STATUS | CTRL_VQ | MQ;
    assert_eq!(rig.driver.offered(), RING_FEATURES | bits);
    let mut config = [0; 12];
    rig.driver.device_config(0, &mut config);
    assert_eq!(config[8..10], [3, 0], "pairs");
    expect_served(&mut rig, 1);
    // The frames that wait in the second and third pair are served, too.
    assert_eq!(set_pairs(&mut rig, 3), 0);
    for tx in [3, 5] {
        assert_eq!(rig.driver.queue(tx).wait_used().len, 5);
    }
    expect_served(&mut rig, 3);
    back_end.kill();
    rig.wait_for("connections_lost", 1);
    let _successor = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
    rig.wait_for("connections", 2);
    rig.wait_until_served();
    expect_served(&mut rig, 3);
    // Another driver begins with one pair.
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    expect_served(&mut rig, 1);
    assert_eq!(rig.count("protocol_errors"), 0);
    assert_eq!(rig.count("bad_requests"), 0);
}

#[test]
fn wrong_commands_change_nothing_and_are_counted() {
    let mut rig = Rig::idle(with_pairs);
    let _back_end = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    for pairs in [0, 4, u16::MAX] {
        assert_eq!(set_pairs(&mut rig, pairs), 1, "{pairs} pairs");
    }
    // Offloads are not negotiated.
    for wrong in [
        &[][..],
        &[4, 0],
        &[4, 1, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(command(&mut rig, wrong), 1);
    }
    assert_eq!(rig.count("bad_requests"), 7);
    expect_served(&mut rig, 1);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn back_end_without_the_pairs_is_refused() {
    let one_pair = (usize::from(QUEUES_OF_PAIRS), about());
    let too_few = (usize::from(QUEUES_OF_PAIRS) - 1, about_pairs());
    for (queues, about) in [one_pair, too_few] {
        let mut rig = Rig::idle(with_pairs);
        let back_end = BackEnd::start_as(&rig.socket(), queues, about);
        rig.wait_for("protocol_errors", 1);
        assert_eq!(rig.count("connected"), 0);
        back_end.kill();
        let _successor = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
        rig.driver.start(u64::MAX);
        rig.wait_until_served();
    }
}

/// A driver that does not know several pairs has the control queue behind the first one.
#[test]
fn driver_without_several_pairs_has_one() {
    let mut rig = Rig::idle(with_pairs);
    let _back_end = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
    rig.driver.start(!MQ);
    rig.wait_until_served();
    let segments = [Segment::Readable(&[4, 0, 1, 0][..]), Segment::Writable(1)];
    let chain = rig.driver.queue(2).push(&segments);
    rig.driver.kick(2);
    rig.driver.queue(2).wait_used();
    assert_eq!(rig.driver.queue(2).read_buffer(chain.buffers[1])[0], 1);
}

#[test]
fn saved_interface_keeps_its_number_of_pairs() {
    let mut rig = Rig::idle(with_pairs);
    let back_end = BackEnd::start_as(&rig.socket(), QUEUES_OF_PAIRS.into(), about_pairs());
    rig.driver.start(u64::MAX);
    rig.wait_until_served();
    assert_eq!(set_pairs(&mut rig, 2), 0);
    let Rig { folder, driver } = rig;
    let (saved, moving) = driver.save();
    drop(back_end);
    let socket = folder.path().join("other");
    let driver = moving.restore(with_pairs(&socket), &saved).unwrap();
    let mut rig = Rig { folder, driver };
    let _back_end = BackEnd::start_as(&socket, QUEUES_OF_PAIRS.into(), about_pairs());
    rig.driver.function.resume();
    expect_served(&mut rig, 2);
}

#[test]
fn number_of_pairs_that_the_interface_does_not_have_is_not_restored() {
    let state = |enabled_pairs| {
        Saved::of(&VhostUserState {
            identity: None,
            enabled_pairs,
        })
    };
    let restore = |queues, pairs| {
        let endpoint = Endpoint::Connect("/nobody".into());
        let device = net_with(endpoint, queues, None, true);
        let restored = device.lock().unwrap().restore(&state(pairs));
        restored.map_err(|error| error.to_string())
    };
    for pairs in [1, 3] {
        restore(6, Some(pairs)).unwrap();
    }
    restore(2, None).unwrap();
    for (queues, pairs) in [(6, Some(0)), (6, Some(4)), (6, None), (2, Some(1))] {
        let error = restore(queues, pairs).unwrap_err();
        assert!(error.contains("enabled_pairs"), "{error}");
    }
}
