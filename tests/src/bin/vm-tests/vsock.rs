//! Tests streams between programs of the host and of a Linux guest.
//!
//! Linux has no driver for the watchdog device, so the watchdog is tested by the guest without an operating system.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::linux::{Guest, Machine};
use integration_tests::outcome::{Outcome, Test};
use integration_tests::tests;
use integration_tests::wait::wait_for;
use serde_json::{Value, json};

pub(crate) fn tests() -> Vec<Test> {
    tests![
        vsock_streams_carry_data_both_ways_and_each_way_ends_alone,
        vsock_added_to_a_running_guest_serves_across_a_reboot_and_goes,
    ]
}

/// The port on which the guest listens.
const GUEST_PORT: u32 = 1024;
/// The port to which the guest connects.
const HOST_PORT: u32 = 2048;
/// Several times what the device buffers for a connection.
const TRANSFER_BYTES: usize = 512 << 10;
/// Number of concurrent streams in each direction.
const STREAMS: usize = 4;
/// Time for asynchronous actions of Linux, and for a transfer under emulation.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);

/// Starts the server in the guest.
fn listen(guest: &mut Guest) -> Result<()> {
    guest
        .shell(&format!(
            "guest-mem vsock listen {GUEST_PORT} > /dev/null 2> /tmp/vsock &"
        ))
        .map(drop)
}

/// Connects to a port of the guest; `None` if the guest rejects the connection, which yields no text.
fn connect(socket: &Path, port: u32) -> Result<Option<BufReader<UnixStream>>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(GUEST_DEADLINE))?;
    stream.set_write_timeout(Some(GUEST_DEADLINE))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    ensure!(line.starts_with("OK "), "{line:?}");
    Ok(Some(stream))
}

fn connect_when_listening(socket: &Path) -> Result<BufReader<UnixStream>> {
    wait_for("listener in the guest", GUEST_DEADLINE, || {
        connect(socket, GUEST_PORT)
    })
}

/// The guest's server returns all it gets and, once this end has ended, the number of bytes.
fn exchange_from_host(mut stream: BufReader<UnixStream>, salt: usize) -> Result<()> {
    // The period is not a power of two, so that a lost or duplicated packet is detected.
    let data: Vec<u8> = (0..TRANSFER_BYTES)
        .map(|index| (index % 251 + salt) as u8)
        .collect();
    let mut back = Vec::new();
    thread::scope(|scope| {
        let mut writer = stream.get_ref().try_clone()?;
        let writing = scope.spawn({
            let data = &data;
            move || -> Result<()> {
                writer.write_all(data).context("writing to the guest")?;
                Ok(writer.shutdown(Shutdown::Write)?)
            }
        });
        stream
            .read_to_end(&mut back)
            .context("reading from the guest")?;
        writing.join().expect("the thread does not panic")
    })?;
    let count = back.split_off(data.len().min(back.len()));
    ensure!(back == data, "the data changed on its way");
    let count = String::from_utf8(count)?;
    ensure!(count == TRANSFER_BYTES.to_string(), "{count:?}");
    Ok(())
}

/// The guest's client ends its direction and then reads back all it sent.
fn answer_from_host(listener: &UnixListener) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(GUEST_DEADLINE))?;
    stream.set_write_timeout(Some(GUEST_DEADLINE))?;
    let mut data = Vec::new();
    stream.read_to_end(&mut data)?;
    ensure!(data.len() == TRANSFER_BYTES, "{} bytes came", data.len());
    Ok(stream.write_all(&data)?)
}

fn at_the_same_time(each: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let each = &each;
    thread::scope(|scope| {
        let all: Vec<_> = (0..STREAMS)
            .map(|index| scope.spawn(move || each(index)))
            .collect();
        all.into_iter()
            .try_for_each(|one| one.join().expect("the thread does not panic"))
    })
}

fn streams_from_host(socket: &Path) -> Result<()> {
    at_the_same_time(|index| exchange_from_host(connect_when_listening(socket)?, index))
}

