//! Loads arbitrary kernel and initramfs files: any bytes, or valid headers with changes (fuzz target `boot`).

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;

use api::config::{MemoryConfig, PayloadConfig};
use machine::boot::PayloadFiles;
use machine::memory::GuestMemory;
use vm_memory::GuestAddress;

/// Maximum number of changes to sound headers.
const EDITS_MAX: u8 = 16;
/// Bytes of a sound file beyond its headers.
const BODY_BYTES: usize = 256;
const LOAD_ADDRESS: u64 = 0x10_0000;

/// A file of 64-bit ELF with a segment to load and the note that names the entry point.
fn elf() -> Vec<u8> {
    const SEGMENTS: u64 = 64;
    const NOTE: u64 = SEGMENTS + 2 * 56;
    const NOTE_BYTES: u64 = 24;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for x86-64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [LOAD_ADDRESS, SEGMENTS, 0] {
        file.extend(field.to_le_bytes());
    }
    // Flags; sizes of this header and of a segment's; two segments, no sections.
    for field in [0, 0, 64, 56, 2, 64, 0, 0_u16] {
        file.extend(field.to_le_bytes());
    }
    for (kind, offset, address, bytes) in [
        (1_u32, NOTE + NOTE_BYTES, LOAD_ADDRESS, BODY_BYTES as u64),
        (4, NOTE, 0, NOTE_BYTES),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(5_u32.to_le_bytes());
        for field in [offset, address, address, bytes, bytes, 0x1000] {
            file.extend(field.to_le_bytes());
        }
    }
    // The owner has 4 bytes, the address 8; the note is of type 18.
    for field in [4, 8, 18_u32] {
        file.extend(field.to_le_bytes());
    }
    file.extend(*b"Xen\0");
    file.extend(LOAD_ADDRESS.to_le_bytes());
    file.resize(file.len() + BODY_BYTES, 0x90);
    file
}

/// A bzImage of boot protocol 2.12 with one sector of set-up code.
fn bz_image() -> Vec<u8> {
    const SECTOR: usize = 512;
    let mut file = vec![0; 2 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &[0x0c, 2]);
    // Loaded high, with an entry point for 64 bits.
    put(0x211, &[1]);
    put(0x214, &(LOAD_ADDRESS as u32).to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1]);
    put(0x258, &LOAD_ADDRESS.to_le_bytes());
    put(0x260, &0x1000_u32.to_le_bytes());
    file.resize(file.len() + BODY_BYTES, 0x90);
    file
}

/// The kernel's file: the bytes themselves, or sound headers that they change.
fn kernel(choice: u8, bytes: &[u8]) -> Vec<u8> {
    let mut file = match choice % 4 {
        0 => return bytes.to_vec(),
        1 | 2 => elf(),
        _ => bz_image(),
    };
    for edit in bytes.chunks_exact(4).take(EDITS_MAX.into()) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % file.len();
        file[at] = edit[2];
        // Often a whole field is to become small or large.
        let fill = usize::from(edit[3] % 8).min(file.len() - at);
        file[at..at + fill].fill(edit[2]);
    }
    file
}

/// A file with these bytes, and its path.
fn file(file: &mut Option<File>, bytes: &[u8]) -> std::path::PathBuf {
    let file = file.get_or_insert_with(|| tempfile::tempfile().expect("files can be made"));
    file.set_len(0).expect("files can be emptied");
    file.rewind().expect("files have a position");
    file.write_all(bytes).expect("the file system has room");
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Loads the files; returns whether a guest could boot from them.
#[must_use]
pub fn run(bytes: &[u8]) -> bool {
    thread_local! {
        static MEMORY: GuestMemory = {
            let config = MemoryConfig {
                size: 64 << 20,
                ..MemoryConfig::default()
            };
            GuestMemory::new(&config, 46).expect("guest RAM")
        };
        static FILES: std::cell::RefCell<[Option<File>; 2]> = const { std::cell::RefCell::new([None, None]) };
    }
    // The last bytes are the initramfs; its length is in the first byte, which also chooses the kernel.
    let (choice, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let length = choice >> 2;
    let at = rest.len().saturating_sub(usize::from(length));
    let (changes, initramfs) = rest.split_at(at);
    let kernel = kernel(*choice, changes);
    FILES.with_borrow_mut(|files| {
        let config = PayloadConfig {
            kernel: Some(file(&mut files[0], &kernel)),
            initramfs: (length > 0).then(|| file(&mut files[1], initramfs)),
            cmdline: Some("console=ttyS0".into()),
            ..PayloadConfig::default()
        };
        MEMORY.with(|memory| {
            let loaded = PayloadFiles::open(&config).and_then(|files| files.load(memory));
            let written = loaded
                .and_then(|payload| payload.write_boot_data(memory, None, GuestAddress(0xf0000)));
            written.is_ok()
        })
    })
}
