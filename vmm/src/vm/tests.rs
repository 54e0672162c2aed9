#![allow(clippy::unwrap_used)]

use std::path::Path;

use api::config::{
    ConsoleConfig, ConsoleOutputMode, CpuAffinity, DiskConfig, MemoryZoneConfig, PayloadConfig,
    SerialConfig,
};

use super::build::Parts;
use super::*;

/// A 64-bit ELF header of a kernel that has no segments, so without a PVH note.
fn kernel_without_note(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("vmlinux");
    let mut header = [0_u8; 64];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // ehsize, phentsize (System V ABI, ELF header).
    header[0x34] = 64;
    header[0x36] = 56;
    std::fs::write(&path, header).unwrap();
    path
}

/// The error from opening the parts, as a chain of causes. `/dev/kvm` is not opened.
fn refusal(change: impl FnOnce(&mut VmConfig)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut config = VmConfig {
        payload: Some(PayloadConfig {
            kernel: Some(kernel_without_note(folder.path())),
            ..PayloadConfig::default()
        }),
        ..VmConfig::default()
    };
    config.memory.size = 64 << 20;
    change(&mut config);
    let context = VmContext::new(Arc::new(|_| {}), Arc::new(|_| {})).unwrap();
    match Parts::open(&mut config, &context, None) {
        Ok(_parts) => panic!("{config:?} can be opened"),
        Err(error) => api::error_line(&error),
    }
}

fn console_refusal(mode: ConsoleOutputMode) -> [String; 2] {
    let mut config = VmConfig::default();
    let path = || Some("/nonexistent/x".into());
    config.serial = SerialConfig {
        mode,
        file: path(),
        file_bytes_max: None,
        socket: path(),
    };
    config.console = ConsoleConfig {
        mode,
        file: path(),
        socket: path(),
        ..ConsoleConfig::default()
    };
    let context = VmContext::new(Arc::new(|_| {}), Arc::new(|_| {})).unwrap();
    let serial = consoles::open_serial(&mut config, &context).err().unwrap();
    let console = consoles::open_console(&mut config, &context).err().unwrap();
    [serial, console].map(|error| api::error_line(&error))
}

#[test]
fn path_that_is_not_there_is_named_whatever_the_host_has() {
    let path = Path::new("/nonexistent/x");
    let payload =
        |change: fn(&mut PayloadConfig)| refusal(|config| change(config.payload.as_mut().unwrap()));
    let refusals = [
        payload(|it| it.kernel = Some("/nonexistent/x".into())),
        payload(|it| it.initramfs = Some("/nonexistent/x".into())),
        payload(|it| {
            it.kernel = None;
            it.firmware = Some("/nonexistent/x".into());
        }),
        refusal(|config| {
            config.disks = Some(vec![DiskConfig {
                id: Some("_disk0".to_owned()),
                path: Some(path.to_path_buf()),
                ..DiskConfig::default()
            }]);
        }),
        refusal(|config| config.rng.src = path.to_path_buf()),
        refusal(|config| {
            config.memory.size = 0;
            config.memory.zones = Some(vec![MemoryZoneConfig {
                id: "a".to_owned(),
                size: 64 << 20,
                file: Some(path.to_path_buf()),
                ..MemoryZoneConfig::default()
            }]);
        }),
    ];
    let consoles = [ConsoleOutputMode::File, ConsoleOutputMode::Socket]
        .into_iter()
        .flat_map(console_refusal);
    for refusal in refusals.into_iter().chain(consoles) {
        assert!(refusal.contains("/nonexistent/x"), "{refusal}");
    }
}

#[test]
fn affinity_to_a_cpu_that_no_host_has_is_told_whatever_the_host_has() {
    let refusal = refusal(|config| {
        config.cpus.affinity = Some(vec![CpuAffinity {
            vcpu: 0,
            host_cpus: vec![9999],
        }]);
    });
    assert!(refusal.contains("9999"), "{refusal}");
}

#[test]
fn defect_of_a_kernel_is_told_whatever_the_host_has() {
    let refusal = refusal(|_config| {});
    assert!(refusal.contains("PVH"), "{refusal}");
}
