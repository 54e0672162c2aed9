//! Tests valid and invalid payload files. Needs no KVM.

use std::path::{Path, PathBuf};
use std::process::Command;

use api::config::{MemoryConfig, PayloadConfig};
use machine::boot::{BootError, BootProtocol, EntryPoint, Payload, PayloadFiles};
use machine::memory::GuestMemory;
use machine::memory::layout::{MIB, RSDP_START};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::images::{BZIMAGE_CODE_OFFSET, ELF_CODE_OFFSET, LOAD_ADDRESS, PVH_NOTE, bzimage, elf};

const RAM_BYTES: u64 = 8 * MIB;
const CODE: [u8; 16] = [0xf4; 16];

struct Files {
    directory: TempDir,
}

impl Files {
    fn new() -> Self {
        Self {
            directory: TempDir::new().expect("a temporary directory"),
        }
    }

    fn add(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).expect("a file");
        path
    }
}

fn memory() -> GuestMemory {
    let config = MemoryConfig {
        size: RAM_BYTES,
        ..MemoryConfig::default()
    };
    GuestMemory::new(&config, 46).expect("guest RAM")
}

fn load(config: &PayloadConfig, memory: &GuestMemory) -> Result<Payload, BootError> {
    PayloadFiles::open(config)?.load(memory)
}

fn kernel(path: &Path) -> PayloadConfig {
    PayloadConfig {
        kernel: Some(path.to_path_buf()),
        ..PayloadConfig::default()
    }
}

fn load_error(content: &[u8]) -> BootError {
    let files = Files::new();
    let path = files.add("kernel", content);
    load(&kernel(&path), &memory()).expect_err("a bad kernel")
}

fn read<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory
        .ram()
        .memory()
        .read_slice(&mut bytes, GuestAddress(address))
        .expect("guest RAM");
    bytes
}

#[test]
fn payload_elf_lies_with_its_boot_data_in_ram() {
    let files = Files::new();
    let path = files.add("kernel", &elf(&CODE, LOAD_ADDRESS, PVH_NOTE));
    let initramfs = files.add("initramfs", &[7; 5000]);
    let config = PayloadConfig {
        cmdline: Some("console=ttyS0 -- x".into()),
        initramfs: Some(initramfs),
        ..kernel(&path)
    };
    let memory = memory();
    let payload = load(&config, &memory).unwrap();
    let entry = payload
        .write_boot_data(&memory, None, GuestAddress(RSDP_START))
        .unwrap();
    assert_eq!(
        entry,
        EntryPoint {
            protocol: BootProtocol::Pvh,
            address: LOAD_ADDRESS
        }
    );
    assert_eq!(read::<16>(&memory, LOAD_ADDRESS), CODE);
    assert_eq!(&read::<19>(&memory, 0x2_0000), b"console=ttyS0 -- x\0");
    assert_eq!(read(&memory, 0x6000), 0x336e_c578u32.to_le_bytes());
    assert_eq!(read(&memory, 0x6020), RSDP_START.to_le_bytes());
    // Page-aligned below the end of RAM.
    let start = RAM_BYTES - 8192;
    assert_eq!(read(&memory, 0x6040), start.to_le_bytes());
    assert_eq!(read(&memory, 0x6048), 5000u64.to_le_bytes());
    assert_eq!(read::<5000>(&memory, start), [7; 5000]);
    assert_eq!(read(&memory, 0x40e), 0xa000u16.to_le_bytes());
    assert_eq!(&read::<5>(&memory, 0xf_0000), b"_SM3_");
}

#[test]
fn payload_firmware_goes_through_the_same_loader() {
    let files = Files::new();
    let config = PayloadConfig {
        firmware: Some(files.add("firmware", &elf(&CODE, LOAD_ADDRESS, PVH_NOTE))),
        ..PayloadConfig::default()
    };
    load(&config, &memory()).unwrap();
}

#[test]
fn payload_bzimage_fills_the_zero_page() {
    let files = Files::new();
    let path = files.add("kernel", &bzimage(&CODE, 0x20f));
    let memory = memory();
    let payload = load(&kernel(&path), &memory).unwrap();
    let entry = payload
        .write_boot_data(&memory, None, GuestAddress(RSDP_START))
        .unwrap();
    assert_eq!(entry.protocol, BootProtocol::Linux32);
    assert_eq!(read::<16>(&memory, LOAD_ADDRESS), CODE);
    assert_eq!(&read::<4>(&memory, 0x7202), b"HdrS");
    assert_eq!(read(&memory, 0x7228), 0x2_0000u32.to_le_bytes());
}

#[test]
fn payload_missing_or_double_is_refused() {
    let nothing = PayloadConfig::default();
    assert!(matches!(
        load(&nothing, &memory()),
        Err(BootError::MissingPayload)
    ));
    let both = PayloadConfig {
        kernel: Some("a".into()),
        firmware: Some("b".into()),
        ..nothing
    };
    assert!(matches!(
        load(&both, &memory()),
        Err(BootError::KernelAndFirmware)
    ));
}

