//! Reads the numbers of page faults that KVM has taken and resolved for a vCPU. KVM publishes these statistics in a
//! file (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`). Reading does not disturb the vCPU.
#![allow(unsafe_code)]
// UNSAFETY: kvm-ioctls has no wrapper for KVM_GET_STATS_FD.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)` of linux/kvm.h.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
/// Faults that were begun.
const TAKEN: &str = "pf_taken";
/// How a fault can end well.
const RESOLVED: [&str; 5] = [
    "pf_fixed",
    "pf_emulate",
    "pf_spurious",
    "pf_fast",
    "pf_guest",
];
const HEADER_BYTES: usize = 24;
/// Descriptor without its name.
const DESCRIPTOR_BYTES: usize = 16;
/// Limits of the numbers in the kernel's tables; real ones are below 100 and 48.
const DESCRIPTORS_MAX: u32 = 4096;
const NAME_BYTES_MAX: u32 = 256;

/// Page faults of a vCPU since it was created.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Faults begun. One that cannot be resolved yet is counted again at each attempt.
    pub taken: u64,
    /// Faults resolved.
    pub resolved: u64,
}

/// The counters of one vCPU.
#[derive(Debug)]
pub struct FaultStats {
    file: File,
    /// Positions in the file.
    taken: u64,
    resolved: Vec<u64>,
}

impl FaultStats {
    /// `None`: this kernel does not count page faults (it is older than 5.19).
    pub(crate) fn open(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the request takes no argument and returns a new descriptor, which is checked.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor is open and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        Self::read_layout(file).ok().flatten()
    }

    fn read_layout(file: File) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let [_flags, name_bytes, count, _id, descriptors, data] = words(&header);
        if count > DESCRIPTORS_MAX || name_bytes > NAME_BYTES_MAX {
            return Ok(None);
        }
        let step = DESCRIPTOR_BYTES + name_bytes as usize;
        let mut table = vec![0; step * count as usize];
        file.read_exact_at(&mut table, descriptors.into())?;
        let position_of = |name: &str| {
            let mut all = table.chunks_exact(step);
            let found = all.find(|descriptor| {
                let text = &descriptor[DESCRIPTOR_BYTES..];
                text.split(|byte| *byte == 0).next() == Some(name.as_bytes())
            });
            let [_flags, _size, offset, _bucket] = words::<4>(&found?[..DESCRIPTOR_BYTES]);
            Some(u64::from(data) + u64::from(offset))
        };
        Ok(position_of(TAKEN).map(|taken| Self {
            taken,
            resolved: RESOLVED
                .iter()
                .filter_map(|name| position_of(name))
                .collect(),
            file,
        }))
    }

    /// The counts now.
    ///
    /// # Errors
    /// The vCPU is gone.
    pub fn read(&self) -> io::Result<FaultCounts> {
        let count_at = |position: u64| {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, position)?;
            Ok::<_, io::Error>(u64::from_ne_bytes(value))
        };
        let mut counts = FaultCounts {
            taken: count_at(self.taken)?,
            resolved: 0,
        };
        for position in &self.resolved {
            counts.resolved = counts.resolved.wrapping_add(count_at(*position)?);
        }
        Ok(counts)
    }
}

/// The first numbers of 32 bits in `bytes`, which has that many.
fn words<const COUNT: usize>(bytes: &[u8]) -> [u32; COUNT] {
    std::array::from_fn(|index| {
        let word = bytes[4 * index..4 * index + 4].try_into();
        u32::from_ne_bytes(word.expect("four bytes"))
    })
}
