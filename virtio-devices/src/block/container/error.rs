//! Reasons why an image that is not raw is rejected.

use std::io;
use std::path::PathBuf;

use crate::block::format::ImageFormat;

/// Reasons why an image in another format than raw is rejected.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The signature is another one than that of the configured format.
    #[error("the file is not a {0} image")]
    OtherFormat(ImageFormat),
    /// The format is known, but cannot be read.
    #[error("{0} images are not supported; convert it with \"qemu-img convert -O qcow2\"")]
    Unsupported(ImageFormat),
    /// A block device, for example.
    #[error("only regular files can be images of this format")]
    NotAFile,
    /// The qcow2 header is rejected.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
    /// The VHD footer is rejected.
    #[error(transparent)]
    Vhd(#[from] VhdError),
    /// The VMDK is rejected.
    #[error(transparent)]
    Vmdk(#[from] VmdkError),
    /// The image refers to another one.
    #[error("the image refers to {}; to allow that, set backing_files=on", .0.display())]
    BackingNotAllowed(PathBuf),
    /// Guessing the format would let the guest of a raw backing file choose it.
    #[error(
        "the image does not state the format of its backing file {}; set it with \"qemu-img rebase -u -F FORMAT\"",
        .0.display()
    )]
    BackingFormatMissing(PathBuf),
    /// A backing file that is neither raw nor qcow2.
    #[error("the backing file {} has the format {format:?}; only raw and qcow2 are supported", path.display())]
    BackingFormat {
        /// The backing file.
        path: PathBuf,
        /// Its format, as the image states it.
        format: String,
    },
    /// Too many backing files, or a circle.
    #[error("more than {max} images refer to one another")]
    ChainTooLong {
        /// The limit.
        max: usize,
    },
    /// Clusters are too large for so many files.
    #[error("the tables of this image and those that refer to it need more than {max_mib} MiB")]
    Memory {
        /// The limit in MiB.
        max_mib: u64,
    },
    /// imago rejected the image.
    #[error("the image cannot be used")]
    Imago(#[source] io::Error),
}

/// Reasons why a qcow2 image is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Error {
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0} is not supported (only 2 and 3 are)")]
    Version(u32),
    /// Encrypted.
    #[error("encrypted qcow2 images are not supported")]
    Encrypted,
    /// Not closed cleanly.
    #[error(
        "the image was not closed cleanly (dirty bit) and can only be read; repair it with \"qemu-img check -r all\", or set readonly=on"
    )]
    Dirty,
    /// Known to be damaged.
    #[error(
        "the image is marked as corrupt and can only be read; repair it with \"qemu-img check -r all\", or set readonly=on"
    )]
    Corrupt,
    /// Compressed by another method than zlib.
    #[error(
        "the image has clusters compressed with zstd and can only be read; use it as a backing file, set readonly=on, or convert it with \"qemu-img convert -O qcow2\""
    )]
    Compression,
    /// Another incompatible feature.
    #[error(
        "the image uses {0}, which is not supported; convert it with \"qemu-img convert -O qcow2\""
    )]
    Feature(&'static str),
    /// An incompatible feature without a name.
    #[error("the image has the unknown incompatible feature {0}")]
    UnknownFeature(u32),
    /// A field has an impossible value.
    #[error("the header is damaged: {field} is {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A table is larger than supported.
    #[error("{table} of {bytes} bytes is larger than supported ({max} bytes)")]
    TableTooLarge {
        /// The table.
        table: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A table is outside the file.
    #[error("{table} ends at byte {end}, beyond the end of the file ({file_bytes} bytes)")]
    Truncated {
        /// The table.
        table: &'static str,
        /// Where it ends.
        end: u64,
        /// The file's size.
        file_bytes: u64,
    },
    /// The table of the blocks of reference counts is damaged.
    #[error(
        "the refcount table is damaged: entry {entry:#x} is unaligned, repeated or beyond the end of the file; repair it with \"qemu-img check -r all\""
    )]
    Refcounts {
        /// The entry.
        entry: u64,
    },
    /// The header or a table is not counted as used.
    #[error(
        "the reference counts take the header or a table at byte {offset:#x} for free space; repair them with \"qemu-img check -r all\""
    )]
    Uncounted {
        /// The cluster that is not counted.
        offset: u64,
    },
    /// Writing an image with internal snapshots is not supported.
    #[error(
        "the image has internal snapshots ({0}) and can only be read (readonly=on); to write it, delete them with \"qemu-img snapshot -d\""
    )]
    Snapshots(u32),
    /// The first table does not cover the disk.
    #[error("an L1 table of {entries} entries is too short for a disk of {size} bytes")]
    L1TooShort {
        /// Number of entries.
        entries: u32,
        /// Size of the disk.
        size: u64,
    },
    /// The extensions of the header are damaged.
    #[error("the header's extensions are damaged")]
    Extensions,
}

/// Reasons why a VHD is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VhdError {
    /// Dynamic or differencing.
    #[error(
        "only fixed VHDs are supported; convert it with \"qemu-img convert -O vpc -o subformat=fixed\""
    )]
    NotFixed,
    /// Checksum or signature are wrong.
    #[error("the footer of the VHD is damaged")]
    Damaged,
    /// The size in the footer is not that of the file.
    #[error("the footer states a disk of {stated} bytes, but the file has room for {actual}")]
    Size {
        /// In the footer.
        stated: u64,
        /// The file without the footer.
        actual: u64,
    },
}

/// Reasons why a VMDK is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmdkError {
    /// Sparse, compressed or on a device.
    #[error(
        "only flat VMDKs are supported (extents of the types FLAT, VMFS and ZERO); convert it with \"qemu-img convert -O qcow2\""
    )]
    NotFlat,
    /// It would be written.
    #[error(
        "VMDKs can only be read; set readonly=on, or convert it with \"qemu-img convert -O qcow2\""
    )]
    Writable,
    /// The difference to another image.
    #[error(
        "the VMDK is a snapshot of another image, which is not supported; convert it with \"qemu-img convert -O qcow2\""
    )]
    Parent,
    /// A file of this size is no descriptor.
    #[error("a VMDK descriptor of {bytes} bytes is larger than supported ({max} bytes)")]
    TooLong {
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Not UTF-8.
    #[error("the VMDK descriptor is not UTF-8 text")]
    NotText,
    /// A line, from 1 on, that has no meaning.
    #[error("line {0} of the VMDK descriptor is damaged")]
    Line(usize),
    /// The descriptor states no version.
    #[error("the VMDK descriptor has no version")]
    NoVersion,
    /// Another version than 1 to 3.
    #[error("VMDK version {0} is not supported (only 1 to 3 are)")]
    Version(u32),
    /// The disk has no part.
    #[error("the VMDK descriptor has no extents")]
    NoExtents,
    /// Too many files.
    #[error("the VMDK has more than {max} extents")]
    TooManyExtents {
        /// The limit.
        max: usize,
    },
    /// A descriptor could name any file of the host.
    #[error("the VMDK extent {0:?} is not a file name; extents must be in the folder of the image")]
    ExtentName(String),
    /// The file does not have the size that the descriptor states.
    #[error(
        "the file is too short for a VMDK extent: it has {actual} bytes, and its descriptor needs {needed}"
    )]
    ExtentTooShort {
        /// Bytes according to the descriptor.
        needed: u64,
        /// Bytes of the file.
        actual: u64,
    },
}
