//! Builds virtio devices from the configuration, without a machine.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::VmConfig;
use api::config::{
    BalloonConfig, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NumaConfig,
    PmemConfig, RtcConfig, VsockConfig,
};
use machine::memory::{GuestMemory, HotplugRam, growing_zones};
use machine::pc::{Assignment, Plug};
use machine::pci::Place;
use machine::serial::Output;
use machine::signals::VmSignals;
use machine::threads::DeviceKind;
use virtio_devices::VirtioDevice;
use virtio_devices::balloon::{Balloon, BalloonHandle, BalloonParams};
use virtio_devices::block::{Block, BlockParams, DiskHandle, EngineChoice};
use virtio_devices::fs::{Fs, FsParams};
use virtio_devices::iommu::{Iommu, IommuHandle, IommuParams};
use virtio_devices::mem::{Mem, MemHandle, MemParams, MemRegion};
use virtio_devices::pmem::{Pmem, PmemHandle, PmemParams};
use virtio_devices::rate_limit::RateLimiter;
use virtio_devices::reclaim::DiscardEngine;
use virtio_devices::rng::Rng;
use virtio_devices::rtc::Rtc;
use virtio_devices::vhost_user::{Endpoint, Profile, VhostUser, VhostUserParams};
use virtio_devices::vsock::{Vsock, VsockParams};
use virtio_devices::watchdog::{self, Watchdog};

use super::VmError;
use crate::config::{has_iommu, image_format, iommu_address_width_bits};
use crate::device_ids::{BALLOON_ID, IOMMU_ID, RNG_ID, RTC_ID, WATCHDOG_ID};

/// The place that a device's section asks for.
macro_rules! place {
    ($config:expr) => {
        ::machine::pci::Place {
            segment: $config.pci_segment,
            slot: $config.pci_device_id,
        }
    };
}
pub(super) use place;

/// A device that has no slot yet.
pub(super) struct Made {
    pub(super) plug: Plug,
    /// The part behind the queue of a console.
    pub(super) output: Option<Output>,
    /// It is behind the virtual IOMMU.
    pub(super) is_behind_iommu: bool,
}

impl Made {
    /// A device that is not behind the IOMMU.
    pub(super) fn new(
        id: &str,
        kind: DeviceKind,
        place: Place,
        device: impl VirtioDevice + 'static,
    ) -> Self {
        Self {
            plug: Plug {
                id: id.to_owned(),
                kind,
                place,
                device: Arc::new(Mutex::new(device)),
                dma: None,
            },
            output: None,
            is_behind_iommu: false,
        }
    }

    /// Puts the device behind the machine's IOMMU, if it belongs there.
    pub(super) fn connect(mut self, iommu: Option<&IommuHandle>) -> Self {
        let iommu = iommu.filter(|_| self.is_behind_iommu);
        self.plug.dma = iommu.map(IommuHandle::endpoint);
        self
    }
}

/// The name of a device that can be added repeatedly.
pub(super) fn assigned(id: &Option<String>) -> &str {
    id.as_deref()
        .expect("ids are assigned before a machine is built")
}

/// A disk whose back end need not run yet.
pub(super) fn vhost_user_disk(disk: &DiskConfig, socket: &Path) -> Result<Made, VmError> {
    let id = assigned(&disk.id);
    let device = VhostUser::new(VhostUserParams {
        id: id.to_owned(),
        profile: Profile::block(),
        endpoint: Endpoint::Connect(socket.to_owned()),
        queue_sizes: vec![disk.queue_size; disk.num_queues],
    })
    .map_err(|source| VmError::device(id, source))?;
    Ok(Made::new(id, DeviceKind::VhostUser, place!(disk), device))
}

/// Opens a disk's image.
pub(super) fn disk(
    disk: &DiskConfig,
    limiter: Arc<RateLimiter>,
) -> Result<(Made, DiskHandle), VmError> {
    let id = assigned(&disk.id);
    let path = disk.path.clone().expect("validation wants a path");
    let block = Block::new(BlockParams {
        id: id.to_owned(),
        path,
        readonly: disk.readonly,
        direct: disk.direct,
        num_queues: u16::try_from(disk.num_queues).unwrap_or(u16::MAX),
        queue_size: disk.queue_size,
        serial: disk.serial.clone(),
        sparse: disk.sparse,
        format: image_format(disk),
        backing_files: disk.backing_files,
        lock_granularity: disk.lock_granularity,
        engine: match (disk.disable_io_uring, disk.disable_aio) {
            (false, false) => EngineChoice::Auto,
            (false, true) => EngineChoice::WithoutAio,
            (true, false) => EngineChoice::Aio,
            (true, true) => EngineChoice::Sync,
        },
        queue_affinity: disk
            .queue_affinity
            .iter()
            .flatten()
            .map(|pinned| (pinned.queue_index, pinned.host_cpus.clone()))
            .collect(),
        limiter,
    })
    .map_err(|source| VmError::device(id, source))?;
    let handle = block.handle();
    let made = Made {
        is_behind_iommu: disk.iommu,
        ..Made::new(id, DeviceKind::Block, place!(disk), block)
    };
    Ok((made, handle))
}

