//! `guest-mem dirty`: writes one word in each page of a region in turn, at a steady rate, until it is killed.

use std::thread;
use std::time::{Duration, Instant};

use crate::blocks::PAGE_BYTES;
use crate::sys::{HugePages, Mapping};

const PAGE_WORDS: usize = 512;
/// Short compared with a pass of a migration, long compared with the cost of waking up.
const INTERVAL: Duration = Duration::from_millis(5);

/// Writes `bytes_per_s` bytes of whole pages per second. Catches up after a time in which the guest did not run.
pub(crate) fn run(bytes: u64, bytes_per_s: u64) -> Result<(), String> {
    let mut region = Region::new(bytes)?;
    println!("ok dirty {bytes} bytes");
    let begin = Instant::now();
    loop {
        region.write_until(due(begin.elapsed(), bytes_per_s));
        thread::sleep(INTERVAL);
    }
}

/// The number of pages that must be written after this time.
fn due(elapsed: Duration, bytes_per_s: u64) -> u64 {
    let bytes = elapsed.as_micros() * u128::from(bytes_per_s) / 1_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX) / PAGE_BYTES
}

struct Region {
    mapping: Mapping,
    written_pages: u64,
}

impl Region {
    fn new(bytes: u64) -> Result<Self, String> {
        if bytes < PAGE_BYTES {
            return Err("less than a page".into());
        }
        let bytes = usize::try_from(bytes).map_err(|_| "too large".to_string())?;
        let mut mapping =
            Mapping::new(bytes, HugePages::Default).map_err(|error| error.to_string())?;
        for page in mapping.words_mut().chunks_mut(PAGE_WORDS) {
            page[0] = 1;
        }
        Ok(Self {
            mapping,
            written_pages: 0,
        })
    }

    fn write_until(&mut self, pages: u64) {
        let words = self.mapping.words_mut();
        let count = words.len() / PAGE_WORDS;
        while self.written_pages < pages {
            let page = usize::try_from(self.written_pages).unwrap_or(0) % count;
            words[page * PAGE_WORDS] = self.written_pages;
            self.written_pages += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_written_in_turn_at_the_rate() {
        assert_eq!(due(Duration::from_millis(500), 8 << 20), 1024);
        let mut region = Region::new(4 * PAGE_BYTES).unwrap();
        region.write_until(6);
        let firsts: Vec<_> = region
            .mapping
            .words()
            .chunks(PAGE_WORDS)
            .map(|page| page[0])
            .collect();
        assert_eq!(firsts, [4, 5, 2, 3]);
    }

    #[test]
    fn region_of_less_than_a_page_is_refused() {
        assert!(Region::new(PAGE_BYTES - 1).is_err());
    }
}
