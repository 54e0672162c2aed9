//! Sound qcow2 images, made without `qemu-img`.
//!
//! The file has a header, the table of reference counts, their blocks, the table of the L2 tables, and then L2 tables
//! and data.

const MAGIC: &[u8] = b"QFI\xfb";
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
const ENTRY_BYTES: u64 = 8;
/// The entry's cluster has one reference and may be changed in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header of a block of deflate that is not compressed.
const STORED_BYTES: usize = 5;
const SECTOR: u64 = 512;

/// A cluster of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cluster {
    /// As in the image below; without one, zeros.
    Unallocated,
    /// Zeros whatever is below. Only version 3 has them.
    Zero,
    /// Filled with this byte.
    Data(u8),
    /// The same, compressed. Clusters must be smaller than 64 KiB.
    Compressed(u8),
}

/// An image to be made.
#[derive(Debug, Clone)]
pub(crate) struct Qcow2<'a> {
    /// 2 or 3.
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// A reference count has this power of two of bits; 4 in version 2.
    pub(crate) refcount_order: u32,
    pub(crate) disk_bytes: u64,
    /// Path and format of the image below.
    pub(crate) backing: Option<(&'a str, &'a str)>,
    /// The clusters of the disk; those beyond are unallocated.
    pub(crate) clusters: &'a [Cluster],
}

