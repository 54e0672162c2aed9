//! Tracks the requests of a ring that the back end has not completed.
//!
//! The two rings of a virtqueue do not contain this. A slot is overwritten after as many requests as the ring has
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

    /// `None` if entries are overwritten. A back end that works in the meantime may complete a request after its index
    /// was read, and the driver may reuse the head before its own index is read: that head counts twice until the next
    /// call.
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
mod tests;
