//! Records which pages of guest RAM this process writes or discards, while a migration or a live snapshot needs the
//! record.
//!
//! KVM records the guest's own writes. It does not see those of devices, which this log adds. A page is recorded after
//! the write. A reader that takes the record and copies the pages afterwards therefore misses no write: a later write
//! is in the next record.

use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::Unpoisoned;

/// Size of a page in the record.
pub const LOG_PAGE_BYTES: u64 = 4096;
const WORD_BITS: u64 = u64::BITS as u64;

/// The log of one machine's RAM. It is off by default.
#[derive(Debug, Default)]
pub struct WriteLog {
    is_on: AtomicBool,
    ranges: RwLock<Vec<LoggedRange>>,
}

#[derive(Debug)]
struct LoggedRange {
    guest: Range<u64>,
    /// One bit for each page, the first in bit 0 of the first word.
    words: Vec<AtomicU64>,
}

impl WriteLog {
    /// Starts an empty record of these ranges of guest RAM, which begin and end at pages.
    pub fn start(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        let logged = ranges.into_iter().map(|guest| {
            let pages = (guest.end - guest.start).div_ceil(LOG_PAGE_BYTES);
            let words = (0..pages.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0));
            LoggedRange {
                words: words.collect(),
                guest,
            }
        });
        let logged = logged.collect();
        *self.ranges.write().unpoisoned() = logged;
        self.is_on.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Ends the record and frees it.
    pub fn stop(&self) {
        self.is_on.store(false, Ordering::SeqCst);
        self.ranges.write().unpoisoned().clear();
    }

    /// Whether writes are recorded.
    #[must_use]
    pub fn is_on(&self) -> bool {
        // The caller's write must be visible to a reader that has just started the record.
        fence(Ordering::SeqCst);
        self.is_on.load(Ordering::Relaxed)
    }

    /// Records that `bytes` bytes from `start` on were written. Ignores what is outside the ranges.
    pub fn record(&self, start: u64, bytes: u64) {
        if !self.is_on() {
            return;
        }
        let end = start.saturating_add(bytes);
        for LoggedRange { guest, words } in &*self.ranges.read().unpoisoned() {
            let (start, end) = (start.max(guest.start), end.min(guest.end));
            if start >= end {
                continue;
            }
            let mut page = (start - guest.start) / LOG_PAGE_BYTES;
            let end = (end - guest.start).div_ceil(LOG_PAGE_BYTES);
            while page < end {
                let bit = page % WORD_BITS;
                let count = (WORD_BITS - bit).min(end - page);
                let mask = (u64::MAX >> (WORD_BITS - count)) << bit;
                words[(page / WORD_BITS) as usize].fetch_or(mask, Ordering::Release);
                page += count;
            }
        }
    }

    /// Passes each range to `visit` with the bits of its pages, and clears the record.
    pub fn take(&self, mut visit: impl FnMut(&Range<u64>, &mut dyn Iterator<Item = u64>)) {
        for LoggedRange { guest, words } in &*self.ranges.read().unpoisoned() {
            let mut words = words.iter().map(|word| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::Acquire),
            });
            visit(guest, &mut words);
            words.for_each(drop);
        }
        // The pages are read after the record was cleared.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = LOG_PAGE_BYTES;

    /// Numbers of the recorded pages, counted from address 0.
    fn taken(log: &WriteLog) -> Vec<u64> {
        let mut pages = Vec::new();
        log.take(|guest, words| {
            for (at, word) in words.enumerate() {
                let first = guest.start / PAGE + at as u64 * 64;
                pages.extend(
                    (0..64)
                        .filter(|bit| word & 1 << bit != 0)
                        .map(|bit| first + bit),
                );
            }
        });
        pages
    }

    #[test]
    fn every_touched_page_is_recorded_once_and_nothing_outside_the_ranges() {
        let log = WriteLog::default();
        log.record(0, PAGE);
        assert!(!log.is_on());
        log.start([0..100 * PAGE, 1000 * PAGE..1200 * PAGE]);
        assert!(log.is_on());
        assert!(
            taken(&log).is_empty(),
            "writes before the start are not recorded"
        );
        log.record(5 * PAGE - 1, 2);
        log.record(63 * PAGE, 3 * PAGE);
        log.record(7 * PAGE, 0);
        log.record(99 * PAGE, 902 * PAGE);
        log.record(1199 * PAGE, u64::MAX);
        assert_eq!(taken(&log), [4, 5, 63, 64, 65, 99, 1000, 1199]);
        assert!(taken(&log).is_empty());
        log.record(1000 * PAGE, 200 * PAGE);
        assert_eq!(taken(&log), (1000..1200).collect::<Vec<_>>());
        log.record(0, 1);
        log.stop();
        assert!(!log.is_on());
        assert!(taken(&log).is_empty());
    }
}
