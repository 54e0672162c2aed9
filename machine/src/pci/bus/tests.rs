//! Tests the bus as a guest sees it, through both access mechanisms of configuration space.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::fake::{BAR_BYTES, DOORBELL_OFFSET, FakeDoorbells, FakeFunction};
use super::super::{
    CONFIG_PORT_BASE, CONFIG_PORT_BYTES, ConfigPorts, ECAM_BYTES, Ecam, PciBusState, PciSegments,
    SegmentWeights,
};
use super::*;

const ECAM_BASE: u64 = 0xe800_0000;
const MMIO64_BASE: u64 = 0x1_0000_0000;
const MMIO64_END: u64 = 0x2_0000_0000;
/// Where the bus puts the first function's BAR.
const FIRST_BAR: u64 = MMIO64_END - BAR_BYTES;

struct Guest {
    mmio: Arc<Bus>,
    ports: Bus,
    segments: PciSegments,
    /// The bus of segment 0.
    pci: Arc<PciBus>,
    doorbells: Arc<FakeDoorbells>,
}

impl Guest {
    fn new() -> Self {
        let mmio = Arc::new(Bus::new());
        let ports = Bus::new();
        let doorbells = Arc::new(FakeDoorbells::default());
        let (mmio32, mmio64) = (0xc000_0000..0xe800_0000, MMIO64_BASE..MMIO64_END);
        let backend = doorbells.clone() as Arc<dyn DoorbellBackend>;
        let segments = PciSegments::new(
            &[SegmentWeights::default()],
            &mmio,
            &mmio32,
            &mmio64,
            &backend,
        )
        .unwrap();
        let pci = Arc::clone(&segments.buses()[0]);
        mmio.insert(ECAM_BASE, ECAM_BYTES, Arc::new(Ecam::new(&pci)))
            .unwrap();
        let config_ports = Arc::new(ConfigPorts::new(pci.clone()));
        ports
            .insert(CONFIG_PORT_BASE, CONFIG_PORT_BYTES, config_ports)
            .unwrap();
        Self {
            mmio,
            ports,
            segments,
            pci,
            doorbells,
        }
    }

