//! Tests network interfaces with a real tap, real packets and checked contents.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::descriptors::{inherit, open_tap};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::vmm::PROCESS_DEADLINE;
use integration_tests::wait::wait_for;

pub(crate) fn tests() -> Vec<Test> {
    tests![
        net_carries_data_both_ways_unchanged,
        net_with_two_queue_pairs_carries_data,
        net_on_an_inherited_tap_carries_packets,
        two_nets_keep_their_addresses,
    ]
}

/// Address of the network card that [`exchange`] uses.
pub(crate) const MAC: &str = "12:34:56:78:90:ab";
const TRANSFER_BYTES: usize = 4 << 20;
const ACCEPT_DEADLINE: Duration = Duration::from_secs(60);

/// Bytes whose period is not a power of two, so that a lost or duplicated packet is detected.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491u32;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()[1]
        })
        .collect()
}

/// `tap` and the network of that number are used by this test only.
fn carries_data(tap: &str, network: u8, options: &str) -> Result<Outcome> {
    let prefix = format!("192.168.{network}");
    let net = format!("tap={tap},ip={prefix}.1,mask=255.255.255.0,mac={MAC}{options}");
    let mut guest = Machine {
        cpus: "boot=2",
        arguments: &["--net", &net],
        ..Machine::default()
    }
    .serve()?;
    exchange(&mut guest, &prefix)?;
    guest.end_cleanly()?;
    wait_for("the tap to vanish", PROCESS_DEADLINE, || {
        Ok((!Path::new("/sys/class/net").join(tap).exists()).then_some(()))
    })?;
    Ok(Outcome::Passed)
}

/// Sends data to the guest, which returns it. The host's end of the network is `prefix`.1, and the guest's card has the
/// address [`MAC`].
pub(crate) fn exchange(guest: &mut Guest, prefix: &str) -> Result<()> {
    set_up(guest, prefix, MAC)?;
    carry(guest, prefix, TRANSFER_BYTES)?;
    let counters = guest.vmm.get("vm.counters")?;
    let net = counters
        .as_object()
        .and_then(|devices| devices.iter().find(|(name, _)| name.starts_with("_net")))
        .map(|(_, net)| net)
        .with_context(|| format!("{counters:#}"))?;
    for name in ["rx_bytes", "tx_bytes"] {
        let bytes = net.get(name).and_then(serde_json::Value::as_u64);
        ensure!(bytes >= Some(TRANSFER_BYTES as u64), "{name}: {counters:#}");
    }
    Ok(())
}

/// Sets up the guest's only card.
pub(crate) fn set_up(guest: &mut Guest, prefix: &str, mac: &str) -> Result<()> {
    guest.shell(&format!(
        "ip addr add {prefix}.2/24 dev eth0 && ip link set eth0 up"
    ))?;
    let text = guest.shell(&format!(
        "cat /sys/class/net/eth0/address; ping -c 3 -W 20 {prefix}.1"
    ))?;
    ensure!(text.contains(mac), "{text}");
    Ok(())
}

/// Sends this number of bytes to the guest, which returns them, through a network that is set up.
pub(crate) fn carry(guest: &mut Guest, prefix: &str, bytes: usize) -> Result<()> {
    let data = noise(bytes);
    let listener = TcpListener::bind(format!("{prefix}.1:0"))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    // The guest stores the received data in a file before returning it, so each direction transfers all of it.
    guest.serial.send(&format!(
        "sh nc {prefix}.1 {port} > /tmp/data < /dev/null; nc {prefix}.1 {port} < /tmp/data"
    ))?;
    accept(&listener)?.write_all(&data)?;
    let mut back = Vec::new();
    accept(&listener)?.read_to_end(&mut back)?;
    ensure!(
        back.len() == data.len(),
        "{} of {} bytes came back",
        back.len(),
        data.len()
    );
    ensure!(back == data, "the data changed on its way");
    guest.serial.expect("ok sh 0", ACCEPT_DEADLINE).map(drop)
}

fn accept(listener: &TcpListener) -> Result<std::net::TcpStream> {
    let stream = wait_for("connection from the guest", ACCEPT_DEADLINE, || {
        Ok(listener.accept().ok().map(|(stream, _)| stream))
    })?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(ACCEPT_DEADLINE))?;
    stream.set_write_timeout(Some(ACCEPT_DEADLINE))?;
    Ok(stream)
}

fn net_carries_data_both_ways_unchanged() -> Result<Outcome> {
    carries_data("vmtest0", 249, "")
}

fn net_with_two_queue_pairs_carries_data() -> Result<Outcome> {
    carries_data("vmtest4", 250, ",num_queues=4,queue_size=512")
}

/// The test opens the tap and passes it to the VMM; it still works after a reboot.
fn net_on_an_inherited_tap_carries_packets() -> Result<Outcome> {
    let tap = open_tap("vmtest3")?;
    let set_up = "ip addr add 192.168.248.1/24 dev vmtest3 && ip link set vmtest3 up";
    let status = Command::new("sh").args(["-c", set_up]).status()?;
    ensure!(status.success(), "{set_up}: {status}");
    let net = format!("fd={},mac=12:34:56:78:90:ac", inherit(&tap)?);
    let vmm = Machine {
        arguments: &["--net", &net],
        ..Machine::default()
    }
    .start()?;
    let mut guest = Guest::on_socket(vmm, "serial.sock")?;
    for _ in 0..2 {
        guest.wait_serving()?;
        guest.shell("ip addr add 192.168.248.2/24 dev eth0 && ip link set eth0 up")?;
        guest.shell("ping -c 2 -W 20 192.168.248.1")?;
        guest.vmm.put("vm.reboot", None)?;
        guest.wait_init()?;
    }
    Ok(Outcome::Passed)
}

fn two_nets_keep_their_addresses() -> Result<Outcome> {
    let mut guest = Machine {
        arguments: &[
            "--net",
            "tap=vmtest1,mac=12:34:56:00:00:01,mtu=1400",
            "--net",
            "tap=vmtest2,mac=12:34:56:00:00:02",
        ],
        ..Machine::default()
    }
    .serve()?;
    let text = guest.shell(
        "cd /sys/class/net; echo A $(cat eth0/address) $(cat eth0/mtu) $(cat eth1/address)",
    )?;
    text.find("A 12:34:56:00:00:01 1400 12:34:56:00:00:02")
        .with_context(|| text.clone())?;
    Ok(Outcome::Passed)
}
