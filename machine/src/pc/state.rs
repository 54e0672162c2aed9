//! The saved state of the whole PC, and its restoration.
//!
//! ```text
//!  pause ─► state()
//!
//!  Pc::new ─► BarePc::check ─► serial port ─► plug_restored(each device) ─► restore_pvpanic ─► restore() ─► resume
//!                              (guest RAM has its content)                                    chips, vCPUs last
//! ```

use std::collections::BTreeMap;

use ::state::{Fields, Part, Saved, State, StateError, parts, require};
use hypervisor::Kvm;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddressSpace;

use super::{PVPANIC_ID, Pc, PcError, Plug, Plugged};
use crate::acpi;
use crate::cpu::{HostCpu, VcpusState};
use crate::legacy::{CmosState, GedState, PmTimerState};
use crate::pci::{Bdf, PciBusState, SlotState};

const PART: Part = parts::PC;

/// The state of a paused PC without the content of its RAM. Each part is a separately versioned envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcState {
    /// A `MemoryState`.
    pub memory: Saved,
    /// A `VcpusState`.
    pub vcpus: Saved,
    /// An `IoapicState`.
    pub ioapic: Saved,
    /// A `PciBusState`.
    pub pci_bus: Saved,
    /// A `HotplugState`.
    pub pci_hotplug: Saved,
    /// A `CpuHotplugState`; absent in a state of version 1.
    pub cpu_hotplug: Option<Saved>,
    /// A `MemoryHotplugState`, if there is room for more memory; absent in a state of version 1 to 3.
    pub memory_hotplug: Option<Saved>,
    /// A `VirtioPciState` of each virtio device, by the device's identifier.
    pub devices: BTreeMap<String, Saved>,
    /// A `PciConfigState`, if the machine has a pvpanic device.
    pub pvpanic: Option<Saved>,
    /// A `UartState`, if the machine has a serial port.
    pub serial: Option<Saved>,
    /// A `CmosState`.
    pub cmos: Saved,
    /// A `PmTimerState`.
    pub pm_timer: Saved,
    /// A `GedState`.
    pub ged: Saved,
    /// The guest's ACPI tables have a generation identifier; not so in a state of version 1 or 2.
    pub has_generation_id: bool,
}

impl State for PcState {
    const PART: Part = PART;

    fn upgrade(from: u32, fields: &mut Fields) -> Result<(), StateError> {
        match from {
            // vCPUs could not be hot-plugged.
            1 => fields.insert("cpu_hotplug".to_owned(), ().into()),
            2 => fields.insert("has_generation_id".to_owned(), false.into()),
            // Memory devices could not be added.
            _ => fields.insert("memory_hotplug".to_owned(), ().into()),
        };
        Ok(())
    }
}

/// A machine that is to be restored: it has no devices, and its vCPUs have not run.
#[derive(Debug)]
pub struct BarePc {
    pc: Pc,
    /// What this host provides to its vCPUs.
    host: HostCpu,
}

impl BarePc {
    /// Examines the vCPUs of the new machine `pc`.
    ///
    /// # Errors
    /// KVM fails.
    pub fn new(kvm: &Kvm, pc: Pc) -> Result<Self, StateError> {
        let host = HostCpu::examine(kvm, &pc.vcpus)?;
        Ok(Self { pc, host })
    }

    /// Checks whether this host can continue the saved vCPUs. Call it before RAM gets its content: the check is quick,
    /// and the vCPUs themselves are restored last.
    ///
    /// # Errors
    /// The list of what this host lacks.
    pub fn check(&self, state: &PcState) -> Result<(), StateError> {
        self.host.check(&state.vcpus.read()?)
    }

    /// The machine.
    pub fn into_pc(self) -> Pc {
        self.pc
    }
}

impl PcState {
    /// The saved slot of the function `id`, and its segment.
    fn slot(&self, id: &str) -> Result<(u16, SlotState), StateError> {
        let bus: PciBusState = self.pci_bus.read()?;
        let slot = bus.slot(id).map(|(segment, slot)| (segment, slot.clone()));
        slot.ok_or_else(|| StateError::invalid(PART, "pci_bus", format!("has no device {id}")))
    }
}

