//! Tests assigned functions with an in-memory device instead of VFIO.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vfio_ioctls::VfioError;
use virtio_devices::pci::{Bar, MsiMessage, PciFunction};
use vmm_sys_util::eventfd::EventFd;

use super::claims::{Claim, Claims, Occupancy};
use super::function::{AssignedFunction, BarSlots};
use super::host::{HostDevice, HostMapping, InterruptKind};
use super::{AssignError, VfioFunction};
use crate::interrupt::fake::FakeBackend;
use crate::interrupt::{FunctionVectors, GsiRouter};

const MSIX: u16 = 0x70;
const MSI: u16 = 0x50;
const VECTORS: u16 = 3;
/// Of BAR 0, a 64-bit one.
const BAR_BYTES: u64 = 0x8000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;

/// The function's accesses to the device.
#[derive(Debug, Default)]
struct Seen {
    config_writes: Vec<(u16, Vec<u8>)>,
    bar_writes: Vec<(u8, u64, Vec<u8>)>,
    /// The descriptors of the events.
    interrupts: Vec<(bool, Vec<i32>)>,
    resets: usize,
}

struct Device {
    config: [u8; 256],
    file: File,
    seen: Mutex<Seen>,
    refuses_interrupts: AtomicBool,
}

impl Device {
    /// A device with MSI, MSI-X, PCI Express, power management and a vendor's capability; a 64-bit BAR 0, an I/O BAR 2
    /// and a BAR 3 of 256 bytes.
    fn new() -> Self {
        let mut config = [0; 256];
        config[0..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        config[4..6].copy_from_slice(&[0x46, 0x01]);
        config[8..12].copy_from_slice(&[2, 2, 8, 1]);
        config[0x0e] = 0x80;
        config[0x10] = 0xc;
        config[0x18] = 1;
        config[0x34] = 0x40;
        config[0x3d] = 1;
        let links: [(usize, u8, u8); 5] = [
            (0x40, 0x01, 0x50),
            (0x50, 0x05, 0x60),
            (0x60, 0x09, 0x70),
            (0x70, 0x11, 0x80),
            (0x80, 0x10, 0),
        ];
        for (at, id, next) in links {
            config[at] = id;
            config[at + 1] = next;
            config[at + 2..at + 12].fill(0xee);
        }
        // 64 bits, several vectors, masks.
        config[0x52..0x54].copy_from_slice(&[0x8a, 0x01]);
        config[0x62] = 8;
        config[0x72..0x74].copy_from_slice(&(0x8000 | (VECTORS - 1)).to_le_bytes());
        config[0x74..0x78].copy_from_slice(&(TABLE as u32).to_le_bytes());
        config[0x78..0x7c].copy_from_slice(&(PENDING as u32).to_le_bytes());
        let file = tempfile::tempfile().unwrap();
        file.set_len(BAR_BYTES).unwrap();
        Self {
            config,
            file,
            seen: Mutex::default(),
            refuses_interrupts: AtomicBool::new(false),
        }
    }
}

impl HostDevice for Device {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        data.copy_from_slice(&self.config[start..start + data.len()]);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut seen = self.seen.lock().unwrap();
        seen.config_writes.push((offset, data.to_vec()));
    }

    fn bar_bytes(&self, index: u8) -> u64 {
        match index {
            0 => BAR_BYTES,
            2 => 32,
            3 => 256,
            _ => 0,
        }
    }

    fn bar_areas(&self, index: u8) -> Vec<Range<u64>> {
        match index {
            0 => std::iter::once(0..BAR_BYTES).collect(),
            _ => Vec::new(),
        }
    }

    fn map(&self, _index: u8, area: &Range<u64>) -> io::Result<HostMapping> {
        HostMapping::new(&self.file, area.start, area.end - area.start)
    }

