//! The files that a configuration or a device names, and the access that the VMM needs to each.

use std::fs;
use std::path::{Path, PathBuf};

use api::VmConfig;
use api::config::{
    ConsoleOutputMode, DeviceConfig, DiskConfig, FsConfig, MemoryConfig, MemoryZoneConfig,
    NetConfig, PayloadConfig, PmemConfig, VsockConfig,
};
use hypervisor::KVM_PATH;
use landlock::{AccessFs, BitFlags, make_bitflags};

use super::LandlockError;
use crate::config::{NewDevice, image_format};
use crate::jail::Place;

/// The device that creates taps.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Reads a file, a device or a folder.
pub(super) const READ: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | ReadDir | IoctlDev});
/// Reads and changes a file or device.
pub(super) const CHANGE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});
/// Creates sockets in a folder and removes them.
const SOCKETS: BitFlags<AccessFs> = make_bitflags!(AccessFs::{MakeSock | RemoveFile});
/// Creates memory files in a folder.
const MEMORY_FILES: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile});
/// The rights that `w` grants in a rule.
pub(super) const WRITE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{WriteFile | Truncate | IoctlDev | MakeReg | MakeSock | RemoveFile});
/// The rights that apply to files. The kernel rejects any others in the rule of a file.
const OF_FILES: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | IoctlDev});

/// A path and the access that the VMM needs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    pub(super) path: PathBuf,
    pub(super) access: BitFlags<AccessFs>,
    /// The VMM creates the file if it does not exist.
    pub(super) creates: bool,
}

impl Need {
    fn new(path: &Path, access: BitFlags<AccessFs>) -> Self {
        Self {
            path: path.to_owned(),
            access,
            creates: false,
        }
    }

    /// A file that receives guest output or events.
    pub fn output(path: &Path) -> Self {
        Self {
            creates: true,
            ..Self::new(path, CHANGE)
        }
    }

    /// The folder of a socket.
    pub fn socket(path: &Path) -> Self {
        Self::new(folder(path), SOCKETS)
    }

    /// The path for a jail, which knows only reading and writing.
    pub fn place(&self) -> Place {
        Place {
            path: self.path.clone(),
            writable: self.writes(),
            creates: self.creates,
        }
    }

    fn writes(&self) -> bool {
        self.access.intersects(WRITE & !AccessFs::IoctlDev)
    }

    /// The access in the syntax of a rule.
    fn access(&self) -> &'static str {
        let reads = self
            .access
            .intersects(AccessFs::ReadFile | AccessFs::ReadDir);
        match (reads, self.writes()) {
            (true, true) => "rw",
            (false, true) => "w",
            _ => "r",
        }
    }

    pub(super) fn outside(&self) -> LandlockError {
        LandlockError::Outside {
            path: self.path.clone(),
            access: self.access(),
        }
    }

    pub(super) fn outside_jail(&self) -> LandlockError {
        LandlockError::OutsideJail {
            path: self.path.clone(),
            access: if self.writes() { "rw" } else { "r" },
        }
    }
}

/// The folder that holds `path`.
pub(super) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The subset of `access` that the kernel accepts for the kind of file at `path`.
pub(super) fn fitting(path: &Path, access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    match path.is_dir() {
        true => access,
        false => access & OF_FILES,
    }
}

/// Everything that a machine of this configuration opens. The function names every section, so that a new one cannot be
/// forgotten.
pub fn of_config(config: &VmConfig) -> Vec<Need> {
    let VmConfig {
        cpus: _,
        memory,
        payload,
        disks,
        net,
        rng,
        balloon: _,
        fs,
        pmem,
        vsock,
        serial,
        console,
        debug_console,
        numa: _,
        platform: _,
        iommu: _,
        watchdog: _,
        pvpanic: _,
        landlock_enable: _,
        landlock_rules: _,
        devices,
        user_devices: _,
        vdpa: _,
        pci_segments: _,
        tpm: _,
        rtc: _,
        rate_limit_groups: _,
        generic_vhost_user,
    } = config;
    let mut needs = vec![
        Need::new(Path::new(KVM_PATH), CHANGE),
        // Figures about this process. The files of other processes remain inaccessible, because Landlock forbids
        // tracing them.
        Need::new(Path::new("/proc"), READ),
        Need::new(&rng.src, READ & OF_FILES),
    ];
    needs.extend(of_memory(memory));
    needs.extend(payload.iter().flat_map(of_payload));
    needs.extend(disks.iter().flatten().flat_map(of_disk));
    needs.extend(net.iter().flatten().flat_map(of_net));
    needs.extend(fs.iter().flatten().map(of_fs));
    let generic = generic_vhost_user.iter().flatten();
    needs.extend(generic.map(|device| Need::socket(&device.socket)));
    needs.extend(devices.iter().flatten().flat_map(of_assigned));
    needs.extend(pmem.iter().flatten().map(of_pmem));
    needs.extend(vsock.iter().map(of_vsock));
    for (mode, file, socket) in [
        (serial.mode, &serial.file, &serial.socket),
        (console.mode, &console.file, &console.socket),
        (debug_console.mode, &debug_console.file, &None),
    ] {
        needs.extend(of_console(mode, file.as_deref(), socket.as_deref()));
    }
    needs
}

