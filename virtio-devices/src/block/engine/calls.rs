//! Operations executed synchronously by system calls: all of them for the synchronous engine; for io_uring, those that
//! it cannot execute.

#![allow(unsafe_code)]
// UNSAFETY: preadv, pwritev and pwrite on vectors whose validity is the caller's
// promise, and zeros written to them; fallocate takes plain numbers.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::bounce::Bounce;
use super::operation::IoOperation;
use super::zeroes::zeroes;
use crate::block::disk_sys;
use crate::block::image::Image;

/// The zeroes as a vector, which may be written from but never read into.
fn zeroes_vector(bytes: u64) -> libc::iovec {
    let zeroes = zeroes(bytes);
    libc::iovec {
        iov_base: zeroes.as_ptr().cast_mut().cast(),
        iov_len: zeroes.len(),
    }
}

pub(super) const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub(super) const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Executes operations on one image, including misaligned direct I/O.
pub(super) struct Calls {
    image: Arc<Image>,
    bounce: Option<Bounce>,
}

impl Calls {
    pub(super) fn new(image: Arc<Image>) -> Self {
        let bounce = image.dio().map(Bounce::new);
        Self { image, bounce }
    }

    /// Whether only [`Calls::perform`] can do this: misaligned direct I/O, the end of an image that is not whole blocks,
    /// and ioctls.
    pub(super) fn must_perform(&self, operation: &IoOperation<'_>) -> bool {
        match (operation, &self.bounce) {
            (IoOperation::OwnDiscard { .. }, _) => true,
            (IoOperation::Read { offset, into: v } | IoOperation::Write { offset, from: v }, _)
                if self.is_in_tail(*offset, v) =>
            {
                true
            }
            (IoOperation::WriteZeroBuffer { offset, bytes }, _)
                if self.is_in_tail(*offset, &[zeroes_vector(*bytes)]) =>
            {
                true
            }
            (
                IoOperation::Read { offset, into: v } | IoOperation::Write { offset, from: v },
                Some(bounce),
            ) => bounce.is_needed(*offset, v),
            (IoOperation::WriteZeroBuffer { offset, bytes }, Some(bounce)) => {
                bounce.is_needed(*offset, &[zeroes_vector(*bytes)])
            }
            _ => false,
        }
    }

    fn is_in_tail(&self, offset: u64, vectors: &[libc::iovec]) -> bool {
        let start = self.image.tail_start();
        start < u64::MAX && offset.saturating_add(total(vectors) as u64) > start
    }

    /// Executes an operation; returns the number of bytes moved, or the negated errno.
    ///
    /// # Safety
    /// The vectors and the memory behind them are valid.
    pub(super) unsafe fn perform(&mut self, operation: &IoOperation<'_>) -> i32 {
        loop {
            // SAFETY: the caller's guarantee is passed on.
            let result = unsafe { self.try_perform(operation) };
            match result {
                Ok(bytes) => return i32::try_from(bytes).unwrap_or(i32::MAX),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return -error.raw_os_error().unwrap_or(libc::EIO),
            }
        }
    }

    /// # Safety
    /// As [`Calls::perform`].
    unsafe fn try_perform(&mut self, operation: &IoOperation<'_>) -> io::Result<usize> {
        if let Some(container) = self.image.container() {
            // SAFETY: the caller's guarantee is passed on.
            let moved = unsafe { container.perform(operation) }?;
            if matches!(operation, IoOperation::Sync) {
                self.image.file().sync_data()?;
            }
            return Ok(moved);
        }
        let fd = self.image.fd();
        match *operation {
            // SAFETY: the caller's guarantee is passed on.
            IoOperation::Read { offset, into } => unsafe { self.read(offset, into) },
            // SAFETY: the caller's guarantee is passed on.
            IoOperation::Write { offset, from } => unsafe { self.write(offset, from) },
            IoOperation::WriteZeroBuffer { offset, bytes } => {
                // SAFETY: the zeroes are static.
                unsafe { self.write(offset, &[zeroes_vector(bytes)]) }
            }
            IoOperation::Sync => self.image.file().sync_data().map(|()| 0),
            IoOperation::PunchHole { offset, bytes } => fallocate(fd, PUNCH_HOLE, offset, bytes),
            IoOperation::ZeroRange { offset, bytes } => fallocate(fd, ZERO_RANGE, offset, bytes),
            IoOperation::OwnDiscard { offset, bytes } => {
                disk_sys::block_device_discard(fd, offset, bytes).map(|()| 0)
            }
        }
    }

