//! Guest memory that assigned devices can access through the virtual IOMMU. Such memory must not be discarded: the
//! device would continue to use the old page, and the guest would get a new one.
//!
//! ```text
//!   IOMMU                                     discard engine
//!   hold: the range counts as mapped          begin: takes mapped ranges out of the batch,
//!         waits for batches that have it             and names the rest
//!   the host pins the pages                   system calls
//!   …                                         the batch ends
//!   the host unpins them
//!   release
//! ```
//! Both `hold` and `begin` start under one lock. If `hold` is first, the batch does not contain the range. If `begin`
//! is first, `hold` returns after the last system call of the batch. So no page is pinned between the check and the
//! discard. A mapping waits for batches that contain its own range, which a guest with a sound driver never causes. It
//! also waits for batches that began while nothing was mapped, because they do not name their ranges.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex};

use crate::Unpoisoned;

/// The mapped ranges of one machine's RAM, and the batches of discards in progress.
#[derive(Debug, Default)]
pub struct DmaMapped {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    mapped: MappedRanges,
    /// By number. A batch that began while nothing was mapped has no ranges, and may contain everything.
    batches: BTreeMap<u64, Option<Vec<Range<u64>>>>,
    next: u64,
}

/// Ranges of guest addresses that are mapped. A range can be mapped several times.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct MappedRanges {
    /// By first address: the end, and the number of mappings. Segments do not overlap; there are at most twice as many
    /// as mappings.
    segments: BTreeMap<u64, (u64, u32)>,
}

impl MappedRanges {
    #[cfg(test)]
    pub(crate) fn of(ranges: &[Range<u64>]) -> Self {
        let mut mapped = Self::default();
        ranges.iter().for_each(|range| mapped.add(range));
        mapped
    }

    /// The mapped parts of `range`, ascending.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.segments.range(..=range.start).next_back();
        let before = before.filter(|(start, _)| **start < range.start);
        let inside = self.segments.range(range.start..range.end.max(range.start));
        let clamp = move |(start, (end, _)): (&u64, &(u64, u32))| {
            range.start.max(*start)..range.end.min(*end)
        };
        let parts = before.into_iter().chain(inside).map(clamp);
        parts.filter(|part| part.start < part.end)
    }

    /// Begins a segment at `at`, if one contains it.
    fn split(&mut self, at: u64) {
        let Some((_, (end, count))) = self.segments.range_mut(..at).next_back() else {
            return;
        };
        if *end > at {
            let behind = (std::mem::replace(end, at), *count);
            self.segments.insert(at, behind);
        }
    }

    fn add(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
        let mut at = range.start;
        while at < range.end {
            let next = self.segments.range_mut(at..range.end).next();
            let gap_end = match next {
                Some((start, (end, count))) if *start == at => {
                    *count += 1;
                    at = *end;
                    continue;
                }
                Some((start, _)) => *start,
                None => range.end,
            };
            self.segments.insert(at, (gap_end, 1));
            at = gap_end;
        }
    }

    /// Undoes an [`MappedRanges::add`] of the same range.
    fn remove(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
        let inside = self.segments.range_mut(range.clone());
        let mut gone = Vec::new();
        for (start, (_, count)) in inside {
            *count -= 1;
            if *count == 0 {
                gone.push(*start);
            }
        }
        for start in gone {
            self.segments.remove(&start);
        }
        self.join(range.start);
        self.join(range.end);
    }

    /// Joins the segments that touch at `at`, so that only the mappings that exist now bound their number.
    fn join(&mut self, at: u64) {
        let Some(&(end, count)) = self.segments.get(&at) else {
            return;
        };
        if let Some((_, before)) = self.segments.range_mut(..at).next_back()
            && *before == (at, count)
        {
            before.0 = end;
            self.segments.remove(&at);
        }
    }
}

impl State {
    fn is_discarding(&self, range: &Range<u64>) -> bool {
        self.batches.values().any(|batch| match batch {
            None => true,
            Some(ranges) => {
                let at = ranges.partition_point(|it| it.end <= range.start);
                ranges.get(at).is_some_and(|it| it.start < range.end)
            }
        })
    }
}

impl DmaMapped {
    /// Counts a range as mapped, and returns when no discard of it is in progress. The host may pin it from then on.
    pub(crate) fn hold(&self, range: &Range<u64>) {
        let mut state = self.state.lock().unpoisoned();
        state.mapped.add(range);
        let ended = self.ended.wait_while(state, |it| it.is_discarding(range));
        drop(ended.unpoisoned());
    }

    /// Undoes a [`DmaMapped::hold`] of the same range, after the host has unpinned it.
    pub(crate) fn release(&self, range: &Range<u64>) {
        self.state.lock().unpoisoned().mapped.remove(range);
    }

