//! Builds a machine from a validated configuration.
//!
//! Files of the configuration are opened first and KVM last, so that errors about a path or a value do not depend on
//! the host:
//!
//! ```text
//! disks, entropy source, taps, payload ─► guest RAM ─► payload loaded ─► consoles ─► KVM ─► devices on the bus
//! (read, not changed)                                                    (files emptied, sockets made)
//! ```
//! When a snapshot is restored, the machine without devices is created first, with KVM. RAM gets the saved content instead
//! of a payload, after the machine's vCPUs have been compared with the saved ones. Each device gets its state when it is
//! plugged into the bus.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::VmConfig;
use hypervisor::Kvm;
use machine::boot::{Payload, PayloadFiles};
use machine::cpu::{CpuError, Vcpus, guest_phys_bits};
use machine::memory::GuestMemory;
use machine::memory::on_demand::OnDemand;
use machine::pc::{Assignment, BarePc, Pc, PcError, PcParams};
use machine::serial::Endpoint;
use machine::threads::DeviceKind;
use state::StateError;
use virtio_devices::balloon::BalloonHandle;
use virtio_devices::iommu::IommuHandle;
use virtio_devices::mem::MemHandle;
use virtio_devices::reclaim::ResidencyProbe;

use super::consoles::DebugConsole;
use super::context::VmContext;
use super::devices::{self, Made};
use super::handles::Handles;
use super::observer::{Observed, OwnObserver};
use super::{Vm, VmError, consoles, pin};
use crate::config::{iommu_segments, segment_weights, wished_slots};
use crate::device_ids::{DEBUG_CONSOLE_ID, SERIAL_ID};
use crate::snapshot::Snapshot;

/// All parts of a machine, opened and checked before the machine is created.
pub(super) struct Parts {
    /// None if the machine is restored.
    payload: Option<Payload>,
    memory: GuestMemory,
    serial: Option<Arc<Endpoint>>,
    debug_console: Option<DebugConsole>,
    /// In the order in which slots are assigned.
    devices: Vec<Made>,
    balloon: Option<BalloonHandle>,
    /// By the zone that grows.
    mems: BTreeMap<String, MemHandle>,
    iommu: Option<IommuHandle>,
    assigned: Vec<Assignment>,
    handles: Handles,
    /// The machine that is restored, without devices; none without KVM.
    bare: Option<BarePc>,
    /// Fills `memory`. Behind the machine, which may have to be stopped first.
    on_demand: Option<OnDemand>,
}

