//! Writes the "newc" cpio format that the kernel unpacks as initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The contents must not depend on the machine: owner and time are 0, and device nodes are written without root
//! privileges.

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive being written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// A directory with mode 755.
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, S_IFDIR | 0o755, &[], (0, 0));
    }

    /// A regular file with its permissions.
    pub(crate) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.entry(name, S_IFREG | mode, contents, (0, 0));
    }

    /// A symbolic link.
    pub(crate) fn symlink(&mut self, name: &str, target: &str) {
        self.entry(name, S_IFLNK | 0o777, target.as_bytes(), (0, 0));
    }

    /// A character device.
    pub(crate) fn character_device(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.entry(name, S_IFCHR | mode, &[], device);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8], device: (u32, u32)) {
        let size = u32::try_from(contents.len()).expect("a file of an initramfs is below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a name is short");
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device ×2, node device ×2, name size, checksum
        let fields = [
            self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    /// Header plus name, and contents, each end on a multiple of four.
    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/console", 0o600, (5, 1));
        archive.file("init", 0o755, b"hello");
        archive.symlink("bin/sh", "busybox");
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 5);
        assert!(text.contains("TRAILER!!!"));
        // The second header starts right after the padded first one: 110 + "dev\0" = 114 → 116.
        assert_eq!(&bytes[116..122], b"070701");
    }

    #[test]
    fn archive_header_carries_mode_size_and_device() {
        let mut archive = Archive::default();
        archive.character_device("c", 0o600, (5, 1));
        archive.file("f", 0o755, b"hello");
        let bytes = archive.finish();
        let field = |at: usize, index: usize| {
            let start = at + 6 + index * 8;
            u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
        };
        assert_eq!(field(0, 1), S_IFCHR | 0o600);
        assert_eq!((field(0, 9), field(0, 10)), (5, 1));
        // 110 + "c\0" = 112, no contents.
        assert_eq!(field(112, 1), S_IFREG | 0o755);
        assert_eq!(field(112, 6), 5);
    }
}
