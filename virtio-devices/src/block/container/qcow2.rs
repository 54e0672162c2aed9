//! The header of a qcow2 image (QEMU, docs/interop/qcow2.txt), checked before the image is opened.
//!
//! The reader of the format trusts sizes in the header: it allocates tables of these sizes. This module compares them
//! with fixed limits and with the size of the file, and rejects features that the reader does not support by name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::big_endian::{be_u32, be_u64};
use super::error::Qcow2Error;
use crate::block::SECTOR_BYTES;
use crate::block::image_file::read_up_to;

/// Bytes of the header of version 2, and the least of version 3.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// Largest size of a cluster.
const CLUSTER_BITS_MAX: u32 = 21;
const CLUSTER_BITS_MIN: u32 = 9;
/// QEMU's limits of both tables.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
const REFCOUNT_ORDER_MAX: u32 = 6;
/// Counts of version 2 have 16 bits.
const V2_REFCOUNT_ORDER: u32 = 4;
/// The reader keeps so many clusters of L2 tables and reference counts in memory.
const CACHED_CLUSTERS: u64 = 128 + 32;
/// Bytes of an entry of both tables.
const ENTRY_BYTES: u64 = 8;
/// Bytes of an entry in the table of feature names.
const FEATURE_NAME_BYTES: usize = 48;

/// Types of header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;

/// Where the incompatible features are: 64 bits.
const FEATURES_AT: usize = 72;
/// The incompatible features that only forbid writing, by their bits.
const READABLE_FEATURES: [(u32, Qcow2Error); 3] = [
    (0, Qcow2Error::Dirty),
    (1, Qcow2Error::Corrupt),
    (COMPRESSION_BIT, Qcow2Error::Compression),
];
/// The other ones.
const FEATURES: [(u32, Qcow2Error); 2] = [
    (2, Qcow2Error::Feature("an external data file")),
    (4, Qcow2Error::Feature("extended L2 entries")),
];
/// The image states how it is compressed: not by zlib.
const COMPRESSION_BIT: u32 = 3;
const COMPRESSION_AT: usize = 104;
const ZSTD: u8 = 1;

/// The byte of the header with all bits of [`READABLE_FEATURES`], and these bits. imago rejects them.
pub(super) const READABLE_BYTE: u64 = FEATURES_AT as u64 + 7;
pub(super) const READABLE_BITS: u8 = 0b1011;

/// A reference to another image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    /// As in the header, possibly relative to the image.
    path: PathBuf,
    pub(super) format: Option<String>,
}

impl Backing {
    /// Its path, seen from the image at `from`.
    pub(super) fn path_from(&self, from: &Path) -> PathBuf {
        match from.parent() {
            Some(folder) => folder.join(&self.path),
            None => self.path.clone(),
        }
    }
}

/// The checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) backing: Option<Backing>,
    /// Why the image can only be read.
    pub(super) only_readable: Option<Qcow2Error>,
    /// Its compressed clusters are compressed with zstd.
    pub(super) is_zstd: bool,
    /// Where the L1 table is.
    pub(super) l1: Range<u64>,
    /// Where the table of the blocks of reference counts is.
    refcounts: Range<u64>,
    /// Bits of each count.
    refcount_bits: u64,
    /// Number of internal snapshots.
    snapshots: u32,
    pub(super) cluster_bytes: u64,
    /// Bytes of the disk that one L2 table describes.
    pub(super) l2_covers: u64,
    /// Memory that the reader may use for the tables of this image.
    pub(super) memory_bytes: u64,
}

impl Header {
    /// Reads the header of an image, and checks what only a `writable` one needs.
    pub(super) fn read(
        file: &File,
        file_bytes: u64,
        writable: bool,
    ) -> io::Result<Result<Self, Qcow2Error>> {
        let mut front = vec![0; V3_BYTES];
        read_up_to(file, &mut front, 0)?;
        let cluster_bits = be_u32(&front, 20);
        if (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
            // The header and its extensions are in the first cluster. What the file lacks of it reads as zeros.
            front.resize(1 << cluster_bits, 0);
            read_up_to(file, &mut front, 0)?;
        }
        let header = match Self::parse(&front, file_bytes) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        if !writable {
            return Ok(Ok(header));
        }
        if let Some(reason) = header.only_readable {
            return Ok(Err(reason));
        }
        if header.snapshots != 0 {
            return Ok(Err(Qcow2Error::Snapshots(header.snapshots)));
        }
        let range = &header.refcounts;
        let mut table = vec![0; (range.end - range.start) as usize];
        read_up_to(file, &mut table, range.start)?;
        if let Err(error) = check_refcounts(&table, header.cluster_bytes, file_bytes) {
            return Ok(Err(error));
        }
        let uncounted = header.uncounted(file, &table)?;
        Ok(match uncounted {
            Some(offset) => Err(Qcow2Error::Uncounted { offset }),
            None => Ok(header),
        })
    }

