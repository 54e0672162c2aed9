//! Throughput of a network interface, TCP between the guest and this host over a tap, and of vsock.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration_tests::MIB;
use integration_tests::linux::{Guest, Machine};
use serde_json::{Value, json};

use crate::cases::Cases;
use crate::subject::Subject;
use crate::timed_work::TimedWork;

/// Number of turns per VMM when two are compared.
pub(crate) const TURNS: usize = 3;

const STREAM_BYTES: u64 = 16 * MIB;
const ROUND_TRIPS: u64 = 128;
/// Message size, as in `guest-mem net-bench`.
const MESSAGE_BYTES: usize = 64;
/// Time without a single byte after which the guest is considered gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Size of one read or write of a stream.
const CHUNK_BYTES: u64 = 64 << 10;

/// Addresses of host and guest in a separate network.
const HOST: &str = "192.168.247.1";
const GUEST: &str = "192.168.247.2";

/// A stream each way and round trips of small messages over either device, with a guest of one VMM.
pub(crate) fn measure(subject: &Subject) -> Result<Value> {
    let net = format!("tap=vmbench1,ip={HOST},mask=255.255.255.0");
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock");
    let vsock = format!("cid=3,socket={}", socket.display());
    let boot = || {
        let mut guest = Machine {
            vmm: Some(&subject.program),
            arguments: &["--net", &net, "--vsock", &vsock],
            ..Machine::default()
        }
        .serve()?;
        guest.shell(&format!(
            "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 20 {HOST}"
        ))?;
        // The first connection has one-time costs.
        for connection in [over_tcp, over_vsock] {
            connection(&socket, &mut guest, "ask", 1)?;
        }
        Ok(guest)
    };
    let mut cases = Cases::new("net", subject, &boot);
    for (prefix, connection) in [("", over_tcp as Connection), ("vsock_", over_vsock)] {
        // Work without the cost of the connection.
        let work = |guest: &mut Guest, kind, amount| -> Result<TimedWork> {
            let nothing = connection(&socket, guest, kind, 0)?;
            Ok(connection(&socket, guest, kind, amount)?.beyond(&nothing))
        };
        for (name, kind) in [("guest_to_host", "send"), ("host_to_guest", "receive")] {
            cases.run(&format!("{prefix}{name}"), |guest| {
                let stream_mib = STREAM_BYTES / MIB;
                let taken = work(guest, kind, STREAM_BYTES)?;
                Ok(json!({
                    "mib_per_s": taken.per_second(stream_mib),
                    "each_mib": taken.each(stream_mib),
                }))
            })?;
        }
        cases.run(&format!("{prefix}messages"), |guest| {
            let taken = work(guest, "ask", ROUND_TRIPS)?;
            Ok(json!({
                "round_trips_per_s": taken.per_second(ROUND_TRIPS),
                "each_round_trip": taken.each(ROUND_TRIPS),
            }))
        })?;
    }
    cases.finish()
}

/// Makes one connection from the guest, to a new port, so that a connection left over from a failed case is not taken
/// for it. Takes the socket of the vsock device, the kind of transfer, and its amount.
type Connection = fn(&Path, &mut Guest, &str, u64) -> Result<TimedWork>;

fn over_tcp(_: &Path, guest: &mut Guest, kind: &str, amount: u64) -> Result<TimedWork> {
    let listener = TcpListener::bind((HOST, 0))?;
    let address = listener.local_addr()?;
    let serve = || {
        let stream = listener.accept()?.0;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        serve(&stream, &stream)
    };
    transfer(guest, kind, &address.to_string(), amount, serve, || {
        drop(TcpStream::connect(address));
    })
}

fn over_vsock(socket: &Path, guest: &mut Guest, kind: &str, amount: u64) -> Result<TimedWork> {
    static PORT: AtomicU32 = AtomicU32::new(1024);
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{port}"));
    let listener = UnixListener::bind(&path)?;
    let serve = || {
        let stream = listener.accept()?.0;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        serve(&stream, &stream)
    };
    transfer(guest, kind, &format!("vsock:{port}"), amount, serve, || {
        drop(UnixStream::connect(&path));
    })
}

/// The guest's part of a transfer, with `serve` as the host's. `end_wait` ends the wait of `serve` for a guest that
/// has never connected.
fn transfer(
    guest: &mut Guest,
    kind: &str,
    address: &str,
    amount: u64,
    serve: impl FnOnce() -> Result<()> + Send,
    end_wait: impl FnOnce(),
) -> Result<TimedWork> {
    thread::scope(|scope| {
        let server = scope.spawn(serve);
        let taken = TimedWork::by(
            guest,
            &format!("net-bench {kind} {address} --amount {amount}"),
        );
        if taken.is_err() {
            end_wait();
        }
        match server.join() {
            Ok(served) => taken.and_then(|taken| served.map(|()| taken)),
            Err(_) => bail!("the server panicked"),
        }
        .with_context(|| format!("{kind} {amount}"))
    })
}

/// The host's part of the transfer that the guest announces in its first line.
fn serve(reader: impl Read, mut writer: impl Write) -> Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (kind, amount) = line.trim().split_once(' ').context("no request")?;
    let amount: u64 = amount.parse().context(kind.to_owned())?;
    match kind {
        "send" => {
            let mut chunk = vec![0; CHUNK_BYTES as usize];
            let mut left = amount;
            while left > 0 {
                match reader.read(&mut chunk)? as u64 {
                    0 => bail!("{left} bytes are missing"),
                    count => left = left.saturating_sub(count),
                }
            }
            writer.write_all(&[1])?;
        }
        "receive" => {
            let chunk = vec![1; CHUNK_BYTES as usize];
            let mut left = amount;
            while left > 0 {
                let count = left.min(CHUNK_BYTES);
                writer.write_all(&chunk[..count as usize])?;
                left -= count;
            }
        }
        "ask" => {
            let mut message = [0; MESSAGE_BYTES];
            for _ in 0..amount {
                reader.read_exact(&mut message)?;
                writer.write_all(&message)?;
            }
        }
        _ => bail!("{line:?} is no request"),
    }
    Ok(())
}
