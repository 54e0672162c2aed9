//! `guest-mem net-bench`: measures a stream in each direction, and small messages back and forth.
//!
//! The server serves one connection at a time. It reads a line (`send BYTES`, `receive BYTES` or `ask COUNT`, from the
//! client's point of view) and executes its side. After it has received a whole stream, it responds with one byte.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::{size, sys};

const USAGE: &str =
    "usage: guest-mem net-bench send|receive|ask ADDRESS:PORT|vsock:PORT --amount N";

/// Bytes per read or write of a stream.
const CHUNK_BYTES: usize = 64 << 10;
/// Bytes per message.
const MESSAGE_BYTES: usize = 64;
/// Time without a single byte after which the other end is considered gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Runs one of the three and prints its duration.
pub(crate) fn run(arguments: &[&str]) -> Result<(), String> {
    let [kind, address, "--amount", amount] = arguments else {
        return Err(USAGE.into());
    };
    let amount = size::parse(amount)?;
    let transfer = match *kind {
        "send" => send,
        "receive" => receive,
        "ask" => ask,
        _ => return Err(USAGE.into()),
    };
    let with_address = |error: std::io::Error| format!("{kind} {address}: {error}");
    let mut stream = connect(address).map_err(with_address)?;
    stream
        .set_read_timeout(Some(SILENCE_MAX))
        .map_err(with_address)?;
    stream
        .set_write_timeout(Some(SILENCE_MAX))
        .map_err(with_address)?;
    let begin = Instant::now();
    stream
        .write_all(format!("{kind} {amount}\n").as_bytes())
        .and_then(|()| transfer(&mut stream, amount))
        .map_err(with_address)?;
    println!("ok net-bench {} ns", begin.elapsed().as_nanos());
    Ok(())
}

/// The type of a TCP stream also serves for the other family: its methods that are used here work with any socket.
fn connect(address: &str) -> std::io::Result<TcpStream> {
    if let Some(port) = address.strip_prefix("vsock:") {
        let port = port.parse().map_err(std::io::Error::other)?;
        return sys::vsock_connect(port).map(TcpStream::from);
    }
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    let chunk = vec![1u8; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(CHUNK_BYTES as u64);
        stream.write_all(&chunk[..count as usize])?;
        left -= count;
    }
    stream.read_exact(&mut [0])
}

fn receive(stream: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        match stream.read(&mut chunk)? as u64 {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(())
}

fn ask(stream: &mut TcpStream, count: u64) -> std::io::Result<()> {
    let mut message = [1u8; MESSAGE_BYTES];
    for _ in 0..count {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::net::TcpListener;

    #[test]
    fn net_bench_does_each_of_the_three() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        for (kind, amount) in [("send", "100000"), ("receive", "100000"), ("ask", "3")] {
            std::thread::scope(|scope| {
                let client = scope.spawn(|| run(&[kind, &address, "--amount", amount]));
                let mut stream = BufReader::new(listener.accept().unwrap().0);
                let mut first = String::new();
                stream.read_line(&mut first).unwrap();
                let mut buffer = vec![0; 100_000];
                match kind {
                    "send" => {
                        stream.read_exact(&mut buffer).unwrap();
                        stream.get_mut().write_all(&[1]).unwrap();
                    }
                    "receive" => stream.get_mut().write_all(&buffer).unwrap(),
                    _ => {
                        for _ in 0..3 {
                            stream.read_exact(&mut buffer[..MESSAGE_BYTES]).unwrap();
                            stream
                                .get_mut()
                                .write_all(&buffer[..MESSAGE_BYTES])
                                .unwrap();
                        }
                    }
                }
                assert_eq!(first, format!("{kind} {amount}\n"));
                client.join().unwrap().unwrap();
            });
        }
    }

    #[test]
    fn net_bench_with_wrong_arguments_or_nobody_there_fails() {
        for line in [
            "",
            "send",
            "jump 127.0.0.1:1 --amount 1",
            "ask 127.0.0.1:1 --amount 1",
            "ask vsock:1 --amount 1",
            "ask vsock:-1 --amount 1",
        ] {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            assert!(run(&words).is_err(), "{line}");
        }
    }
}
