//! Puts a machine together, part by part, from a validated configuration.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::VmConfig;
use api::config::{BalloonConfig, DiskConfig, LockGranularity};
use hypervisor::Kvm;
use virtio_devices::balloon::{Balloon, BalloonHandle, BalloonParams};
use virtio_devices::block::{self, Block, BlockParams};
use virtio_devices::mem::{Mem, MemHandle, MemParams, MemRegion};
use virtio_devices::reclaim::ResidencyProbe;
use virtio_devices::rng::Rng;

use super::chassis::Chassis;
use super::consoles;
use super::devices::{Devices, Plug};
use super::exits::Exits;
use super::network;
use super::observer::{CounterSource, Observed, OwnObserver};
use super::{Launch, Vm, VmContext, VmError, VmSignals};
use crate::cpu::{GuestEvent, Vcpus, VcpusContext, guest_phys_bits};
use crate::memory::layout::MIB;
use crate::memory::{DEFAULT_ZONE_ID, GuestMemory};
use crate::seccomp::ThreadKind;

/// Ids of the devices of which there is at most one.
pub(crate) const BALLOON_ID: &str = "__balloon";
const RNG_ID: &str = "__rng";
/// Least part in which memory is plugged in: the guest can give back a transparent huge page, or a page of its own of
/// that size.
const BLOCK_BYTES_MIN: u64 = 2 * MIB;

/// Where the entropy should come from cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open the entropy source {}", path.display())]
struct EntropySourceError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Builds the machine; on an error everything made so far is dropped again.
pub(super) fn build(config: &mut VmConfig, context: &VmContext) -> Result<Vm, VmError> {
    let kvm = Kvm::open().map_err(VmError::Kvm)?;
    let phys_bits = guest_phys_bits(&kvm, config.cpus.max_phys_bits).map_err(VmError::Cpu)?;
    let memory = GuestMemory::new(&config.memory, phys_bits).map_err(VmError::Memory)?;
    let vm = Arc::new(kvm.create_vm().map_err(VmError::Kvm)?);
    vm.enable_split_irqchip(u32::from(crate::interrupt::IOAPIC_PIN_COUNT))
        .map_err(VmError::Kvm)?;
    let slots = memory.attach(&vm).map_err(VmError::Memory)?;
    let chassis = Chassis::new(&vm, memory.map(), &context.signals)?;

    chassis.pci.reserve(crate::config::wished_slots(config));
    let mut devices = Devices::new(&chassis, memory.ram().clone(), context);
    consoles::plug(config, &chassis, &mut devices, context)?;
    for disk in config.disks.iter().flatten() {
        plug_disk(&mut devices, disk)?;
    }
    for net in config.net.iter_mut().flatten() {
        network::plug(&mut devices, net)?;
    }
    plug_rng(&mut devices, config)?;
    let balloon = config
        .balloon
        .as_ref()
        .map(|balloon| plug_balloon(&mut devices, balloon, &memory))
        .transpose()?;
    let mem = plug_mem(&mut devices, config, &memory)?;
    let Devices {
        plugged,
        counters,
        tree,
        ..
    } = devices;

    let residency = ResidencyProbe::new(memory.ram().clone()).map_err(VmError::Residency)?;
    let observed = Observed {
        zones: memory.zones().to_vec(),
        residency,
        balloon: balloon.clone(),
        mem: mem.clone(),
        counters,
    };
    let observer = OwnObserver::new(observed, memory.boot_bytes(), tree);
    let vcpus = Vcpus::new(
        &kvm,
        &vm,
        &config.cpus,
        VcpusContext {
            handler: Arc::new(Exits::new(&chassis)),
            events: guest_events(&context.signals),
            thread_start: Arc::clone(&context.thread_start),
        },
    )
    .map_err(VmError::Cpu)?;
    Ok(Vm {
        vcpus,
        plugged,
        paused: false,
        chassis,
        balloon,
        mem,
        observer,
        launch: Launch::of(config),
        context: context.clone(),
        _slots: slots,
        memory,
    })
}

