//! The output side: writes what the descriptor accepts, keeps a bounded backlog, and drops the rest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};

/// Maximum backlog in bytes: about a screenful of boot messages.
pub(super) const BACKLOG_BYTES_MAX: usize = 64 << 10;

/// The result of writing some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Written {
    /// Bytes lost: backlog full, or the output broken.
    pub(super) dropped_bytes: usize,
}

/// An output and its backlog.
#[derive(Debug)]
pub(super) struct Output {
    file: Option<File>,
    backlog: VecDeque<u8>,
}

impl Output {
    pub(super) fn new(file: Option<File>) -> Self {
        Self {
            file,
            backlog: VecDeque::new(),
        }
    }

    /// The descriptor to wait for while a backlog exists.
    pub(super) fn backlog_fd(&self) -> Option<RawFd> {
        let file = self.file.as_ref()?;
        (!self.backlog.is_empty()).then(|| file.as_raw_fd())
    }

    /// Bytes that the output has not accepted yet.
    pub(super) fn backlog(&self) -> Vec<u8> {
        self.backlog.iter().copied().collect()
    }

    /// Whether written bytes have a destination.
    pub(super) fn is_connected(&self) -> bool {
        self.file.is_some()
    }

    /// Writes `data` after the backlog.
    pub(super) fn write(&mut self, data: &[u8]) -> Written {
        let Some(file) = &self.file else {
            return Written::default();
        };
        let mut rest = data;
        if self.backlog.is_empty() {
            match write_some(file, rest) {
                Ok(count) => rest = &rest[count..],
                Err(lost) => return lost,
            }
        }
        let room = BACKLOG_BYTES_MAX - self.backlog.len();
        let kept = rest.len().min(room);
        self.backlog.extend(&rest[..kept]);
        Written {
            dropped_bytes: rest.len() - kept,
        }
    }

    /// Writes the backlog when the output accepts bytes again.
    pub(super) fn flush(&mut self) -> Written {
        let Some(file) = &self.file else {
            return Written::default();
        };
        match write_some(file, self.backlog.make_contiguous()) {
            Ok(count) => {
                self.backlog.drain(..count);
                if self.backlog.is_empty() {
                    // A console is mostly idle, so the backlog's memory is freed.
                    self.backlog.shrink_to_fit();
                }
                Written::default()
            }
            Err(lost) => {
                self.backlog = VecDeque::new();
                lost
            }
        }
    }
}

/// Writes until `data` is written or the output would block. A broken output loses all of `data`.
fn write_some(mut file: &File, data: &[u8]) -> Result<usize, Written> {
    let mut done = 0;
    while done < data.len() {
        match file.write(&data[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => {
                return Err(Written {
                    dropped_bytes: data.len() - done,
                });
            }
        }
    }
    Ok(done)
}