impl Parts {
    /// Opens and checks everything. `config` is changed where opening decides something: the path of a
    /// pseudo-terminal, the name of a tap.
    pub(super) fn open(
        config: &mut VmConfig,
        context: &VmContext,
        snapshot: Option<&Snapshot>,
    ) -> Result<Self, VmError> {
        Vcpus::check(&config.cpus).map_err(in_cpus)?;
        let groups = config.rate_limit_groups.as_deref().unwrap_or_default();
        let mut handles = Handles::new(groups);
        let disks = config.disks.iter().flatten();
        let disks = disks.map(|disk| handles.disk(disk));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let pmems = config.pmem.iter().flatten();
        let pmems = pmems.map(|pmem| handles.pmem(pmem));
        let pmems = pmems.collect::<Result<Vec<_>, _>>()?;
        let rng = devices::rng(config)?;
        let watchdog = devices::watchdog(config, &context.signals)?;
        let rtc = config.rtc.as_ref().map(devices::rtc);
        let nets = config.net.iter_mut().flatten();
        let nets = nets.map(|net| handles.net(net));
        let nets = nets.collect::<Result<Vec<_>, _>>()?;
        let (iommu, iommu_handle) = devices::iommu(config)?.unzip();
        let assigned = config.devices.iter().flatten();
        let assigned = assigned.map(|it| devices::assignment(it, iommu_handle.as_ref()));
        let assigned: Vec<_> = assigned.collect();
        for assignment in &assigned {
            assignment.check().map_err(VmError::Pc)?;
        }
        let payload = match snapshot {
            Some(_) => None,
            None => {
                let payload = config.payload.clone().unwrap_or_default();
                Some(PayloadFiles::open(&payload).map_err(in_payload)?)
            }
        };

        let mut bare = None;
        let (memory, on_demand) = match snapshot {
            Some(snapshot) => {
                let memory = snapshot.new_memory(config);
                let mut memory = memory.map_err(VmError::Snapshot)?;
                bare = match snapshot.take_pc() {
                    None => prepare(config, context, &mut memory)?,
                    received => received,
                };
                if let Some(bare) = &bare {
                    bare.check(&snapshot.pc).map_err(in_state)?;
                }
                let filled = snapshot.fill(&memory, config, &context.of_restore());
                (memory, filled.map_err(VmError::Snapshot)?)
            }
            None => {
                let memory = GuestMemory::new(&config.memory, config.cpus.max_phys_bits);
                (memory.map_err(in_memory)?, None)
            }
        };
        let mut memory = memory;
        // Before anything touches it.
        memory.watch(&context.signals);
        let payload = payload.map(|payload| payload.load(&memory));
        let payload = payload.transpose().map_err(in_payload)?;
        let balloon = config.balloon.as_ref();
        let balloon = balloon.map(|balloon| devices::balloon(balloon, &memory));
        let (balloon, balloon_handle) = balloon.transpose()?.unzip();
        let mems = devices::mems(config, &memory)?.into_iter();
        let mems = mems.map(|(made, handle)| {
            let id = made.plug.id.clone();
            (made, (id, handle))
        });
        let (mems, mem_handles): (Vec<_>, BTreeMap<_, _>) = mems.unzip();
        // Last, because an output file is emptied and an old socket replaced.
        let serial = consoles::open_serial(config, context)?;
        let console = consoles::open_console(config, context)?;
        let debug_console = consoles::open_debug_console(config, context)?;
        let fs = config.fs.iter().flatten().map(devices::fs);
        let fs = fs.collect::<Result<Vec<_>, _>>()?;
        let generic = config.generic_vhost_user.iter().flatten();
        let generic = generic.map(devices::generic_vhost_user);
        let generic = generic.collect::<Result<Vec<_>, _>>()?;
        let vsock = config.vsock.as_ref().map(devices::vsock).transpose()?;

        let disks_and_nets = disks.into_iter().chain(nets);
        Ok(Self {
            payload,
            memory,
            serial,
            debug_console,
            devices: console
                .into_iter()
                .chain(disks_and_nets)
                .chain([rng])
                .chain(fs)
                .chain(generic)
                .chain(pmems)
                .chain(vsock)
                .chain(balloon)
                .chain(mems)
                .chain(watchdog)
                .chain(rtc)
                .map(|made| made.connect(iommu_handle.as_ref()))
                .chain(iommu)
                .collect(),
            balloon: balloon_handle,
            mems: mem_handles,
            iommu: iommu_handle,
            assigned,
            handles,
            bare,
            on_demand,
        })
    }