    fn bar_read(&self, _index: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xdd);
    }

    fn bar_write(&self, index: u8, offset: u64, data: &[u8]) {
        let mut seen = self.seen.lock().unwrap();
        seen.bar_writes.push((index, offset, data.to_vec()));
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), VfioError> {
        let events = events.iter().map(AsRawFd::as_raw_fd).collect();
        let mut seen = self.seen.lock().unwrap();
        seen.interrupts.push((kind == InterruptKind::Msix, events));
        match self.refuses_interrupts.load(Ordering::Relaxed) {
            true => Err(VfioError::InvalidPath),
            false => Ok(()),
        }
    }

    fn reset(&self) {
        self.seen.lock().unwrap().resets += 1;
    }

    fn unanswered_accesses(&self) -> u64 {
        0
    }
}

#[derive(Debug, Default)]
struct Slots(Mutex<BTreeMap<u32, (u64, u64)>>);

impl BarSlots for Slots {
    fn add(&self, guest_address: u64, mapping: &HostMapping) -> io::Result<u32> {
        let mut slots = self.0.lock().unwrap();
        let number = (0..).find(|number| !slots.contains_key(number)).unwrap();
        slots.insert(number, (guest_address, mapping.bytes()));
        Ok(number)
    }

    fn remove(&self, number: u32) -> io::Result<()> {
        let removed = self.0.lock().unwrap().remove(&number);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

struct Rig {
    device: Arc<Device>,
    slots: Arc<Slots>,
    backend: Arc<FakeBackend>,
    function: Arc<AssignedFunction>,
}

fn assign(device: Device) -> Result<Rig, AssignError> {
    let (device, slots) = (Arc::new(device), Arc::new(Slots::default()));
    let backend = Arc::new(FakeBackend::default());
    let router = Arc::new(GsiRouter::new(backend.clone()));
    let vectors = |events| FunctionVectors::of_events(router, events);
    let function = AssignedFunction::new("_vfio0", (device.clone(), None), slots.clone(), vectors)?;
    Ok(Rig {
        device,
        slots,
        backend,
        function,
    })
}

fn rig() -> Rig {
    assign(Device::new()).unwrap()
}

impl Rig {
    fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u16, value: u32, bytes: usize) -> bool {
        let value = &value.to_le_bytes()[..bytes];
        self.function.config_write(offset, value)
    }

    fn take_seen(&self) -> Seen {
        std::mem::take(&mut *self.device.seen.lock().unwrap())
    }

    /// The capabilities that the guest finds, with their offsets.
    fn capabilities(&self) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        let mut at = self.dword(0x34) & 0xff;
        while at != 0 && found.len() < 64 {
            let head = self.dword(at as u16);
            found.push((head & 0xff, at));
            at = head >> 8 & 0xff;
        }
        found
    }
}

#[test]
fn guest_sees_the_identity_and_the_harmless_capabilities() {
    let rig = rig();
    assert_eq!(rig.dword(0), 0x0010_1b36);
    assert_eq!(rig.dword(8), 0x0108_0202);
    assert_eq!(rig.dword(0xc), 0, "one function");
    assert_eq!(rig.dword(4), 0x0010_0000, "capabilities, and nothing on");
    assert_eq!(rig.dword(0x3c), 0, "no interrupt pin");
    let expected = [(5, 0x50), (9, 0x60), (0x11, 0x70), (0x10, 0x80)];
    assert_eq!(rig.capabilities(), expected, "no power management");
    assert_eq!(rig.dword(0x44), 0, "what is hidden reads as zero");
    assert_eq!(rig.dword(0x64), 0xeeee_eeee, "the device's own");
    assert_eq!(
        rig.dword(0x50) >> 16,
        0x0080,
        "one vector, 64 bits, no mask"
    );
    assert_eq!(rig.dword(0x70) >> 16, u32::from(VECTORS - 1), "off");
    assert_eq!(rig.dword(0x100), 0, "extended space");
    // It was reset, and responds at its BARs, but may not access memory.
    let seen = rig.take_seen();
    assert_eq!(seen.resets, 1);
    assert_eq!(seen.config_writes, [(4, vec![2])]);
}

