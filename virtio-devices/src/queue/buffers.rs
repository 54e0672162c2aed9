//! Guest buffers as host I/O vectors, so that a disk or a tap reads and writes guest RAM without an intermediate copy
//! (virtio 1.2 §2.7).
//!
//! All fields of a descriptor are guest-controlled. [`ChainBuffers::collect`] resolves them against guest RAM once. The
//! result is valid host memory as long as the value exists, because each [`GuestBuffers`] keeps the memory map alive.

#![allow(unsafe_code)]
// UNSAFETY: the kernel receives raw pointers into guest RAM (`iovec`), and small pieces are copied through
// `VolatileSlice`s made from those pointers.

use smallvec::{SmallVec, smallvec};
use vm_memory::atomic::GuestMemoryLoadGuard;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, Permissions, VolatileSlice};

use super::dma::IOVECS_MAX;
use super::walk::{Chain, ChainEnd, DESCRIPTORS_MAX, walk};
use crate::dma::{Access, DmaError};
use crate::worker::Turn;

/// The memory map that a worker holds for one batch of work.
pub(crate) type RamGuard = GuestMemoryLoadGuard<GuestMemoryMmap<()>>;

/// Reasons why a descriptor chain cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// No descriptor could be read: the head is outside the table, or the table is outside RAM.
    #[error("descriptor chain is empty")]
    Empty,
    /// The chain loops, leaves its table, or exceeds 4 GiB.
    #[error("descriptor chain does not end")]
    Unterminated,
    /// A buffer is not completely in guest RAM.
    #[error("descriptor points outside guest RAM")]
    OutOfRam,
    /// The IOMMU in front of the device does not allow the access to a buffer.
    #[error("descriptor points to memory that the virtual IOMMU does not map")]
    NotMapped,
    /// A device-readable buffer follows a device-writable one (virtio 1.2 §2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    WrongOrder,
    /// More descriptors than [`DESCRIPTORS_MAX`], or more pieces than [`IOVECS_MAX`].
    #[error("descriptor chain has too many pieces")]
    TooManyPieces,
}

/// A list of pieces of guest RAM, in order; or a copy of some.
pub(crate) struct GuestBuffers {
    /// Most requests have few pieces, for which nothing is allocated.
    iovecs: SmallVec<[libc::iovec; 2]>,
    bytes: usize,
    ram: RamGuard,
    /// Keeps the pieces accessible if the device is behind an IOMMU.
    access: Option<Access>,
    /// The copy to which the pieces refer, if there is one.
    _copy: Option<Box<[u8]>>,
}

// SAFETY: the pointers refer to the mapping kept alive by `ram`, which is `Send`, or to the copy;
// guest RAM may be accessed from any thread.
unsafe impl Send for GuestBuffers {}

crate::debug_fields!(GuestBuffers(it) { pieces: it.iovecs.len(), bytes: it.bytes });

impl GuestBuffers {
    pub(crate) fn new(ram: &RamGuard, access: Option<Access>) -> Self {
        Self {
            iovecs: SmallVec::new(),
            bytes: 0,
            ram: ram.clone(),
            access,
            _copy: None,
        }
    }

