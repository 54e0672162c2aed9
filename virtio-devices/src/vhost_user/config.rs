//! Reads the configuration space of a back end (`VHOST_USER_GET_CONFIG`).
//!
//! The crate `vhost` waits for a response of full length. A back end, however, rejects the request with a shorter one:
//! QEMU without a body, back ends of rust-vmm with a size of 0 bytes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const GET_CONFIG: u32 = 24;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const HEADER_BYTES: usize = 12;
/// Offset, size and flags, before the content.
const PREFIX_BYTES: usize = 12;
/// The front end reads everything.
const FLAGS: u32 = 1;
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("GET_CONFIG failed")]
    Socket(#[from] io::Error),
    #[error(
        "unexpected response to GET_CONFIG: request {request}, flags {flags:#x}, {bytes} bytes"
    )]
    Answer {
        request: u32,
        flags: u32,
        bytes: u32,
    },
}

/// The first `bytes` bytes; `None` if the back end refuses that size.
pub(super) fn read(stream: &UnixStream, bytes: usize) -> Result<Option<Vec<u8>>, ConfigError> {
    let mut stream = stream;
    let size = (PREFIX_BYTES + bytes) as u32;
    let mut message = words(&[GET_CONFIG, VERSION, size, 0, bytes as u32, FLAGS]);
    message.resize(message.len() + bytes, 0);
    stream.write_all(&message)?;

    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let [request, flags, answered] = [0, 4, 8].map(|at| word(&header, at));
    let wrong = ConfigError::Answer {
        request,
        flags,
        bytes: answered,
    };
    if request != GET_CONFIG || flags & (REPLY | 3) != REPLY | VERSION || answered > size {
        return Err(wrong);
    }
    let mut body = vec![0; answered as usize];
    stream.read_exact(&mut body)?;
    match body.len() {
        0 => Ok(None),
        PREFIX_BYTES if word(&body, 4) == 0 => Ok(None),
        _ if answered == size && word(&body, 4) == bytes as u32 => {
            Ok(Some(body.split_off(PREFIX_BYTES)))
        }
        _ => Err(wrong),
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
