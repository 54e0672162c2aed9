//! Memory in constant use with known contents: allocated, checked, partly returned, written again and freed, at random
//! and concurrently on several threads.
//!
//! A thread holds a few slots. Each is empty, or memory filled with a word stream of its own
//! seed. One step picks a slot:
//!
//! | Slot | Step |
//! | --- | --- |
//! | empty | map memory, touch every page, check that the rest of each page reads zero, fill it |
//! | filled | check its contents; then, at random, unmap it, return some of its pages and fill them again, or rewrite it |
//!
//! No memory is freed or overwritten before it is checked, so that every wrong byte is detected. The first one ends the
//! run and is reported.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::pattern;
use crate::random::Random;
use crate::sys::{HugePages, Mapping};

const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Enough that some slots rest while others change.
const SLOTS: usize = 8;

/// Parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Maximum filled memory of all threads together.
    pub(crate) bytes: u64,
    pub(crate) seed: u64,
    pub(crate) threads: u64,
}

/// The work done so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) steps: AtomicU64,
    /// Bytes found to be what was written there.
    pub(crate) verified_bytes: AtomicU64,
    /// Bytes of fresh memory found to be zero.
    pub(crate) zero_bytes: AtomicU64,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
}

impl Tally {
    /// Reports the first wrong byte, if there is one.
    pub(crate) fn check(&self) -> Result<(), String> {
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.clone().map_or(Ok(()), Err)
    }

    fn fail(&self, what: String) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.get_or_insert(what);
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Running threads.
#[derive(Debug)]
pub(crate) struct Churn {
    tally: Arc<Tally>,
    threads: Vec<JoinHandle<()>>,
}

impl Churn {
    pub(crate) fn start(plan: Plan) -> Result<Self, String> {
        let share = plan.bytes / plan.threads.max(1) / SLOTS as u64;
        let slot_pages = usize::try_from(share).map_err(|_| "too large")? / PAGE_BYTES;
        if slot_pages == 0 {
            return Err(format!("{} bytes are too few", plan.bytes));
        }
        let tally = Arc::new(Tally::default());
        let threads = (0..plan.threads.max(1)).map(|number| {
            let tally = Arc::clone(&tally);
            let random = Random::new(plan.seed, number);
            std::thread::spawn(move || {
                let mut worker = Worker::new(random, slot_pages, &tally);
                if let Err(what) = worker.run() {
                    tally.fail(format!("thread {number}, {what}"));
                }
            })
        });
        Ok(Self {
            threads: threads.collect(),
            tally,
        })
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Makes every thread check all its memory and end.
    pub(crate) fn stop(self) -> Result<Arc<Tally>, String> {
        self.tally.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if thread.join().is_err() {
                return Err("a thread panicked".into());
            }
        }
        self.tally.check()?;
        Ok(self.tally)
    }
}

struct Worker<'a> {
    random: Random,
    slots: [Option<Filled>; SLOTS],
    slot_pages: usize,
    tally: &'a Tally,
}

/// Filled memory.
struct Filled {
    mapping: Mapping,
    seed: u64,
}

impl<'a> Worker<'a> {
    fn new(random: Random, slot_pages: usize, tally: &'a Tally) -> Self {
        Self {
            random,
            slots: [const { None }; SLOTS],
            slot_pages,
            tally,
        }
    }

    /// Steps until stopped, then checks the remaining memory.
    fn run(&mut self) -> Result<(), String> {
        while !self.tally.stop.load(Ordering::Relaxed) {
            let at = self.random.below(SLOTS);
            let step = self.step(at);
            step.map_err(|what| {
                let steps = self.tally.steps.load(Ordering::Relaxed);
                format!("slot {at}, step {steps}: {what}")
            })?;
            self.tally.steps.fetch_add(1, Ordering::Relaxed);
        }
        self.slots.iter().flatten().try_for_each(|filled| {
            filled
                .verify(self.tally)
                .map_err(|what| format!("at the end: {what}"))
        })
    }

    fn step(&mut self, at: usize) -> Result<(), String> {
        let Some(mut filled) = self.slots[at].take() else {
            let filled = self.fill_new().map_err(|error| error.to_string())?;
            self.slots[at] = Some(filled?);
            return Ok(());
        };
        filled.verify(self.tally)?;
        match self.random.below(4) {
            // The memory is unmapped when dropped here.
            0 | 1 => return Ok(()),
            2 => {
                let pages = filled.mapping.words().len() / PAGE_WORDS;
                let first = self.random.below(pages);
                let count = 1 + self.random.below(pages - first);
                filled.replace_pages(first, count, self.tally)?;
            }
            _ => {
                filled.seed = self.random.next();
                pattern::fill(filled.mapping.words_mut(), filled.seed, 0);
            }
        }
        self.slots[at] = Some(filled);
        Ok(())
    }

