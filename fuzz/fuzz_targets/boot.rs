//! Arbitrary kernel and initramfs files.
#![no_main]

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;

use api::config::{MemoryConfig, PayloadConfig};
use libfuzzer_sys::fuzz_target;
use machine::boot::PayloadFiles;
use machine::memory::GuestMemory;
use vm_memory::GuestAddress;

/// A file with these bytes, and its path.
fn file(file: &mut Option<File>, bytes: &[u8]) -> std::path::PathBuf {
    let file = file.get_or_insert_with(|| tempfile::tempfile().expect("files can be made"));
    file.set_len(0).expect("files can be emptied");
    file.rewind().expect("files have a position");
    file.write_all(bytes).expect("the file system has room");
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fuzz_target!(|bytes: &[u8]| {
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
    // The last bytes are the initramfs; its length is in the first byte.
    let (length, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let at = rest.len().saturating_sub(usize::from(*length));
    let (kernel, initramfs) = rest.split_at(at);
    FILES.with_borrow_mut(|files| {
        let config = PayloadConfig {
            kernel: Some(file(&mut files[0], kernel)),
            initramfs: (*length > 0).then(|| file(&mut files[1], initramfs)),
            cmdline: Some("console=ttyS0".into()),
            ..PayloadConfig::default()
        };
        MEMORY.with(|memory| {
            let loaded = PayloadFiles::open(&config).and_then(|files| files.load(memory));
            if let Ok(payload) = loaded {
                payload
                    .write_boot_data(memory, None, GuestAddress(0xf0000))
                    .ok();
            }
        });
    });
});
