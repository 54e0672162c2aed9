//! Disks, network devices, assigned devices, shared folders and the vsock device.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use api::VmConfig;
use api::config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VhostMode, VsockConfig,
};

use machine::memory::all_shared;
use virtio_devices::fs::TAG_BYTES_MAX;
use virtio_devices::pmem;
use virtio_devices::worker::HOST_CPUS_MAX;

use super::error::{DeviceFault, ValidationError};

/// Two descriptors make the smallest useful request.
const QUEUE_SIZE_MIN: u16 = 2;
/// The largest ring that the transport supports; virtio itself allows 32768.
const QUEUE_SIZE_MAX: u16 = 1024;
/// The smallest MTU of IPv6 (RFC 8200 section 5), and upstream's limit.
const MTU_MIN: u16 = 1280;
/// The host's address. Lower addresses are reserved, too (virtio 1.2 §5.10.4).
const HOST_CID: u32 = 2;
/// The wildcard address.
const ANY_CID: u32 = u32::MAX;
/// The capacity of `sockaddr_un`, without the final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Maximum number of request queues of a shared folder. Each queue needs an interrupt vector and two descriptors.
const FS_QUEUES_MAX: usize = 64;
/// The most queues of a device of any type.
const GENERIC_QUEUES_MAX: usize = 64;
/// PCI device ids of virtio devices have six bits for it (virtio 1.2 §4.1.2).
const DEVICE_TYPE_MAX: u32 = 63;
/// Balloon, IOMMU, memory and watchdog: they act on the machine, which no back end can.
const OF_THE_VMM: [u32; 4] = [5, 23, 24, 35];
/// Descriptors up to here are the standard streams.
const LAST_STANDARD_FD: i32 = 2;

pub(super) fn check(config: &VmConfig) -> Result<(), ValidationError> {
    // The maximum counts, not the number at boot, because a VM with fewer vCPUs than before must be able to boot again.
    let vcpus = usize::try_from(config.cpus.max_vcpus).unwrap_or(usize::MAX);
    let shared = all_shared(&config.memory);
    for (index, disk) in config.disks.iter().flatten().enumerate() {
        check_disk(disk, vcpus, shared)
            .map_err(|fault| at("disk", index, disk.id.as_deref(), fault))?;
    }
    for (index, net) in config.net.iter().flatten().enumerate() {
        check_net(net, vcpus, shared)
            .map_err(|fault| at("net", index, net.id.as_deref(), fault))?;
    }
    for (index, fs) in config.fs.iter().flatten().enumerate() {
        check_fs(fs, shared).map_err(|fault| at("fs", index, fs.id.as_deref(), fault))?;
    }
    for (index, device) in config.generic_vhost_user.iter().flatten().enumerate() {
        check_generic(device, shared)
            .map_err(|fault| at("generic_vhost_user", index, device.id.as_deref(), fault))?;
    }
    for (index, pmem) in config.pmem.iter().flatten().enumerate() {
        check_pmem(pmem).map_err(|fault| at("pmem", index, pmem.id.as_deref(), fault))?;
    }
    let mut assigned = BTreeSet::new();
    for (index, device) in config.devices.iter().flatten().enumerate() {
        if device.path.as_os_str().is_empty() {
            let fault = DeviceFault::PathMissing;
            return Err(at("devices", index, device.id.as_deref(), fault));
        }
        // The folders in `/sys/bus/pci/devices` are links. A path that does not exist is reported when it is opened.
        let folder = fs::canonicalize(&device.path);
        if !assigned.insert(folder.unwrap_or_else(|_| device.path.clone())) {
            let path = device.path.clone();
            return Err(ValidationError::DuplicateDevicePath { path });
        }
    }
    if let Some(vsock) = &config.vsock {
        check_vsock(vsock).map_err(|fault| at("vsock", 0, vsock.id.as_deref(), fault))?;
    }
    disk_paths(config)
}

pub(super) fn at(
    section: &str,
    index: usize,
    id: Option<&str>,
    fault: DeviceFault,
) -> ValidationError {
    ValidationError::Device {
        device: match id {
            Some(id) => format!("{section} {id}"),
            None => format!("{section} number {index}"),
        },
        fault,
    }
}

