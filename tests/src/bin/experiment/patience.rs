//! Ends a step only when it makes no more progress, because a guest on a busy machine is slow without having failed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use integration_tests::linux::{Guest, memory_bytes_in};
use integration_tests::wait::TooLate;

/// A step that makes no progress for so long has stalled.
const STALL: Duration = Duration::from_secs(120);
/// Between two looks at its progress.
const LOOK: Duration = Duration::from_secs(3);
/// Smaller changes of the resident set are noise.
const NOTICEABLE_BYTES: u64 = 1 << 20;

/// The progress of a step. Each figure moves in one direction only and has a bound, so that no step lasts forever:
/// memory that is loaded and evicted repeatedly, as on a thrashing host, is not progress.
#[derive(Debug)]
struct Patience {
    highest_bytes: u64,
    lowest_bytes: u64,
    printed: usize,
    /// When the last of them changed, since the step began.
    at: Duration,
}

impl Patience {
    fn new(resident_bytes: u64, printed: usize) -> Self {
        Self {
            highest_bytes: resident_bytes,
            lowest_bytes: resident_bytes,
            printed,
            at: Duration::ZERO,
        }
    }

    /// Whether the step may continue at `now` since its beginning.
    fn lasts(&mut self, now: Duration, resident_bytes: u64, printed: usize) -> bool {
        let mut progress = false;
        if resident_bytes >= self.highest_bytes + NOTICEABLE_BYTES {
            self.highest_bytes = resident_bytes;
            progress = true;
        }
        if resident_bytes + NOTICEABLE_BYTES <= self.lowest_bytes {
            self.lowest_bytes = resident_bytes;
            progress = true;
        }
        if printed > self.printed {
            self.printed = printed;
            progress = true;
        }
        if progress {
            self.at = now;
        }
        now.saturating_sub(self.at) < STALL
    }
}

/// Repeats `look`, which waits for a moment, until it finds something or fails otherwise.
fn while_it_progresses<T>(
    guest: &mut Guest,
    what: &str,
    mut look: impl FnMut(&mut Guest) -> Result<T>,
) -> Result<T> {
    let begun = Instant::now();
    let mut patience = Patience::new(guest.vmm.resident_bytes()?, guest.serial.text().len());
    loop {
        match look(guest) {
            Err(error) if TooLate::is_cause_of(&error) => {
                if guest.vmm.has_ended()? {
                    return Err(error).context("the VMM has ended");
                }
                let resident_bytes = guest.vmm.resident_bytes()?;
                let printed = guest.serial.text().len();
                if !patience.lasts(begun.elapsed(), resident_bytes, printed) {
                    bail!(
                        "{what}: no progress for {} s; {}",
                        STALL.as_secs(),
                        guest.serial.last_words()
                    );
                }
            }
            result => return result,
        }
    }
}

/// Waits until the guest answers commands.
pub(crate) fn boot(guest: &mut Guest) -> Result<()> {
    while_it_progresses(guest, "boot", |guest| {
        guest.expect("guest: init", LOOK).map(drop)
    })?;
    // Bytes sent before the terminal is raw may be echoed or lost, so the request is repeated until the first response.
    while_it_progresses(guest, "command server", |guest| {
        guest.serial.send("ping")?;
        guest.expect("ok ping", LOOK).map(drop)
    })
}

/// Has the guest carry out one command.
pub(crate) fn command(guest: &mut Guest, line: &str) -> Result<String> {
    let verb = line.split(' ').next().unwrap_or(line);
    guest.serial.send(line)?;
    while_it_progresses(guest, line, |guest| guest.serial.expect_answer(verb, LOOK))
}

/// Free memory of the guest by its own figures.
pub(crate) fn free_bytes(guest: &mut Guest) -> Result<u64> {
    memory_bytes_in(&command(guest, "mem")?, "free")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Looks every 100 s, which is less than [`STALL`]; whether each look is patient.
    fn looks(start: u64, rest: &[(u64, usize)]) -> Vec<bool> {
        let mut patience = Patience::new(start * MIB, 0);
        rest.iter()
            .zip(1..)
            .map(|((mib, printed), n)| {
                patience.lasts(Duration::from_secs(100 * n), mib * MIB, *printed)
            })
            .collect()
    }

    #[test]
    fn guest_that_touches_a_little_at_a_time_is_slow_and_not_stalled() {
        let slow: Vec<(u64, usize)> = (1..200).map(|mib| (10 + mib, 0)).collect();
        assert!(looks(10, &slow).into_iter().all(|patient| patient));
    }

    #[test]
    fn memory_that_leaves_is_progress_and_so_is_what_the_guest_prints() {
        assert_eq!(looks(500, &[(400, 0), (300, 0), (300, 7)]), [true; 3]);
    }

    #[test]
    fn step_without_progress_ends() {
        assert_eq!(looks(10, &[(10, 0), (10, 0)]), [true, false]);
        assert_eq!(looks(10, &[(20, 0), (20, 0), (20, 0)]), [true, true, false]);
    }

    #[test]
    fn memory_that_comes_and_goes_is_no_progress() {
        let thrashing = [(90, 0), (100, 0), (90, 0), (100, 0), (90, 0)];
        assert_eq!(looks(100, &thrashing), [true, true, false, false, false]);
    }

    #[test]
    fn noise_is_no_progress() {
        let mut patience = Patience::new(10 * MIB, 0);
        assert!(patience.lasts(Duration::from_secs(100), 10 * MIB + 4096, 0));
        assert!(!patience.lasts(Duration::from_secs(130), 10 * MIB + 8192, 0));
    }
}
