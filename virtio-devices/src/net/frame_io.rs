//! Frames between a tap and guest RAM, one system call each, without an intermediate copy.

#![allow(unsafe_code)]
// UNSAFETY: readv and writev on vectors into guest RAM.

use std::io;
use std::os::fd::RawFd;

use crate::queue::{GuestBuffers, IOVECS_MAX};

/// `struct virtio_net_hdr_v1`.
pub(super) const HEADER_BYTES: usize = 12;

/// Maximum length of a frame with its header: 64 KiB of IP packet, Ethernet with two VLAN tags. Longer frames from a
/// guest are dropped.
pub(super) const FRAME_BYTES_MAX: usize = HEADER_BYTES + 14 + 8 + 65535;

/// Writes one frame, header first.
///
/// # Errors
/// `WouldBlock`: the tap is full. Any other error: the tap rejects this frame.
pub(super) fn write_frame(fd: RawFd, frame: &GuestBuffers) -> io::Result<usize> {
    let vectors = frame.iovecs();
    // SAFETY: the vectors lie in guest RAM that `frame` keeps mapped; there are at
    // most IOVECS_MAX of them.
    moved(unsafe { libc::writev(fd, vectors.as_ptr(), vectors.len() as i32) })
}

/// The result of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// A whole frame of this length, including the header.
    Frame(usize),
    /// A frame of this length, which continued in the spill.
    Spilled(usize),
    /// A frame that did not fit; the rest of it is lost.
    TooLong,
}

/// Reads frames into several consecutive buffers; keeps its vector list between calls.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    vectors: Vec<libc::iovec>,
}

// SAFETY: between calls the list is empty.
unsafe impl Send for FrameReader {}

impl FrameReader {
    /// Reads one frame into `buffers`, in order, up to the kernel's limit. `spill` has space for a whole frame, or is
    /// empty. If a frame is longer than the buffers, the spill holds all of it.
    ///
    /// # Errors
    /// `WouldBlock`: no frame is waiting. Any other error: the tap is unusable.
    pub(super) fn read<'a>(
        &mut self,
        fd: RawFd,
        buffers: impl Iterator<Item = &'a GuestBuffers> + Clone,
        spill: &mut [u8],
    ) -> io::Result<Read> {
        // One extra byte distinguishes a frame that fits exactly from a truncated one.
        let mut too_long = 0u8;
        let mut room = 0;
        let mut count = 0;
        for buffer in buffers.clone() {
            // Two more vectors: for the spill and the extra byte.
            if self.vectors.len() + buffer.iovecs().len() + 2 > IOVECS_MAX {
                break;
            }
            room += buffer.bytes();
            count += 1;
            self.vectors.extend_from_slice(buffer.iovecs());
        }
        if let Some(behind) = spill.get_mut(room..).filter(|behind| !behind.is_empty()) {
            self.vectors.push(libc::iovec {
                iov_base: behind.as_mut_ptr().cast(),
                iov_len: behind.len(),
            });
        }
        self.vectors.push(libc::iovec {
            iov_base: (&raw mut too_long).cast(),
            iov_len: 1,
        });
        // SAFETY: the vectors are in guest RAM that the buffers keep mapped during this call, except for the last ones:
        // the caller's spill, exclusively borrowed, and a local variable.
        let result =
            moved(unsafe { libc::readv(fd, self.vectors.as_ptr(), self.vectors.len() as i32) });
        self.vectors.clear();
        let bytes = result?;
        if bytes <= room {
            return Ok(Read::Frame(bytes));
        }
        if bytes > spill.len() {
            return Ok(Read::TooLong);
        }
        let mut at = 0;
        for buffer in buffers.take(count) {
            at += buffer.copy_out(&mut spill[at..room]);
        }
        Ok(Read::Spilled(bytes))
    }
}

fn moved(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
