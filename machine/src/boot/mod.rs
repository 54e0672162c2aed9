//! Booting: a payload becomes guest memory content and an entry point.
//!
//! ```text
//!   PayloadConfig ─► PayloadFiles::open   kernel or firmware, initramfs
//!                       └─► load          into guest RAM              (slow: file content)
//!                             └─► Payload::write_boot_data ─► EntryPoint  (fast: tables)
//! ```
//!
//! There are two protocols: PVH for ELF images (Linux `vmlinux`, firmware), and the 32-bit Linux boot protocol for
//! bzImages. Both enter in protected mode without paging. Loading accesses only guest RAM, so it can run on a separate
//! thread while devices are created.

mod bzimage;
mod elf;
mod gdt;
mod image;
mod loaded;
mod payload;
mod pvh;
mod smbios;
mod zero_page;

use std::io;
use std::path::PathBuf;

pub use gdt::{BOOT_GDT, BootSegment, CODE_SEGMENT, DATA_SEGMENT, TASK_SEGMENT};
pub use payload::{Payload, PayloadFiles};
pub use smbios::{SmbiosError, check_platform};

/// The boot protocol of the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// Xen's PVH: start info in RBX.
    Pvh,
    /// Linux's 32-bit protocol: zero page in RSI.
    Linux32,
}

/// The boot vCPU's entry point, and its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryPoint {
    /// The initial registers.
    pub protocol: BootProtocol,
    /// Guest physical address of the first instruction.
    pub address: u64,
}

/// Reasons why the payload cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither a kernel nor firmware is configured.
    #[error("No kernel or firmware is given")]
    MissingPayload,
    /// Both a kernel and firmware are configured.
    #[error("Both a kernel and a firmware are given")]
    KernelAndFirmware,
    /// A payload file cannot be opened.
    #[error("Cannot open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A payload file is not a regular file (a directory, a pipe).
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// A payload file cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A payload file is shorter than its headers announce.
    #[error("{} is truncated: {found_bytes} bytes of at least {needed_bytes}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The size in its headers.
        needed_bytes: u64,
        /// The actual size.
        found_bytes: u64,
    },
    /// Neither ELF nor bzImage.
    #[error("{} is neither a 64-bit ELF image nor a bzImage", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// An ELF image without the note for the 32-bit entry point.
    #[error("{} has no PVH header (ELF note XEN_ELFNOTE_PHYS32_ENTRY): is the kernel built with CONFIG_PVH?", path.display())]
    KernelMissingPvhHeader {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage that is older than protocol 2.10, or that does not load high.
    #[error("Unsupported Linux boot protocol {version:#06x} in {}", path.display())]
    BzImageProtocol {
        /// The file.
        path: PathBuf,
        /// Protocol version from the setup header.
        version: u16,
    },
    /// Another defect of the image.
    #[error("Cannot load {}", path.display())]
    Load {
        path: PathBuf,
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A part of the image would be outside RAM or over the boot structures.
    #[error("{} needs guest RAM at {start:#x}..{end:#x}; usable are {ram_start:#x}..{ram_end:#x}", path.display())]
    OutsideRam {
        /// The file.
        path: PathBuf,
        /// First address needed.
        start: u64,
        /// First address after the part.
        end: u64,
        /// First usable address.
        ram_start: u64,
        /// First address after low RAM.
        ram_end: u64,
    },
    /// The initramfs does not fit between kernel and the end of low RAM.
    #[error("The initramfs {} has {bytes} bytes, but only {room_bytes} bytes are available", path.display())]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The space left above the kernel.
        room_bytes: u64,
    },
    /// The command line is too long.
    #[error("The kernel command line has {bytes} bytes, the limit is {max_bytes}")]
    CmdlineTooLong {
        /// Its length with the final zero.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The command line contains a zero byte.
    #[error("The kernel command line contains a zero byte")]
    CmdlineZeroByte,
    /// SMBIOS cannot represent a setting.
    #[error("Cannot create the SMBIOS tables")]
    Smbios(#[source] SmbiosError),
    /// A boot structure cannot be written, because RAM is smaller than the layout requires.
    #[error("Cannot write {what} to guest RAM")]
    Write {
        /// The structure.
        what: &'static str,
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}
