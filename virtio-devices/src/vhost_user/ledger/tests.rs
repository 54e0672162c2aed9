use proptest::prelude::*;

use super::*;

const SIZE: u16 = 8;

/// A driver and a back end that completes in any order.
struct Model {
    available: [u16; SIZE as usize],
    used: [u32; SIZE as usize],
    indices: (u16, u16),
    free: Vec<u16>,
    open: Vec<u16>,
}

impl Model {
    fn new(index: u16) -> Self {
        Self {
            available: [u16::MAX; SIZE as usize],
            used: [u32::MAX; SIZE as usize],
            indices: (index, index),
            free: (0..SIZE).collect(),
            open: Vec::new(),
        }
    }

    fn request(&mut self, choice: usize) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.swap_remove(choice % self.free.len());
        self.available[usize::from(self.indices.0 % SIZE)] = head;
        self.indices.0 = self.indices.0.wrapping_add(1);
        self.open.push(head);
    }

    fn complete(&mut self, choice: usize) {
        if self.open.is_empty() {
            return;
        }
        let head = self.open.remove(choice % self.open.len());
        self.used[usize::from(self.indices.1 % SIZE)] = head.into();
        self.indices.1 = self.indices.1.wrapping_add(1);
        self.free.push(head);
    }
}

impl BothRings for Model {
    fn indices(&self) -> (u16, u16) {
        self.indices
    }

    fn available(&self, index: u16) -> Option<u16> {
        Some(self.available[usize::from(index % SIZE)])
    }

    fn used(&self, index: u16) -> Option<u32> {
        Some(self.used[usize::from(index % SIZE)])
    }
}

proptest! {
    /// Known and right if it is called often enough; otherwise right or unknown.
    #[test]
    fn requests_in_flight_are_those_of_the_driver(
        start: u16,
        steps in prop::collection::vec((0usize..3, any::<usize>()), 0..300),
        rests in 1u16..30,
    ) {
        let mut model = Model::new(start);
        let mut ledger = Ledger::new(SIZE, start);
        let mut rest = 0;
        for (what, choice) in steps {
            match what {
                0 => model.complete(choice),
                _ => model.request(choice),
            }
            rest += 1;
            if rest >= rests {
                rest = 0;
                ledger.follow(&model);
                if rests <= SIZE {
                    prop_assert_eq!(ledger.in_flight(), Some(model.open.clone()));
                }
                prop_assert!(ledger.in_flight().is_none_or(|open| open == model.open));
            }
        }
    }

    /// Whatever a guest and a back end write, nothing panics and the list fits the ring.
    #[test]
    fn garbage_is_bounded(
        rings in prop::collection::vec((any::<u16>(), any::<u16>(), 0u16..12, 0u32..12), 0..60),
    ) {
        let mut ledger = Ledger::new(SIZE, 0);
        for (available, used, head, done) in rings {
            let mut model = Model::new(0);
            model.indices = (available % 40, used % 40);
            model.available = [head; SIZE as usize];
            model.used = [done; SIZE as usize];
            ledger.follow(&model);
            let open = ledger.in_flight().unwrap_or_default();
            prop_assert!(open.len() <= usize::from(SIZE));
        }
    }
}

/// Rings whose back end completes requests after its index was read.
struct Late<'a>(&'a Model, u16);

impl BothRings for Late<'_> {
    fn indices(&self) -> (u16, u16) {
        (self.0.indices.0, self.1)
    }

    fn available(&self, index: u16) -> Option<u16> {
        self.0.available(index)
    }

    fn used(&self, index: u16) -> Option<u32> {
        self.0.used(index)
    }
}

#[test]
fn head_that_is_reused_while_the_rings_are_read_is_followed() {
    let mut model = Model::new(0);
    let mut ledger = Ledger::new(SIZE, 0);
    model.free = vec![5, 6];
    model.request(0);
    model.request(0);
    ledger.follow(&model);
    let before = model.indices.1;
    model.complete(0);
    model.request(0);
    assert_eq!(model.open, [6, 5]);
    ledger.follow(&Late(&model, before));
    assert_eq!(ledger.in_flight(), None);
    ledger.follow(&model);
    assert_eq!(ledger.in_flight(), Some(vec![6, 5]));
}

#[test]
fn track_that_was_lost_is_found_when_nothing_is_in_flight() {
    let mut model = Model::new(0);
    let mut ledger = Ledger::new(SIZE, 0);
    model.request(0);
    ledger.lose_track();
    ledger.follow(&model);
    assert_eq!(ledger.in_flight(), None);
    model.complete(0);
    ledger.follow(&model);
    model.request(3);
    ledger.follow(&model);
    assert_eq!(ledger.in_flight(), Some(model.open.clone()));
}