fn streams_from_guest(guest: &mut Guest, listener: &UnixListener) -> Result<()> {
    thread::scope(|scope| {
        let answering = scope.spawn(|| at_the_same_time(|_| answer_from_host(listener)));
        let client = format!("guest-mem vsock connect {HOST_PORT} --bytes {TRANSFER_BYTES}");
        let printed = guest.shell(&format!(
            "for i in $(seq {STREAMS}); do {client} --seed $i & done; wait"
        ));
        if printed.is_err() {
            // Waits with a limit, in case the guest does not connect.
            listener.set_nonblocking(true)?;
        }
        let good = format!("ok vsock {TRANSFER_BYTES} bytes");
        let count = printed?.matches(&good).count();
        ensure!(count == STREAMS, "{count} of {STREAMS} streams were good");
        answering.join().expect("the thread does not panic")
    })
}

fn port_of_the_host(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{HOST_PORT}"));
    path.into()
}

fn vsock_streams_carry_data_both_ways_and_each_way_ends_alone() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock");
    let option = format!("cid=3,socket={},id=vs", socket.display());
    let mut guest = Machine {
        arguments: &["--vsock", &option],
        ..Machine::default()
    }
    .serve()?;
    ensure!(
        connect(&socket, GUEST_PORT)?.is_none(),
        "nobody listens in the guest"
    );
    let client = format!("guest-mem vsock connect {HOST_PORT} --bytes 8 --seed 1");
    let refused = guest.command(&format!("sh {client}"))?;
    ensure!(refused.ends_with("sh 1"), "nobody listens: {refused}");

    listen(&mut guest)?;
    if let Err(error) = streams_from_host(&socket) {
        guest.shell("cat /tmp/vsock")?;
        return Err(error.context(guest.serial.last_words()));
    }
    let listener = UnixListener::bind(port_of_the_host(&socket))?;
    streams_from_guest(&mut guest, &listener)?;

    let counters = guest.vmm.get("vm.counters")?;
    let counter = |name: &str| counters["vs"][name].as_u64();
    let bytes = (2 * STREAMS * TRANSFER_BYTES) as u64;
    ensure!(
        counter("rx_bytes") >= Some(bytes)
            && counter("tx_bytes") >= Some(bytes)
            && counter("bad_packets") == Some(0),
        "{counters:#}"
    );
    guest.end_cleanly()?;
    ensure!(!socket.exists(), "the socket was left behind");
    Ok(Outcome::Passed)
}

fn expect(guest: &Guest, endpoint: &str, body: &Value, status: u16) -> Result<()> {
    let answer = guest
        .vmm
        .request("PUT", endpoint, Some(&body.to_string()))?;
    ensure!(answer.status == status, "{endpoint} {body}: {answer:?}");
    Ok(())
}

fn vsock_added_to_a_running_guest_serves_across_a_reboot_and_goes() -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock");
    let mut guest = Machine::default().serve()?;
    let vsock = json!({"cid": 3, "socket": socket, "id": "vs"});
    expect(&guest, "vm.add-vsock", &vsock, 200)?;
    listen(&mut guest)?;
    exchange_from_host(connect_when_listening(&socket)?, 0)?;

    let mut open = connect_when_listening(&socket)?;
    guest.vmm.put("vm.reboot", None)?;
    let mut text = String::new();
    open.read_to_string(&mut text)
        .context("the reboot did not close the connection")?;
    guest.wait_init()?;
    guest.wait_serving()?;
    listen(&mut guest)?;
    exchange_from_host(connect_when_listening(&socket)?, 0)?;

    let mut open = connect_when_listening(&socket)?;
    expect(&guest, "vm.remove-device", &json!({"id": "vs"}), 204)?;
    open.read_to_string(&mut text)
        .context("the removal did not close the connection")?;
    ensure!(text.is_empty(), "{text:?}");
    wait_for("the device to go", GUEST_DEADLINE, || {
        let info = guest.vmm.get("vm.info")?;
        Ok(info["device_tree"]["vs"].is_null().then_some(()))
    })?;
    ensure!(!socket.exists(), "the socket was left behind");
    expect(&guest, "vm.add-vsock", &vsock, 200)?;
    exchange_from_host(connect_when_listening(&socket)?, 0)?;
    guest.end_cleanly()?;
    Ok(Outcome::Passed)
}