    /// Begins a batch of discards. If something is mapped, `plan` takes it out of the batch, and returns what is left in
    /// ascending order. Nothing that was left is pinned until the result is dropped.
    pub(crate) fn begin(
        &self,
        plan: impl FnOnce(&MappedRanges) -> Vec<Range<u64>>,
    ) -> DiscardBatch<'_> {
        let mut state = self.state.lock().unpoisoned();
        let has_mapped = !state.mapped.segments.is_empty();
        let ranges = has_mapped.then(|| plan(&state.mapped));
        let number = state.next;
        state.next += 1;
        state.batches.insert(number, ranges);
        DiscardBatch { book: self, number }
    }
}

/// A batch of discards in progress.
#[derive(Debug)]
pub(crate) struct DiscardBatch<'a> {
    book: &'a DmaMapped,
    number: u64,
}

impl Drop for DiscardBatch<'_> {
    fn drop(&mut self) {
        let mut state = self.book.state.lock().unpoisoned();
        state.batches.remove(&self.number);
        // Whoever waits has a mapping. Without one, a system call to wake it would be in vain.
        if !state.mapped.segments.is_empty() {
            self.book.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::wait_until;

    const PAGES: u64 = 40;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        let range = (0..PAGES - 8, 1..8_u64).prop_map(|(start, pages)| start..start + pages);
        proptest::collection::vec(range, 1..30)
    }

    proptest! {
        /// The model counts the mappings of each page.
        #[test]
        fn ranges_are_those_of_a_page_by_page_model(
            ranges in ranges(),
            gone in proptest::collection::vec(any::<bool>(), 30),
        ) {
            let mut mapped = MappedRanges::default();
            let mut model = [0_u32; PAGES as usize];
            let check = |mapped: &MappedRanges, model: &[u32]| {
                for within in [0..PAGES, 5..6, 7..23, 9..9] {
                    let pages: Vec<u64> = mapped.within(within.clone()).flatten().collect();
                    let expected: Vec<u64> = within.filter(|page| model[*page as usize] > 0).collect();
                    assert_eq!(pages, expected);
                }
            };
            for range in &ranges {
                mapped.add(range);
                range.clone().for_each(|page| model[page as usize] += 1);
                check(&mapped, &model);
            }
            let (gone, left): (Vec<_>, Vec<_>) = ranges.iter().zip(gone).partition(|(_, gone)| *gone);
            for (range, _) in gone {
                mapped.remove(range);
                range.clone().for_each(|page| model[page as usize] -= 1);
                check(&mapped, &model);
            }
            prop_assert!(mapped.segments.len() <= 2 * left.len());
            left.iter().for_each(|(range, _)| mapped.remove(range));
            prop_assert_eq!(mapped, MappedRanges::default());
        }
    }

    /// Starts a mapping of `range`, and checks that it is over although all batches are in progress.
    fn assert_at_once(book: &DmaMapped, range: &Range<u64>) {
        let is_held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                book.hold(range);
                is_held.store(true, Ordering::SeqCst);
            });
            wait_until("the mapping", || is_held.load(Ordering::SeqCst));
        });
    }

    /// Starts a mapping of `range`, and checks that it is over after the batch and not before.
    fn assert_waits(book: &DmaMapped, range: &Range<u64>, batch: DiscardBatch<'_>) {
        let is_held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                book.hold(range);
                is_held.store(true, Ordering::SeqCst);
            });
            wait_until("the mapping to be counted", || {
                let state = book.state.lock().unpoisoned();
                let pages = state.mapped.within(range.clone()).flatten();
                pages.count() as u64 == range.end - range.start
            });
            // Enough for a mapping that does not wait.
            for _ in 0..50 {
                std::thread::yield_now();
                assert!(!is_held.load(Ordering::SeqCst), "{range:?}");
            }
            drop(batch);
        });
        assert!(is_held.load(Ordering::SeqCst));
    }

    #[test]
    fn mapping_that_is_first_is_not_in_the_batch() {
        let book = DmaMapped::default();
        book.hold(&(4..6));
        let mut seen = Vec::new();
        let batch = book.begin(|mapped| {
            seen.extend(mapped.within(0..10));
            vec![0..4, 6..10]
        });
        assert!(seen.into_iter().eq(std::iter::once(4..6)));
        assert_at_once(&book, &(4..6));
        drop(batch);
        book.release(&(4..6));
        book.release(&(4..6));
        let state = book.state.lock().unpoisoned();
        assert_eq!(state.mapped, MappedRanges::default());
    }

    #[test]
    fn mapping_waits_for_the_batches_that_have_its_range() {
        let book = DmaMapped::default();
        // While nothing is mapped, a batch does not name its ranges.
        let first = book.begin(|_| unreachable!("nothing is mapped"));
        assert_waits(&book, &(100..101), first);
        let low = book.begin(|_| vec![0..4, 6..10]);
        let high = book.begin(|_| vec![8..9, 9..20]);
        assert_at_once(&book, &(4..6));
        assert_at_once(&book, &(20..30));
        assert_waits(&book, &(3..5), low);
        assert_at_once(&book, &(3..5));
        assert_waits(&book, &(19..40), high);
        assert!(book.state.lock().unpoisoned().batches.is_empty());
    }
}