    fn ecam_read(&self, slot: u8, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio
            .read(ECAM_BASE + (u64::from(slot) << 15) + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam_write(&self, slot: u8, offset: u64, value: u32) {
        let address = ECAM_BASE + (u64::from(slot) << 15) + offset;
        self.mmio.write(address, &value.to_le_bytes());
    }

    fn doorbells(&self) -> Vec<u64> {
        let addresses = self.doorbells.addresses.lock().unwrap();
        addresses.iter().copied().collect()
    }
}

#[test]
fn host_bridge_is_at_slot_zero() {
    let guest = Guest::new();
    assert_eq!(guest.ecam_read(0, 0), 0x0d57_8086);
    assert_eq!(guest.ecam_read(0, 8), 0x0600_0000);
    assert_eq!(guest.ecam_read(1, 0), 0xffff_ffff);
    // Function 1 of slot 0.
    assert_eq!(guest.ecam_read(0, 0x1000), 0xffff_ffff);
}

#[test]
fn slots_are_given_out_in_order_or_as_asked() {
    let guest = Guest::new();
    let add = |slot| guest.pci.add(Arc::new(FakeFunction::new("_f")), slot);
    assert_eq!(add(None).unwrap().to_string(), "0000:00:01.0");
    assert_eq!(add(Some(3)).unwrap().to_string(), "0000:00:03.0");
    assert_eq!(add(None).unwrap().slot, 2);
    assert_eq!(add(None).unwrap().slot, 4);
    assert_eq!(add(Some(31)).unwrap().to_string(), "0000:00:1f.0");
    assert!(matches!(add(Some(3)), Err(PciError::SlotInUse(3))));
    assert!(matches!(add(Some(0)), Err(PciError::SlotInUse(0))));
    assert!(matches!(add(Some(32)), Err(PciError::SlotOutOfRange(32))));
    while let Ok(bdf) = add(None) {
        assert!(bdf.slot < 31);
    }
    assert!(matches!(
        add(None),
        Err(PciError::BusFull {
            segment: 0,
            count: 31
        })
    ));
    assert_eq!(guest.pci.functions().len(), 32);
}

#[test]
fn slots_wished_for_are_left_to_who_wishes_for_them() {
    let guest = Guest::new();
    guest.pci.reserve([1, 3, 99]);
    let add = |slot| guest.pci.add(Arc::new(FakeFunction::new("_f")), slot);
    assert_eq!(add(None).unwrap().slot, 2);
    assert_eq!(add(None).unwrap().slot, 4);
    assert_eq!(add(Some(3)).unwrap().slot, 3);
    // Reserved slot 1 is assigned once no other slot is free.
    while let Ok(bdf) = add(None) {
        assert!(bdf.slot == 1 || bdf.slot > 4);
    }
    assert_eq!(guest.pci.functions().len(), 32);
}

#[test]
fn config_ports_reach_a_function_only_when_enabled() {
    let guest = Guest::new();
    guest
        .pci
        .add(Arc::new(FakeFunction::new("_f")), Some(2))
        .unwrap();
    let select = |value: u32| guest.ports.write(0xcf8, &value.to_le_bytes());
    let read = |port: u64, bytes: usize| {
        let mut data = vec![0; bytes];
        guest.ports.read(port, &mut data);
        data
    };
    select(0x8000_1000);
    assert_eq!(read(0xcf8, 4), 0x8000_1000_u32.to_le_bytes());
    assert_eq!(read(0xcfc, 4), [0xf4, 0x1a, 0x45, 0x10]);
    assert_eq!(read(0xcfe, 2), [0x45, 0x10]);
    assert_eq!(read(0xcff, 1), [0x10]);
    // Bus 1, function 1, not enabled.
    for address in [0x8001_1000, 0x8000_1100, 0x0000_1000] {
        select(address);
        assert_eq!(read(0xcfc, 4), [0xff; 4], "{address:#x}");
    }
}

#[test]
fn byte_write_to_the_address_register_changes_that_byte() {
    // Linux's probe: outb(1, 0xcfb), after which the register must still be usable.
    let guest = Guest::new();
    guest.ports.write(0xcfb, &[0x01]);
    let mut data = [0; 4];
    guest.ports.read(0xcf8, &mut data);
    assert_eq!(data, [0, 0, 0, 1]);
    guest.ports.write(0xcf8, &0x8000_0000_u32.to_le_bytes());
    guest.ports.read(0xcf8, &mut data);
    assert_eq!(data, [0, 0, 0, 0x80]);
}

#[test]
fn odd_accesses_are_cut_into_aligned_pieces() {
    let guest = Guest::new();
    let function = Arc::new(FakeFunction::new("_f"));
    guest.pci.add(function.clone(), Some(1)).unwrap();
    let mut data = [0; 7];
    guest.mmio.read(ECAM_BASE + 0x8001, &mut data);
    assert_eq!(data[..3], [0x1a, 0x45, 0x10]);
    let accesses = &function.registers.lock().unwrap().config_accesses;
    assert_eq!(*accesses, [(1, 1), (2, 2), (4, 4)]);
}

#[test]
fn access_across_the_end_of_a_function_reads_ones() {
    let guest = Guest::new();
    let function = Arc::new(FakeFunction::new("_f"));
    guest.pci.add(function.clone(), Some(1)).unwrap();
    let mut data = [0; 4];
    guest.mmio.read(ECAM_BASE + 0x8ffe, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert!(
        function
            .registers
            .lock()
            .unwrap()
            .config_accesses
            .is_empty()
    );
}

#[test]
fn bar_answers_where_it_is_decoded_and_takes_its_doorbell_along() {
    let guest = Guest::new();
    let function = Arc::new(FakeFunction::new("_f"));
    guest.pci.add(function.clone(), Some(1)).unwrap();
    assert_eq!(guest.ecam_read(1, 0x14), 1);
    assert!(guest.doorbells().is_empty());

    guest.ecam_write(1, 4, 2);
    let mut data = [0; 2];
    guest.mmio.read(FIRST_BAR + 0x42, &mut data);
    assert_eq!(data, [0x42; 2]);
    assert_eq!(guest.doorbells(), [FIRST_BAR + DOORBELL_OFFSET]);
    guest.mmio.write(FIRST_BAR + 1, &[7]);
    assert_eq!(
        function.registers.lock().unwrap().bar_writes,
        [(1, vec![7])]
    );

    guest.ecam_write(1, 0x10, 0x10_0000);
    guest.mmio.read(FIRST_BAR + 0x42, &mut data);
    assert_eq!(data, [0xff; 2]);
    guest.mmio.read(MMIO64_BASE + 0x10_0042, &mut data);
    assert_eq!(data, [0x42; 2]);
    assert_eq!(
        guest.doorbells(),
        [MMIO64_BASE + 0x10_0000 + DOORBELL_OFFSET]
    );

    guest.ecam_write(1, 4, 0);
    guest.mmio.read(MMIO64_BASE + 0x10_0042, &mut data);
    assert_eq!(data, [0xff; 2]);
    assert!(guest.doorbells().is_empty());
}

#[test]
fn bar_outside_the_windows_or_over_another_does_not_answer() {
    let guest = Guest::new();
    for slot in [1, 2] {
        let function = Arc::new(FakeFunction::new("_f"));
        guest.pci.add(function, Some(slot)).unwrap();
        guest.ecam_write(slot, 4, 2);
    }
    assert_eq!(guest.doorbells().len(), 2);
    // Over the other BAR.
    guest.ecam_write(2, 0x10, FIRST_BAR as u32);
    assert_eq!(guest.doorbells(), [FIRST_BAR + DOORBELL_OFFSET]);
    assert_eq!(guest.pci.unmapped_bars(), 1);
    // Onto the configuration space, then into RAM.
    guest.ecam_write(2, 0x14, 0);
    guest.ecam_write(2, 0x10, ECAM_BASE as u32);
    assert_eq!(guest.doorbells().len(), 1);
    assert_eq!(guest.ecam_read(0, 0), 0x0d57_8086);
    // Back to a valid address.
    guest.ecam_write(2, 0x10, BAR_BYTES as u32);
    guest.ecam_write(2, 0x14, 1);
    assert_eq!(guest.doorbells().len(), 2);
}

#[test]
fn bar_refused_for_another_answers_when_that_one_moves_away_or_goes() {
    let guest = Guest::new();
    for slot in [1, 2, 3] {
        let function = Arc::new(FakeFunction::new("_f"));
        guest.pci.add(function, Some(slot)).unwrap();
        guest.ecam_write(slot, 4, 2);
    }
    let second_bar = FIRST_BAR - BAR_BYTES;
    let [first, second] = [FIRST_BAR, second_bar].map(|bar| bar + DOORBELL_OFFSET);
    // Two functions swap addresses: temporarily the first overlaps the second.
    guest.ecam_write(1, 0x10, second_bar as u32);
    assert!(!guest.doorbells().contains(&first));
    guest.ecam_write(2, 0x10, FIRST_BAR as u32);
    assert!(guest.doorbells().contains(&first));
    assert!(guest.doorbells().contains(&second));
    assert_eq!(guest.doorbells().len(), 3);
    // The third moves to the address of the first, which then moves away.
    guest.ecam_write(3, 0x10, second_bar as u32);
    assert_eq!(guest.doorbells().len(), 2);
    guest.pci.remove(1);
    assert_eq!(guest.doorbells(), [second, first]);
}

#[test]
fn removed_function_leaves_slot_addresses_and_doorbells() {
    let guest = Guest::new();
    let bdf = guest
        .pci
        .add(Arc::new(FakeFunction::new("_f")), None)
        .unwrap();
    guest.ecam_write(1, 4, 2);
    assert_eq!(guest.pci.remove(bdf.slot).unwrap().id(), "_f");
    assert!(guest.pci.remove(bdf.slot).is_none());
    assert!(guest.doorbells().is_empty());
    assert_eq!(guest.ecam_read(1, 0), 0xffff_ffff);
    let function = Arc::new(FakeFunction::new("_g"));
    guest.pci.add(function.clone(), None).unwrap();
    assert_eq!(function.bars()[0].address, FIRST_BAR);
}

#[test]
fn dropped_machine_leaves_no_cycle() {
    let guest = Guest::new();
    let function = Arc::new(FakeFunction::new("_f"));
    guest.pci.add(function.clone(), None).unwrap();
    guest.ecam_write(1, 4, 2);
    drop(guest);
    assert_eq!(Arc::strong_count(&function), 1);
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        accesses in prop::collection::vec(
            (0u64..(1 << 17), 0u64..8, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()),
            0..100,
        )
    ) {
        let guest = Guest::new();
        guest.pci.add(Arc::new(FakeFunction::new("_f")), Some(1)).unwrap();
        guest.pci.add(Arc::new(FakeFunction::new("_g")), Some(2)).unwrap();
        for (offset, port, mut data, is_write) in accesses {
            if is_write {
                guest.ports.write(CONFIG_PORT_BASE + port, &data);
                guest.mmio.write(ECAM_BASE + offset, &data);
                guest.mmio.write(ECAM_BASE + 0x8000 + offset % 0x20, &data);
            } else {
                guest.ports.read(CONFIG_PORT_BASE + port, &mut data);
                guest.mmio.read(ECAM_BASE + offset, &mut data);
            }
        }
    }
}

#[test]
fn bus_saved_and_restored_has_every_function_where_the_guest_put_it() {
    use ::state::{Saved, testing};

    let guest = Guest::new();
    let functions = ["_a", "_b"].map(|id| Arc::new(FakeFunction::new(id)));
    guest.pci.reserve([9]);
    guest.pci.add(functions[0].clone(), Some(3)).unwrap();
    guest.pci.add(functions[1].clone(), Some(1)).unwrap();
    let saved = Saved::of(&guest.segments.state(0x8000_1810));
    let state: PciBusState = saved.read().unwrap();
    assert_eq!(state.slots().count(), 2);
    assert_eq!(state.slot("_a").unwrap().1.slot, 3);

    let restore = |state: &PciBusState| {
        let other = Guest::new();
        other.segments.restore_reserved(state)?;
        for (segment, slot) in state.slots() {
            let function = functions.iter().find(|function| function.id() == slot.id);
            let function = function.unwrap_or(&functions[0]);
            other
                .segments
                .add_restored(function.clone(), segment, slot)?;
        }
        Ok::<_, ::state::StateError>(other)
    };
    let other = restore(&state).unwrap();
    let again = other.segments.state(state.config_address);
    assert_eq!(Saved::of(&again), saved);
    assert_eq!(other.ecam_read(3, 0), 0x1045_1af4);
    // Allocated address space is not allocated again.
    let third = Arc::new(FakeFunction::new("_c"));
    other.pci.add(third, None).unwrap();
    let ranges: Vec<_> = other
        .pci
        .state()
        .slots
        .iter()
        .map(|slot| slot.ranges.clone())
        .collect();
    assert!(ranges[0] != ranges[1] && ranges[1] != ranges[2]);

    testing::damage(&saved, |damaged| {
        if let Err(error) = damaged.read().and_then(|state| restore(&state).map(drop)) {
            assert!(error.to_string().contains("pci-bus"), "{error}");
        }
    });
}

#[test]
fn state_of_the_machine_with_one_segment_is_read() {
    let one = r#"{"version":1,"config_address":5,"reserved":512,
        "slots":[{"slot":3,"id":"_a","ranges":[{"start":4294967296,"bytes":32768}]}]}"#;
    let one: ::state::Saved = serde_json::from_str(one).unwrap();
    let state: PciBusState = one.read().unwrap();
    assert_eq!((state.config_address, state.segments.len()), (5, 1));
    assert_eq!(state.segments[0].reserved, 512);
    let (segment, slot) = state.slot("_a").unwrap();
    assert_eq!((segment, slot.slot, slot.ranges.len()), (0, 3, 1));
}