    /// The first cluster of the header or of a table that is not counted as used. It would be taken for free space and
    /// overwritten.
    fn uncounted(&self, file: &File, table: &[u8]) -> io::Result<Option<u64>> {
        let cluster = self.cluster_bytes;
        let per_block = cluster * 8 / self.refcount_bits;
        for range in [0..cluster, self.l1.clone(), self.refcounts.clone()] {
            for number in range.start / cluster..range.end.div_ceil(cluster) {
                let entry = (number / per_block) as usize * ENTRY_BYTES as usize;
                let block = match table.get(entry..entry + ENTRY_BYTES as usize) {
                    Some(entry) => be_u64(entry, 0),
                    None => 0,
                };
                let bit = number % per_block * self.refcount_bits;
                let mut count = [0; size_of::<u64>()];
                let count = &mut count[..self.refcount_bits.div_ceil(8) as usize];
                read_up_to(file, count, block + bit / 8)?;
                if self.refcount_bits < 8 {
                    // Several counts in a byte, the first one at its low end.
                    count[0] &= ((1 << self.refcount_bits) - 1) << (bit % 8);
                }
                if block == 0 || count.iter().all(|byte| *byte == 0) {
                    return Ok(Some(number * cluster));
                }
            }
        }
        Ok(None)
    }

    /// Checks the header in the first cluster of the image. `front` has at least [`V3_BYTES`].
    pub(super) fn parse(front: &[u8], file_bytes: u64) -> Result<Self, Qcow2Error> {
        let version = be_u32(front, 4);
        if !matches!(version, 2 | 3) {
            return Err(Qcow2Error::Version(version));
        }
        let cluster_bits = field(front, 20, "cluster_bits", |bits| {
            (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits)
        })?;
        let cluster = 1_u64 << cluster_bits;
        if be_u32(front, 32) != 0 {
            return Err(Qcow2Error::Encrypted);
        }
        let mut header_bytes = V2_BYTES;
        let mut refcount_order = V2_REFCOUNT_ORDER;
        let mut features = 0;
        if version == 3 {
            features = be_u64(front, FEATURES_AT);
            refcount_order = field(front, 96, "refcount_order", |order| {
                order <= REFCOUNT_ORDER_MAX
            })?;
            header_bytes = field(front, 100, "header_length", |bytes| {
                bytes as usize >= V3_BYTES && u64::from(bytes) <= cluster
            })? as usize;
        }
        let only_readable = incompatible(features)?;
        let is_zstd = features & (1 << COMPRESSION_BIT) != 0;
        if is_zstd {
            let is_stated = header_bytes > COMPRESSION_AT;
            let kind = front.get(COMPRESSION_AT).filter(|_| is_stated);
            let kind = kind.copied().unwrap_or_default();
            if kind != ZSTD {
                return Err(damaged("compression_type", kind.into()));
            }
        }
        let size = be_u64(front, 24);
        if !size.is_multiple_of(SECTOR_BYTES) {
            return Err(damaged("size", size));
        }
        let l1_entries = be_u32(front, 36);
        let l1 = Table {
            name: "the L1 table",
            field: "l1_table_offset",
            offset: be_u64(front, 40),
            bytes: u64::from(l1_entries) * ENTRY_BYTES,
            max: L1_BYTES_MAX,
        };
        l1.check(cluster, file_bytes)?;
        // Less than 2^40.
        let l2_covers = (cluster / ENTRY_BYTES) << cluster_bits;
        if size.div_ceil(l2_covers) > u64::from(l1_entries) {
            return Err(Qcow2Error::L1TooShort {
                entries: l1_entries,
                size,
            });
        }
        let refcounts = Table {
            name: "the refcount table",
            field: "refcount_table_offset",
            offset: be_u64(front, 48),
            bytes: u64::from(be_u32(front, 56)) << cluster_bits,
            max: REFCOUNT_TABLE_BYTES_MAX,
        };
        refcounts.check(cluster, file_bytes)?;
        let backing_name = backing_name(front)?;
        let extensions_end = match version {
            2 if backing_name.is_some() => be_u64(front, 8) as usize,
            _ => front.len(),
        };
        let format = backing_format(front, header_bytes, extensions_end, version)?;
        Ok(Self {
            backing: backing_name.map(|path| Backing { path, format }),
            only_readable,
            is_zstd,
            l1: l1.range(),
            refcounts: refcounts.range(),
            refcount_bits: 1 << refcount_order,
            snapshots: be_u32(front, 60),
            cluster_bytes: cluster,
            l2_covers,
            // The L1 table is kept twice.
            memory_bytes: 2 * l1.bytes + refcounts.bytes + CACHED_CLUSTERS * cluster,
        })
    }
}