impl Pc {
    /// The state of the paused machine.
    ///
    /// # Errors
    /// The machine is not paused, KVM refuses to return a part, or a worker has ended. Also fails while the removal of
    /// a device or vCPU is pending: no configuration describes such a machine.
    pub fn state(&self) -> Result<PcState, PcError> {
        self.check_copyable()?;
        let chassis = &self.chassis;
        let hotplug = chassis.hotplug.state();
        let devices: Vec<&Plugged> = self
            .plugged
            .iter()
            .filter(|plugged| self.is_on_bus(plugged))
            .collect();
        let leaving = |plugged: &&&Plugged| hotplug.is_leaving(plugged.bdf);
        if let Some(plugged) = devices.iter().find(leaving) {
            let id = plugged.id.clone();
            return Err(PcError::Leaving { id });
        }
        let state_of = |plugged: &&Plugged| {
            let id = plugged.id.clone();
            let Some(virtio) = &plugged.virtio else {
                return Err(PcError::IsAssigned { id });
            };
            match virtio.state() {
                Ok(state) => Ok((id, Saved::of(&state))),
                Err(source) => Err(PcError::DeviceState { id, source }),
            }
        };
        let leaving = chassis.cpu_hotplug.leaving();
        if leaving > 0 {
            return Err(PcError::LeavingVcpus { count: leaving });
        }
        // Directly before the guest's other clocks.
        let pm_timer = chassis.pm_timer.state();
        let vcpus = self.vcpus.state(&chassis.cpu_hotplug.present_vcpus());
        Ok(PcState {
            memory: Saved::of(&self.memory.state()),
            vcpus: Saved::of(&vcpus.map_err(PcError::Cpu)?),
            ioapic: Saved::of(&chassis.ioapic.state()),
            pci_bus: Saved::of(&chassis.pci.state(chassis.config_ports.address())),
            pci_hotplug: Saved::of(&hotplug),
            cpu_hotplug: Some(Saved::of(&chassis.cpu_hotplug.state())),
            memory_hotplug: {
                let controller = chassis.memory_hotplug.as_ref();
                controller.map(|controller| Saved::of(&controller.state()))
            },
            devices: devices.iter().map(state_of).collect::<Result<_, _>>()?,
            pvpanic: self.pvpanic.as_ref().map(|it| Saved::of(&it.state())),
            serial: self.serial.as_ref().map(|uart| Saved::of(&uart.state())),
            cmos: Saved::of(&chassis.cmos.state()),
            pm_timer: Saved::of(&pm_timer),
            ged: Saved::of(&chassis.ged.state()),
            has_generation_id: self.has_generation_id,
        })
    }

    /// Puts a device with its saved state back into its slot. It stays paused until [`Pc::resume`].
    ///
    /// # Errors
    /// The state does not fit this device, or the host has no thread or descriptor left.
    pub fn plug_restored(&mut self, plug: Plug, state: &PcState) -> Result<&Plugged, PcError> {
        let id = plug.id.clone();
        let saved = state.devices.get(&id).ok_or_else(|| {
            let reason = format!("have no {id}, the configuration has");
            StateError::invalid(PART, "devices", reason)
        });
        let saved = saved.and_then(|saved| Ok((saved, state.slot(&id)?)));
        let (saved, (segment, slot)) = saved.map_err(PcError::State)?;
        self.chassis.router.collect();
        self.chassis.doorbells.collect();
        // Before the rings of the device are looked at.
        plug.place_endpoint(Bdf {
            segment,
            slot: slot.slot,
        });
        let function = self.function_of(&plug, Some(saved))?;
        let memory = self.map_memory_of(&plug, segment)?;
        let pci = &self.chassis.pci;
        let bdf = pci.add_restored(function.clone(), segment, &slot);
        let bdf = bdf.map_err(PcError::State)?;
        Ok(self.keep(Plugged::new(plug, bdf, function, memory)))
    }