impl Qcow2<'_> {
    /// The image's file.
    pub(crate) fn file(&self) -> Vec<u8> {
        let cluster = 1_u64 << self.cluster_bits;
        let entries = cluster / ENTRY_BYTES;
        let l1_entries = self.disk_bytes.div_ceil(entries * cluster);
        let l1_clusters = (l1_entries * ENTRY_BYTES).div_ceil(cluster).max(1);
        let own = 2 + l1_clusters + self.clusters_beyond_tables(entries);
        let counts = (cluster * 8) >> self.refcount_order;
        let blocks = (1..).find(|blocks| (own + blocks).div_ceil(counts) <= *blocks);
        let blocks = blocks.expect("a block counts more clusters than itself");
        let l1 = (2 + blocks) * cluster;
        let mut file = vec![0; ((own + blocks) * cluster) as usize];
        self.write_header(&mut file, l1, l1_entries);
        for block in 0..blocks {
            put(
                &mut file,
                cluster + block * ENTRY_BYTES,
                (2 + block) * cluster,
            );
        }
        for number in 0..own + blocks {
            self.count(&mut file[2 * cluster as usize..], number);
        }
        let mut free = l1 + l1_clusters * cluster;
        let mut take = |clusters: u64| {
            free += clusters * cluster;
            free - clusters * cluster
        };
        for (table, clusters) in (0_u64..).zip(self.clusters.chunks(entries as usize)) {
            if clusters.iter().all(|it| *it == Cluster::Unallocated) {
                continue;
            }
            let l2 = take(1);
            put(&mut file, l1 + table * ENTRY_BYTES, l2 | COPIED);
            for (at, it) in (0_u64..).zip(clusters) {
                let place = take(self.clusters_of(*it));
                let entry = self.write_cluster(&mut file, *it, place);
                put(&mut file, l2 + at * ENTRY_BYTES, entry);
            }
        }
        file
    }

    /// The disk's content, over the content of the image below.
    pub(crate) fn content(&self, below: &[u8]) -> Vec<u8> {
        let mut content = below.to_vec();
        content.resize(self.disk_bytes as usize, 0);
        let chunks = content.chunks_mut(1 << self.cluster_bits);
        for (chunk, it) in chunks.zip(self.clusters) {
            match it {
                Cluster::Unallocated => {}
                Cluster::Zero => chunk.fill(0),
                Cluster::Data(fill) | Cluster::Compressed(fill) => chunk.fill(*fill),
            }
        }
        content
    }

    fn clusters_of(&self, it: Cluster) -> u64 {
        match it {
            Cluster::Unallocated | Cluster::Zero => 0,
            Cluster::Data(_) => 1,
            Cluster::Compressed(_) => 2,
        }
    }

    fn clusters_beyond_tables(&self, entries: u64) -> u64 {
        let tables = self.clusters.chunks(entries as usize);
        let tables = tables.filter(|of| of.iter().any(|it| *it != Cluster::Unallocated));
        let data = self.clusters.iter().map(|it| self.clusters_of(*it));
        tables.count() as u64 + data.sum::<u64>()
    }

    fn write_header(&self, file: &mut [u8], l1: u64, l1_entries: u64) {
        let cluster = 1_u64 << self.cluster_bits;
        let mut header = MAGIC.to_vec();
        let mut number = |value: u64, bytes: usize| {
            header.extend(&value.to_be_bytes()[size_of::<u64>() - bytes..]);
        };
        number(self.version.into(), 4);
        // The name of the image below follows later.
        number(0, 8);
        number(0, 4);
        number(self.cluster_bits.into(), 4);
        number(self.disk_bytes, 8);
        // No encryption.
        number(0, 4);
        number(l1_entries, 4);
        number(l1, 8);
        number(cluster, 8);
        number(1, 4);
        // No snapshots.
        number(0, 4);
        number(0, 8);
        if self.version > 2 {
            // No features.
            number(0, 8);
            number(0, 8);
            number(0, 8);
            number(self.refcount_order.into(), 4);
            number(V3_BYTES as u64, 4);
        }
        debug_assert!(matches!(header.len(), V2_BYTES | V3_BYTES));
        if let Some((path, format)) = self.backing {
            header.extend(BACKING_FORMAT.to_be_bytes());
            header.extend((format.len() as u32).to_be_bytes());
            header.extend(format.as_bytes());
            // Extensions are padded to eight bytes. The last one is empty.
            header.resize(header.len().next_multiple_of(8) + 8, 0);
            let at = header.len() as u64;
            header[8..16].copy_from_slice(&at.to_be_bytes());
            header[16..20].copy_from_slice(&(path.len() as u32).to_be_bytes());
            header.extend(path.as_bytes());
        }
        file[..header.len()].copy_from_slice(&header);
    }

    /// Sets the reference count of a cluster to one.
    fn count(&self, blocks: &mut [u8], number: u64) {
        let bits = 1_u64 << self.refcount_order;
        // Counts of less than a byte begin at its low end, larger ones are big-endian.
        let (at, shift) = match bits {
            1..8 => (number * bits / 8, number * bits % 8),
            _ => ((number + 1) * bits / 8 - 1, 0),
        };
        blocks[at as usize] |= 1 << shift;
    }

    /// Writes the cluster's data; returns its entry.
    fn write_cluster(&self, file: &mut [u8], it: Cluster, place: u64) -> u64 {
        let cluster = 1_usize << self.cluster_bits;
        let data = &mut file[place as usize..];
        match it {
            Cluster::Unallocated => 0,
            Cluster::Zero => ZERO,
            Cluster::Data(fill) => {
                data[..cluster].fill(fill);
                place | COPIED
            }
            Cluster::Compressed(fill) => {
                let bytes = u16::try_from(cluster).expect("less than 64 KiB");
                data[0] = 1;
                data[1..3].copy_from_slice(&bytes.to_le_bytes());
                data[3..STORED_BYTES].copy_from_slice(&(!bytes).to_le_bytes());
                data[STORED_BYTES..][..cluster].fill(fill);
                // Sectors beyond the first one.
                let more = (cluster + STORED_BYTES) as u64 / SECTOR;
                place | more << (62 - (self.cluster_bits - 8)) | COMPRESSED
            }
        }
    }
}

fn put(file: &mut [u8], at: u64, entry: u64) {
    file[at as usize..][..ENTRY_BYTES as usize].copy_from_slice(&entry.to_be_bytes());
}