#[test]
fn payload_file_that_is_none_is_refused() {
    let error = load(&kernel(Path::new("/nonexistent/vmlinux")), &memory());
    assert!(matches!(error, Err(BootError::Open { .. })));
    let error = load(&kernel(Path::new("/")), &memory());
    assert!(matches!(error, Err(BootError::NotAFile { .. })));
}

#[test]
fn payload_fifo_is_refused_without_waiting_for_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let error = load(&kernel(&fifo), &memory());
    assert!(matches!(error, Err(BootError::NotAFile { .. })));
}

#[test]
fn payload_garbage_is_of_unknown_format() {
    for content in [&b""[..], b"\x7fELF", b"\x7fELF\x01", &[0xff; 4096]] {
        assert!(matches!(
            load_error(content),
            BootError::UnknownFormat { .. }
        ));
    }
}

/// A Linux program may have any load address; that must not be the reported error.
#[test]
fn payload_program_for_linux_has_no_pvh_note() {
    let program = std::env::current_exe().expect("this test");
    let error = load(&kernel(&program), &memory()).expect_err("not a kernel");
    assert!(
        matches!(error, BootError::KernelMissingPvhHeader { .. }),
        "{error}"
    );
}

#[test]
fn payload_elf_without_pvh_note_is_told_so() {
    let error = load_error(&elf(&CODE, LOAD_ADDRESS, PVH_NOTE + 1));
    assert!(matches!(error, BootError::KernelMissingPvhHeader { .. }));
    assert!(error.to_string().contains("PVH"), "{error}");
}

#[test]
fn payload_elf_cut_anywhere_is_truncated_or_unknown() {
    let image = elf(&CODE, LOAD_ADDRESS, PVH_NOTE);
    for length in 5..image.len() {
        assert!(
            matches!(load_error(&image[..length]), BootError::Truncated { .. }),
            "cut at {length}"
        );
    }
    assert!(image.len() > ELF_CODE_OFFSET);
}

#[test]
fn payload_bzimage_cut_in_its_code_is_truncated() {
    let image = bzimage(&CODE, 0x20f);
    for length in [0x206, 0x26b, BZIMAGE_CODE_OFFSET, image.len() - 1] {
        assert!(
            matches!(load_error(&image[..length]), BootError::Truncated { .. }),
            "cut at {length}"
        );
    }
}

#[test]
fn payload_bzimage_of_old_protocol_is_refused() {
    assert!(matches!(
        load_error(&bzimage(&CODE, 0x204)),
        BootError::BzImageProtocol { version: 0x204, .. }
    ));
}

#[test]
fn payload_image_outside_of_ram_is_refused() {
    for address in [0, 0x9_f000, RAM_BYTES - 8, 3 << 30, u64::MAX - 4] {
        assert!(
            matches!(
                load_error(&elf(&CODE, address, PVH_NOTE)),
                BootError::OutsideRam { .. }
            ),
            "at {address:#x}"
        );
    }
}

#[test]
fn payload_bzimage_that_unpacks_beyond_ram_is_refused() {
    let mut image = bzimage(&CODE, 0x20f);
    image[0x260..0x264].copy_from_slice(&(RAM_BYTES as u32).to_le_bytes());
    assert!(matches!(load_error(&image), BootError::OutsideRam { .. }));
}

#[test]
fn payload_initramfs_larger_than_the_room_is_refused() {
    let files = Files::new();
    let path = files.add("kernel", &elf(&CODE, LOAD_ADDRESS, PVH_NOTE));
    let initramfs = files.add("initramfs", b"");
    let load = |bytes| {
        std::fs::File::options()
            .write(true)
            .open(&initramfs)
            .and_then(|file| file.set_len(bytes))
            .expect("a sparse file");
        let config = PayloadConfig {
            initramfs: Some(initramfs.clone()),
            ..kernel(&path)
        };
        load(&config, &memory())
    };
    for bytes in [RAM_BYTES - LOAD_ADDRESS, 1 << 40] {
        assert!(
            matches!(load(bytes), Err(BootError::InitramfsTooLarge { .. })),
            "{bytes} bytes"
        );
    }
    load(RAM_BYTES - LOAD_ADDRESS - 4096).unwrap();
}

#[test]
fn payload_bad_command_line_is_refused() {
    let load = |cmdline: String| {
        let files = Files::new();
        let config = PayloadConfig {
            cmdline: Some(cmdline),
            ..kernel(&files.add("kernel", &elf(&CODE, LOAD_ADDRESS, PVH_NOTE)))
        };
        load(&config, &memory()).map(|_payload| ())
    };
    assert!(load("x".repeat(65535)).is_ok());
    assert!(matches!(
        load("x".repeat(65536)),
        Err(BootError::CmdlineTooLong { bytes: 65537, .. })
    ));
    assert!(matches!(
        load("a\0b".into()),
        Err(BootError::CmdlineZeroByte)
    ));
}