/// A table whose size and place the header states.
struct Table {
    name: &'static str,
    field: &'static str,
    offset: u64,
    bytes: u64,
    max: u64,
}

impl Table {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }

    fn check(&self, cluster: u64, file_bytes: u64) -> Result<(), Qcow2Error> {
        if self.bytes > self.max {
            return Err(Qcow2Error::TableTooLarge {
                table: self.name,
                bytes: self.bytes,
                max: self.max,
            });
        }
        // The header is at 0.
        if self.offset == 0 || !self.offset.is_multiple_of(cluster) {
            return Err(damaged(self.field, self.offset));
        }
        let end = self.offset.saturating_add(self.bytes);
        if end > file_bytes.next_multiple_of(cluster) {
            return Err(Qcow2Error::Truncated {
                table: self.name,
                end,
                file_bytes,
            });
        }
        Ok(())
    }
}

/// Checks the table of the blocks of reference counts. The search for a free cluster reads one block after the other: a
/// small file whose entries all name the same full block would make it last for hours.
fn check_refcounts(table: &[u8], cluster: u64, file_bytes: u64) -> Result<(), Qcow2Error> {
    let end = file_bytes.next_multiple_of(cluster);
    let mut blocks: Vec<u64> = (0..table.len())
        .step_by(ENTRY_BYTES as usize)
        .map(|at| be_u64(table, at))
        .filter(|entry| *entry != 0)
        .collect();
    blocks.sort_unstable();
    for (at, block) in blocks.iter().enumerate() {
        let is_repeated = at > 0 && blocks[at - 1] == *block;
        if is_repeated || !block.is_multiple_of(cluster) || *block >= end {
            return Err(Qcow2Error::Refcounts { entry: *block });
        }
    }
    Ok(())
}

fn damaged(field: &'static str, value: u64) -> Qcow2Error {
    Qcow2Error::Field { field, value }
}

fn field(
    front: &[u8],
    at: usize,
    name: &'static str,
    is_valid: impl FnOnce(u32) -> bool,
) -> Result<u32, Qcow2Error> {
    let value = be_u32(front, at);
    match is_valid(value) {
        true => Ok(value),
        false => Err(damaged(name, u64::from(value))),
    }
}

/// Checks the incompatible features; returns what forbids writing.
fn incompatible(bits: u64) -> Result<Option<Qcow2Error>, Qcow2Error> {
    let first = |features: &[(u32, Qcow2Error)]| {
        let mut features = features.iter().filter(|(bit, _)| bits & (1 << bit) != 0);
        features.next().map(|(_, error)| *error)
    };
    if let Some(error) = first(&FEATURES) {
        return Err(error);
    }
    match bits & !u64::from(READABLE_BITS) {
        0 => Ok(first(&READABLE_FEATURES)),
        bits => Err(Qcow2Error::UnknownFeature(bits.trailing_zeros())),
    }
}

fn backing_name(front: &[u8]) -> Result<Option<PathBuf>, Qcow2Error> {
    let offset = be_u64(front, 8);
    if offset == 0 {
        return Ok(None);
    }
    let bytes = field(front, 16, "backing_file_size", |bytes| {
        (1..=BACKING_NAME_BYTES_MAX).contains(&bytes)
    })?;
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = front.get(start..start.saturating_add(bytes as usize));
    let name = name.ok_or(damaged("backing_file_offset", offset))?;
    Ok(Some(std::ffi::OsString::from_vec(name.to_vec()).into()))
}

