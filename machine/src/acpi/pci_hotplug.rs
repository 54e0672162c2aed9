//! AML that notifies the guest of added PCI functions and of removal requests (ACPI 6.5 §5.6.6, §6.3.3).
//!
//! ```text
//! GED_._EVT ─► PHPR.PSCN ─► PCxx.PCNT ─┬─ reads PCIU: Notify(S005, device check)
//!                                      └─ reads PCID: Notify(S005, eject request)
//! S005._EJ0 ─► PHPR.PCEJ ─── writes B0EJ: the function is released
//! ```
//! The registers are those of [`crate::pci::HotplugController`].

use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall,
    Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Path, Release, ResourceTemplate, ShiftLeft,
    Store,
};
use acpi_tables::{Aml, AmlSink};

use crate::pci::{HOTPLUG_BYTES, SLOT_COUNT};

/// A device was plugged in (ACPI 6.5, table 5.187).
pub(super) const DEVICE_CHECK: u8 = 1;
/// The guest must eject the device.
pub(super) const EJECT_REQUEST: u8 = 3;
/// No timeout: the owner of the lock only makes a few register accesses.
pub(super) const WAIT_FOR_EVER: u16 = 0xffff;
/// `_STA`: present, decoding and working, and hidden from the user.
pub(super) const STATUS_HIDDEN: u8 = 0b1011;

/// The method that the event device calls.
pub(super) const SCAN_METHOD: &str = "\\_SB_.PHPR.PSCN";

/// The name of a segment's host bridge.
pub(super) fn bridge_name(segment: u16) -> String {
    format!("_SB_.PC{segment:02X}")
}

/// The controller with its registers at `address`.
pub(super) fn controller(address: u64, segments: u16, aml: &mut dyn AmlSink) {
    let scan = |segment| {
        let method = format!("\\{}.PCNT", bridge_name(segment));
        MethodCall::new(Path::new(&method), vec![])
    };
    let scans: Vec<MethodCall<'_>> = (0..segments).map(scan).collect();
    let registers = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        address,
        address + HOTPLUG_BYTES - 1,
        None,
    );
    let register = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    Device::new(
        Path::new("_SB_.PHPR"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A06")),
            &Name::new(Path::new("_UID"), &"PCI Hotplug Controller"),
            &Name::new(Path::new("_STA"), &STATUS_HIDDEN),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers])),
            &Mutex::new(Path::new("BLCK"), 0),
            &OpRegion::new(
                Path::new("PCST"),
                OpRegionSpace::SystemMemory,
                &address,
                &HOTPLUG_BYTES,
            ),
            &Field::new(
                Path::new("PCST"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![
                    register(b"PCIU"),
                    register(b"PCID"),
                    register(b"B0EJ"),
                    register(b"PSEG"),
                ],
            ),
            // Arguments: slot, segment.
            &Method::new(
                Path::new("PCEJ"),
                2,
                true,
                vec![
                    &Acquire::new(Path::new("BLCK"), WAIT_FOR_EVER),
                    &Store::new(&Path::new("PSEG"), &Arg(1)),
                    &ShiftLeft::new(&Local(0), &ONE, &Arg(0)),
                    &Store::new(&Path::new("B0EJ"), &Local(0)),
                    &Release::new(Path::new("BLCK")),
                ],
            ),
            &Method::new(
                Path::new("PSCN"),
                0,
                true,
                scans.iter().map(|it| it as &dyn Aml).collect(),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The host bridge's part: a device for each hot-pluggable slot, and the method that notifies them.
pub(super) struct BridgeSlots {
    first: u8,
}

impl BridgeSlots {
    /// The slots of `segment`. Slot 0 of segment 0 is the bridge itself.
    pub(super) fn new(segment: u16) -> Self {
        Self {
            first: u8::from(segment == 0),
        }
    }
}

impl Aml for BridgeSlots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        for slot in self.first..SLOT_COUNT {
            slot_device(slot, sink);
        }
        tell_slots(self.first, sink);
        Method::new(
            Path::new("PCNT"),
            0,
            true,
            vec![
                &Acquire::new(Path::new("\\_SB_.PHPR.BLCK"), WAIT_FOR_EVER),
                &Store::new(&Path::new("\\_SB_.PHPR.PSEG"), &Path::new("_SEG")),
                &tell("\\_SB_.PHPR.PCIU", &DEVICE_CHECK),
                &tell("\\_SB_.PHPR.PCID", &EJECT_REQUEST),
                &Release::new(Path::new("\\_SB_.PHPR.BLCK")),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03}")
}

fn slot_device(slot: u8, sink: &mut dyn AmlSink) {
    Device::new(
        Path::new(&slot_name(slot)),
        vec![
            &Name::new(Path::new("_SUN"), &slot),
            &Name::new(Path::new("_ADR"), &(u32::from(slot) << 16)),
            &Method::new(
                Path::new("_EJ0"),
                1,
                true,
                vec![&MethodCall::new(
                    Path::new("\\_SB_.PHPR.PCEJ"),
                    vec![&Path::new("_SUN"), &Path::new("_SEG")],
                )],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// `DVNT(bitmap of slots, notification for them)`.
fn tell_slots(first: u8, sink: &mut dyn AmlSink) {
    struct TellSlot(u8);
    impl Aml for TellSlot {
        fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
            let bit = 1_u32 << self.0;
            And::new(&Local(0), &Arg(0), &bit).to_aml_bytes(sink);
            If::new(
                &Equal::new(&Local(0), &bit),
                vec![&Notify::new(&Path::new(&slot_name(self.0)), &Arg(1))],
            )
            .to_aml_bytes(sink);
        }
    }
    let slots: Vec<TellSlot> = (first..SLOT_COUNT).map(TellSlot).collect();
    let body = slots.iter().map(|slot| slot as &dyn Aml).collect();
    Method::new(Path::new("DVNT"), 2, true, body).to_aml_bytes(sink);
}

fn tell<'a>(register: &str, what: &'a dyn Aml) -> impl Aml + 'a {
    struct Tell<'a>(Path, &'a dyn Aml);
    impl Aml for Tell<'_> {
        fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
            Path::new("DVNT").to_aml_bytes(sink);
            self.0.to_aml_bytes(sink);
            self.1.to_aml_bytes(sink);
        }
    }
    Tell(Path::new(register), what)
}
