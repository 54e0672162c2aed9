//! System calls on a disk image that std does not provide.

#![allow(unsafe_code)]
// UNSAFETY: raw system calls on a descriptor we own; each takes plain numbers or
// a pointer to a local of the size the kernel writes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// `statx` mask bit for the direct I/O fields (linux/stat.h, since 6.1).
const STATX_DIOALIGN: u32 = 0x2000;
/// Size of `struct statx`, and the offset of its direct I/O fields (linux/stat.h).
const STATX_BYTES: usize = 256;
const STATX_DIO_MEM_ALIGN_AT: usize = 152;
const STATX_DIO_OFFSET_ALIGN_AT: usize = 156;

/// Unnumbered block device ioctls (linux/fs.h); not in libc.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Alignment that direct I/O on `file` requires: (memory, offset and length), in bytes. `None`: neither the kernel nor
/// the file system reports it.
pub(super) fn dio_alignment(file: &File) -> Option<(u32, u32)> {
    let mut buffer = [0u64; STATX_BYTES / 8];
    // SAFETY: the path is an empty C string, with which AT_EMPTY_PATH refers to the descriptor itself; the buffer has
    // the size and alignment of `struct statx`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_statx,
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_DIOALIGN,
            buffer.as_mut_ptr(),
        )
    };
    let field = |at: usize| {
        let word = buffer[at / 8].to_ne_bytes();
        u32::from_ne_bytes([
            word[at % 8],
            word[at % 8 + 1],
            word[at % 8 + 2],
            word[at % 8 + 3],
        ])
    };
    let (mask, mem, offset) = (
        field(0),
        field(STATX_DIO_MEM_ALIGN_AT),
        field(STATX_DIO_OFFSET_ALIGN_AT),
    );
    (result == 0 && mask & STATX_DIOALIGN != 0 && mem != 0 && offset != 0).then_some((mem, offset))
}

/// Allocates the first `bytes` of a file.
///
/// # Errors
/// There is no space, or the file system cannot do that.
pub(super) fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let bytes = i64::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: takes numbers only.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sizes that a block device reports, in bytes (linux/fs.h `BLK*GET`).
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockDeviceSizes {
    pub(super) logical: u32,
    pub(super) physical: u32,
    pub(super) io_min: u32,
    pub(super) io_opt: u32,
}

/// Reads the sizes of a block device.
///
/// # Errors
/// The ioctl failed, for example because this is not a block device.
pub(super) fn block_device_sizes(file: &File) -> io::Result<BlockDeviceSizes> {
    let get = |request: libc::Ioctl| {
        let mut value: libc::c_uint = 0;
        // SAFETY: each of the requests below writes one (unsigned) int.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(value)
    };
    Ok(BlockDeviceSizes {
        logical: get(libc::BLKSSZGET)?,
        physical: get(libc::BLKPBSZGET)?,
        io_min: get(libc::BLKIOMIN)?,
        io_opt: get(libc::BLKIOOPT)?,
    })
}

/// Discards a range of a block device.
///
/// # Errors
/// The device does not support it, or the range is invalid.
pub(super) fn block_device_discard(fd: RawFd, offset: u64, bytes: u64) -> io::Result<()> {
    let range = [offset, bytes];
    // SAFETY: BLKDISCARD reads two u64.
    let result = unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