/// Checks the extensions and returns the format of the backing file.
fn backing_format(
    front: &[u8],
    mut at: usize,
    end: usize,
    version: u32,
) -> Result<Option<String>, Qcow2Error> {
    let mut format = None;
    loop {
        let Some(header) = front.get(at..at + 8) else {
            return Err(Qcow2Error::Extensions);
        };
        // Version 2 has extensions only if they fit in front of the name.
        if version == 2 && at + 8 > end {
            return Ok(format);
        }
        let bytes = be_u32(header, 4) as usize;
        let data = front
            .get(at + 8..at + 8 + bytes)
            .ok_or(Qcow2Error::Extensions)?;
        match be_u32(header, 0) {
            EXTENSION_END => return Ok(format),
            EXTENSION_BACKING_FORMAT => {
                let text = std::str::from_utf8(data).map_err(|_| Qcow2Error::Extensions)?;
                format = Some(text.to_owned());
            }
            EXTENSION_FEATURE_NAMES if !bytes.is_multiple_of(FEATURE_NAME_BYTES) => {
                return Err(Qcow2Error::Extensions);
            }
            _ => {}
        }
        at += 8 + bytes.next_multiple_of(8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 1 << 16;

    /// A header of version 3 for a disk of 1 GiB, with these extensions.
    fn front(extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut front = vec![0; CLUSTER];
        let mut put = |at: usize, bytes: &[u8]| front[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb");
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &(3 * CLUSTER as u64).to_be_bytes());
        put(48, &(CLUSTER as u64).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        let mut at = 104;
        for (kind, data) in extensions {
            put(at, &kind.to_be_bytes());
            put(at + 4, &(data.len() as u32).to_be_bytes());
            put(at + 8, data);
            at += 8 + data.len().next_multiple_of(8);
        }
        front
    }

    fn parse(front: &[u8]) -> Result<Header, Qcow2Error> {
        Header::parse(front, 4 * CLUSTER as u64)
    }

    fn with(at: usize, bytes: &[u8]) -> Result<Header, Qcow2Error> {
        let mut front = front(&[]);
        front[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&front)
    }

    #[test]
    fn sound_header_is_accepted_with_the_memory_it_costs() {
        let header = parse(&front(&[])).unwrap();
        assert_eq!(header.backing, None);
        assert_eq!(header.memory_bytes, 32 + CLUSTER as u64 * 161);
    }

    #[test]
    fn backing_file_is_found_beside_the_image() {
        let mut front = front(&[
            (EXTENSION_FEATURE_NAMES, &[0; 96]),
            (EXTENSION_BACKING_FORMAT, b"qcow2"),
        ]);
        front[8..16].copy_from_slice(&4096_u64.to_be_bytes());
        front[16..20].copy_from_slice(&8_u32.to_be_bytes());
        front[4096..4104].copy_from_slice(b"base.img");
        let backing = parse(&front).unwrap().backing.unwrap();
        assert_eq!(backing.format.as_deref(), Some("qcow2"));
        let path = |from: &str| backing.path_from(Path::new(from));
        assert_eq!(path("/images/top.img"), Path::new("/images/base.img"));
        assert_eq!(path("top.img"), Path::new("base.img"));
    }

    #[test]
    fn damaged_fields_are_named() {
        for (at, bytes, expected) in [
            (4, &4_u32.to_be_bytes()[..], "version 4"),
            (20, &8_u32.to_be_bytes(), "cluster_bits is 8"),
            (20, &22_u32.to_be_bytes(), "cluster_bits is 22"),
            (24, &513_u64.to_be_bytes(), "size is 513"),
            (24, &(1_u64 << 40).to_be_bytes(), "too short"),
            (24, &(u64::MAX - 511).to_be_bytes(), "too short"),
            (32, &1_u32.to_be_bytes(), "encrypted"),
            (36, &u32::MAX.to_be_bytes(), "larger than supported"),
            (36, &0x40_0000_u32.to_be_bytes(), "beyond the end"),
            (40, &17_u64.to_be_bytes(), "l1_table_offset is 17"),
            (40, &(1_u64 << 60).to_be_bytes(), "beyond the end"),
            (40, &(!0xffff_u64).to_be_bytes(), "beyond the end"),
            (40, &[0; 8], "l1_table_offset is 0"),
            (48, &17_u64.to_be_bytes(), "refcount_table_offset is 17"),
            (48, &[0; 8], "refcount_table_offset is 0"),
            (56, &129_u32.to_be_bytes(), "larger than supported"),
            (72, &4_u64.to_be_bytes(), "external data file"),
            // The header is too short for the type.
            (72, &8_u64.to_be_bytes(), "compression_type is 0"),
            (72, &16_u64.to_be_bytes(), "extended L2"),
            (72, &(1_u64 << 63).to_be_bytes(), "feature 63"),
            (96, &7_u32.to_be_bytes(), "refcount_order is 7"),
            (100, &103_u32.to_be_bytes(), "header_length is 103"),
            (100, &0x10001_u32.to_be_bytes(), "header_length is 65537"),
            (104, &[0xff; 8], "extensions"),
            (8, &4096_u64.to_be_bytes(), "backing_file_size is 0"),
        ] {
            let error = with(at, bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{at}: {error}");
        }
        let odd = parse(&front(&[(EXTENSION_FEATURE_NAMES, &[0; 49])]));
        assert_eq!(odd, Err(Qcow2Error::Extensions));
    }

    #[test]
    fn image_that_may_not_be_written_can_be_read() {
        for (bits, reason) in [(1_u64, "dirty bit"), (2, "corrupt"), (3, "dirty bit")] {
            let header = with(72, &bits.to_be_bytes()).unwrap();
            let told = header.only_readable.unwrap().to_string();
            assert!(told.contains(reason), "{told}");
            assert!(!header.is_zstd);
        }
        let typed = |kind| {
            let mut front = front(&[]);
            front[79] = 8;
            front[100..104].copy_from_slice(&112_u32.to_be_bytes());
            front[104..112].copy_from_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
            parse(&front)
        };
        let header = typed(ZSTD).unwrap();
        assert!(header.is_zstd);
        assert_eq!(header.only_readable, Some(Qcow2Error::Compression));
        let unknown = typed(2).unwrap_err().to_string();
        assert!(unknown.contains("compression_type is 2"), "{unknown}");
    }

    #[test]
    fn blocks_of_reference_counts_are_apart_and_in_the_file() {
        let cluster = CLUSTER as u64;
        let check = |entries: &[u64]| {
            let table: Vec<u8> = entries.iter().flat_map(|it| it.to_be_bytes()).collect();
            check_refcounts(&table, cluster, 3 * cluster + 1)
        };
        // The file's last cluster may be incomplete.
        assert_eq!(check(&[cluster, 0, 3 * cluster, 0, 2 * cluster]), Ok(()));
        for entry in [cluster, 2 * cluster + 512, 4 * cluster, u64::MAX] {
            let expected = Err(Qcow2Error::Refcounts { entry });
            assert_eq!(check(&[cluster, 0, entry]), expected);
        }
    }

    /// The search for free clusters would never end, or take the header for free space.
    #[test]
    fn header_and_tables_that_are_not_counted_are_rejected() {
        const CLUSTER: u64 = 512;
        let read = |bytes: &[u8], writable| {
            let mut file = tempfile::tempfile().unwrap();
            std::io::Write::write_all(&mut file, bytes).unwrap();
            Header::read(&file, bytes.len() as u64, writable).unwrap()
        };
        for refcount_order in 0..=REFCOUNT_ORDER_MAX {
            let image = crate::testing::qcow2::Qcow2 {
                version: 3,
                cluster_bits: 9,
                refcount_order,
                disk_bytes: 64 << 10,
                backing: None,
                clusters: &[],
            };
            let sound = image.file();
            let header = read(&sound, true).expect("it is sound");
            // The first entry of the table, and the count of each cluster.
            let mut without_block = sound.clone();
            without_block[CLUSTER as usize..][..8].fill(0);
            assert_eq!(
                read(&without_block, true),
                Err(Qcow2Error::Uncounted { offset: 0 })
            );
            assert_eq!(read(&without_block, false), Ok(header.clone()));
            for cluster in [0, 1, header.l1.start / CLUSTER] {
                let mut damaged = sound.clone();
                let bit = cluster << refcount_order;
                let byte = match refcount_order {
                    0..3 => bit / 8,
                    _ => ((cluster + 1) << refcount_order) / 8 - 1,
                };
                damaged[(2 * CLUSTER + byte) as usize] ^= 1 << (bit % 8);
                let offset = cluster * CLUSTER;
                assert_eq!(
                    read(&damaged, true),
                    Err(Qcow2Error::Uncounted { offset }),
                    "{refcount_order}"
                );
            }
        }
    }

    #[test]
    fn no_header_makes_the_parser_panic() {
        use proptest::prelude::*;
        let sound = front(&[(EXTENSION_BACKING_FORMAT, b"raw")]);
        proptest!(|(changes in proptest::collection::vec((0..200_usize, any::<u8>()), 0..16),
                    file_bytes in any::<u64>())| {
            let mut front = sound.clone();
            for (at, byte) in changes {
                front[at] = byte;
            }
            if let Ok(header) = Header::parse(&front, file_bytes / 2) {
                prop_assert!(header.memory_bytes < 512 << 20);
            }
        });
    }
}
