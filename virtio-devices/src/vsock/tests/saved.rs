//! Tests a device that continues elsewhere: its connections are closed, and the guest is notified.

use state::Saved;

use super::super::VsockConnectionsState;
use super::*;

#[test]
fn connections_of_a_saved_device_are_reset_where_it_continues() {
    let mut rig = Rig::new(8);
    let (_kept, first) = rig.connect_to_guest(52);
    let (_also, second) = rig.connect_to_host(1024, 80);
    let saved = rig.harness.handler.state().own;
    // Saved again before the guest was notified: the state still lists both.
    let rig = Rig::restored(0, saved.as_ref());
    let again = rig.harness.handler.state().own;
    let mut ports: Vec<(u32, u32)> = Vec::new();
    let mut rig = Rig::restored(8, again.as_ref());
    for _ in 0..2 {
        let reset = rig.next_is(Op::Reset);
        ports.push((reset.src_port, reset.dst_port));
    }
    ports.sort_unstable();
    let mut expected = [first, second].map(|header| (header.dst_port, header.src_port));
    expected.sort_unstable();
    assert_eq!(ports, expected);
    rig.nothing_comes();
    // A port that the guest may remember is not reused.
    let (_stream, header) = rig.connect_to_guest(52);
    assert_eq!(header.dst_port, (1 << 30) + 1);
}

#[test]
fn saved_state_that_cannot_be_is_refused() {
    let sound = VsockConnectionsState {
        next_host_port: 1 << 30,
        connections: vec![(80, 1024)],
    };
    for wrong in [
        VsockConnectionsState {
            next_host_port: 1,
            ..sound.clone()
        },
        VsockConnectionsState {
            next_host_port: 1 << 31,
            ..sound.clone()
        },
        VsockConnectionsState {
            connections: vec![(80, 1024); 10_000],
            ..sound.clone()
        },
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::new(params(&folder)).unwrap();
        let mut handler = vsock.take_handlers().remove(0);
        assert!(handler.restore(None).is_err());
        assert!(handler.restore(Some(&Saved::of(&wrong))).is_err());
        assert!(handler.restore(Some(&Saved::of(&sound))).is_ok());
    }
}