pub(super) fn plug_disk(devices: &mut Devices<'_>, disk: &DiskConfig) -> Result<(), VmError> {
    let id = disk
        .id
        .as_deref()
        .expect("ids are assigned before a machine is built");
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
        autodetect: disk.image_type.is_none(),
        lock_granularity: match disk.lock_granularity {
            LockGranularity::ByteRange => block::LockGranularity::ByteRange,
            LockGranularity::Full => block::LockGranularity::Full,
        },
        engine: block::EngineChoice::default(),
    })
    .map_err(|source| VmError::Device {
        id: id.to_owned(),
        source: source.into(),
    })?;
    devices.plug(
        &Plug {
            id,
            kind: ThreadKind::Block,
            slot: disk.pci_device_id,
        },
        block,
        None,
    )
}

/// The entropy device is always there, as upstream has it.
fn plug_rng(devices: &mut Devices<'_>, config: &VmConfig) -> Result<(), VmError> {
    let id = config.rng.id.as_deref().unwrap_or(RNG_ID);
    let source = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&config.rng.src)
        .map_err(|source| VmError::Device {
            id: id.to_owned(),
            source: Box::new(EntropySourceError {
                path: config.rng.src.clone(),
                source,
            }),
        })?;
    let plug = Plug {
        id,
        kind: ThreadKind::Rng,
        slot: config.rng.pci_device_id,
    };
    devices.plug(&plug, Rng::new(id, source), None)
}

pub(super) fn plug_balloon(
    devices: &mut Devices<'_>,
    config: &BalloonConfig,
    memory: &GuestMemory,
) -> Result<BalloonHandle, VmError> {
    let id = config.id.as_deref().unwrap_or(BALLOON_ID);
    let (balloon, handle) = Balloon::new(BalloonParams {
        ram: memory.ram().clone(),
        size_bytes: config.size,
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
        free_page_hinting: config.free_page_hinting,
        reporting_policy: config.reporting_policy,
    })
    .map_err(|source| VmError::Device {
        id: id.to_owned(),
        source: source.into(),
    })?;
    handle.set_stats_poll(Duration::from_millis(config.stats_poll_ms));
    let plug = Plug {
        id,
        kind: ThreadKind::Balloon,
        slot: config.pci_device_id,
    };
    devices.plug(&plug, balloon, Some(CounterSource::Balloon(handle.clone())))?;
    Ok(handle)
}

/// The device that plugs memory in, if any can be. It has the name of the zone that grows, as upstream has it.
fn plug_mem(
    devices: &mut Devices<'_>,
    config: &VmConfig,
    memory: &GuestMemory,
) -> Result<Option<MemHandle>, VmError> {
    let Some(zone) = memory.hotplug_zone() else {
        return Ok(None);
    };
    let in_device = |source: Box<dyn Error + Send + Sync>| VmError::Device {
        id: DEFAULT_ZONE_ID.to_owned(),
        source,
    };
    let block_bytes = zone.page_bytes.max(BLOCK_BYTES_MIN);
    let start = memory.map().hotplug.start;
    let region = MemRegion::new(start, zone.bytes(), block_bytes);
    let (mem, handle) = Mem::new(MemParams {
        id: DEFAULT_ZONE_ID.to_owned(),
        region: region.map_err(|source| in_device(source.into()))?,
        requested_bytes: config.memory.hotplugged_size.unwrap_or(0),
    })
    .map_err(|source| in_device(source.into()))?;
    let plug = Plug {
        id: DEFAULT_ZONE_ID,
        kind: ThreadKind::Mem,
        slot: None,
    };
    devices.plug(&plug, mem, None)?;
    Ok(Some(handle))
}

/// What ends the guest from inside, as the control thread hears of it.
fn guest_events(signals: &Arc<VmSignals>) -> Arc<dyn Fn(GuestEvent) + Send + Sync> {
    let signals = Arc::clone(signals);
    Arc::new(move |event| {
        let signal = match event {
            GuestEvent::Reset => &signals.reset,
            GuestEvent::Shutdown => &signals.shutdown,
            GuestEvent::Failed => &signals.failed,
        };
        if let Err(error) = signal.write(1) {
            log::error!("The control thread cannot be told of {event:?}: {error}");
        }
    })
}