#[test]
fn bars_have_the_sizes_of_the_device_and_their_own_addresses() {
    let rig = rig();
    let sizes: Vec<_> = rig
        .function
        .bars()
        .iter()
        .map(|it| (it.index, it.size_bytes))
        .collect();
    assert_eq!(sizes, [(0, BAR_BYTES), (3, 256)], "no I/O BAR");
    rig.function.set_bar_address(0, 0x12_3400_8000);
    assert_eq!((rig.dword(0x10), rig.dword(0x14)), (0x3400_800c, 0x12));
    assert!(rig.write(0x10, u32::MAX, 4));
    assert_eq!(rig.dword(0x10), !(BAR_BYTES as u32 - 1) | 0xc);
    assert!(rig.write(0x1c, u32::MAX, 4));
    assert_eq!(rig.dword(0x1c), 0xffff_ff00);
    assert!(!rig.write(0x18, u32::MAX, 4));
    assert_eq!(rig.dword(0x18), 0);
    assert!(rig.write(4, 2, 2), "decoding");
    assert!(rig.function.bars()[0].decoded);
    assert_eq!(
        rig.take_seen().config_writes.len(),
        1,
        "the device's BARs do not move"
    );
}

#[test]
fn bus_master_is_the_guests_to_switch() {
    let rig = rig();
    rig.take_seen();
    for (command, device) in [(4, 6), (6, 6), (2, 2), (0x400, 2)] {
        rig.write(4, command, 2);
        let last = rig.take_seen().config_writes.pop();
        let changed = matches!(command, 4 | 2);
        assert_eq!(last, changed.then(|| (4, vec![device])), "{command:#x}");
    }
}

#[test]
fn mapped_part_of_a_bar_follows_it_without_the_table_of_msix() {
    let rig = rig();
    rig.function.bar_mapped(0, Some(0x1000_0000));
    rig.function.bar_mapped(3, Some(0x2000_0000));
    let slots: Vec<_> = rig.slots.0.lock().unwrap().values().copied().collect();
    assert_eq!(slots, [(0x1000_0000, 0x2000), (0x1000_4000, 0x4000)]);
    rig.function.bar_mapped(0, Some(0x3000_0000));
    let first = rig.slots.0.lock().unwrap().values().next().copied();
    assert_eq!(first, Some((0x3000_0000, 0x2000)));
    rig.function.bar_mapped(0, None);
    assert!(rig.slots.0.lock().unwrap().is_empty());
    // The rest is accessed through the device, the table is not.
    rig.take_seen();
    rig.function.bar_write(0, TABLE, &[1; 4]);
    rig.function
        .bar_write(0, TABLE + 16 * u64::from(VECTORS), &[2; 4]);
    rig.function.bar_write(3, TABLE, &[3; 4]);
    let writes = rig.take_seen().bar_writes;
    assert_eq!(
        writes,
        [(0, TABLE + 48, vec![2; 4]), (3, TABLE, vec![3; 4])]
    );
    let mut read = [0; 4];
    rig.function.bar_read(0, TABLE, &mut read);
    assert_eq!(read, [1; 4]);
    rig.function.bar_read(3, TABLE, &mut read);
    assert_eq!(read, [0xdd; 4]);
}

#[test]
fn msix_is_signalled_by_the_device_and_routed_when_unmasked() {
    let rig = rig();
    let enable = |on: bool| rig.write(MSIX + 2, if on { 0x8000 } else { 0 }, 2);
    enable(true);
    let [(true, events)] = &rig.take_seen().interrupts[..] else {
        panic!("MSI-X is off");
    };
    assert_eq!(events.len(), usize::from(VECTORS));
    assert!(rig.backend.notes().irqfds.is_empty(), "all are masked");
    rig.function
        .bar_write(0, TABLE + 16, &0xfee0_0000_u32.to_le_bytes());
    rig.function
        .bar_write(0, TABLE + 24, &0x42_u32.to_le_bytes());
    rig.function.bar_write(0, TABLE + 28, &[0; 4]);
    assert_eq!(rig.backend.notes().irqfds.len(), 1);
    let table = rig.backend.notes().tables.last().cloned().unwrap();
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    assert_eq!(table[0].message, message);
    enable(true);
    assert!(rig.take_seen().interrupts.is_empty(), "no change");
    enable(false);
    assert_eq!(rig.take_seen().interrupts, [(true, Vec::new())]);
    assert!(rig.backend.notes().irqfds.is_empty());
}

