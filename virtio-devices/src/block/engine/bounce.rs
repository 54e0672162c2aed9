//! Direct I/O for guests whose buffers or sectors are misaligned for it.
//!
//! Linux aligns its requests; firmware may not. Misaligned transfers go through an aligned buffer, synchronously and in
//! pieces: they are rare, and a bounded buffer matters more than their speed.

#![allow(unsafe_code)]
// UNSAFETY: copies between the bounce buffer and guest memory, which is described by raw vectors.

use std::io;
use std::os::unix::fs::FileExt;

use crate::block::image::{DioAlignment, Image};

/// Maximum number of bytes moved by one call; a multiple of every common block size.
const BOUNCE_BYTES: usize = 256 << 10;

/// An aligned buffer, allocated on first use.
pub(super) struct Bounce {
    align: DioAlignment,
    memory: Vec<u8>,
}

/// A transfer extended to whole blocks.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// Aligned offset in the image.
    start: u64,
    /// Aligned length, at most [`BOUNCE_BYTES`].
    len: usize,
    /// Offset of the requested bytes in the window.
    skip: usize,
    /// Number of requested bytes.
    wanted: usize,
}

impl Bounce {
    pub(super) fn new(align: DioAlignment) -> Self {
        Self {
            align,
            memory: Vec::new(),
        }
    }

    /// Whether the kernel would reject this transfer unmodified.
    pub(super) fn is_needed(&self, offset: u64, vectors: &[libc::iovec]) -> bool {
        !offset.is_multiple_of(self.align.offset as u64)
            || vectors.iter().any(|piece| {
                !(piece.iov_base as usize).is_multiple_of(self.align.memory)
                    || !piece.iov_len.is_multiple_of(self.align.offset)
            })
    }

    /// Reads into the front of `into`; returns the number of bytes moved.
    ///
    /// # Safety
    /// `into` describes writable memory.
    pub(super) unsafe fn read(
        &mut self,
        image: &Image,
        offset: u64,
        into: &[libc::iovec],
    ) -> io::Result<usize> {
        let window = self.window(offset, into);
        let buffer = self.buffer(window.len);
        let got = image.file().read_at(buffer, window.start)?;
        let wanted = window.wanted.min(got.saturating_sub(window.skip));
        let mut source = &buffer[window.skip..window.skip + wanted];
        for piece in into {
            let count = piece.iov_len.min(source.len());
            // SAFETY: the caller guarantees that the piece is writable for `iov_len >= count` bytes; guest RAM cannot
            // overlap a buffer of ours.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr(), piece.iov_base.cast(), count);
            }
            source = &source[count..];
        }
        Ok(wanted)
    }

    /// Writes from the front of `from`; returns the number of bytes moved.
    ///
    /// # Safety
    /// `from` describes readable memory.
    pub(super) unsafe fn write(
        &mut self,
        image: &Image,
        offset: u64,
        from: &[libc::iovec],
    ) -> io::Result<usize> {
        let window = self.window(offset, from);
        let whole_blocks = window.wanted == window.len;
        // Two writes to parts of one block must not interleave between reading and writing it. Writes of whole blocks
        // need no such protection: an overlap with them is a race in the guest.
        let _one_at_a_time = (!whole_blocks).then(|| image.lock_partial_writes());
        let buffer = self.buffer(window.len);
        if !whole_blocks {
            // A short read must be an error: unread bytes must not be written back as zeroes.
            image.file().read_exact_at(buffer, window.start)?;
        }
        let mut target = &mut buffer[window.skip..window.skip + window.wanted];
        for piece in from {
            let count = piece.iov_len.min(target.len());
            // SAFETY: the caller guarantees that the piece is readable for `iov_len >= count` bytes; guest RAM cannot
            // overlap a buffer of ours.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    piece.iov_base.cast_const().cast(),
                    target.as_mut_ptr(),
                    count,
                );
            }
            target = &mut target[count..];
        }
        let put = image.file().write_at(buffer, window.start)?;
        Ok(window.wanted.min(put.saturating_sub(window.skip)))
    }

    fn window(&self, offset: u64, vectors: &[libc::iovec]) -> Window {
        let block = self.align.offset;
        let skip = (offset % block as u64) as usize;
        let total: usize = vectors.iter().map(|piece| piece.iov_len).sum();
        let wanted = total.min(BOUNCE_BYTES - skip);
        Window {
            start: offset - skip as u64,
            len: (skip + wanted).next_multiple_of(block),
            skip,
            wanted,
        }
    }

    fn buffer(&mut self, len: usize) -> &mut [u8] {
        let align = self.align.memory;
        if self.memory.is_empty() {
            self.memory.resize(BOUNCE_BYTES + align, 0);
        }
        let at = self.memory.as_ptr().align_offset(align);
        &mut self.memory[at..at + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::tests::{image, params};

    #[test]
    fn write_into_a_block_that_cannot_be_read_whole_changes_nothing() {
        let file = image(16);
        let image = Image::open(&params(&file)).expect("the image is sound");
        let mut bounce = Bounce::new(DioAlignment {
            memory: 512,
            offset: 4096,
        });
        let mut write = |offset| {
            let data = [9_u8; 512];
            let vector = libc::iovec {
                iov_base: data.as_ptr().cast_mut().cast(),
                iov_len: data.len(),
            };
            // SAFETY: the vector describes `data`, which outlives the call and is only read.
            unsafe { bounce.write(&image, offset, &[vector]) }
        };
        // Sectors 8 to 15 are one block, whose second half is cut off by the truncation.
        file.as_file().set_len(12 * 512).unwrap();
        let before = std::fs::read(file.path()).unwrap();
        assert!(write(9 * 512).is_err());
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
        assert_eq!(write(512).unwrap(), 512);
        let mut after = before;
        after[512..1024].fill(9);
        assert_eq!(std::fs::read(file.path()).unwrap(), after);
    }

    #[test]
    fn read_of_what_the_image_has_lost_moves_only_what_is_there() {
        let file = image(16);
        let image = Image::open(&params(&file)).expect("the image is sound");
        let mut bounce = Bounce::new(DioAlignment {
            memory: 512,
            offset: 4096,
        });
        let mut read = |offset| {
            let mut data = [0xee_u8; 2048];
            let vector = libc::iovec {
                iov_base: data.as_mut_ptr().cast(),
                iov_len: data.len(),
            };
            // SAFETY: the vector describes `data`, which outlives the call.
            let moved = unsafe { bounce.read(&image, offset, &[vector]) };
            (moved.unwrap(), data)
        };
        let content: Vec<u8> = (0..12 * 512_u32).map(|n| (n / 512) as u8).collect();
        std::fs::write(file.path(), &content).unwrap();
        let (moved, data) = read(10 * 512);
        assert_eq!(moved, 1024);
        assert_eq!(data[..1024], content[10 * 512..]);
        assert_eq!(data[1024..], [0xee; 1024], "never filled with zeroes");
        assert_eq!(read(12 * 512), (0, [0xee; 2048]));
    }
}
