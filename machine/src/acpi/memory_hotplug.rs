//! AML that notifies the guest of added memory devices (ACPI 6.5 §9.11, §5.6.6).
//!
//! ```text
//! GED_._EVT ─► MHPC.MSCN ─ for each device ── MINS: Notify(M001, device check), acknowledged
//! M001._STA ─► MHPC.MSTA ─ reads MEN_
//! M001._CRS ─► MHPC.MCRS ─ reads address and size
//! ```
//! The registers are those of [`crate::memory::MemoryHotplug`].

use acpi_tables::aml::{
    Acquire, Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, Device, EISAName,
    Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, LessThan, Local,
    Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Or, Path, Release,
    ResourceTemplate, Return, ShiftLeft, Store, Subtract, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::cpu_hotplug::STATUS_PRESENT;
use super::pci_hotplug::{DEVICE_CHECK, WAIT_FOR_EVER};
use crate::memory::{DIMMS_MAX, MEMORY_HOTPLUG_BYTES};

/// The method that the event device calls.
pub(super) const SCAN_METHOD: &str = "\\_SB_.MHPC.MSCN";

/// Offsets of the minimum, maximum and length in a QWord address space descriptor (ACPI 6.5 §6.4.3.5.1).
const MINIMUM_AT: u8 = 14;
const MAXIMUM_AT: u8 = 22;
const LENGTH_AT: u8 = 38;
/// Bits of a register.
const HALF_BITS: u8 = 32;

/// The controller with its registers at `address`, and a device for each slot.
pub(super) fn controller(address: u64, aml: &mut dyn AmlSink) {
    let range = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        address,
        address + MEMORY_HOTPLUG_BYTES - 1,
        None,
    );
    let slots: Vec<Slot> = (0..DIMMS_MAX as u8).map(Slot).collect();
    let register = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    let registers = |entries| {
        Field::new(
            Path::new("MHPR"),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::Preserve,
            entries,
        )
    };
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0A06"));
    let uid = Name::new(Path::new("_UID"), &"Memory Hotplug Controller");
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&range]));
    let lock = Mutex::new(Path::new("MLCK"), 0);
    let region = OpRegion::new(
        Path::new("MHPR"),
        OpRegionSpace::SystemMemory,
        &address,
        &MEMORY_HOTPLUG_BYTES,
    );
    let reads = registers(vec![
        register(b"MHBL"),
        register(b"MHBH"),
        register(b"MHLL"),
        register(b"MHLH"),
    ]);
    // The other bits are written as zeros.
    let status = Field::new(
        Path::new("MHPR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Reserved(0x14 * 8),
            FieldEntry::Named(*b"MEN_", 1),
            FieldEntry::Named(*b"MINS", 1),
        ],
    );
    let writes = registers(vec![register(b"MSEL")]);
    let mut parts: Vec<&dyn Aml> = vec![&hid, &uid, &resources, &lock, &region];
    parts.extend([&reads as &dyn Aml, &status, &writes, &Methods]);
    parts.extend(slots.iter().map(|slot| slot as &dyn Aml));
    Device::new(Path::new("_SB_.MHPC"), parts).to_aml_bytes(aml);
}

struct Methods;

impl Aml for Methods {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // MTFY(slot, notification)
        let notifications: Vec<NotifySlot> = (0..DIMMS_MAX as u8).map(NotifySlot).collect();
        let body = notifications.iter().map(|it| it as &dyn Aml).collect();
        Method::new(Path::new("MTFY"), 2, true, body).to_aml_bytes(sink);
        scan(sink);
        // MSTA(slot)
        Method::new(
            Path::new("MSTA"),
            1,
            true,
            vec![
                &Acquire::new(Path::new("MLCK"), WAIT_FOR_EVER),
                &Store::new(&Path::new("MSEL"), &Arg(0)),
                &Store::new(&Local(0), &ZERO),
                &If::new(
                    &Equal::new(&Path::new("MEN_"), &ONE),
                    vec![&Store::new(&Local(0), &STATUS_PRESENT)],
                ),
                &Release::new(Path::new("MLCK")),
                &Return::new(&Local(0)),
            ],
        )
        .to_aml_bytes(sink);
        resources(sink);
    }
}

