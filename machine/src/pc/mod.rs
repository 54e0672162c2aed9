//! The whole machine: memory, vCPUs and buses; device hot-plug; boot, pause and shutdown.
//!
//! One thread owns it. No call makes that thread wait for the guest.

mod assign;
mod chassis;
mod coredump;
mod device_events;
mod device_memory;
mod devices;
mod error;
mod exits;
mod grow;
mod memory_failure;
mod params;
mod plugged;
mod pvpanic;
mod state;
#[cfg(test)]
mod tests;
mod vcpus;

use std::ops::Range;
use std::sync::{Arc, Weak};

use api::config::{NumaConfig, PlatformConfig};
use hypervisor::Kvm;
use virtio_devices::pci::pause_all;
use vm_memory::GuestAddressSpace;

use crate::acpi::{self, AcpiParams, IommuEntry, NumaNode, PciSegmentEntry, VcpuEntry};
use crate::assigned::Containers;
use crate::boot::Payload;
use crate::bus::BusDevice;
use crate::cpu::{GuestEvent, VcpuBrake, Vcpus, VcpusContext};
use crate::events::DeviceEventSink;
use crate::interrupt::IOAPIC_PIN_COUNT;
use crate::legacy::DebugConsole;
use crate::memory::{GuestMemory, MemoryFault, MemoryFaults, RamSlots, WriteTracker, ZoneKind};
use crate::pci::{Bdf, PciBus, Place};
use crate::serial::{Endpoint, Output, SERIAL_IRQ, SERIAL_PORTS, Uart};
use crate::signals::VmSignals;
use crate::threads::{DeviceKind, MachineThreadStart};
use chassis::Chassis;
use device_events::DeviceEvents;
use device_memory::DeviceSlots;
use exits::Exits;
use pvpanic::Pvpanic;

pub use assign::Assignment;
pub use error::{CoreError, PcError};
pub use params::PcParams;
pub use plugged::{FunctionView, Plug, Plugged};
pub use pvpanic::PVPANIC_ID;
#[cfg(any(test, fuzzing))]
pub(crate) use pvpanic::Pvpanic as PvpanicFunction;
pub use state::{BarePc, PcState};

/// The environment of a machine.
#[derive(Clone)]
pub struct PcContext {
    /// Signals to the machine's owner.
    pub signals: Arc<VmSignals>,
    /// Called first on every thread.
    pub thread_start: MachineThreadStart,
    /// Called when a driver initialises or releases a device.
    pub events: DeviceEventSink,
}

virtio_devices::debug_fields!(PcContext { signals });

/// One machine. Dropping it stops everything that it started.
///
/// The order of the fields is the drop order: first everything that accesses guest RAM, RAM itself last.
#[derive(Debug)]
pub struct Pc {
    vcpus: Vcpus,
    plugged: Vec<Plugged>,
    /// Set between [`Pc::pause`] and [`Pc::resume`].
    paused: bool,
    serial: Option<Arc<Uart>>,
    pvpanic: Option<Arc<Pvpanic>>,
    /// The guest's ACPI tables have one.
    has_generation_id: bool,
    chassis: Chassis,
    device_slots: Arc<DeviceSlots>,
    /// Memory that assigned devices can access.
    containers: Containers,
    params: PcParams,
    /// Needed for devices that are hot-plugged.
    context: PcContext,
    slots: RamSlots,
    faults: Arc<MemoryFaults>,
    memory: GuestMemory,
}