#[test]
fn msix_that_the_host_refuses_is_tried_again() {
    let rig = rig();
    let attempts = |control| {
        rig.write(MSIX + 2, control, 2);
        let seen = rig.take_seen().interrupts.into_iter();
        let attempts: Vec<_> = seen.map(|(_, events)| events.len()).collect();
        attempts
    };
    rig.device.refuses_interrupts.store(true, Ordering::Relaxed);
    assert_eq!(attempts(0x8000), [usize::from(VECTORS)]);
    rig.device
        .refuses_interrupts
        .store(false, Ordering::Relaxed);
    assert_eq!(attempts(0xc000), [usize::from(VECTORS)]);
    assert!(attempts(0x8000).is_empty(), "it is on");
    assert_eq!(rig.function.counters()["refused_interrupts"], 1);
}

#[test]
fn msi_has_one_vector_and_gives_way_to_msix() {
    let rig = rig();
    rig.take_seen();
    rig.write(MSI + 4, 0xfee0_1003, 4);
    rig.write(MSI + 8, 0, 4);
    rig.write(MSI + 12, 0xffff_0031, 4);
    assert!(rig.take_seen().interrupts.is_empty());
    rig.write(MSI + 2, 0xffff, 2);
    assert_eq!(rig.dword(MSI) >> 16, 0x0081);
    let seen = rig.take_seen();
    assert_eq!((seen.interrupts.len(), seen.interrupts[0].1.len()), (1, 1));
    let table = rig.backend.notes().tables.last().cloned().unwrap();
    let message = MsiMessage {
        address: 0xfee0_1000,
        data: 0x31,
    };
    assert_eq!(table[0].message, message);
    rig.write(MSIX + 2, 0x8000, 2);
    let kinds: Vec<_> = rig
        .take_seen()
        .interrupts
        .iter()
        .map(|it| (it.0, it.1.len()))
        .collect();
    assert_eq!(kinds, [(false, 0), (true, 3)]);
    rig.write(MSIX + 2, 0, 2);
    let kinds: Vec<_> = rig
        .take_seen()
        .interrupts
        .iter()
        .map(|it| (it.0, it.1.len()))
        .collect();
    assert_eq!(kinds, [(true, 0), (false, 1)]);
    rig.write(MSI + 2, 0, 2);
    assert!(rig.backend.notes().irqfds.is_empty());
}

#[test]
fn reset_and_drop_end_interrupts_and_access() {
    let rig = rig();
    rig.write(4, 6, 2);
    rig.write(MSIX + 2, 0x8000, 2);
    rig.take_seen();
    rig.function.reset();
    let seen = rig.take_seen();
    assert_eq!(seen.interrupts, [(true, Vec::new())]);
    assert_eq!((seen.resets, seen.config_writes), (1, vec![(4, vec![2])]));
    assert!(!rig.function.bars()[0].decoded);
    rig.write(4, 6, 2);
    rig.function.bar_mapped(0, Some(0x1000_0000));
    let Rig {
        device,
        slots,
        function,
        ..
    } = rig;
    drop(function);
    assert!(slots.0.lock().unwrap().is_empty());
    let seen = device.seen.lock().unwrap();
    assert_eq!(seen.config_writes.last(), Some(&(4, vec![0])));
    assert_eq!(seen.interrupts.len(), 2);
}