/// The source of entropy cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open the entropy source {}", path.display())]
struct EntropySourceError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The entropy device is always present, as in upstream.
pub(super) fn rng(config: &VmConfig) -> Result<Made, VmError> {
    let id = config.rng.id.as_deref().unwrap_or(RNG_ID);
    let path = &config.rng.src;
    let source = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| {
            let path = path.clone();
            VmError::device(id, EntropySourceError { path, source })
        })?;
    let rng = Rng::new(id, source);
    Ok(Made {
        is_behind_iommu: config.rng.iommu,
        ..Made::new(id, DeviceKind::Rng, place!(config.rng), rng)
    })
}

/// The balloon and its handle.
pub(super) fn balloon(
    config: &BalloonConfig,
    memory: &GuestMemory,
) -> Result<(Made, BalloonHandle), VmError> {
    let id = config.id.as_deref().unwrap_or(BALLOON_ID);
    let params = BalloonParams {
        ram: memory.ram().clone(),
        size_bytes: config.size,
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
        free_page_hinting: config.free_page_hinting,
        reporting_policy: config.reporting_policy,
        device_init: config.device_init,
    };
    let engine = |switch| DiscardEngine::new(switch).over(memory.overlay().cloned());
    let (balloon, handle) =
        Balloon::with_engine(params, engine).map_err(|source| VmError::device(id, source))?;
    handle.set_stats_poll(Duration::from_millis(config.stats_poll_ms));
    let made = Made::new(id, DeviceKind::Balloon, place!(config), balloon);
    Ok((made, handle))
}

/// The memory hot-plug devices. Each has the name of the zone that grows, as in upstream.
pub(super) fn mems(
    config: &VmConfig,
    memory: &GuestMemory,
) -> Result<Vec<(Made, MemHandle)>, VmError> {
    let zones = growing_zones(&config.memory);
    let hotplugs = memory.hotplug_ram().iter();
    let made = hotplugs.map(|hotplug| {
        let mut zones = zones.iter();
        let zone = zones.find(|zone| zone.id == hotplug.zone_id());
        let requested_bytes = zone.and_then(|zone| zone.hotplugged_size).unwrap_or(0);
        mem(config, memory, hotplug, requested_bytes)
    });
    made.collect()
}

fn mem(
    config: &VmConfig,
    memory: &GuestMemory,
    hotplug: &Arc<HotplugRam>,
    requested_bytes: u64,
) -> Result<(Made, MemHandle), VmError> {
    let id = hotplug.zone_id();
    let is_of = |node: &&NumaConfig| {
        let mut zones = node.memory_zones.iter().flatten();
        zones.any(|zone| zone == id)
    };
    let node = config.numa.iter().flatten().find(is_of);
    let Range { start, end } = hotplug.range();
    let region = MemRegion::new(start, end - start, hotplug.block_bytes())
        .map_err(|source| VmError::device(id, source))?;
    let (mem, handle) = Mem::new(MemParams {
        id: id.to_owned(),
        region,
        ram: memory.ram().clone(),
        access: Arc::clone(hotplug) as _,
        requested_bytes,
        node: node.and_then(|node| u16::try_from(node.guest_numa_id).ok()),
    })
    .map_err(|source| VmError::device(id, source))?;
    let made = Made::new(id, DeviceKind::Mem, Place::default(), mem);
    Ok((made, handle))
}

/// The virtual IOMMU, if a device or a segment is behind it.
pub(super) fn iommu(config: &VmConfig) -> Result<Option<(Made, IommuHandle)>, VmError> {
    if !has_iommu(config) {
        return Ok(None);
    }
    let params = IommuParams {
        id: IOMMU_ID,
        address_width_bits: iommu_address_width_bits(config),
    };
    let (iommu, handle) = Iommu::new(params).map_err(|source| VmError::device(IOMMU_ID, source))?;
    let made = Made::new(IOMMU_ID, DeviceKind::Iommu, Place::default(), iommu);
    Ok(Some((made, handle)))
}

