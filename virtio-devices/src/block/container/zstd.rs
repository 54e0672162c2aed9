//! qcow2 images with clusters compressed with zstd (QEMU, docs/interop/qcow2.txt, "Compressed Clusters Descriptor"), which
//! can only be read. imago decompresses zlib alone, so these clusters are read here, and everything else by imago.

use std::fmt;
use std::io::{self, Read as _};
use std::sync::Arc;

use imago::format::drivers::FormatDriverInstance;
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::{DynStorage, ShallowMapping, StorageExt as _};
use ruzstd::decoding::StreamingDecoder;

use super::chain::Layer;
use super::layer_file::LayerFile;

type Storage = Arc<dyn DynStorage>;

/// Bits of an entry of the L1 table that are the place of an L2 table.
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bit of an entry of an L2 table whose cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
const ENTRY_BYTES: u64 = 8;
/// Unit of the size of compressed data.
const SECTOR_BYTES: u64 = 512;
/// Memory that a frame may make the decoder use. QEMU's frames need 2 MiB; every decoder should accept 8 MiB (RFC 8878,
/// section 3.1.1.1.2).
const WINDOW_BYTES_MAX: u64 = 8 << 20;

/// Where a compressed cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Compressed {
    offset: u64,
    /// An upper limit.
    bytes: u64,
}

impl Compressed {
    /// Of an entry of an L2 table; `None` if the cluster is not compressed.
    fn of_entry(entry: u64, cluster_bits: u32) -> Option<Self> {
        if entry & COMPRESSED == 0 {
            return None;
        }
        // The number of further sectors has so many bits, below the two flags.
        let sectors_bits = cluster_bits - 8;
        let offset_bits = 62 - sectors_bits;
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry >> offset_bits) & ((1 << sectors_bits) - 1);
        Some(Self {
            offset,
            bytes: (sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES,
        })
    }
}

/// An image that is only read.
#[derive(Debug)]
pub(super) struct ZstdImage {
    image: Qcow2<Storage>,
    file: Arc<LayerFile>,
    l1_offset: u64,
    cluster_bytes: u64,
    l2_covers: u64,
}

impl ZstdImage {
    /// `image`, opened for reading from `file`, whose checked header is that of `layer`.
    pub(super) fn new(image: Qcow2<Storage>, file: Arc<LayerFile>, layer: &Layer) -> Self {
        Self {
            image,
            file,
            l1_offset: layer.l1.start,
            cluster_bytes: layer.cluster_bytes,
            l2_covers: layer.l2_covers,
        }
    }

    /// The compressed cluster at `offset` of the disk.
    fn find(&self, offset: u64) -> io::Result<Compressed> {
        let entry = |at| {
            let mut entry = [0; ENTRY_BYTES as usize];
            let read = self.file.read(entry.as_mut_slice(), at);
            read.map(|()| u64::from_be_bytes(entry))
        };
        let l2 = entry(self.l1_offset + offset / self.l2_covers * ENTRY_BYTES)? & L2_OFFSET;
        let index = offset % self.l2_covers / self.cluster_bytes;
        let entry = entry(l2 + index * ENTRY_BYTES)?;
        Compressed::of_entry(entry, self.cluster_bytes.trailing_zeros())
            .ok_or_else(|| self.damaged(offset, "it is not compressed"))
    }

    /// Reads the cluster that contains `offset`.
    fn read_cluster(&self, offset: u64) -> io::Result<Vec<u8>> {
        let at = self.find(offset)?;
        // Less than two clusters, however the entry is.
        let mut compressed = vec![0; at.bytes as usize];
        self.file.read(compressed.as_mut_slice(), at.offset)?;
        let damaged = |error: &dyn fmt::Display| self.damaged(offset, error);
        let mut decoder =
            StreamingDecoder::new_with_max_window_size(compressed.as_slice(), WINDOW_BYTES_MAX)
                .map_err(|error| damaged(&error))?;
        let mut cluster = vec![0; self.cluster_bytes as usize];
        let read = decoder.read_exact(&mut cluster);
        read.map_err(|error| damaged(&error))?;
        Ok(cluster)
    }

    fn damaged(&self, offset: u64, reason: impl fmt::Display) -> io::Error {
        io::Error::other(format!(
            "{self}: compressed cluster at offset {offset:#x} of the disk: {reason}"
        ))
    }
}

impl fmt::Display for ZstdImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.image.fmt(f)
    }
}

impl FormatDriverInstance for ZstdImage {
    type Storage = Storage;

    fn format(&self) -> Format {
        self.image.format()
    }

    unsafe fn probe(_storage: &Storage) -> io::Result<bool> {
        Ok(false)
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn collect_storage_dependencies(&self) -> Vec<&Storage> {
        self.image.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        false
    }

    fn get_mapping(
        &self,
        offset: u64,
        max_length: u64,
    ) -> io::Result<(ShallowMapping<'_, Storage>, u64)> {
        self.image.get_mapping(offset, max_length)
    }

    fn ensure_data_mapping(
        &self,
        _offset: u64,
        _length: u64,
        _overwrite: bool,
    ) -> io::Result<(&Storage, u64, u64)> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    /// Reads compressed clusters.
    fn readv_special(&self, mut into: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            let within = offset % self.cluster_bytes;
            let bytes = into.len().min(self.cluster_bytes - within);
            let (mut piece, rest) = into.split_at(bytes);
            into = rest;
            let cluster = self.read_cluster(offset)?;
            piece.copy_from_slice(&cluster[within as usize..(within + bytes) as usize]);
            offset += bytes;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.image.invalidate_cache() }
    }

    fn resize_grow(&self, _new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn resize_shrink(&mut self, _new_size: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_of_a_compressed_cluster_is_split_by_the_size_of_clusters() {
        let of = |entry, cluster_bits| {
            let found = Compressed::of_entry(entry, cluster_bits);
            found.map(|it| (it.offset, it.bytes))
        };
        assert_eq!(of(1 << 63 | 0x5_0000, 16), None);
        // 64 KiB: 8 bits of sectors.
        assert_eq!(
            of(COMPRESSED | 3 << 54 | 0x5_0123, 16),
            Some((0x5_0123, 2048 - 0x123))
        );
        // 512 bytes: one bit.
        assert_eq!(of(COMPRESSED | 1 << 61 | 0x1400, 9), Some((0x1400, 1024)));
        // All bits set: no more than two clusters of 2 MiB, and no overflow.
        let (offset, bytes) = of(u64::MAX, 21).unwrap();
        assert_eq!((offset, bytes), ((1 << 49) - 1, (4 << 20) - 511));
    }
}