#[test]
fn devices_that_cannot_be_presented_are_refused() {
    let refused = |damage: fn(&mut [u8; 256])| {
        let mut device = Device::new();
        damage(&mut device.config);
        let error = assign(device).map(|_| ()).unwrap_err();
        error.to_string()
    };
    assert!(refused(|config| config[0x0e] = 1).contains("header of type 0x1"));
    assert!(refused(|config| config[0x34] = 0).contains("neither MSI nor MSI-X"));
    // In an I/O BAR, in none, behind its end.
    for dword in [TABLE as u32 | 2, 1, BAR_BYTES as u32 - 32] {
        let mut device = Device::new();
        device.config[0x74..0x78].copy_from_slice(&dword.to_le_bytes());
        let error = assign(device).map(|_| ()).unwrap_err();
        assert!(matches!(error, AssignError::BadMsix), "{error}");
    }
    // A list of capabilities that is a loop.
    let mut device = Device::new();
    device.config[0x81] = 0x50;
    let rig = assign(device).unwrap();
    assert!(rig.capabilities().len() <= 64);
}

proptest! {
    /// Whatever the guest writes, identity, sizes and capabilities stay, and only bytes of visible capabilities reach
    /// the device, apart from the command register.
    #[test]
    fn wild_writes_change_nothing_of_the_machine(
        writes in prop::collection::vec((0_u16..1024, any::<u32>(), 0_u32..3), 0..200)
    ) {
        let rig = rig();
        let identity = (rig.dword(0), rig.dword(8), rig.dword(0x2c), rig.dword(0x34));
        let layout = |rig: &Rig| -> Vec<Bar> {
            let bars = rig.function.bars().into_iter();
            bars.map(|bar| Bar { address: 0, decoded: false, ..bar }).collect()
        };
        let (before, capabilities) = (layout(&rig), rig.capabilities());
        rig.take_seen();
        for (dword, value, log) in writes {
            rig.write(dword * 4, value, 1 << log);
            for bar in rig.function.bars() {
                prop_assert_eq!(bar.address % bar.size_bytes, 0);
            }
        }
        prop_assert_eq!(identity, (rig.dword(0), rig.dword(8), rig.dword(0x2c), rig.dword(0x34)));
        prop_assert_eq!(before, layout(&rig));
        prop_assert_eq!(capabilities, rig.capabilities());
        for (at, data) in rig.take_seen().config_writes {
            let end = at as usize + data.len();
            let vendor = (0x62..0x68).contains(&at) && end <= 0x68;
            let express = (0x82..0xbc).contains(&at) && end <= 0xbc;
            prop_assert!(vendor || express || at == 4 && (data == [2] || data == [6]), "{:#x}", at);
        }
    }
}

/// The whole of VFIO needs an IOMMU; its errors do not.
#[test]
fn vfio_device_is_named_if_it_cannot_be_opened() {
    let Ok(kvm) = hypervisor::Kvm::open().map_err(test_skip::skip) else {
        return;
    };
    let vm = kvm.create_vm().unwrap();
    let error = match super::Containers::default().shared(&vm) {
        Err(error) => error.to_string(),
        Ok(container) => {
            let path = tempfile::tempdir().unwrap();
            let opened = VfioFunction::open(path.path(), container);
            opened.map(drop).unwrap_err().to_string()
        }
    };
    assert!(
        error.contains("VFIO") || error.contains("vfio-pci"),
        "{error}"
    );
}

/// Devices `a` and `b` of group 1 and `c` of group 2, and a link to the first.
fn sysfs() -> tempfile::TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let at = |name: &str| sysfs.path().join(name);
    for group in ["1", "2"] {
        std::fs::create_dir_all(at(group).join("devices")).unwrap();
    }
    for (device, group) in [("a", "1"), ("b", "1"), ("c", "2")] {
        std::fs::create_dir(at(device)).unwrap();
        symlink(at(group), at(device).join("iommu_group")).unwrap();
        symlink(at(device), at(group).join("devices").join(device)).unwrap();
    }
    symlink(at("a"), at("same")).unwrap();
    std::fs::create_dir(at("no-group")).unwrap();
    sysfs
}

