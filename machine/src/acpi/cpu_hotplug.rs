//! AML that notifies the guest of added vCPUs and of removal requests (ACPI 6.5 §8.4, §5.6.6, §6.3.3).
//!
//! ```text
//! GED_._EVT ─► CPUS.CSCN ─ for each vCPU ─┬─ CINS: Notify(C001, device check), acknowledged
//!                                         └─ CRMV: Notify(C001, eject request), acknowledged
//! C001._STA ─► CPUS.CSTA ─ reads CPEN
//! C001._EJ0 ─► CPUS.CEJ0 ─ writes CEJ0: the vCPU is released
//! ```
//! The registers are those of [`crate::cpu::CpuHotplug`].

use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, Arg, BufferData, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, LessThan, Local,
    Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Path, Release,
    ResourceTemplate, Return, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::fixed::apic_entry;
use super::params::VcpuEntry;
use super::pci_hotplug::{DEVICE_CHECK, EJECT_REQUEST, STATUS_HIDDEN, WAIT_FOR_EVER};
use crate::cpu::CPU_HOTPLUG_BYTES;

/// `_STA`: present, enabled, shown and working.
pub(super) const STATUS_PRESENT: u8 = 0xf;

/// The method that the event device calls.
pub(super) const SCAN_METHOD: &str = "\\_SB_.CPUS.CSCN";

const LOCK: &str = "\\_SB_.PRES.CPLK";
const SELECTED: &str = "\\_SB_.PRES.CSEL";
const PRESENT: &str = "\\_SB_.PRES.CPEN";
const INSERTING: &str = "\\_SB_.PRES.CINS";
const REMOVING: &str = "\\_SB_.PRES.CRMV";
const EJECT: &str = "\\_SB_.PRES.CEJ0";

/// The controller with its registers at `address`, and a device for each vCPU.
pub(super) fn controller(address: u64, vcpus: &[VcpuEntry], aml: &mut dyn AmlSink) {
    registers(address, aml);
    let devices: Vec<VcpuDevice> = (0..).zip(vcpus).map(VcpuDevice::new).collect();
    let count = vcpus.len();
    let mut parts: Vec<&dyn Aml> = Vec::new();
    let hid = Name::new(Path::new("_HID"), &"ACPI0010");
    let cid = Name::new(Path::new("_CID"), &EISAName::new("PNP0A05"));
    let methods = Methods { count };
    parts.extend([&hid as &dyn Aml, &cid, &methods]);
    parts.extend(devices.iter().map(|device| device as &dyn Aml));
    Device::new(Path::new("_SB_.CPUS"), parts).to_aml_bytes(aml);
}