fn check_disk(disk: &DiskConfig, vcpus: usize, shared: bool) -> Result<(), DeviceFault> {
    queue_size(disk.queue_size)?;
    queue_count(disk.num_queues, 1..=vcpus, " (at most one per vCPU)")?;
    if disk.vhost_user {
        return check_vhost_user_disk(disk, shared);
    }
    if disk.vhost_socket.is_some() {
        return Err(DeviceFault::SocketWithoutVhostUser);
    }
    if disk
        .path
        .as_ref()
        .is_none_or(|path| path.as_os_str().is_empty())
    {
        return Err(DeviceFault::PathMissing);
    }
    queue_affinity(disk)
}

/// Keys of a disk that a back end serves. It has the image, so it decides about everything that the other keys concern.
const VHOST_USER_DISK_KEYS: [&str; 11] = [
    // Refused before, by name.
    "iommu",
    "num_queues",
    "queue_size",
    "vhost_user",
    "socket",
    "id",
    "pci_segment",
    "pci_device_id",
    "backing_files",
    "_disable_io_uring",
    "_disable_aio",
];

fn check_vhost_user_disk(disk: &DiskConfig, memory_shared: bool) -> Result<(), DeviceFault> {
    let mut changed = disk.changed_keys();
    if let Some(key) = changed.find(|key| !VHOST_USER_DISK_KEYS.contains(key)) {
        let key = match key {
            "rate_limiter_config" => "a rate limit",
            key => key,
        };
        return Err(DeviceFault::OfBackEnd { key });
    }
    if !memory_shared {
        return Err(DeviceFault::MemoryPrivate);
    }
    let socket = disk.vhost_socket.as_deref();
    socket_path(socket.ok_or(DeviceFault::SocketMissing)?)
}

/// Does not check that the host has these CPUs, which is known only when the threads start.
fn queue_affinity(disk: &DiskConfig) -> Result<(), DeviceFault> {
    let mut seen = BTreeSet::new();
    for pinned in disk.queue_affinity.iter().flatten() {
        let queue_index = pinned.queue_index;
        if usize::from(queue_index) >= disk.num_queues {
            return Err(DeviceFault::AffinityQueue {
                queue_index,
                num_queues: disk.num_queues,
            });
        }
        if !seen.insert(queue_index) {
            return Err(DeviceFault::AffinityTwice { queue_index });
        }
        if pinned.host_cpus.is_empty() {
            return Err(DeviceFault::AffinityEmpty { queue_index });
        }
        if let Some(&host_cpu) = pinned.host_cpus.iter().find(|cpu| **cpu >= HOST_CPUS_MAX) {
            return Err(DeviceFault::AffinityHostCpu {
                queue_index,
                host_cpu,
                max: HOST_CPUS_MAX - 1,
            });
        }
    }
    Ok(())
}

fn check_net(net: &NetConfig, vcpus: usize, shared: bool) -> Result<(), DeviceFault> {
    queue_size(net.queue_size)?;
    if net.vhost_user {
        check_vhost_user_net(net, shared)?;
    } else if net.vhost_socket.is_some() || net.vhost_mode == VhostMode::Server {
        return Err(DeviceFault::SocketWithoutVhostUser);
    }
    // An odd number includes the control queue, which exists in any case.
    let max = vcpus.saturating_mul(2).saturating_add(1);
    queue_count(
        net.num_queues,
        2..=max,
        " (at most one pair per vCPU, and a control queue)",
    )?;
    if let Some(mtu) = net.mtu
        && mtu < MTU_MIN
    {
        return Err(DeviceFault::Mtu { mtu, min: MTU_MIN });
    }
    // The lowest bit of the first byte marks a group address (IEEE 802 section 8.2).
    if net.mac.0[0] & 1 != 0 || net.mac.0 == [0; 6] {
        return Err(DeviceFault::Mac {
            mac: net.mac.to_string(),
        });
    }
    let Some(fds) = &net.fds else { return Ok(()) };
    let pairs = net.num_queues / 2;
    if fds.len() != pairs {
        return Err(DeviceFault::DescriptorCount {
            fds: fds.len(),
            pairs,
        });
    }
    match fds.iter().find(|fd| **fd <= LAST_STANDARD_FD) {
        Some(&fd) => Err(DeviceFault::Descriptor { fd }),
        None => Ok(()),
    }
}