/// The watchdog, if configured. It resets the machine as the guest itself would.
pub(super) fn watchdog(
    config: &VmConfig,
    signals: &Arc<VmSignals>,
) -> Result<Option<Made>, VmError> {
    if !config.watchdog {
        return Ok(None);
    }
    let signals = Arc::clone(signals);
    let watchdog = Watchdog::new(WATCHDOG_ID, watchdog::TIMEOUT, move || {
        if let Err(error) = signals.reset.write(1) {
            log::error!("Cannot request the reset of the VM: {error}");
        }
    })
    .map_err(|source| VmError::device(WATCHDOG_ID, source))?;
    Ok(Some(Made::new(
        WATCHDOG_ID,
        DeviceKind::Watchdog,
        Place::default(),
        watchdog,
    )))
}

/// The clock device.
pub(super) fn rtc(config: &RtcConfig) -> Made {
    let id = config.id.as_deref().unwrap_or(RTC_ID);
    Made {
        is_behind_iommu: config.iommu,
        ..Made::new(id, DeviceKind::Rtc, place!(config), Rtc::new(id))
    }
}

/// A shared folder. Its back end need not be running yet.
pub(super) fn fs(config: &FsConfig) -> Result<Made, VmError> {
    let id = assigned(&config.id);
    let fs = Fs::new(FsParams {
        id: id.to_owned(),
        tag: config.tag.clone(),
        socket: config.socket.clone(),
        num_queues: u16::try_from(config.num_queues).unwrap_or(u16::MAX),
        queue_size: config.queue_size,
    })
    .map_err(|source| VmError::device(id, source))?;
    Ok(Made::new(id, DeviceKind::VhostUser, place!(config), fs))
}

/// A device of any type, whose back end need not run yet.
pub(super) fn generic_vhost_user(config: &GenericVhostUserConfig) -> Result<Made, VmError> {
    let id = assigned(&config.id);
    let device = VhostUser::new(VhostUserParams {
        id: id.to_owned(),
        profile: Profile::of_type(config.device_type.0),
        endpoint: Endpoint::Connect(config.socket.clone()),
        queue_sizes: config.queue_sizes.clone(),
    })
    .map_err(|source| VmError::device(id, source))?;
    Ok(Made::new(id, DeviceKind::VhostUser, place!(config), device))
}

/// Persistent memory. The file is mapped here, and becomes visible to the guest when the device is plugged into the
/// bus.
pub(super) fn pmem(config: &PmemConfig) -> Result<(Made, PmemHandle), VmError> {
    let id = assigned(&config.id);
    let pmem = Pmem::new(&PmemParams {
        id: id.to_owned(),
        file: config.file.clone(),
        bytes: config.size,
        discard_writes: config.discard_writes,
    })
    .map_err(|source| VmError::device(id, source))?;
    let handle = pmem.handle();
    let made = Made {
        is_behind_iommu: config.iommu,
        ..Made::new(id, DeviceKind::Pmem, place!(config), pmem)
    };
    Ok((made, handle))
}

/// A device of the host, which is opened when it is plugged in.
pub(super) fn assignment(config: &DeviceConfig, iommu: Option<&IommuHandle>) -> Assignment {
    Assignment {
        id: assigned(&config.id).to_owned(),
        place: place!(config),
        path: config.path.clone(),
        iommu: iommu.filter(|_| config.iommu).cloned(),
    }
}

/// The socket of a vsock device cannot be created.
#[derive(Debug, thiserror::Error)]
#[error("Cannot listen on {}", path.display())]
struct VsockSocketError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The vsock device, which listens on its socket from now on.
pub(super) fn vsock(config: &VsockConfig) -> Result<Made, VmError> {
    let id = assigned(&config.id);
    let vsock = Vsock::new(VsockParams {
        id: id.to_owned(),
        cid: config.cid,
        socket: config.socket.clone(),
    })
    .map_err(|source| {
        let path = config.socket.clone();
        VmError::device(id, VsockSocketError { path, source })
    })?;
    Ok(Made {
        is_behind_iommu: config.iommu,
        ..Made::new(id, DeviceKind::Vsock, place!(config), vsock)
    })
}