#[test]
fn devices_of_a_group_are_open_once_in_one_container_until_the_last_is_closed() {
    let sysfs = sysfs();
    let at = |name: &str| sysfs.path().join(name);
    let claims = Arc::new(Claims::default());
    // Whether the device was the first of its group, and its claim.
    let containers: [Arc<Occupancy>; 3] = Default::default();
    let open = |name: &str, container: usize| claims.open(&at(name), &containers[container], Ok);
    let refused = |name: &str, container| open(name, container).unwrap_err().to_string();
    let is_last = |claim: &Claim| {
        let mut last = None;
        claim.close(true, |is_last| last = Some(is_last));
        last.unwrap()
    };
    let (is_first, a) = open("a", 1).unwrap();
    assert!(is_first);
    let path = at("a").canonicalize().unwrap();
    for (name, container) in [("a", 1), ("same", 1), ("a", 2)] {
        let expected = format!("{} is already assigned to this VM", path.display());
        assert_eq!(refused(name, container), expected);
    }
    let other = refused("b", 2);
    assert!(other.contains("/b is in the IOMMU group of"), "{other}");
    assert!(refused("no-group", 1).contains("IOMMU group"));
    let (is_first, b) = open("b", 1).unwrap();
    assert!(!is_first);
    let (is_first, c) = open("c", 2).unwrap();
    assert!(is_first);
    assert!(!is_last(&a));
    // One that cannot be opened leaves the group as it was.
    let failed = claims.open(&at("a"), &containers[1], |_| {
        Err::<(), _>(AssignError::NoInterrupt)
    });
    assert!(matches!(failed, Err(AssignError::NoInterrupt)));
    let (is_first, a) = open("a", 1).unwrap();
    assert!(!is_first);
    assert!(!is_last(&b));
    assert!(is_last(&a));
    assert!(is_last(&c));
    let (is_first, _) = open("b", 0).unwrap();
    assert!(is_first);
}

/// The kernel ends all mappings of a container with its last group.
#[test]
fn container_that_has_lost_its_last_group_has_no_further_device() {
    let sysfs = sysfs();
    let claims = Arc::new(Claims::default());
    let open = |name: &str, container: &Arc<Occupancy>| {
        let opened = claims.open(&sysfs.path().join(name), container, Ok);
        opened.map(|(_, claim)| claim)
    };
    let container = Arc::<Occupancy>::default();
    let (a, c) = (
        open("a", &container).unwrap(),
        open("c", &container).unwrap(),
    );
    a.close(true, |_| assert!(!container.is_emptied(), "it has group 2"));
    let b = open("b", &container).unwrap();
    c.close(true, |_| ());
    b.close(true, |_| {
        assert!(container.is_emptied(), "before the group is released");
    });
    let error = open("a", &container).unwrap_err();
    assert!(
        matches!(error, AssignError::ContainerEmptied { .. }),
        "{error}"
    );
    let container = Arc::default();
    // A device that has vanished leaves its group, and so the mappings.
    open("a", &container).unwrap().close(false, |_| ());
    open("c", &container).unwrap().close(true, |_| ());
    open("c", &container).unwrap();
}

#[test]
fn devices_that_keep_a_group_from_being_assigned_are_named() {
    let sysfs = sysfs();
    let at = |name: &str| sysfs.path().join(name);
    let refused = || AssignError::of_open(&at("a"), VfioError::GroupViable).to_string();
    assert!(refused().contains("bound to vfio-pci?"), "{}", refused());
    symlink("drivers/vfio-pci", at("a").join("driver")).unwrap();
    symlink("drivers/e1000e", at("b").join("driver")).unwrap();
    assert!(refused().contains(": b (e1000e);"), "{}", refused());
}