/// The back end has the host's side of the interface.
fn check_vhost_user_net(net: &NetConfig, memory_shared: bool) -> Result<(), DeviceFault> {
    let for_taps = [
        ("tap", net.tap.is_some()),
        ("ip", net.ip.is_some()),
        ("mask", net.mask.is_some()),
        ("host_mac", net.host_mac.is_some()),
        ("fd", net.fds.is_some()),
        ("a rate limit", net.rate_limiter_config.is_some()),
    ];
    if let Some((key, _)) = for_taps.into_iter().find(|(_, given)| *given) {
        return Err(DeviceFault::OfBackEnd { key });
    }
    if !memory_shared {
        return Err(DeviceFault::MemoryPrivate);
    }
    let socket = net.vhost_socket.as_deref();
    socket_path(socket.ok_or(DeviceFault::SocketMissing)?)
}

fn check_vsock(vsock: &VsockConfig) -> Result<(), DeviceFault> {
    let cid = vsock.cid;
    if cid <= HOST_CID || cid == ANY_CID {
        return Err(DeviceFault::Cid {
            cid,
            min: HOST_CID + 1,
            max: ANY_CID - 1,
        });
    }
    socket_path(&vsock.socket)
}

/// Properties of the file are checked when it is opened.
fn check_pmem(pmem: &PmemConfig) -> Result<(), DeviceFault> {
    if pmem.file.as_os_str().is_empty() {
        return Err(DeviceFault::PathMissing);
    }
    match pmem.size {
        Some(bytes) if bytes == 0 || !bytes.is_multiple_of(pmem::ALIGN_BYTES) => {
            Err(DeviceFault::PmemSize {
                bytes,
                unit_bytes: pmem::ALIGN_BYTES,
            })
        }
        _ => Ok(()),
    }
}

fn check_fs(fs: &FsConfig, memory_shared: bool) -> Result<(), DeviceFault> {
    if !memory_shared {
        return Err(DeviceFault::MemoryPrivate);
    }
    let bytes = fs.tag.len();
    if !(1..=TAG_BYTES_MAX).contains(&bytes) || fs.tag.contains('\0') {
        return Err(DeviceFault::Tag {
            tag: fs.tag.clone(),
            max: TAG_BYTES_MAX,
        });
    }
    queue_size(fs.queue_size)?;
    queue_count(fs.num_queues, 1..=FS_QUEUES_MAX, "")?;
    socket_path(&fs.socket)
}

fn check_generic(device: &GenericVhostUserConfig, memory_shared: bool) -> Result<(), DeviceFault> {
    if !memory_shared {
        return Err(DeviceFault::MemoryPrivate);
    }
    let device_type = device.device_type.0;
    if !(1..=DEVICE_TYPE_MAX).contains(&device_type) || OF_THE_VMM.contains(&device_type) {
        return Err(DeviceFault::DeviceType {
            device_type,
            max: DEVICE_TYPE_MAX,
        });
    }
    queue_count(device.queue_sizes.len(), 1..=GENERIC_QUEUES_MAX, "")?;
    for &size in &device.queue_sizes {
        queue_size(size)?;
    }
    socket_path(&device.socket)
}

fn socket_path(path: &Path) -> Result<(), DeviceFault> {
    let bytes = path.as_os_str().len();
    if !(1..=SOCKET_PATH_BYTES_MAX).contains(&bytes) {
        return Err(DeviceFault::SocketPath {
            bytes,
            max: SOCKET_PATH_BYTES_MAX,
        });
    }
    Ok(())
}

fn queue_size(size: u16) -> Result<(), DeviceFault> {
    if !size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&size) {
        return Err(DeviceFault::QueueSize {
            size,
            min: QUEUE_SIZE_MIN,
            max: QUEUE_SIZE_MAX,
        });
    }
    Ok(())
}

fn queue_count(
    count: usize,
    allowed: RangeInclusive<usize>,
    reason: &'static str,
) -> Result<(), DeviceFault> {
    if allowed.contains(&count) {
        return Ok(());
    }
    let (min, max) = allowed.into_inner();
    Err(DeviceFault::QueueCount {
        count,
        min,
        max,
        reason,
    })
}

/// Several disks may share an image only if all of them are read-only.
fn disk_paths(config: &VmConfig) -> Result<(), ValidationError> {
    let mut readonly_by_path = BTreeMap::new();
    for disk in config.disks.iter().flatten() {
        let Some(path) = &disk.path else { continue };
        if let Some(other_readonly) = readonly_by_path.insert(path, disk.readonly)
            && !(other_readonly && disk.readonly)
        {
            return Err(ValidationError::DuplicateDiskPath { path: path.clone() });
        }
    }
    Ok(())
}
