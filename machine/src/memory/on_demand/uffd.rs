//! `userfaultfd(2)`: a thread of this process handles the page faults of registered memory.
#![allow(unsafe_code)]
// UNSAFETY: requests of an ioctl, with addresses of this process.

use std::fs::File;
use std::io::{self, Read};
use std::ops;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::error::{DEVICE, OnDemandError};

/// A report of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Report {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The memory in this range is being discarded; the thread that discards it waits until this has been read.
    Removed(u64, u64),
}

/// The outcome of filling memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// The number of bytes filled in; fewer than requested only if memory is being discarded.
    Bytes(usize),
    /// The first page is already present.
    Present,
}

/// A descriptor on which faults are reported and resolved. Once it is closed, missing pages read as zeros.
#[derive(Debug)]
pub(super) struct Userfaultfd {
    file: File,
}

impl Userfaultfd {
    /// Opens a descriptor that also reports faults of the kernel, which KVM causes, and discarded memory.
    ///
    /// # Errors
    /// This process is not permitted to have one, or the kernel lacks a feature.
    pub(super) fn open() -> Result<Self, OnDemandError> {
        let file = from_device().or_else(|device| {
            from_call().map_err(|call| OnDemandError::Unavailable {
                device,
                source: call,
            })
        })?;
        let mut api = Api {
            api: API_VERSION,
            features: FEATURE_EVENT_REMOVE,
            ..Api::default()
        };
        // SAFETY: the kernel reads and writes a structure of the size encoded in the request's number.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check(answer).map_err(OnDemandError::Features)?;
        Ok(Self { file })
    }

    /// Registers `range`, so that faults of its missing pages are reported.
    pub(super) fn register(&self, range: &ops::Range<u64>) -> io::Result<()> {
        let mut register = Register {
            range: Range::of(range),
            mode: REGISTER_MISSING,
            ioctls: 0,
        };
        // SAFETY: as above. Threads that touch the range wait until a page is filled in; nothing else changes.
        let answer =
            unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
        check(answer)?;
        let needed = 1 << COPY_NUMBER | 1 << ZEROPAGE_NUMBER | 1 << WAKE_NUMBER;
        match register.ioctls & needed == needed {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Ends [`Userfaultfd::register`] for a range: missing pages read as zeros.
    pub(super) fn unregister(&self, range: &ops::Range<u64>) -> io::Result<()> {
        let mut range = Range::of(range);
        // SAFETY: as above; the caller has filled in every page that is not zero.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) })
    }

    /// Fills missing pages from `start` on with `data`, and wakes the threads that wait for them.
    pub(super) fn copy(&self, start: u64, data: &[u8]) -> io::Result<Filled> {
        let mut copy = Copy {
            start,
            source: data.as_ptr() as u64,
            bytes: data.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: as above. The kernel reads `data`, and writes only to pages that did not exist.
        let answer = unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        filled(check(answer), copy.copied)
    }

    /// Fills missing pages from `start` on with zeros, and wakes the threads that wait for them.
    pub(super) fn zero(&self, start: u64, bytes: u64) -> io::Result<Filled> {
        let mut zero = Zero {
            range: Range { start, bytes },
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: as above.
        let answer = unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
        filled(check(answer), zero.zeroed)
    }

    /// Wakes threads that wait for present pages.
    pub(super) fn wake(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut range = Range { start, bytes };
        // SAFETY: as above.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), UFFDIO_WAKE, &raw mut range) })
    }

    /// Appends the kernel's pending reports to `reports`, without waiting. The kernel returns faults before older
    /// discards.
    pub(super) fn read(&self, reports: &mut Vec<Report>) -> io::Result<()> {
        let mut buffer = [0; MESSAGE_BYTES * MESSAGES];
        loop {
            let bytes = match (&self.file).read(&mut buffer) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            reports.extend(
                buffer[..bytes]
                    .chunks_exact(MESSAGE_BYTES)
                    .filter_map(report),
            );
            if bytes < buffer.len() {
                return Ok(());
            }
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Needs only the permissions of the file.
fn from_device() -> io::Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(DEVICE)?;
    // SAFETY: the request takes flags and returns a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
    file_of(fd)
}

/// Needs CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd`.
fn from_call() -> io::Result<File> {
    // SAFETY: the call takes flags and returns a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    file_of(libc::c_int::try_from(fd).expect("descriptors are small integers"))
}

fn file_of(fd: libc::c_int) -> io::Result<File> {
    check(fd)?;
    // SAFETY: the kernel has just returned this descriptor, and it has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    match answer {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An interrupted request fails with EAGAIN, and returns a count if it was partly done.
fn filled(answer: io::Result<()>, count: i64) -> io::Result<Filled> {
    let done = usize::try_from(count).unwrap_or(0);
    match answer {
        Ok(()) => Ok(Filled::Bytes(done)),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(Filled::Bytes(done)),
            Some(libc::EEXIST) => Ok(Filled::Present),
            _ => Err(error),
        },
    }
}

fn report(message: &[u8]) -> Option<Report> {
    let word = |at: usize| {
        let bytes = message[at..at + 8].try_into();
        u64::from_ne_bytes(bytes.expect("eight bytes"))
    };
    match message[0] {
        EVENT_PAGEFAULT => Some(Report::Fault(word(16))),
        EVENT_REMOVE => Some(Report::Removed(word(8), word(16))),
        _ => None,
    }
}

// As defined in include/uapi/linux/userfaultfd.h.
const API_VERSION: u64 = 0xaa;
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const REGISTER_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const MESSAGE_BYTES: usize = 32;
/// Messages of one read: usually enough for all waiting threads.
const MESSAGES: usize = 32;
const WAKE_NUMBER: u32 = 2;
const COPY_NUMBER: u32 = 3;
const ZEROPAGE_NUMBER: u32 = 4;
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
}

impl Range {
    fn of(range: &ops::Range<u64>) -> Self {
        Self {
            start: range.start,
            bytes: range.end - range.start,
        }
    }
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    start: u64,
    source: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

// Bits 16 to 29 of a request's number are the size of its structure.
const _: () = {
    assert!((UFFDIO_API as usize >> 16) & 0x3fff == size_of::<Api>());
    assert!((UFFDIO_REGISTER as usize >> 16) & 0x3fff == size_of::<Register>());
    assert!((UFFDIO_WAKE as usize >> 16) & 0x3fff == size_of::<Range>());
    assert!((UFFDIO_COPY as usize >> 16) & 0x3fff == size_of::<Copy>());
    assert!((UFFDIO_ZEROPAGE as usize >> 16) & 0x3fff == size_of::<Zero>());
};
