//! Returns the same memory with the minimum number of system calls, without guest and device: the baseline for all
//! other figures.
#![allow(unsafe_code)]
// UNSAFETY: memory is mapped, touched and returned with system calls that have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::plan::{Backing, Block};

const PAGE_BYTES: usize = 4096;
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Bytes returned in one round, in blocks.
const BLOCKS_BYTES: usize = 256 << 20;
/// Bytes returned as a whole.
const ALL_BYTES: usize = 700 << 20;
/// Number of ranges in a report of Linux.
const VECTOR_RANGES: usize = 32;

/// Bytes per second at which blocks are returned, the median of several rounds.
///
/// # Errors
/// The host has no such memory.
pub(super) fn bytes_per_second(backing: Backing, block: Block, rounds: usize) -> Result<f64> {
    let (block_bytes, bytes) = match block {
        Block::Bytes(block_bytes) => (usize::try_from(block_bytes)?, BLOCKS_BYTES),
        Block::All => (ALL_BYTES, ALL_BYTES),
    };
    // Every other block, so that no two can be merged.
    let memory = Memory::new(backing, 2 * bytes - block_bytes)
        .with_context(|| format!("mapping {} memory", backing.word()))?;
    let starts: Vec<usize> = (0..2 * bytes - block_bytes)
        .step_by(2 * block_bytes)
        .collect();
    let mut rates = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        memory.touch(&starts, block_bytes);
        let took = memory.give_back(&starts, block_bytes);
        let took = took.with_context(|| format!("giving back {} memory", backing.word()))?;
        rates.push((starts.len() * block_bytes) as f64 / took.as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

/// Memory of this process, mapped like a VMM's guest memory.
struct Memory {
    address: *mut u8,
    /// Start of the mapping; the memory may start a little later.
    mapping: *mut u8,
    mapping_bytes: usize,
    file: Option<File>,
    pidfd: OwnedFd,
}

impl Memory {
    fn new(backing: Backing, bytes: usize) -> io::Result<Self> {
        let file = match backing {
            Backing::Private | Backing::Thp => None,
            Backing::Memfd => Some(memory_file(0, bytes)?),
            Backing::Hugetlb => Some(memory_file(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, bytes)?),
        };
        // Additional space to start on a huge page; a file is mapped with its own alignment.
        let (mapping_bytes, flags, descriptor) = match &file {
            None => (
                bytes + HUGE_PAGE_BYTES,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
            ),
            Some(file) => (bytes, libc::MAP_SHARED, file.as_raw_fd()),
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapping_bytes,
                protection,
                flags,
                descriptor,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping: *mut u8 = mapping.cast();
        let address = match &file {
            None => mapping.wrapping_add(mapping.align_offset(HUGE_PAGE_BYTES)),
            Some(_) => mapping,
        };
        let advice = match backing {
            Backing::Thp => Some(libc::MADV_HUGEPAGE),
            Backing::Private => Some(libc::MADV_NOHUGEPAGE),
            Backing::Memfd | Backing::Hugetlb => None,
        };
        if let Some(advice) = advice {
            // SAFETY: changes how the new mapping is paged, not its contents. A kernel without huge pages rejects the
            // call, which is harmless.
            unsafe { libc::madvise(address.cast(), bytes, advice) };
        }
        // SAFETY: a plain system call; its result becomes an owned descriptor below.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        let pidfd = i32::try_from(pidfd).map_err(io::Error::other)?;
        if pidfd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address,
            mapping,
            mapping_bytes,
            file,
            // SAFETY: the descriptor was just created and has no other owner.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        })
    }

    fn touch(&self, starts: &[usize], block_bytes: usize) {
        for start in starts {
            for at in (*start..start + block_bytes).step_by(PAGE_BYTES) {
                // SAFETY: blocks lie inside the mapping, which is writable and not shared.
                unsafe { self.address.add(at).write_volatile(1) };
            }
        }
    }

    /// Returns all blocks to the kernel, and the duration.
    fn give_back(&self, starts: &[usize], block_bytes: usize) -> io::Result<Duration> {
        let begin = Instant::now();
        if self.file.is_some() {
            for start in starts {
                self.punch(*start, block_bytes)?;
            }
        } else {
            for starts in starts.chunks(VECTOR_RANGES) {
                self.discard(starts, block_bytes)?;
            }
        }
        Ok(begin.elapsed())
    }

    fn punch(&self, start: usize, block_bytes: usize) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let file = self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: frees pages of this file, which nothing refers to but this mapping.
        check(unsafe { libc::fallocate(file, mode, start as i64, block_bytes as i64) })
    }

    fn discard(&self, starts: &[usize], block_bytes: usize) -> io::Result<()> {
        let spans: Vec<libc::iovec> = starts
            .iter()
            .map(|start| libc::iovec {
                iov_base: self.address.wrapping_add(*start).cast(),
                iov_len: block_bytes,
            })
            .collect();
        // SAFETY: frees pages of this mapping, which nothing refers to.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.pidfd.as_raw_fd(),
                spans.as_ptr(),
                spans.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        if done >= 0 {
            return Ok(());
        }
        // A kernel before 6.13 needs one call per range.
        for span in spans {
            // SAFETY: as above.
            check(unsafe { libc::madvise(span.iov_base, span.iov_len, libc::MADV_DONTNEED) })?;
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap returned, unmapped once.
        unsafe { libc::munmap(self.mapping.cast(), self.mapping_bytes) };
    }
}

fn memory_file(flags: libc::c_uint, bytes: usize) -> io::Result<File> {
    // SAFETY: the name is a C string.
    let descriptor = unsafe { libc::memfd_create(c"bare".as_ptr(), flags) };
    check(descriptor.min(0))?;
    // SAFETY: the descriptor was just created and has no other owner.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes as u64)?;
    Ok(file)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_memory_of_each_kind_comes_back_and_can_be_touched_again() {
        for backing in [Backing::Private, Backing::Thp, Backing::Memfd] {
            let memory = Memory::new(backing, 3 * HUGE_PAGE_BYTES).unwrap();
            for _ in 0..2 {
                memory.touch(&[0, 2 * HUGE_PAGE_BYTES], HUGE_PAGE_BYTES);
                memory
                    .give_back(&[0, 2 * HUGE_PAGE_BYTES], HUGE_PAGE_BYTES)
                    .unwrap();
                // SAFETY: the first byte of the mapping, which is still mapped.
                let first = unsafe { memory.address.read_volatile() };
                assert_eq!(first, 0, "{}", backing.word());
            }
        }
    }
}