fn scan(sink: &mut dyn AmlSink) {
    Method::new(
        Path::new("MSCN"),
        0,
        true,
        vec![
            &Acquire::new(Path::new("MLCK"), WAIT_FOR_EVER),
            &Store::new(&Local(0), &ZERO),
            &While::new(
                &LessThan::new(&Local(0), &DIMMS_MAX),
                vec![
                    &Store::new(&Path::new("MSEL"), &Local(0)),
                    &If::new(
                        &Equal::new(&Path::new("MINS"), &ONE),
                        vec![
                            &MethodCall::new(Path::new("MTFY"), vec![&Local(0), &DEVICE_CHECK]),
                            &Store::new(&Path::new("MINS"), &ONE),
                        ],
                    ),
                    &Add::new(&Local(0), &Local(0), &ONE),
                ],
            ),
            &Release::new(Path::new("MLCK")),
        ],
    )
    .to_aml_bytes(sink);
}

/// MCRS(slot): the range of the device, as a resource.
fn resources(sink: &mut dyn AmlSink) {
    // The values are filled in; those here only make a descriptor of 64 bits.
    let range = AddressSpace::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        0_u64,
        u64::MAX - 1,
        None,
    );
    let (buffer, minimum) = (Path::new("MR64"), Path::new("MMIN"));
    let (maximum, length) = (Path::new("MMAX"), Path::new("MLEN"));
    let start = Joined("MHBL", "MHBH");
    let bytes = Joined("MHLL", "MHLH");
    Method::new(
        Path::new("MCRS"),
        1,
        true,
        vec![
            &Acquire::new(Path::new("MLCK"), WAIT_FOR_EVER),
            &Store::new(&Path::new("MSEL"), &Arg(0)),
            &Name::new(Path::new("MR64"), &ResourceTemplate::new(vec![&range])),
            &CreateQWordField::new(&minimum, &buffer, &MINIMUM_AT),
            &CreateQWordField::new(&maximum, &buffer, &MAXIMUM_AT),
            &CreateQWordField::new(&length, &buffer, &LENGTH_AT),
            &start,
            &Store::new(&Path::new("MMIN"), &Local(0)),
            &Store::new(&Local(1), &Local(0)),
            &bytes,
            &Store::new(&Path::new("MLEN"), &Local(0)),
            &Add::new(&Local(1), &Local(1), &Local(0)),
            &Subtract::new(&Path::new("MMAX"), &Local(1), &ONE),
            &Release::new(Path::new("MLCK")),
            &Return::new(&Path::new("MR64")),
        ],
    )
    .to_aml_bytes(sink);
}

/// Stores the value of two registers, the low half first, in `Local0`.
struct Joined(&'static str, &'static str);

impl Aml for Joined {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (low, high) = (Path::new(self.0), Path::new(self.1));
        ShiftLeft::new(&Local(0), &high, &HALF_BITS).to_aml_bytes(sink);
        Or::new(&Local(0), &Local(0), &low).to_aml_bytes(sink);
    }
}

fn slot_name(index: u8) -> String {
    format!("M{index:03}")
}

struct NotifySlot(u8);

impl Aml for NotifySlot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        If::new(
            &Equal::new(&Arg(0), &self.0),
            vec![&Notify::new(&Path::new(&slot_name(self.0)), &Arg(1))],
        )
        .to_aml_bytes(sink);
    }
}

/// A memory device, there or not.
struct Slot(u8);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let call = |method| MethodCall::new(Path::new(method), vec![&self.0 as &dyn Aml]);
        let (status, resources) = (call("MSTA"), call("MCRS"));
        Device::new(
            Path::new(&slot_name(self.0)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C80")),
                &Name::new(Path::new("_UID"), &self.0),
                &Method::new(Path::new("_STA"), 0, false, vec![&Return::new(&status)]),
                &Method::new(Path::new("_CRS"), 0, true, vec![&Return::new(&resources)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
