//! A proxy that cuts a connection, and the files that it carries, at any byte.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::Address;

/// Which way the bytes are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ToTarget,
    ToSource,
}

/// The state of the connection after a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// It is closed, and there is no other.
    Closed,
    /// It is closed, and others are possible.
    Reopened,
    /// Nothing is forwarded any more, in either direction, but others are possible.
    Silent,
}

/// Forwards the first connection until `bytes` bytes went one way, then closes it. Later connections are forwarded as a
/// whole, or refused. Returns its address and the number of bytes that went each way if it is never cut.
pub(super) fn cut(
    target: &Address,
    way: Way,
    bytes: usize,
    after: After,
) -> (Address, Receiver<[usize; 2]>) {
    let (listener, address) = Listener::beside(target);
    let target = target.clone();
    let (counts, counted) = channel();
    std::thread::spawn(move || {
        let source = listener.accept().unwrap();
        let listener = match after {
            After::Closed => None,
            _ => Some(listener),
        };
        let onward = Socket::connect(&target).unwrap();
        let limit = |it| if it == way { bytes } else { usize::MAX };
        let limits = [limit(Way::ToTarget), limit(Way::ToSource)];
        let first = std::thread::spawn(move || {
            counts.send(forward(&source, &onward, limits, after)).ok();
            if after == After::Silent {
                // They stay open.
                std::mem::forget((source, onward));
            }
        });
        if after != After::Silent {
            first.join().unwrap();
        }
        while let Some(listener) = &listener {
            let Ok(source) = listener.accept() else {
                return;
            };
            let Ok(onward) = Socket::connect(&target) else {
                continue;
            };
            forward(&source, &onward, [usize::MAX; 2], After::Closed);
        }
    });
    (address, counted)
}

fn forward(
    source: &Socket,
    target: &Socket,
    [to_target, to_source]: [usize; 2],
    after: After,
) -> [usize; 2] {
    let is_silent = AtomicBool::new(false);
    let copy = |from: &Socket, to: &Socket, limit: usize| {
        let mut buffer = [0; 16 << 10];
        let mut done = 0;
        while done < limit {
            let wanted = buffer.len().min(limit - done);
            let received = from.receive(&mut buffer[..wanted]);
            if is_silent.load(Ordering::Relaxed) {
                return done;
            }
            let Ok((count, file)) = received else {
                break;
            };
            if done + count == limit && after == After::Silent {
                // Before the last byte arrives: its answer must not pass.
                is_silent.store(true, Ordering::Relaxed);
            }
            if count == 0 || to.send(&buffer[..count], file.as_ref()).is_err() {
                break;
            }
            done += count;
        }
        if done < limit || after != After::Silent {
            source.end();
            target.end();
        }
        done
    };
    std::thread::scope(|scope| {
        let there = scope.spawn(|| copy(source, target, to_target));
        let back = copy(target, source, to_source);
        [there.join().unwrap(), back]
    })
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Of the same kind as `address`.
    fn beside(address: &Address) -> (Self, Address) {
        match address {
            Address::Tcp(_) => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = Address::Tcp(listener.local_addr().unwrap());
                (Self::Tcp(listener), address)
            }
            Address::Unix(path) => {
                let mut beside = path.clone().into_os_string();
                beside.push("-proxy");
                let beside = PathBuf::from(beside);
                std::fs::remove_file(&beside).ok();
                let listener = UnixListener::bind(&beside).unwrap();
                (Self::Unix(listener), Address::Unix(beside))
            }
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(listener) => Socket::Tcp(listener.accept()?.0),
            Self::Unix(listener) => Socket::Unix(listener.accept()?.0),
        })
    }
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn connect(address: &Address) -> io::Result<Self> {
        Ok(match address {
            Address::Tcp(address) => Self::Tcp(TcpStream::connect(address)?),
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
        })
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<File>)> {
        match self {
            Self::Tcp(stream) => Ok(((&*stream).read(buffer)?, None)),
            Self::Unix(stream) => {
                let received = stream.recv_with_fd(buffer);
                received.map_err(|error| io::Error::from_raw_os_error(error.errno()))
            }
        }
    }

    fn send(&self, bytes: &[u8], file: Option<&File>) -> io::Result<()> {
        match (self, file) {
            (Self::Tcp(stream), _) => (&*stream).write_all(bytes),
            (Self::Unix(stream), None) => (&*stream).write_all(bytes),
            (Self::Unix(stream), Some(file)) => {
                // The kernel ends what it returns behind the byte that carries a file.
                let (last, before) = bytes.split_last().unwrap();
                (&*stream).write_all(before)?;
                let sent = stream.send_with_fd(&[*last][..], file.as_raw_fd());
                sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
                Ok(())
            }
        }
    }

    fn end(&self) {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both).ok(),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both).ok(),
        };
    }
}
