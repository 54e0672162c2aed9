//! Tracks the requests of a ring that the back end has not completed.
//!
//! The two rings of a virtqueue do not contain this: a slot is overwritten after as many requests as the ring has
//! entries, and a back end may complete requests in any order. The ledger therefore follows both rings from the start,
//! at each interrupt. If the driver takes more completions than the ring has entries without an interrupt, the ledger
//! loses track until no request is in flight.

/// Both rings of a queue.
pub(super) trait BothRings {
    /// The driver's index, read after the device's, so that no completion precedes its request.
    fn indices(&self) -> (u16, u16);
    /// The head at this free-running index of the available ring.
    fn available(&self, index: u16) -> Option<u16>;
    /// The head at this free-running index of the used ring.
    fn used(&self, index: u16) -> Option<u32>;
}

/// The requests that begin at one descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Head {
    /// Requests made available minus requests completed. A driver reuses a head only after its completion.
    open: i32,
    /// Order of the last request.
    at: u64,
}

#[derive(Debug)]
pub(super) struct Ledger {
    heads: Vec<Head>,
    available: u16,
    used: u16,
    requests: u64,
    /// The number of heads with one request in flight, and of heads with an impossible number of requests.
    open: usize,
    wrong: usize,
    exact: bool,
}

impl Ledger {
    /// A ledger for a ring with this many entries and no request in flight, at this index.
    pub(super) fn new(size: u16, index: u16) -> Self {
        Self {
            heads: vec![Head::default(); usize::from(size)],
            available: index,
            used: index,
            requests: 0,
            open: 0,
            wrong: 0,
            exact: true,
        }
    }

    /// Records that the rings were not followed until now.
    pub(super) fn lose_track(&mut self) {
        self.exact = false;
    }

    /// Follows the rings to their current indexes. Reads at most as many entries as the rings have.
    pub(super) fn follow(&mut self, rings: &impl BothRings) {
        let (available, used) = rings.indices();
        let in_flight = available.wrapping_sub(used);
        if in_flight == 0 {
            if self.open > 0 || !self.exact {
                self.heads.fill(Head::default());
                (self.open, self.wrong, self.exact) = (0, 0, true);
            }
            (self.available, self.used) = (available, used);
            return;
        }
        self.exact = self.exact && self.try_follow(rings, available, used).is_some();
        self.available = available;
        self.used = used;
    }

    /// `None` if entries are overwritten. A back end that works meanwhile may complete a request after its index was read,
    /// and the driver may reuse the head before its own index is read: that head counts twice until the next call.
    fn try_follow(&mut self, rings: &impl BothRings, available: u16, used: u16) -> Option<()> {
        let size = self.heads.len();
        let fresh = |from: u16, to: u16| {
            let count = to.wrapping_sub(from);
            (usize::from(count) <= size).then_some((0..count).map(move |at| from.wrapping_add(at)))
        };
        for index in fresh(self.available, available)? {
            let head = usize::from(rings.available(index)?);
            self.requests += 1;
            self.heads.get_mut(head)?.at = self.requests;
            self.add(head, 1)?;
        }
        for index in fresh(self.used, used)? {
            self.add(rings.used(index)? as usize, -1)?;
        }
        Some(())
    }

    fn add(&mut self, head: usize, requests: i32) -> Option<()> {
        let open = &mut self.heads.get_mut(head)?.open;
        for (value, counts) in [(*open, false), (*open + requests, true)] {
            let count = match value {
                0 => continue,
                1 => &mut self.open,
                _ => &mut self.wrong,
            };
            *count = if counts { *count + 1 } else { *count - 1 };
        }
        *open += requests;
        Some(())
    }

    /// The heads of the requests in flight, oldest first; `None` if that is not known, or if the rings were not those of a
    /// proper driver and back end. The back end must not work since before the last call of [`Self::follow`].
    pub(super) fn in_flight(&self) -> Option<Vec<u16>> {
        let in_flight = usize::from(self.available.wrapping_sub(self.used));
        let is_known = self.exact && self.wrong == 0 && self.open == in_flight;
        let heads = (0u16..).zip(&self.heads);
        let mut open: Vec<_> = heads.filter(|(_, head)| head.open == 1).collect();
        open.sort_by_key(|(_, head)| head.at);
        is_known.then(|| open.into_iter().map(|(index, _)| index).collect())
    }
}

#[cfg(test)]
mod tests {
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
}