/// Everything that a hot-plugged device opens.
pub fn of_device(device: &NewDevice) -> Vec<Need> {
    match device {
        NewDevice::Disk(disk) => of_disk(disk),
        NewDevice::Net(net) => of_net(net).into_iter().collect(),
        NewDevice::Fs(fs) => vec![of_fs(fs)],
        NewDevice::GenericVhostUser(device) => vec![Need::socket(&device.socket)],
        NewDevice::Assigned(device) => of_assigned(device),
        NewDevice::Pmem(pmem) => vec![of_pmem(pmem)],
        NewDevice::Vsock(vsock) => vec![of_vsock(vsock)],
        NewDevice::Balloon(_) => Vec::new(),
    }
}

/// The access that saving a VM into `folder` needs.
pub fn of_snapshot(folder: &Path) -> Need {
    Need::new(folder, MEMORY_FILES)
}

/// Accesses to the folder when a core file is written.
pub fn of_core_file(folder: &Path) -> Need {
    Need::new(folder, MEMORY_FILES)
}

/// The access that restoring a VM from `folder` needs.
pub fn of_restore(folder: &Path) -> Need {
    Need::new(folder, READ)
}

fn of_payload(payload: &PayloadConfig) -> Vec<Need> {
    let files = [&payload.firmware, &payload.kernel, &payload.initramfs];
    let files = files.into_iter().flatten();
    files.map(|path| Need::new(path, READ & OF_FILES)).collect()
}

fn of_memory(memory: &MemoryConfig) -> Vec<Need> {
    let of_zone = |zone: &MemoryZoneConfig| {
        let path = zone.file.as_deref()?;
        let access = match (path.is_dir(), zone.shared) {
            (true, _) => MEMORY_FILES,
            (false, true) => CHANGE,
            (false, false) => READ & OF_FILES,
        };
        Some(Need::new(path, access))
    };
    memory.zones.iter().flatten().filter_map(of_zone).collect()
}

fn of_disk(disk: &DiskConfig) -> Vec<Need> {
    if let Some(socket) = &disk.vhost_socket {
        return vec![Need::socket(socket)];
    }
    let Some(path) = &disk.path else {
        return Vec::new();
    };
    let access = match disk.readonly {
        true => READ & OF_FILES,
        false => CHANGE,
    };
    let mut needs = vec![Need::new(path, access)];
    if disk.backing_files {
        let backing = virtio_devices::block::backing_files(path, image_format(disk));
        needs.extend(backing.iter().map(|path| Need::new(path, READ & OF_FILES)));
    }
    needs
}

fn of_net(net: &NetConfig) -> Option<Need> {
    if let Some(socket) = &net.vhost_socket {
        return Some(Need::socket(socket));
    }
    let opens_tap = net.fds.is_none();
    opens_tap.then(|| Need::new(Path::new(TUN_DEVICE), CHANGE))
}

/// The back end may restart and recreate its socket.
fn of_fs(fs: &FsConfig) -> Need {
    Need::socket(&fs.socket)
}

/// The container, and the group of the device. A device without a group is refused when it is opened.
fn of_assigned(device: &DeviceConfig) -> Vec<Need> {
    let group = fs::read_link(device.path.join("iommu_group")).ok();
    let group = group.as_deref().and_then(Path::file_name);
    let group = group.map(|group| Path::new("/dev/vfio").join(group));
    let nodes = [PathBuf::from("/dev/vfio/vfio")].into_iter().chain(group);
    let nodes = nodes.map(|node| Need::new(&node, CHANGE));
    nodes.chain([Need::new(&device.path, READ)]).collect()
}

fn of_pmem(pmem: &PmemConfig) -> Need {
    let access = match (pmem.file.is_dir(), pmem.discard_writes) {
        (true, _) => MEMORY_FILES,
        (false, true) => READ & OF_FILES,
        (false, false) => CHANGE,
    };
    Need::new(&pmem.file, access)
}

fn of_vsock(vsock: &VsockConfig) -> Need {
    Need::socket(&vsock.socket)
}

/// The kernel looks for the folder of terminals next to this file.
pub(super) const PSEUDO_TERMINALS: &str = "/dev/ptmx";

/// The endpoint of a console.
fn of_console(mode: ConsoleOutputMode, file: Option<&Path>, socket: Option<&Path>) -> Vec<Need> {
    match mode {
        ConsoleOutputMode::Pty => [PSEUDO_TERMINALS, "/dev/pts"]
            .map(|path| Need::new(Path::new(path), CHANGE | AccessFs::ReadDir))
            .into(),
        // The VMM's terminal is opened once more. A pipe has no path and needs no rule.
        ConsoleOutputMode::Tty => ["/proc/self/fd/0", "/proc/self/fd/1"]
            .into_iter()
            .filter_map(|stream| fs::read_link(stream).ok())
            .filter(|path| path.is_absolute() && !path.is_dir())
            .map(|path| Need::new(&path, CHANGE))
            .collect(),
        ConsoleOutputMode::File => file.into_iter().map(Need::output).collect(),
        ConsoleOutputMode::Socket => socket.into_iter().map(Need::socket).collect(),
        ConsoleOutputMode::Off | ConsoleOutputMode::Null => Vec::new(),
    }
}
