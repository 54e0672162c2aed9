//! Tests of network interfaces: decisions of the front end, and a back end that connects to it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::{Endpoint, NetProfile, Profile, RING_FEATURES, VhostUser, VhostUserParams};
use super::Rig;
use super::back_end::{About, BackEnd};
use crate::ListeningSocket;
use crate::device::VirtioDevice;
use crate::testing::Segment;

const QUEUES: usize = 2;
const TX: u16 = 1;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const CSUM: u64 = 1 << 0;
const MTU: u64 = 1 << 3;
const MAC_BIT: u64 = 1 << 5;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;

fn net(endpoint: Endpoint, mtu: Option<u16>, offload: bool) -> Arc<Mutex<dyn VirtioDevice>> {
    let device = VhostUser::new(VhostUserParams {
        id: "_net0".to_owned(),
        profile: Profile::net(&NetProfile {
            mac: MAC,
            mtu,
            offload_tso: offload,
            offload_ufo: offload,
            offload_csum: offload,
        }),
        endpoint,
        queue_sizes: vec![64; QUEUES],
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