    /// As [`Pc::plug_pvpanic`], with the saved state.
    ///
    /// # Errors
    /// The state has no such device or does not fit it.
    pub fn restore_pvpanic(&mut self, state: &PcState) -> Result<Bdf, PcError> {
        let pvpanic = self.new_pvpanic();
        let saved = state.pvpanic.as_ref().ok_or_else(|| {
            StateError::invalid(PART, "pvpanic", "is absent, the configuration has it")
        });
        let restored = saved
            .and_then(|saved| pvpanic.restore(&saved.read()?))
            .and_then(|()| {
                let (segment, slot) = state.slot(PVPANIC_ID)?;
                let pci = &self.chassis.pci;
                pci.add_restored(pvpanic.clone(), segment, &slot)
            });
        self.pvpanic = Some(pvpanic);
        restored.map_err(PcError::State)
    }

    /// Replaces [`Pc::boot`]: restores everything that is not a device in a slot. A copy of the saved machine gets a new
    /// generation identifier; a machine that has `moved` keeps its own. The machine is paused afterwards.
    ///
    /// # Errors
    /// The state belongs to another machine, KVM rejects it, or the host has no random numbers.
    pub fn restore(&mut self, state: &PcState, moved: bool) -> Result<(), PcError> {
        self.paused = true;
        self.chassis.router.collect();
        self.restore_chips(state).map_err(PcError::State)?;
        let routes = self.chassis.router.set_collected();
        routes.map_err(PcError::Routes)?;
        self.restore_time(state).map_err(PcError::State)?;
        self.has_generation_id = state.has_generation_id;
        if moved || !state.has_generation_id {
            return Ok(());
        }
        acpi::renew_generation_id(&*self.memory.ram().memory()).map_err(PcError::Acpi)?;
        // After the vCPUs: restoring their interrupt controllers would lose it.
        let ged = &self.chassis.ged;
        ged.announce_generation().map_err(PcError::Generation)
    }

    /// Restores vCPUs and clocks, which advance together.
    fn restore_time(&mut self, state: &PcState) -> Result<(), StateError> {
        let timer: PmTimerState = state.pm_timer.read()?;
        let vcpus: VcpusState = state.vcpus.read()?;
        let passed_ns = self.vcpus.restore(&vcpus)?;
        self.chassis.pm_timer.restore(timer.after(passed_ns));
        Ok(())
    }

    fn restore_chips(&self, state: &PcState) -> Result<(), StateError> {
        let chassis = &self.chassis;
        let bus: PciBusState = state.pci_bus.read()?;
        let functions = chassis.pci.functions();
        let missing = |slot: &SlotState| functions.iter().all(|(_, it)| it.id() != slot.id);
        if let Some((_, slot)) = bus.slots().find(|(_, slot)| missing(slot)) {
            let reason = format!("has device {}, the configuration has not", slot.id);
            return Err(StateError::invalid(PART, "pci_bus", reason));
        }
        let devices = state.devices.len();
        require(devices == self.plugged.len(), PART, "devices", || {
            format!(
                "are {devices}, the configuration has {}",
                self.plugged.len()
            )
        })?;
        chassis.pci.restore_reserved(&bus)?;
        chassis.config_ports.restore_address(bus.config_address);
        chassis.hotplug.restore(&state.pci_hotplug.read()?)?;
        if let Some(saved) = &state.cpu_hotplug {
            chassis.cpu_hotplug.restore(&saved.read()?)?;
        }
        if let (Some(controller), Some(saved)) = (&chassis.memory_hotplug, &state.memory_hotplug) {
            controller.restore(&saved.read()?)?;
        }
        chassis.ioapic.restore(&state.ioapic.read()?)?;
        chassis.cmos.restore(&state.cmos.read::<CmosState>()?)?;
        chassis.ged.restore(&state.ged.read::<GedState>()?)?;
        match (&self.serial, &state.serial) {
            (Some(uart), Some(saved)) => uart.restore(&saved.read()?),
            (None, None) => Ok(()),
            (own, _) => {
                let own = if own.is_some() { "has" } else { "has not" };
                let reason = format!("differs: the configuration {own} a serial port");
                Err(StateError::invalid(PART, "serial", reason))
            }
        }
    }
}