impl Pc {
    /// Creates the machine with `memory`; no slot holds a device yet. On an error nothing is left behind.
    ///
    /// # Errors
    /// KVM fails, or the host cannot run such vCPUs.
    pub fn new(
        kvm: &Kvm,
        mut memory: GuestMemory,
        params: PcParams,
        context: PcContext,
    ) -> Result<Self, PcError> {
        let faults = memory.watch(&context.signals);
        let vm = Arc::new(kvm.create_vm().map_err(PcError::Kvm)?);
        vm.enable_split_irqchip(u32::from(IOAPIC_PIN_COUNT))
            .map_err(PcError::Kvm)?;
        let slots = memory.attach(&vm).map_err(PcError::Memory)?;
        let device_slots = DeviceSlots::new(Arc::clone(&vm), slots.end());
        let chassis = Chassis::new(&vm, &memory, &params, &context.signals)?;
        for hotplug in memory.hotplug_ram() {
            let Range { start, end } = hotplug.range();
            let closed = Arc::clone(hotplug) as Arc<dyn BusDevice>;
            let inserted = chassis.mmio.insert(start, end - start, closed);
            inserted.map_err(PcError::Bus)?;
        }
        chassis.pci.reserve(params.wished_slots.iter().copied());
        let vcpus_context = VcpusContext {
            handler: Arc::new(Exits::new(&chassis, &memory, &faults)),
            events: guest_events(&context.signals, &faults),
            thread_start: Arc::clone(&context.thread_start),
        };
        let vcpus = Vcpus::new(kvm, &vm, &params.cpus, vcpus_context).map_err(PcError::Cpu)?;
        Ok(Self {
            vcpus,
            plugged: Vec::new(),
            paused: false,
            serial: None,
            pvpanic: None,
            has_generation_id: false,
            chassis,
            device_slots,
            containers: Containers::default(),
            params,
            context,
            slots,
            faults,
            memory,
        })
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Connects a serial port to `endpoint`.
    ///
    /// # Errors
    /// An overlap, which a correct layout excludes: a bug in the VMM.
    pub fn plug_serial(&mut self, endpoint: Arc<Endpoint>) -> Result<(), PcError> {
        let line = self
            .chassis
            .ioapic
            .line(SERIAL_IRQ)
            .expect("the I/O APIC has more pins than the serial port's");
        let uart = Uart::new(line, endpoint);
        crate::legacy::insert(&self.chassis.ports, SERIAL_PORTS, uart.clone())
            .map_err(PcError::Bus)?;
        self.serial = Some(uart);
        Ok(())
    }

    /// Passes the guest's writes to `port` on to `output`.
    ///
    /// # Errors
    /// The port belongs to another device.
    pub fn plug_debug_console(&mut self, port: u16, output: Output) -> Result<(), PcError> {
        let console = Arc::new(DebugConsole::new(Box::new(output)));
        crate::legacy::insert(&self.chassis.ports, (port, 1), console).map_err(PcError::Bus)
    }

    /// Adds the device through which the guest reports its panic to the bus.
    ///
    /// # Errors
    /// No free slot.
    pub fn plug_pvpanic(&mut self) -> Result<Bdf, PcError> {
        let pvpanic = self.new_pvpanic();
        let bdf = self.chassis.pci.add(pvpanic.clone(), Place::default());
        self.pvpanic = Some(pvpanic);
        bdf.map_err(|source| PcError::Device {
            id: PVPANIC_ID.to_owned(),
            source: source.into(),
        })
    }

    /// A view of that device, if there is one.
    pub fn pvpanic_view(&self) -> Option<FunctionView> {
        let pvpanic = self.pvpanic.as_ref()?;
        let function: Weak<Pvpanic> = Arc::downgrade(pvpanic);
        Some(FunctionView::new(function))
    }

    fn new_pvpanic(&self) -> Arc<Pvpanic> {
        let events = DeviceEvents::new(Arc::clone(&self.context.events));
        Arc::new(Pvpanic::new(events))
    }

    /// Sends a non-maskable interrupt to every vCPU that the guest has started, and returns immediately. vCPUs that are
    /// paused receive it when they are resumed.
    pub fn nmi(&self) {
        self.vcpus.nmi();
    }

    /// Passes the description of the machine to a loaded payload and starts the vCPUs.
    ///
    /// # Errors
    /// The tables do not fit, or a vCPU cannot be set up.
    pub fn boot(
        &mut self,
        payload: &Payload,
        platform: Option<&PlatformConfig>,
    ) -> Result<(), PcError> {
        let rsdp_address = {
            let ram = self.memory.ram().memory();
            acpi::build(&self.acpi_params(), &*ram).map_err(PcError::Acpi)?
        };
        self.has_generation_id = true;
        let entry = payload
            .write_boot_data(&self.memory, platform, rsdp_address)
            .map_err(PcError::Payload)?;
        self.vcpus.configure(entry).map_err(PcError::Cpu)?;
        self.vcpus.start().map_err(PcError::Cpu)
    }

    fn acpi_params(&self) -> AcpiParams {
        let topology = self.vcpus.topology();
        let cpus = &self.params.cpus;
        AcpiParams {
            vcpus: (0..cpus.max_vcpus)
                .map(|index| VcpuEntry {
                    apic_id: topology.apic_id(index),
                    enabled: index < cpus.boot_vcpus,
                    domain: self.domain(|node| node.cpus.iter().flatten().any(|it| *it == index)),
                })
                .collect(),
            pci_segments: self.pci_segments(),
            ged_address: self.chassis.ged_address,
            pci_hotplug_address: self.chassis.pci_hotplug_address,
            cpu_hotplug_address: self.chassis.cpu_hotplug_address,
            memory_hotplug_address: {
                let controller = self.chassis.memory_hotplug.as_ref();
                controller.map(|_| self.chassis.memory_hotplug_address)
            },
            has_serial: self.serial.is_some(),
            numa: self.numa_nodes(),
            iommu: self.iommu_entry(),
        }
    }

    fn iommu_entry(&self) -> Option<IommuEntry> {
        let iommu = self
            .plugged
            .iter()
            .find(|it| it.kind == DeviceKind::Iommu)?;
        let behind = self.plugged.iter().filter(|it| it.is_behind_iommu);
        Some(IommuEntry {
            bdf: iommu.bdf,
            functions: behind.map(|it| it.bdf).collect(),
            segments: self.params.iommu_segments.clone(),
        })
    }

    fn pci_segments(&self) -> Vec<PciSegmentEntry> {
        let segments = (0_u16..).zip(self.chassis.pci.buses());
        let entry = |(segment, bus): (u16, &Arc<PciBus>)| PciSegmentEntry {
            windows: bus.windows(),
            domain: self.domain(|node| {
                let mut segments = node.pci_segments.iter().flatten();
                segments.any(|it| *it == segment)
            }),
        };
        segments.map(entry).collect()
    }

    /// The first NUMA node for which `owns` is true.
    fn domain(&self, owns: impl Fn(&NumaConfig) -> bool) -> Option<u32> {
        let mut nodes = self.params.numa.iter();
        nodes.find(|node| owns(node)).map(|node| node.guest_numa_id)
    }

    fn numa_nodes(&self) -> Vec<NumaNode> {
        let topology = self.vcpus.topology();
        let nodes = self.params.numa.iter().map(|node| {
            let names = node.memory_zones.as_deref().unwrap_or_default();
            let ranges = |is_of: fn(ZoneKind) -> bool| {
                let zones = self.memory.zones().iter();
                zones
                    .filter(|zone| {
                        is_of(zone.kind) && names.iter().any(|it| it == zone.configured_id())
                    })
                    .flat_map(|zone| zone.ranges.clone())
                    .collect()
            };
            let distances = node.distances.iter().flatten();
            NumaNode {
                domain: node.guest_numa_id,
                apic_ids: node
                    .cpus
                    .iter()
                    .flatten()
                    .map(|vcpu| topology.apic_id(*vcpu))
                    .collect(),
                ram: ranges(|kind| kind != ZoneKind::VirtioMem),
                hotplug: ranges(|kind| kind == ZoneKind::VirtioMem),
                distances: distances
                    .map(|distance| (distance.destination, distance.distance))
                    .collect(),
            }
        });
        nodes.collect()
    }

    /// Stops vCPUs and device workers. After it returns, guest memory no longer changes.
    ///
    /// # Errors
    /// A vCPU did not stop within its deadline; the machine continues to run then.
    pub fn pause(&mut self) -> Result<(), PcError> {
        self.vcpus.pause().map_err(PcError::Cpu)?;
        // All at once. The IOMMU also finishes a removal of memory when the devices behind it have no request in flight.
        pause_all(self.plugged.iter().map(|it| &*it.function));
        self.paused = true;
        Ok(())
    }

    /// Starts to record the pages of RAM that are written; see [`WriteTracker`].
    ///
    /// # Errors
    /// KVM cannot record writes, or those of an assigned device.
    pub fn track_writes(&self) -> Result<WriteTracker, PcError> {
        self.check_copyable()?;
        let tracker = self.slots.track_writes(&self.memory);
        tracker.map_err(PcError::Memory)
    }

    /// A brake for its vCPUs. At most one may exist.
    pub fn brake(&self) -> VcpuBrake {
        self.vcpus.brake()
    }

    /// Undoes [`Pc::pause`].
    pub fn resume(&mut self) {
        self.paused = false;
        for plugged in &self.plugged {
            plugged.function.resume();
        }
        self.vcpus.resume();
    }

    /// Registers with KVM the doorbells that a restored machine does not need in order to run. To be called after
    /// [`Pc::resume`].
    pub fn register_doorbells(&self) {
        self.chassis.doorbells.register_collected();
    }

    /// Stops the vCPUs, and begins to stop the devices, for which the drop waits.
    ///
    /// # Errors
    /// A vCPU did not end within its deadline.
    pub fn shutdown(&mut self) -> Result<(), PcError> {
        self.vcpus.stop().map_err(PcError::Cpu)?;
        for plugged in &self.plugged {
            plugged.function.begin_stop();
        }
        Ok(())
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn power_button(&self) -> Result<(), PcError> {
        self.chassis
            .ged
            .press_power_button()
            .map_err(PcError::PowerButton)
    }
}

/// The signal for an event that ends the guest, or makes it wait for memory.
fn guest_events(
    signals: &Arc<VmSignals>,
    faults: &Arc<MemoryFaults>,
) -> Arc<dyn Fn(GuestEvent) + Send + Sync> {
    let (signals, faults) = (Arc::clone(signals), Arc::clone(faults));
    Arc::new(move |event| {
        let signal = match event {
            GuestEvent::Reset => &signals.reset,
            GuestEvent::Shutdown => &signals.shutdown,
            GuestEvent::Failed => &signals.failed,
            GuestEvent::MemoryUnavailable { vcpu } => {
                return faults.add(MemoryFault::Vcpu { vcpu });
            }
        };
        if let Err(error) = signal.write(1) {
            log::error!("Cannot notify the control thread of {event:?}: {error}");
        }
    })
}
