//! One device of each kind, for the guest with arbitrary behaviour.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use state::Saved;
use tempfile::{NamedTempFile, TempDir};

use super::any_vsock::{self, Programs};
use super::disk_images::empty_qcow2;
use super::fuzz_input::AREAS;
use super::ram::TestRam;
use super::{MockHostIommu, TestBlocks};
use crate::balloon::{Balloon, BalloonParams};
use crate::block::{Block, BlockError, BlockParams, EngineChoice, ImageFormat};
use crate::console::{Console, ConsoleEndpoint, WindowSize};
use crate::device::VirtioDevice;
use crate::dma::DmaEndpoint;
use crate::fs::{Fs, FsParams};
use crate::iommu::{Iommu, IommuParams};
use crate::mem::{Mem, MemParams, MemRegion};
use crate::net::{Backend, Net, NetLimiters, NetParams};
use crate::pmem::{ALIGN_BYTES, Pmem, PmemParams};
use crate::reclaim::guarded_ram::{GuardedRam, Kind, PAGE, RamArea};
use crate::rng::Rng;
use crate::rtc::Rtc;
use crate::vhost_user::{
    Endpoint, IdentityState, NetProfile, Profile, VhostUser, VhostUserParams, VhostUserState,
};
use crate::vsock::{Vsock, VsockParams};
use crate::watchdog::Watchdog;

/// The devices that [`make`] creates, by choice.
pub(super) const NAMES: [&str; 17] = [
    "block-sync",
    "block",
    "console",
    "fs",
    "mem",
    "net",
    "rng",
    "vsock",
    "watchdog",
    "balloon",
    "pmem",
    "vhost-user",
    "iommu",
    "block-direct",
    "block-qcow2",
    "rtc",
    "vhost-user-net",
];

const DISK_BYTES: u64 = 1 << 20;
/// Less than a unit of direct I/O.
const TAIL_BYTES: u64 = 100;
/// Of virtio-mem.
const BLOCK_BYTES: u64 = 2 << 20;
const BLOCKS: u64 = 2;
/// First page of virtio-mem's region.
const MEM_PAGE: u64 = 1 << 20;

/// Of the network interface of a vhost-user back end.
pub(super) const NET_PAIRS: u16 = 3;

/// Mappings of a device of the host behind the virtual IOMMU.
const HOST_MAPPINGS_MAX: usize = 16;

/// Where the host has placed persistent memory.
const PMEM_START: u64 = 1 << 40;

/// A device and the host resources that it uses.
pub(super) struct Made {
    pub(super) device: Arc<Mutex<dyn VirtioDevice>>,
    /// The other end of a network device's frames, or of a console's input and output.
    pub(super) wire: Option<UnixDatagram>,
    /// The programs of a vsock device.
    pub(super) programs: Option<Programs>,
    _image: Option<NamedTempFile>,
    _folder: Option<TempDir>,
    /// Devices behind it, if it is an IOMMU.
    pub(super) endpoints: Vec<Arc<DmaEndpoint>>,
}

/// The address of a block of virtio-mem's region, or behind it.
pub(super) fn mem_block(number: u8) -> u64 {
    MEM_PAGE * PAGE as u64 + u64::from(number) * BLOCK_BYTES
}

pub(super) fn name(choice: u8) -> &'static str {
    NAMES[usize::from(choice) % NAMES.len()]
}

/// Whether that device can be behind a virtual IOMMU. The others use guest addresses.
pub(super) fn uses_dma(choice: u8) -> bool {
    !matches!(
        name(choice),
        "balloon" | "fs" | "iommu" | "mem" | "vhost-user" | "vhost-user-net"
    )
}

