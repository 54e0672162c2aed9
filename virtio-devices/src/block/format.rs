//! Recognises disk image formats by their signatures.
//!
//! Serving a qcow2 file as a raw disk would show the guest the container instead of its contents, so the format is
//! detected unless it is configured. The reverse danger is a guest that writes a signature into a raw image, so that the
//! next start misreads it. Therefore signatures cannot be written to an image with a detected format.

use std::fmt;

/// Number of bytes at each end of the file that [`detect`] checks; one sector.
pub(super) const HEADER_BYTES: usize = 512;

/// The format of an image file, according to its signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// No known signature: the file is the disk.
    Raw,
    /// QEMU copy-on-write, any version.
    Qcow2,
    /// Virtual PC, dynamic or fixed.
    Vhd,
    /// Hyper-V.
    Vhdx,
    /// VMware, sparse extent or descriptor file.
    Vmdk,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        })
    }
}

/// Detects the format from the first [`HEADER_BYTES`] and the last sector of the file (both may be shorter for a short
/// file).
pub(super) fn detect(header: &[u8], footer: &[u8]) -> ImageFormat {
    /// Signatures at offset 0.
    const FRONT: [(&[u8], ImageFormat); 5] = [
        (b"QFI\xfb", ImageFormat::Qcow2),
        (b"conectix", ImageFormat::Vhd),
        (b"vhdxfile", ImageFormat::Vhdx),
        (b"KDMV", ImageFormat::Vmdk),
        (b"# Disk DescriptorFile", ImageFormat::Vmdk),
    ];
    for (magic, format) in FRONT {
        if header.starts_with(magic) {
            return format;
        }
    }
    // A fixed VHD is a raw disk followed by a footer sector.
    if footer.starts_with(b"conectix") {
        return ImageFormat::Vhd;
    }
    ImageFormat::Raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detect_known_signatures_names_format() {
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03", b""), ImageFormat::Qcow2);
        assert_eq!(detect(b"vhdxfile", b""), ImageFormat::Vhdx);
        assert_eq!(detect(b"KDMV\x01", b""), ImageFormat::Vmdk);
        assert_eq!(detect(&[0; 512], b"conectix\0"), ImageFormat::Vhd);
    }

    #[test]
    fn detect_anything_else_is_raw() {
        assert_eq!(detect(b"", b""), ImageFormat::Raw);
        assert_eq!(detect(&[0xeb; 512], &[0; 512]), ImageFormat::Raw);
        assert_eq!(detect(b"QFI", b"conecti"), ImageFormat::Raw);
    }
}
