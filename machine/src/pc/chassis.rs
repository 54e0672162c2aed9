//! The parts of every machine before any device is plugged in: buses, interrupt delivery, PCI and the legacy devices.

use std::sync::Arc;

use hypervisor::Vm as KvmVm;

use super::PcError;
use super::params::PcParams;
use crate::bus::{Bus, BusDevice, BusError};
use crate::cpu::{CPU_HOTPLUG_BYTES, CpuHotplug};
use crate::interrupt::{GsiRouter, InterruptBackend, Ioapic};
use crate::legacy::{
    ACPI_POWER_PORTS, AcpiPower, CMOS_PORTS, Cmos, DEBUG_PORTS, DebugPort, FIRMWARE_DEBUG_PORTS,
    FirmwareDebug, GED_BYTES, GED_IRQ, Ged, I8042, I8042_PORTS, PM_TIMER_PORTS, PmTimer, Ports,
};
use crate::memory::layout::{
    AddressMap, IOAPIC_BYTES, IOAPIC_START, MEM_32BIT_DEVICES_BYTES, MEM_32BIT_DEVICES_START,
    pci_mmconfig,
};
use crate::memory::{GuestMemory, MEMORY_HOTPLUG_BYTES, MemoryHotplug};
use crate::pci::{
    CONFIG_PORT_BASE, CONFIG_PORT_BYTES, ConfigPorts, DoorbellBackend, ECAM_BYTES, Ecam, EjectSink,
    HOTPLUG_BYTES, HotplugController, LateDoorbells, PciSegments,
};
use crate::signals::VmSignals;

/// The offset of the PCI hot-plug controller from the event device: one page, so that a guest may map them separately.
const PCI_HOTPLUG_OFFSET: u64 = 0x1000;
/// The offset of the vCPU hot-plug controller.
const CPU_HOTPLUG_OFFSET: u64 = 0x2000;
/// That of the memory hot-plug controller.
const MEMORY_HOTPLUG_OFFSET: u64 = 0x3000;

/// The bare machine.
#[derive(Debug)]
pub(super) struct Chassis {
    pub(super) ports: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) router: Arc<GsiRouter>,
    pub(super) ioapic: Arc<Ioapic>,
    pub(super) doorbells: Arc<LateDoorbells>,
    pub(super) pci: PciSegments,
    pub(super) config_ports: Arc<ConfigPorts>,
    pub(super) cmos: Arc<Cmos>,
    pub(super) pm_timer: Arc<PmTimer>,
    pub(super) ged: Arc<Ged>,
    pub(super) ged_address: u64,
    pub(super) hotplug: Arc<HotplugController>,
    pub(super) pci_hotplug_address: u64,
    pub(super) cpu_hotplug: Arc<CpuHotplug>,
    pub(super) cpu_hotplug_address: u64,
    /// None if there is no room for more memory.
    pub(super) memory_hotplug: Option<Arc<MemoryHotplug>>,
    pub(super) memory_hotplug_address: u64,
}

