//! `guest-mem vsock`: streams between the guest and programs of the host.
//!
//! Both ends prove that the two directions of a stream end separately. The server still sends data after it has read to
//! the end, and the client still reads after it has ended its own direction.

use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use crate::serve::Server;
use crate::{pattern, size, sys};

const USAGE: &str = "usage: guest-mem vsock listen PORT | connect PORT --bytes SIZE --seed SEED";

/// Bytes per read or write.
const CHUNK_BYTES: usize = 64 << 10;
/// Time without a single byte after which the other end is considered gone. An emulated guest on a busy host is slow.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// Runs one of the two; `listen` runs until it is killed.
pub(crate) fn run(arguments: &[&str]) -> Result<(), String> {
    match arguments {
        ["listen", port] => {
            let with_port = |error: io::Error| format!("listening on port {port}: {error}");
            let listener = sys::vsock_listen(number(port)?).map_err(with_port)?;
            loop {
                let stream = stream(sys::accept(&listener).map_err(with_port)?);
                thread::spawn(move || {
                    if let Err(error) = stream.and_then(|mut stream| answer(&mut stream)) {
                        eprintln!("guest-mem vsock: {error}");
                    }
                });
            }
        }
        ["connect", port, "--bytes", bytes, "--seed", seed] => {
            let data = data(size::parse(bytes)?, size::parse(seed)?)?;
            let with_port = |error: io::Error| format!("port {port}: {error}");
            let connection = sys::vsock_connect(number(port)?).map_err(with_port)?;
            let mut stream = stream(connection).map_err(with_port)?;
            stream.write_all(&data).map_err(with_port)?;
            stream.shutdown(Shutdown::Write).map_err(with_port)?;
            let mut back = Vec::new();
            stream.read_to_end(&mut back).map_err(with_port)?;
            if back != data {
                let count = back.len();
                return Err(format!("port {port}: {count} other bytes came back"));
            }
            println!("ok vsock {} bytes", data.len());
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

/// Serves commands to the first program of the host that connects to `port`.
pub(crate) fn serve(port: &str) -> Result<(), String> {
    let with_port = |error: io::Error| format!("serving on port {port}: {error}");
    let listener = sys::vsock_listen(number(port)?).map_err(with_port)?;
    let connection = sys::accept(&listener).map_err(with_port)?;
    // The test may take its time between two commands.
    let mut stream = TcpStream::from(connection);
    let input = stream.try_clone().map_err(with_port)?;
    Server::default()
        .run(&mut BufReader::new(input), &mut stream)
        .map_err(with_port)
}

fn number(port: &str) -> Result<u32, String> {
    port.parse().map_err(|_| format!("{port:?} is no port"))
}

/// `std` has no type for sockets of this family; only operations that all streams have are used here.
fn stream(connection: OwnedFd) -> io::Result<TcpStream> {
    let stream = TcpStream::from(connection);
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// Echoes each piece as it arrives and, after the end, sends the number of received bytes.
fn answer(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return write!(stream, "{bytes}");
        }
        stream.write_all(&chunk[..count])?;
        bytes += count;
    }
}

/// `bytes` (rounded down to words) of the stream `seed`.
fn data(bytes: u64, seed: u64) -> Result<Vec<u8>, String> {
    let words = usize::try_from(bytes / 8).map_err(|error| error.to_string())?;
    let mut words = vec![0; words];
    pattern::fill(&mut words, seed, 0);
    Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn vsock_server_answers_after_the_other_end_has_ended() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || answer(&mut far));
        near.write_all(b"seven77").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut back = String::new();
        near.read_to_string(&mut back).unwrap();
        assert_eq!(back, "seven777");
        server.join().unwrap().unwrap();
    }

    #[test]
    fn vsock_with_wrong_arguments_fails() {
        for line in ["", "listen", "listen x", "connect 1", "connect 1 --bytes x"] {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            assert!(run(&words).is_err(), "{line}");
        }
    }
}
