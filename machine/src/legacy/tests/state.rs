//! Tests saving and restoring of small devices, including invalid states.

use std::sync::Arc;

use ::state::{Saved, State, StateError, testing};

use super::super::{CMOS_PORTS, Cmos, CmosState, GED_IRQ, Ged, GedState};
use crate::bus::BusDevice;
use crate::interrupt::{GsiRouter, Ioapic, IoapicState, fake::FakeBackend};

/// Damages a state in every way. The reader must accept it or reject it with the part's name.
fn survives_damage<S: State>(state: &S, restore: impl Fn(&S) -> Result<(), StateError>) {
    let mut refused = 0;
    let count = testing::damage(&Saved::of(state), |damaged| {
        if let Err(error) = damaged.read().and_then(|state| restore(&state)) {
            refused += 1;
            assert!(error.to_string().contains(S::PART.name), "{error}");
        }
    });
    assert!(refused > 0 && count > refused / 2, "{refused} of {count}");
}

fn ioapic() -> (Arc<Ioapic>, Arc<FakeBackend>) {
    let backend = Arc::new(FakeBackend::default());
    let router = Arc::new(GsiRouter::new(backend.clone()));
    (Arc::new(Ioapic::new(router)), backend)
}

#[test]
fn cmos_saved_and_restored_reads_the_same() {
    let cmos = Cmos::new(1 << 30, 1 << 32);
    cmos.write(0, &[0x40]);
    cmos.write(1, &[0x77]);
    let state: CmosState = Saved::of(&cmos.state()).read().unwrap();
    let other = Cmos::new(64 << 20, 0);
    other.restore(&state).unwrap();
    assert_eq!(other.state(), cmos.state());
    let mut byte = [0];
    other.read(1, &mut byte);
    assert_eq!(
        byte,
        [0x77],
        "through the index of before, port {:#x}",
        CMOS_PORTS.0
    );
    survives_damage(&state, |state| other.restore(state));
}

#[test]
fn ged_saved_and_restored_has_the_event_the_guest_has_not_read() {
    let (ioapic, _) = ioapic();
    let ged = Ged::new(ioapic.line(GED_IRQ).unwrap());
    ged.press_power_button().unwrap();
    let state: GedState = Saved::of(&ged.state()).read().unwrap();
    let other = Ged::new(ioapic.line(GED_IRQ).unwrap());
    other.restore(&state).unwrap();
    let mut byte = [0];
    other.read(0, &mut byte);
    assert_eq!(byte, [8]);
    survives_damage(&state, |state| other.restore(state));
}

#[test]
fn ioapic_saved_and_restored_routes_level_pins_and_waits_for_their_end() {
    const LEVEL: u32 = 1 << 15;
    let program = |ioapic: &Ioapic, pin: u8, low: u32| {
        ioapic.write(0, &[0x10 + 2 * pin]);
        ioapic.write(0x10, &low.to_le_bytes());
    };
    let (first, _) = ioapic();
    program(&first, 4, 0x24);
    program(&first, 9, 0x29 | LEVEL);
    let line = first.line(9).unwrap();
    line.trigger().unwrap();
    let state: IoapicState = Saved::of(&first.state()).read().unwrap();
    let (second, backend) = ioapic();
    second.restore(&state).unwrap();
    assert_eq!(second.state(), state);
    assert!(
        backend.notes().messages.is_empty(),
        "nothing is delivered twice"
    );
    assert_eq!(
        backend.notes().tables.last().unwrap().len(),
        1,
        "the level pin"
    );
    // The pin stays busy until the guest ends the interrupt, as before.
    second.line(9).unwrap().trigger().unwrap();
    assert!(backend.notes().messages.is_empty());
    second.end_of_interrupt(0x29);
    second.line(9).unwrap().trigger().unwrap();
    assert_eq!(backend.notes().messages[0].data & 0xff, 0x29);
    second.line(4).unwrap().trigger().unwrap();
    assert_eq!(backend.notes().messages[1].data, 0x24);
    survives_damage(&state, |state| second.restore(state));
}

#[test]
fn ioapic_states_that_cannot_be_are_refused_by_field() {
    let (chip, _) = ioapic();
    let good = chip.state();
    let refused = |change: &dyn Fn(&mut IoapicState), field: &str| {
        let mut state = good.clone();
        change(&mut state);
        match chip.restore(&state) {
            Err(StateError::Invalid { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{other:?}"),
        }
        assert_eq!(chip.state(), good, "nothing has changed");
    };
    refused(&|state| state.entries.truncate(23), "entries");
    refused(&|state| state.entries[0] |= 1 << 14, "entries");
    refused(&|state| state.lines = 1 << 24, "lines");
    refused(&|state| state.id = 1, "id");
}
