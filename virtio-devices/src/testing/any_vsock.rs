//! Host programs of a vsock device and headers of its guest's packets, for the guest with arbitrary behaviour.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::fuzz_input::Input;

pub(super) const CID: u32 = 3;
const CID_HOST: u64 = 2;
/// The host port with a listening program.
const PORT: u32 = 1024;
/// The port that the device gives to the first program that connects.
const FIRST_PROGRAM_PORT: u32 = 1 << 30;
/// The first of a few guest ports.
const GUEST_PORT: u32 = 2000;
const PORTS: u8 = 2;
const PROGRAMS_MAX: usize = 4;
/// Operations of packets: most are those of a connection that is open, and 0 and 8 are none.
const OPERATIONS: [u8; 16] = [1, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 5, 6, 7, 8, 0];
/// Offset of the field `len` in a header.
pub(super) const LEN_OFFSET: u64 = 24;

/// The programs.
pub(super) struct Programs {
    socket: PathBuf,
    listener: UnixListener,
    streams: Vec<UnixStream>,
}

impl Programs {
    /// Host programs of a device with this socket.
    pub(super) fn new(socket: &Path) -> Self {
        let mut path = socket.as_os_str().to_owned();
        path.push(format!("_{PORT}"));
        let listener = UnixListener::bind(path).expect("a new folder");
        listener.set_nonblocking(true).expect("sockets can be so");
        Self {
            socket: socket.to_owned(),
            listener,
            streams: Vec::new(),
        }
    }

    /// Lets a program connect, accept, send, receive or leave.
    pub(super) fn act(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        match choice % 8 {
            0 | 1 => {
                if let Ok((stream, _)) = self.listener.accept() {
                    self.add(stream);
                }
            }
            2 => {
                if let Ok(stream) = UnixStream::connect(&self.socket) {
                    self.add(stream);
                    let port = GUEST_PORT + u32::from(choice >> 3) % u32::from(PORTS);
                    self.send(
                        self.streams.len() - 1,
                        format!("CONNECT {port}\n").as_bytes(),
                    );
                }
            }
            _ if self.streams.is_empty() => {}
            action => {
                let at = usize::from(choice >> 3) % self.streams.len();
                match action {
                    3 | 4 => self.send(at, &vec![input.byte(); usize::from(input.word())]),
                    5 => {
                        let mut data = vec![0; usize::from(input.word())];
                        // Whatever came; the result does not matter.
                        let _received = self.streams[at].read(&mut data);
                    }
                    6 => {
                        self.streams[at].shutdown(Shutdown::Write).ok();
                    }
                    _ => drop(self.streams.swap_remove(at)),
                }
            }
        }
    }

    fn add(&mut self, stream: UnixStream) {
        if self.streams.len() == PROGRAMS_MAX {
            self.streams.remove(0);
        }
        stream.set_nonblocking(true).expect("sockets can be so");
        self.streams.push(stream);
    }

    /// Sends as much as the socket takes; its other end may be closed.
    fn send(&mut self, at: usize, data: &[u8]) {
        let _sent = self.streams[at].write(data);
    }
}

/// A header that mostly belongs to a connection which there may be. The caller writes its length.
pub(super) fn header(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.byte();
    let port = u32::from(choice >> 2) % u32::from(PORTS);
    let host_port = match choice % 4 {
        0 | 1 => PORT,
        2 => FIRST_PROGRAM_PORT + port,
        _ => input.number(4) as u32,
    };
    // Rarely of another type.
    let kind = 1 + u16::from(choice >= 0xf8);
    let mut header = u64::from(CID).to_le_bytes().to_vec();
    header.extend(CID_HOST.to_le_bytes());
    header.extend((GUEST_PORT + port).to_le_bytes());
    header.extend(host_port.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    header.extend(kind.to_le_bytes());
    let operation = OPERATIONS[usize::from(input.byte()) % OPERATIONS.len()];
    header.extend(u16::from(operation).to_le_bytes());
    header.extend((u32::from(input.byte()) & 0b111).to_le_bytes());
    // Space for data, and the data passed on, which is rarely wrong.
    header.extend((input.number(2) as u32).to_le_bytes());
    header.extend(u32::from(input.byte().saturating_sub(0xf0)).to_le_bytes());
    header
}