    /// Memory of a random size and kind, small and large with equal probability.
    fn fill_new(&mut self) -> io::Result<Result<Filled, String>> {
        let shift = self.random.below(self.slot_pages.ilog2() as usize + 1);
        let pages = (1 << shift) + self.random.below(1 << shift);
        let bytes = pages.min(self.slot_pages) * PAGE_BYTES;
        let mapping = match self.random.below(8) {
            0 => Mapping::shared(bytes)?,
            1 | 2 => Mapping::new(bytes, HugePages::Default)?,
            3 => Mapping::new(bytes, HugePages::Never)?,
            _ => Mapping::new(bytes, HugePages::Always)?,
        };
        let mut filled = Filled {
            mapping,
            seed: self.random.next(),
        };
        let pages = filled.mapping.words().len() / PAGE_WORDS;
        Ok(filled.fill_fresh(0, pages, self.tally).map(|()| filled))
    }
}

impl Filled {
    /// Returns pages to the kernel and fills the new ones.
    fn replace_pages(&mut self, first: usize, count: usize, tally: &Tally) -> Result<(), String> {
        let given = self.mapping.discard(first * PAGE_BYTES, count * PAGE_BYTES);
        given.map_err(|error| format!("madvise: {error}"))?;
        self.fill_fresh(first, count, tally)
    }

    /// Fills pages never written before. Checked only after a write, because an untouched page reads zero without being
    /// allocated.
    fn fill_fresh(&mut self, first: usize, count: usize, tally: &Tally) -> Result<(), String> {
        let from = first * PAGE_WORDS;
        let words = &mut self.mapping.words_mut()[from..from + count * PAGE_WORDS];
        for page in words.chunks_mut(PAGE_WORDS) {
            page[0] = !0;
        }
        for (number, page) in words.chunks(PAGE_WORDS).enumerate() {
            if let Some(at) = page[1..].iter().position(|word| *word != 0) {
                let (page_at, word) = (first + number, page[at + 1]);
                return Err(format!("fresh page {page_at} reads {word:#x}"));
            }
        }
        pattern::fill(words, self.seed, from as u64);
        let bytes = (count * PAGE_BYTES) as u64;
        tally.zero_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn verify(&self, tally: &Tally) -> Result<(), String> {
        let words = self.mapping.words();
        if let Some(word) = pattern::first_difference(words, self.seed, 0) {
            let (bytes, found) = (words.len() * 8, words[usize::try_from(word).unwrap_or(0)]);
            let at = word * 8;
            return Err(format!("byte {at} of {bytes} reads {found:#x}"));
        }
        tally
            .verified_bytes
            .fetch_add(words.len() as u64 * 8, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(tally: &Tally) -> Worker<'_> {
        Worker::new(Random::new(5, 0), 64, tally)
    }

    #[test]
    fn worker_after_many_steps_has_checked_bytes_of_every_kind() {
        let tally = Tally::default();
        let mut worker = worker(&tally);
        for step in 0..400 {
            worker.step(step % SLOTS).unwrap();
        }
        assert!(tally.verified_bytes.load(Ordering::Relaxed) > 1 << 20);
        assert!(tally.zero_bytes.load(Ordering::Relaxed) > 1 << 20);
    }

    #[test]
    fn worker_with_one_word_changed_under_it_tells() {
        let tally = Tally::default();
        let mut worker = worker(&tally);
        worker.step(3).unwrap();
        let filled = worker.slots[3].as_mut().unwrap();
        let words = filled.mapping.words_mut();
        *words.last_mut().unwrap() ^= 1 << 40;
        let error = worker.step(3).unwrap_err();
        assert!(error.contains("reads"), "{error}");
    }

    #[test]
    fn churn_stopped_tells_what_it_did() {
        let churn = Churn::start(Plan {
            bytes: 4 << 20,
            seed: 1,
            threads: 2,
        })
        .unwrap();
        while churn.tally().steps.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        let tally = churn.stop().unwrap();
        assert!(tally.verified_bytes.load(Ordering::Relaxed) > 0);
        tally.fail("byte 7".into());
        assert_eq!(tally.check(), Err("byte 7".into()));
    }
}