    /// Creates the machine from the parts.
    fn assemble(
        mut self,
        config: &VmConfig,
        context: &VmContext,
        snapshot: Option<&Snapshot>,
    ) -> Result<Vm, VmError> {
        let saved = snapshot.map(|it| &it.pc);
        // Here, so that it is dropped after the machine if that cannot be assembled.
        let on_demand = self.on_demand.take();
        let residency =
            ResidencyProbe::new(self.memory.ram().clone()).map_err(VmError::Residency)?;
        let zones = self.memory.zones().to_vec();
        let ram_bytes = self.memory.own_bytes();
        let mut pc = match self.bare.take() {
            Some(bare) => bare.into_pc(),
            None => new_pc(&open_kvm()?, config, context, self.memory)?,
        };
        let mut outputs = Vec::new();
        if let Some(endpoint) = self.serial {
            outputs.push((SERIAL_ID.to_owned(), endpoint.output()));
            pc.plug_serial(endpoint).map_err(VmError::Pc)?;
        }
        if let Some(DebugConsole { port, output }) = self.debug_console {
            outputs.push((DEBUG_CONSOLE_ID.to_owned(), output.clone()));
            pc.plug_debug_console(port, output).map_err(VmError::Pc)?;
        }
        if saved.is_some() {
            // Rings of other devices may be in hot-plugged memory, which one of these opens, and behind the other. Slots
            // are those of the state.
            self.devices
                .sort_by_key(|made| !matches!(made.plug.kind, DeviceKind::Mem | DeviceKind::Iommu));
        }
        for made in self.devices {
            let plugged = match saved {
                Some(saved) => pc.plug_restored(made.plug, saved),
                None => pc.plug(made.plug),
            };
            let plugged = plugged.map_err(VmError::Pc)?;
            outputs.extend(made.output.map(|it| (plugged.id.clone(), it)));
        }
        let pins_all = self.assigned.iter().any(|it| it.iommu.is_none());
        let pin = match pins_all {
            true => pin::settled(self.balloon.as_ref())?,
            false => None,
        };
        for assignment in self.assigned {
            pc.plug_assigned(assignment).map_err(VmError::Pc)?;
        }
        let pvpanic = config.pvpanic.then(|| match saved {
            Some(saved) => pc.restore_pvpanic(saved),
            None => pc.plug_pvpanic(),
        });
        let pvpanic = pvpanic.transpose().map_err(VmError::Pc)?;
        if let Some(saved) = saved {
            let moved = snapshot.is_some_and(Snapshot::is_moved);
            pc.restore(saved, moved).map_err(VmError::Pc)?;
        }
        let observed = Observed {
            zones,
            residency,
            balloon: self.balloon.clone(),
            mems: self.mems.clone(),
            outputs,
        };
        let pvpanic = pvpanic.zip(pc.pvpanic_view());
        let observer = OwnObserver::new(observed, ram_bytes, pc.devices(), pvpanic.as_ref());
        Ok(Vm {
            pc,
            payload: self.payload,
            platform: config.platform.clone(),
            balloon: self.balloon,
            mems: self.mems,
            iommu: self.iommu,
            pin,
            handles: self.handles,
            observer,
            on_demand,
        })
    }
}

impl Vm {
    /// Opens everything a validated configuration names, loads the payload, and creates
    /// memory, vCPUs and devices. On an error nothing is left behind.
    ///
    /// `config` is changed where creation decides something: the path of a
    /// pseudo-terminal, the name of a tap.
    ///
    /// With a `snapshot`, the machine is restored from it and paused, and no payload is loaded.
    ///
    /// # Errors
    /// A part that could not be created or restored, with its cause.
    pub fn new(
        config: &mut VmConfig,
        context: &VmContext,
        snapshot: Option<&Snapshot>,
    ) -> Result<Self, VmError> {
        let parts = Parts::open(config, context, snapshot)?;
        parts.assemble(config, context, snapshot)
    }
}

/// The machine of a validated configuration without devices. `memory` gets its content later, before the devices are
/// added. No file of the configuration is opened.
///
/// # Errors
/// KVM cannot create it. Without KVM there is none, so that the errors about paths come first.
pub fn prepare(
    config: &VmConfig,
    context: &VmContext,
    memory: &mut GuestMemory,
) -> Result<Option<BarePc>, VmError> {
    let Ok(kvm) = open_kvm() else {
        return Ok(None);
    };
    memory.watch(&context.signals);
    let pc = new_pc(&kvm, config, context, memory.clone())?;
    BarePc::new(&kvm, pc).map(Some).map_err(in_state)
}

fn new_pc(
    kvm: &Kvm,
    config: &VmConfig,
    context: &VmContext,
    mut memory: GuestMemory,
) -> Result<Pc, VmError> {
    let phys_bits = guest_phys_bits(kvm, config.cpus.max_phys_bits).map_err(in_cpus)?;
    memory.narrow(phys_bits).map_err(in_memory)?;
    let params = PcParams {
        cpus: config.cpus.clone(),
        numa: config.numa.clone().unwrap_or_default(),
        pci_segments: segment_weights(config),
        wished_slots: wished_slots(config).collect(),
        iommu_segments: iommu_segments(config).to_vec(),
    };
    Pc::new(kvm, memory, params, context.of_machine()).map_err(VmError::Pc)
}

fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::open().map_err(|source| VmError::Pc(PcError::Kvm(source)))
}

fn in_cpus(source: CpuError) -> VmError {
    VmError::Pc(PcError::Cpu(source))
}

fn in_state(source: StateError) -> VmError {
    VmError::Pc(PcError::State(source))
}

fn in_payload(source: machine::boot::BootError) -> VmError {
    VmError::Pc(PcError::Payload(source))
}

fn in_memory(source: machine::memory::MemoryError) -> VmError {
    VmError::Pc(PcError::Memory(source))
}