    /// Sum of the lengths of all pieces.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The pieces in the kernel's format; at most [`IOVECS_MAX`].
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Appends `len` bytes at `addr` of the device's address space.
    fn push_translated(
        &mut self,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<(), ChainError> {
        let Some(dma) = &self.access else {
            return self.push(addr, len);
        };
        let room = IOVECS_MAX - self.iovecs.len();
        let pieces = dma.translate(addr.0, len as u64, access, room);
        let pieces = pieces.map_err(|error| match error {
            DmaError::Fault => ChainError::NotMapped,
            DmaError::TooManyPieces => ChainError::TooManyPieces,
        })?;
        // No piece is longer than the descriptor.
        pieces
            .into_iter()
            .try_for_each(|piece| self.push(GuestAddress(piece.address), piece.bytes as usize))
    }

    /// Appends `len` bytes of guest RAM at `addr`, merged with the last piece if both are adjacent on the host. A
    /// length of 0 appends nothing.
    fn push(&mut self, addr: GuestAddress, len: usize) -> Result<(), ChainError> {
        // Split borrows: the slices borrow the map while pieces are appended.
        let Self {
            iovecs, bytes, ram, ..
        } = self;
        for slice in GuestMemoryBackend::get_slices(&**ram, addr, len) {
            let slice = slice.map_err(|_| ChainError::OutOfRam)?;
            let base = slice.ptr_guard_mut().as_ptr();
            *bytes += slice.len();
            if let Some(last) = iovecs.last_mut()
                && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base
            {
                last.iov_len += slice.len();
                continue;
            }
            if iovecs.len() == IOVECS_MAX {
                return Err(ChainError::TooManyPieces);
            }
            iovecs.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: slice.len(),
            });
        }
        Ok(())
    }

    /// Drops the first `count` bytes (all if there are fewer).
    pub(crate) fn advance(&mut self, count: usize) {
        let mut left = count.min(self.bytes);
        self.bytes -= left;
        let mut whole = 0;
        for piece in &mut self.iovecs {
            if left < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(left).cast();
                piece.iov_len -= left;
                break;
            }
            left -= piece.iov_len;
            whole += 1;
        }
        self.iovecs.drain(..whole);
    }

    /// Splits off the first `count` bytes (all if there are fewer) as separate buffers.
    pub(crate) fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self {
            iovecs: SmallVec::new(),
            bytes: count.min(self.bytes),
            ram: self.ram.clone(),
            access: self.access.clone(),
            _copy: None,
        };
        let mut left = front.bytes;
        for piece in &self.iovecs {
            if left == 0 {
                break;
            }
            let iov_len = piece.iov_len.min(left);
            front.iovecs.push(libc::iovec { iov_len, ..*piece });
            left -= iov_len;
        }
        self.advance(count);
        front
    }

    /// Splits off the last byte as a separate buffer; `None` if there is none.
    pub(crate) fn split_last_byte(&mut self) -> Option<Self> {
        let last = self.iovecs.last_mut()?;
        last.iov_len -= 1;
        let byte = libc::iovec {
            iov_base: last.iov_base.cast::<u8>().wrapping_add(last.iov_len).cast(),
            iov_len: 1,
        };
        if last.iov_len == 0 {
            self.iovecs.pop();
        }
        self.bytes -= 1;
        Some(Self {
            iovecs: smallvec![byte],
            bytes: 1,
            ram: self.ram.clone(),
            access: self.access.clone(),
            _copy: None,
        })
    }

    /// Replaces the first `count` bytes (all if there are fewer) by a copy, which the guest cannot change any more, and
    /// splits it off.
    pub(crate) fn split_front_copy(&mut self, count: usize) -> Self {
        let mut copy = vec![0; count.min(self.bytes)].into_boxed_slice();
        let bytes = self.copy_out(&mut copy);
        self.advance(bytes);
        Self {
            iovecs: smallvec![libc::iovec {
                iov_base: copy.as_mut_ptr().cast(),
                iov_len: bytes,
            }],
            bytes,
            ram: self.ram.clone(),
            access: self.access.clone(),
            _copy: Some(copy),
        }
    }

    /// Copies from the front into `out` and returns the number of bytes.
    pub(crate) fn copy_out(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            if done == out.len() {
                break;
            }
            done += slice.copy_to(&mut out[done..]);
        }
        done
    }

    /// Copies `data` to the front and returns the number of bytes that fit.
    pub(crate) fn copy_in(&self, data: &[u8]) -> usize {
        self.copy_in_at(0, data)
    }

    /// Copies `data` to `offset` and returns the number of bytes that fit.
    pub(crate) fn copy_in_at(&self, mut offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            if done == data.len() {
                break;
            }
            let Ok(slice) = slice.offset(offset) else {
                offset -= slice.len();
                continue;
            };
            if slice.is_empty() {
                offset = 0;
                continue;
            }
            let count = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + count]);
            done += count;
            offset = 0;
        }
        done
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.iovecs.iter().map(|piece| {
            // SAFETY: `iov_base..+iov_len` came from a slice of guest RAM checked in
            // `push`, or is the copy, and only ever shrunk; `self` keeps both.
            unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
        })
    }
}

/// A whole descriptor chain, split by direction.
#[derive(Debug)]
pub(crate) struct ChainBuffers {
    /// The buffers that the device may read, in order.
    pub(crate) readable: GuestBuffers,
    /// The buffers that the device may write, in order.
    pub(crate) writable: GuestBuffers,
}

impl ChainBuffers {
    /// Resolves every descriptor of `chain`, in the same address space in which the chain itself is.
    ///
    /// # Errors
    /// The chain is malformed; none of its buffers has been accessed.
    pub(crate) fn collect(
        chain: Chain<'_>,
        ram: &RamGuard,
        turn: &mut Turn,
    ) -> Result<Self, ChainError> {
        let access = chain.memory().access.clone();
        let mut buffers = Self {
            readable: GuestBuffers::new(ram, access.clone()),
            writable: GuestBuffers::new(ram, access),
        };
        let mut writing = false;
        let mut refusal = None;
        let end = walk(chain, DESCRIPTORS_MAX, turn, |descriptor| {
            let (target, access) = if descriptor.is_write_only() {
                writing = true;
                (&mut buffers.writable, Permissions::Write)
            } else if writing {
                refusal = Some(ChainError::WrongOrder);
                return false;
            } else {
                (&mut buffers.readable, Permissions::Read)
            };
            let (addr, len) = (descriptor.addr(), descriptor.len() as usize);
            refusal = target.push_translated(addr, len, access).err();
            refusal.is_none()
        });
        match (refusal, end) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(ChainEnd::Empty)) => Err(ChainError::Empty),
            (None, Some(ChainEnd::Broken)) => Err(ChainError::Unterminated),
            (None, Some(ChainEnd::TooLong)) => Err(ChainError::TooManyPieces),
            (None, Some(ChainEnd::Whole) | None) => Ok(buffers),
        }
    }
}