/// Calls `run` with RAM for that device. Later calls on this thread reuse the RAM, because mapping it dominates the
/// cost of a run.
pub(super) fn with_ram<T>(choice: u8, run: impl FnOnce(&GuardedRam) -> T) -> T {
    thread_local! {
        static RAM: GuardedRam = GuardedRam::new(&AREAS);
        static RAM_WITH_BLOCKS: GuardedRam = GuardedRam::new(&[AREAS[0], AREAS[1], AREAS[2], RamArea {
            guest_page: MEM_PAGE,
            pages: (BLOCKS * BLOCK_BYTES) as usize / PAGE,
            kind: Kind::Anonymous,
        }]);
    }
    if name(choice) == "mem" {
        RAM_WITH_BLOCKS.with(run)
    } else {
        RAM.with(run)
    }
}

fn shared(device: impl VirtioDevice + 'static) -> Arc<Mutex<dyn VirtioDevice>> {
    Arc::new(Mutex::new(device))
}

fn datagrams() -> (UnixDatagram, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().expect("sockets");
    for end in [&near, &far] {
        end.set_nonblocking(true).expect("sockets can be so");
    }
    (near, far)
}

/// A device whose back end is gone. Without one that it has had, every driver would wait for the first one.
fn unserved(
    profile: Profile,
    queues: u16,
    config_bytes: usize,
    socket: PathBuf,
) -> Arc<Mutex<dyn VirtioDevice>> {
    let mut device = VhostUser::new(VhostUserParams {
        id: "_unserved0".into(),
        profile,
        endpoint: Endpoint::Connect(socket),
        queue_sizes: vec![64; queues.into()],
    })
    .expect("descriptors");
    let state = VhostUserState {
        identity: Some(IdentityState {
            features: u64::MAX,
            config: vec![0; config_bytes],
        }),
        enabled_pairs: profile.has_several_pairs().then_some(1),
    };
    let restored = device.restore(&Saved::of(&state));
    restored.expect("a sound state");
    shared(device)
}

/// A disk whose image is the file.
fn disk(name: &str, file: NamedTempFile) -> (Block, NamedTempFile) {
    let mut params = BlockParams {
        id: "_disk0".into(),
        path: file.path().into(),
        num_queues: 2,
        queue_size: 128,
        sparse: true,
        format: Some(ImageFormat::Raw),
        ..BlockParams::default()
    };
    let mut bytes = DISK_BYTES;
    match name {
        "block-sync" => params.engine = EngineChoice::Sync,
        // Its end is not a whole unit of direct I/O, and the guest must not make it an image of another format.
        "block-direct" => {
            params.direct = true;
            params.format = None;
            bytes += TAIL_BYTES;
        }
        "block-qcow2" => {
            params.format = Some(ImageFormat::Qcow2);
            let metadata = empty_qcow2(DISK_BYTES);
            fs::write(file.path(), &metadata).expect("files can be written");
            bytes = metadata.len() as u64;
        }
        _ => {}
    }
    file.as_file().set_len(bytes).expect("files can grow");
    let block = match Block::new(params.clone()) {
        // Not every file system of a temporary folder has it.
        Err(BlockError::NoDirectIo { .. }) => {
            params.direct = false;
            Block::new(params)
        }
        made => made,
    };
    (block.expect("a sound image"), file)
}

