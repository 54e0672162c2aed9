//! Recognises disk image formats by their signatures.
//!
//! If a qcow2 file were served as a raw disk, the guest would see the container instead of its contents. The format is
//! therefore detected unless it is configured. The reverse danger is a guest that writes a signature into a raw image,
//! so that the next start misreads it. Therefore signatures cannot be written to an image with a detected format.
//!
//! Only the start of the image is examined, because the guest of a raw image may write anything to its end. A fixed VHD
//! has a signature only in its footer, so this format must be configured.

/// Number of bytes at the front of the file that [`detect`] checks, and of a footer; one sector.
pub(super) const HEADER_BYTES: usize = 512;
/// At the front of a dynamic VHD, and of the footer of every VHD.
const VHD_MAGIC: &[u8] = b"conectix";

/// The format of an image file, according to its signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
#[strum(serialize_all = "lowercase")]
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

/// Whether the last sector of the file is the footer of a VHD.
pub(super) fn is_vhd_footer(footer: &[u8]) -> bool {
    footer.starts_with(VHD_MAGIC)
}

/// Detects the format from the first [`HEADER_BYTES`] of the file (fewer for a short file).
pub(super) fn detect(header: &[u8]) -> ImageFormat {
    /// Signatures at offset 0.
    const FRONT: [(&[u8], ImageFormat); 5] = [
        (b"QFI\xfb", ImageFormat::Qcow2),
        (VHD_MAGIC, ImageFormat::Vhd),
        (b"vhdxfile", ImageFormat::Vhdx),
        (b"KDMV", ImageFormat::Vmdk),
        (b"# Disk DescriptorFile", ImageFormat::Vmdk),
    ];
    let mut known = FRONT.into_iter();
    let found = known.find(|(magic, _)| header.starts_with(magic));
    found.map_or(ImageFormat::Raw, |(_, format)| format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detect_known_signatures_names_format() {
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03"), ImageFormat::Qcow2);
        assert_eq!(detect(b"vhdxfile"), ImageFormat::Vhdx);
        assert_eq!(detect(b"KDMV\x01"), ImageFormat::Vmdk);
        assert_eq!(detect(b"conectix\0"), ImageFormat::Vhd);
    }

    #[test]
    fn detect_anything_else_is_raw() {
        assert_eq!(detect(b""), ImageFormat::Raw);
        assert_eq!(detect(&[0xeb; 512]), ImageFormat::Raw);
        assert_eq!(detect(b"QFI"), ImageFormat::Raw);
    }
}