impl Chassis {
    /// # Errors
    /// An overlap, which a correct address map excludes: a bug in the VMM.
    pub(super) fn new(
        kvm: &Arc<KvmVm>,
        memory: &GuestMemory,
        params: &PcParams,
        signals: &Arc<VmSignals>,
    ) -> Result<Self, PcError> {
        let map = memory.map();
        let ports = Arc::new(Bus::new());
        let mmio = Arc::new(Bus::new());
        let router = Arc::new(GsiRouter::new(Arc::clone(kvm) as Arc<dyn InterruptBackend>));
        let ioapic = Arc::new(Ioapic::new(Arc::clone(&router)));
        mmio.insert(
            IOAPIC_START,
            IOAPIC_BYTES,
            Arc::clone(&ioapic) as Arc<dyn BusDevice>,
        )
        .map_err(PcError::Bus)?;

        let doorbells = Arc::new(LateDoorbells::new(
            Arc::clone(kvm) as Arc<dyn DoorbellBackend>
        ));
        let pci = PciSegments::new(
            &params.pci_segments,
            &mmio,
            &(MEM_32BIT_DEVICES_START..MEM_32BIT_DEVICES_START + MEM_32BIT_DEVICES_BYTES),
            &map.devices_64bit,
            &(Arc::clone(&doorbells) as Arc<dyn DoorbellBackend>),
        )
        .map_err(PcError::Pci)?;
        for (segment, bus) in (0_u16..).zip(pci.buses()) {
            mmio.insert(pci_mmconfig(segment), ECAM_BYTES, Arc::new(Ecam::new(bus)))
                .map_err(PcError::Bus)?;
        }

        let line = ioapic
            .line(GED_IRQ)
            .expect("the I/O APIC has more pins than the event device's");
        let ged = Arc::new(Ged::new(line));
        let ged_address = map.platform_devices.start;
        mmio.insert(
            ged_address,
            GED_BYTES,
            Arc::clone(&ged) as Arc<dyn BusDevice>,
        )
        .map_err(PcError::Bus)?;

        let ejected = Arc::clone(signals);
        let sink: EjectSink = Arc::new(move || {
            // Fails only if the counter is full; the control thread is about to wake up then anyway.
            ejected.ejected.write(1).ok();
        });
        let hotplug = Arc::new(HotplugController::new(&pci, Arc::clone(&sink)));
        let pci_hotplug_address = map.platform_devices.start + PCI_HOTPLUG_OFFSET;
        mmio.insert(
            pci_hotplug_address,
            HOTPLUG_BYTES,
            Arc::clone(&hotplug) as Arc<dyn BusDevice>,
        )
        .map_err(PcError::Bus)?;

        let (boot, max) = (params.cpus.boot_vcpus, params.cpus.max_vcpus);
        let cpu_hotplug = Arc::new(CpuHotplug::new(boot, max, sink));
        let cpu_hotplug_address = map.platform_devices.start + CPU_HOTPLUG_OFFSET;
        mmio.insert(
            cpu_hotplug_address,
            CPU_HOTPLUG_BYTES,
            Arc::clone(&cpu_hotplug) as Arc<dyn BusDevice>,
        )
        .map_err(PcError::Bus)?;

        let dimms = memory.takes_dimms().then(|| memory.dimms());
        let memory_hotplug = dimms.map(|dimms| Arc::new(MemoryHotplug::new(dimms)));
        let memory_hotplug_address = map.platform_devices.start + MEMORY_HOTPLUG_OFFSET;
        if let Some(controller) = &memory_hotplug {
            mmio.insert(
                memory_hotplug_address,
                MEMORY_HOTPLUG_BYTES,
                Arc::clone(controller) as Arc<dyn BusDevice>,
            )
            .map_err(PcError::Bus)?;
        }

        let chassis = Self {
            config_ports: Arc::new(ConfigPorts::new(Arc::clone(&pci.buses()[0]))),
            cmos: Arc::new(Cmos::new(map.low_ram_end(), high_ram_bytes(map))),
            pm_timer: Arc::new(PmTimer::new()),
            ports,
            mmio,
            router,
            doorbells,
            ioapic,
            pci,
            ged,
            ged_address,
            hotplug,
            pci_hotplug_address,
            cpu_hotplug,
            cpu_hotplug_address,
            memory_hotplug,
            memory_hotplug_address,
        };
        chassis.plug_legacy(signals).map_err(PcError::Bus)?;
        Ok(chassis)
    }

    fn plug_legacy(&self, signals: &Arc<VmSignals>) -> Result<(), BusError> {
        let devices: [(Ports, Arc<dyn BusDevice>); 6] = [
            (I8042_PORTS, Arc::new(I8042::new(Arc::clone(signals)))),
            (CMOS_PORTS, Arc::clone(&self.cmos) as _),
            (DEBUG_PORTS, Arc::new(DebugPort::new())),
            (FIRMWARE_DEBUG_PORTS, Arc::new(FirmwareDebug::new())),
            (
                ACPI_POWER_PORTS,
                Arc::new(AcpiPower::new(Arc::clone(signals))),
            ),
            (PM_TIMER_PORTS, Arc::clone(&self.pm_timer) as _),
        ];
        for (ports, device) in devices {
            crate::legacy::insert(&self.ports, ports, device)?;
        }
        self.ports.insert(
            CONFIG_PORT_BASE,
            CONFIG_PORT_BYTES,
            Arc::clone(&self.config_ports) as _,
        )
    }
}

fn high_ram_bytes(map: &AddressMap) -> u64 {
    let high = map.ram.iter().skip(1);
    high.map(|range| range.end - range.start).sum()
}
