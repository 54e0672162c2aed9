//! Guest memory in the address space of a device: guest addresses, or those that a virtual IOMMU translates.
//!
//! Every ring access and every buffer of a queue passes through here.

use std::iter::FusedIterator;
use std::ops::Deref;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryResult, Permissions, VolatileSlice,
};

use crate::dma::Access;

/// Maximum number of vectors that the kernel accepts in one call (`UIO_MAXIOV`).
pub(crate) const IOVECS_MAX: usize = 1024;

/// Maximum number of mappings in one access to a ring. The largest ring has 512 KiB.
const RING_PIECES_MAX: usize = 256;

/// Guest memory as a queue addresses it.
#[derive(Debug, Clone)]
pub(crate) struct DmaMemory<'m> {
    pub(crate) ram: &'m GuestMemoryMmap<()>,
    /// Translates if the device is behind an IOMMU.
    pub(crate) access: Option<Access>,
}

/// A [`DmaMemory`] that a descriptor chain owns.
#[derive(Debug, Clone)]
pub(crate) struct OwnedDmaMemory<'m>(pub(crate) DmaMemory<'m>);

impl<'m> Deref for OwnedDmaMemory<'m> {
    type Target = DmaMemory<'m>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DmaMemory<'_> {
    /// Passes the guest addresses of a ring or buffer that the device has written to `visit`, as far as they are still
    /// mapped.
    pub(crate) fn each_written_piece(
        &self,
        address: u64,
        bytes: u64,
        mut visit: impl FnMut(u64, u64),
    ) {
        let Some(access) = &self.access else {
            return visit(address, bytes);
        };
        let pieces = access.translate(address, bytes, Permissions::Write, IOVECS_MAX);
        for piece in pieces.into_iter().flatten() {
            visit(piece.address, piece.bytes);
        }
    }
}

impl GuestMemory for DmaMemory<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let slices = self.get_slices(addr, count, access);
        slices.is_ok_and(|mut slices| slices.all(|slice| slice.is_ok()))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, ()>>> {
        let ram = self.ram;
        // Each ring access of every device passes here.
        let Some(dma) = &self.access else {
            return Ok(Slices::Direct(GuestMemoryBackend::get_slices(
                ram, addr, count,
            )));
        };
        let pieces = dma.translate(addr.0, count as u64, access, RING_PIECES_MAX);
        let pieces = pieces.map_err(|_| GuestMemoryError::InvalidGuestAddress(addr))?;
        let slices = pieces.into_iter().flat_map(move |piece| {
            // As large as `count` at most.
            GuestMemoryBackend::get_slices(ram, GuestAddress(piece.address), piece.bytes as usize)
        });
        Ok(Slices::Translated(UntilError {
            slices,
            ended: false,
        }))
    }

    fn physical_memory(&self) -> Option<&GuestMemoryMmap<()>> {
        self.access.is_none().then_some(self.ram)
    }
}

/// The slices of a range in guest RAM, or those of its translation.
enum Slices<D, T> {
    Direct(D),
    Translated(T),
}

impl<D: Iterator, T: Iterator<Item = D::Item>> Iterator for Slices<D, T> {
    type Item = D::Item;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Direct(slices) => slices.next(),
            Self::Translated(slices) => slices.next(),
        }
    }
}

impl<D: FusedIterator, T: FusedIterator<Item = D::Item>> FusedIterator for Slices<D, T> {}

impl<'a, D, T> GuestMemorySliceIterator<'a, ()> for Slices<D, T>
where
    D: FusedIterator<Item = GuestMemoryResult<VolatileSlice<'a>>>,
    T: FusedIterator<Item = D::Item>,
{
}

/// Ends with the first error.
struct UntilError<I> {
    slices: I,
    ended: bool,
}

impl<'a, I> Iterator for UntilError<I>
where
    I: Iterator<Item = GuestMemoryResult<VolatileSlice<'a>>>,
{
    type Item = I::Item;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.slices.next();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

impl<'a, I> FusedIterator for UntilError<I> where
    I: Iterator<Item = GuestMemoryResult<VolatileSlice<'a>>>
{
}