    /// # Safety
    /// `into` describes writable memory.
    unsafe fn read(&mut self, offset: u64, into: &[libc::iovec]) -> io::Result<usize> {
        if self.is_in_tail(offset, into) {
            // SAFETY: passed on.
            return unsafe { read_tail(&self.image, offset, into) };
        }
        if let Some(bounce) = &mut self.bounce
            && bounce.is_needed(offset, into)
        {
            // SAFETY: the caller's guarantee is passed on.
            return unsafe { bounce.read(&self.image, offset, into) };
        }
        let (fd, count) = (self.image.fd(), into.len() as i32);
        // SAFETY: the caller guarantees that the vectors are valid; there are `count` of them.
        bytes_moved(unsafe { libc::preadv(fd, into.as_ptr(), count, offset as i64) })
    }

    /// # Safety
    /// `from` describes readable memory.
    unsafe fn write(&mut self, offset: u64, from: &[libc::iovec]) -> io::Result<usize> {
        if self.is_in_tail(offset, from) {
            let (fd, count) = (self.image.tail_file().as_raw_fd(), from.len() as i32);
            // SAFETY: the caller's promise covers the vectors, of which there are `count`.
            return bytes_moved(unsafe { libc::pwritev(fd, from.as_ptr(), count, offset as i64) });
        }
        if let Some(bounce) = &mut self.bounce
            && bounce.is_needed(offset, from)
        {
            // SAFETY: the caller's guarantee is passed on.
            return unsafe { bounce.write(&self.image, offset, from) };
        }
        let (fd, count) = (self.image.fd(), from.len() as i32);
        // SAFETY: the caller guarantees that the vectors are valid; there are `count` of them.
        bytes_moved(unsafe { libc::pwritev(fd, from.as_ptr(), count, offset as i64) })
    }
}

fn total(vectors: &[libc::iovec]) -> usize {
    vectors.iter().map(|piece| piece.iov_len).sum()
}

/// Reads through the page cache, which has no alignment, and adds the zeros that the last sector lacks.
///
/// # Safety
/// `into` describes writable memory.
unsafe fn read_tail(image: &Image, offset: u64, into: &[libc::iovec]) -> io::Result<usize> {
    let (fd, count) = (image.tail_file().as_raw_fd(), into.len() as i32);
    // SAFETY: the caller's promise covers the vectors, of which there are `count`.
    let moved = bytes_moved(unsafe { libc::preadv(fd, into.as_ptr(), count, offset as i64) })?;
    let mut skip = moved;
    let mut left = image
        .padding_at(offset + moved as u64)
        .min(total(into) - moved);
    let padded = moved + left;
    for piece in into {
        let from = skip.min(piece.iov_len);
        let zeros = left.min(piece.iov_len - from);
        // SAFETY: `from + zeros` is at most the length of the piece, which is writable.
        unsafe { piece.iov_base.cast::<u8>().add(from).write_bytes(0, zeros) };
        skip -= from;
        left -= zeros;
    }
    Ok(padded)
}

fn fallocate(fd: i32, mode: i32, offset: u64, bytes: u64) -> io::Result<usize> {
    // SAFETY: takes numbers only; offsets are inside the image, so they fit an i64.
    let result = unsafe { libc::fallocate(fd, mode, offset as i64, bytes as i64) };
    bytes_moved(result as isize)
}

fn bytes_moved(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