fn registers(address: u64, aml: &mut dyn AmlSink) {
    let range = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        address,
        address + CPU_HOTPLUG_BYTES - 1,
        None,
    );
    let bit = |name: &[u8; 4]| FieldEntry::Named(*name, 1);
    Device::new(
        Path::new("_SB_.PRES"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
            &Name::new(Path::new("_UID"), &"CPU Hotplug Controller"),
            &Name::new(Path::new("_STA"), &STATUS_HIDDEN),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&range])),
            &Mutex::new(Path::new("CPLK"), 0),
            &OpRegion::new(
                Path::new("PRST"),
                OpRegionSpace::SystemMemory,
                &address,
                &CPU_HOTPLUG_BYTES,
            ),
            // The other bits are written as zeros: an acknowledgement does not eject.
            &Field::new(
                Path::new("PRST"),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![
                    FieldEntry::Reserved(32),
                    bit(b"CPEN"),
                    bit(b"CINS"),
                    bit(b"CRMV"),
                    bit(b"CEJ0"),
                ],
            ),
            &Field::new(
                Path::new("PRST"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::Preserve,
                vec![FieldEntry::Named(*b"CSEL", 32)],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The methods of the container.
struct Methods {
    count: usize,
}

impl Aml for Methods {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // CSTA(vCPU)
        Method::new(
            Path::new("CSTA"),
            1,
            true,
            vec![
                &Acquire::new(Path::new(LOCK), WAIT_FOR_EVER),
                &Store::new(&Path::new(SELECTED), &Arg(0)),
                &Store::new(&Local(0), &ZERO),
                &If::new(
                    &Equal::new(&Path::new(PRESENT), &ONE),
                    vec![&Store::new(&Local(0), &STATUS_PRESENT)],
                ),
                &Release::new(Path::new(LOCK)),
                &Return::new(&Local(0)),
            ],
        )
        .to_aml_bytes(sink);
        // CTFY(vCPU, notification)
        let notifications: Vec<NotifyVcpu> = (0..self.count).map(NotifyVcpu).collect();
        let body = notifications.iter().map(|it| it as &dyn Aml).collect();
        Method::new(Path::new("CTFY"), 2, true, body).to_aml_bytes(sink);
        // CEJ0(vCPU): upstream uses the name of the bit for the method.
        Method::new(
            Path::new("CEJ0"),
            1,
            true,
            vec![
                &Acquire::new(Path::new(LOCK), WAIT_FOR_EVER),
                &Store::new(&Path::new(SELECTED), &Arg(0)),
                &Store::new(&Path::new(EJECT), &ONE),
                &Release::new(Path::new(LOCK)),
            ],
        )
        .to_aml_bytes(sink);
        self.scan(sink);
    }
}

impl Methods {
    fn scan(&self, sink: &mut dyn AmlSink) {
        let notify = |what| MethodCall::new(Path::new("CTFY"), vec![&Local(0), what]);
        Method::new(
            Path::new("CSCN"),
            0,
            true,
            vec![
                &Acquire::new(Path::new(LOCK), WAIT_FOR_EVER),
                &Store::new(&Local(0), &ZERO),
                &While::new(
                    &LessThan::new(&Local(0), &self.count),
                    vec![
                        &Store::new(&Path::new(SELECTED), &Local(0)),
                        &If::new(
                            &Equal::new(&Path::new(INSERTING), &ONE),
                            vec![
                                &notify(&DEVICE_CHECK),
                                &Store::new(&Path::new(INSERTING), &ONE),
                            ],
                        ),
                        &If::new(
                            &Equal::new(&Path::new(REMOVING), &ONE),
                            vec![
                                &notify(&EJECT_REQUEST),
                                &Store::new(&Path::new(REMOVING), &ONE),
                            ],
                        ),
                        &Add::new(&Local(0), &Local(0), &ONE),
                    ],
                ),
                &Release::new(Path::new(LOCK)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn vcpu_name(index: usize) -> String {
    format!("C{index:03X}")
}

struct NotifyVcpu(usize);

impl Aml for NotifyVcpu {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        If::new(
            &Equal::new(&Arg(0), &self.0),
            vec![&Notify::new(&Path::new(&vcpu_name(self.0)), &Arg(1))],
        )
        .to_aml_bytes(sink);
    }
}

/// The device of one vCPU, present or not.
struct VcpuDevice {
    index: u32,
    apic_id: u32,
    domain: Option<u32>,
}

impl VcpuDevice {
    fn new((index, entry): (u32, &VcpuEntry)) -> Self {
        Self {
            index,
            apic_id: entry.apic_id,
            domain: entry.domain,
        }
    }
}

impl Aml for VcpuDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let call = |method| MethodCall::new(Path::new(method), vec![&self.index as &dyn Aml]);
        // Always marked as enabled: Linux rejects any other entry for a vCPU that it adds.
        let entry = BufferData::new(apic_entry(self.index, self.apic_id, true));
        let hid = Name::new(Path::new("_HID"), &"ACPI0007");
        let uid = Name::new(Path::new("_UID"), &self.index);
        let status = call("CSTA");
        let status = Return::new(&status);
        let status = Method::new(Path::new("_STA"), 0, false, vec![&status]);
        let entry = Name::new(Path::new("_MAT"), &entry);
        let domain = self.domain.map(|it| Name::new(Path::new("_PXM"), &it));
        let eject = call("CEJ0");
        let eject = Method::new(Path::new("_EJ0"), 1, false, vec![&eject]);
        let mut parts: Vec<&dyn Aml> = vec![&hid, &uid, &status, &entry];
        parts.extend(domain.iter().map(|it| it as &dyn Aml));
        // The first vCPU is never removed.
        if self.index > 0 {
            parts.push(&eject);
        }
        Device::new(Path::new(&vcpu_name(self.index as usize)), parts).to_aml_bytes(sink);
    }
}