/// Makes the device, for a guest with this RAM.
pub(super) fn make(choice: u8, ram: &TestRam) -> Made {
    let mut image = None;
    let mut folder = None;
    let mut wire = None;
    let mut programs = None;
    let mut endpoints = Vec::new();
    let mut in_folder = |file: &str| {
        let made = folder.insert(tempfile::tempdir().expect("folders can be made"));
        made.path().join(file)
    };
    let device: Arc<Mutex<dyn VirtioDevice>> = match name(choice) {
        name if name.starts_with("block") => {
            let file = NamedTempFile::new().expect("files can be made");
            let (block, file) = disk(name, file);
            image = Some(file);
            shared(block)
        }
        "console" => {
            let (near, far) = datagrams();
            wire = Some(far);
            let output = near.try_clone().expect("descriptors");
            let endpoint = ConsoleEndpoint::new(Some(near.into()), Some(output.into()));
            let window = WindowSize {
                columns: 80,
                rows: 25,
            };
            shared(Console::new("__console", endpoint, Some(window)).expect("descriptors"))
        }
        "fs" => shared(
            Fs::new(FsParams {
                id: "_fs0".into(),
                tag: "folder".into(),
                socket: in_folder("nobody"),
                num_queues: 1,
                queue_size: 64,
            })
            .expect("sound parameters"),
        ),
        "mem" => {
            let (device, _) = Mem::new(MemParams {
                id: "mem0".into(),
                region: MemRegion::new(mem_block(0), BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
                    .expect("aligned"),
                ram: ram.mem(),
                access: Arc::new(TestBlocks::new(BLOCK_BYTES)),
                requested_bytes: BLOCK_BYTES,
                node: None,
            })
            .expect("descriptors");
            shared(device)
        }
        "net" => {
            let (near, far) = datagrams();
            wire = Some(far);
            let params = NetParams {
                id: "_net0".into(),
                backend: Backend::Fds(Vec::new()),
                mac: [0x52, 0x54, 0, 1, 2, 3],
                mtu: None,
                num_queues: 2,
                queue_size: 64,
                offload_tso: true,
                offload_ufo: true,
                offload_csum: true,
                limiters: NetLimiters::default(),
            };
            shared(Net::on_sockets(&params, vec![near.into()]).expect("descriptors"))
        }
        "rng" => {
            let source = File::open("/dev/urandom").expect("always there");
            shared(Rng::new("__rng", source))
        }
        "rtc" => shared(Rtc::new("__rtc")),
        "vsock" => {
            let socket = in_folder("vsock");
            programs = Some(Programs::new(&socket));
            let params = VsockParams {
                id: "_vsock0".into(),
                cid: any_vsock::CID,
                socket,
            };
            shared(Vsock::new(params).expect("a socket can be bound"))
        }
        "watchdog" => {
            let expiry = Duration::from_secs(3600);
            shared(Watchdog::new("__watchdog", expiry, || ()).expect("a timer"))
        }
        "balloon" => {
            let params = BalloonParams::with_everything(ram.mem());
            shared(Balloon::new(params).expect("descriptors").0)
        }
        "pmem" => {
            let file = NamedTempFile::new().expect("files can be made");
            file.as_file().set_len(ALIGN_BYTES).expect("they can grow");
            let params = PmemParams {
                id: "_pmem0".into(),
                file: file.path().into(),
                bytes: None,
                discard_writes: false,
            };
            image = Some(file);
            let mut device = Pmem::new(&params).expect("a sound file");
            device.set_memory_start(PMEM_START);
            shared(device)
        }
        "vhost-user" => unserved(Profile::block(), 2, 60, in_folder("nobody")),
        "vhost-user-net" => {
            let profile = Profile::net(&NetProfile {
                mac: [2, 0, 0, 0, 0, 1],
                mtu: None,
                pairs: NET_PAIRS,
                offload_tso: true,
                offload_ufo: true,
                offload_csum: true,
            });
            unserved(profile, 2 * NET_PAIRS, 12, in_folder("nobody"))
        }
        "iommu" => {
            let (device, handle) = Iommu::new(IommuParams {
                id: "__iommu",
                address_width_bits: 48,
            })
            .expect("descriptors");
            // Numbers that a driver finds by chance. Some devices are the host's.
            let host = || Arc::new(MockHostIommu::new(HOST_MAPPINGS_MAX));
            endpoints = (0..4)
                .map(|at| match at % 2 {
                    0 => handle.endpoint(),
                    _ => handle.endpoint_of_host(host(), ram.mem()),
                })
                .collect();
            (0..).zip(&endpoints).for_each(|(at, it)| it.place(at));
            shared(device)
        }
        other => unreachable!("{other}"),
    };
    Made {
        device,
        wire,
        programs,
        _image: image,
        _folder: folder,
        endpoints,
    }
}
