//! Decrease of a VMM's resident memory: samples and their evaluation.

use std::fs;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::{Mutex, MutexGuard};

/// Interval between two samples, if the host's timers are fine enough; the actual interval is reported.
const INTERVAL: Duration = Duration::from_millis(2);
/// Smaller changes are noise, because the VMM's own memory varies.
const STEP_BYTES: u64 = 1 << 20;

/// Resident bytes of a process at one moment, huge pages of the pool included.
///
/// # Errors
/// The process has ended.
pub(super) fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let kib = field("VmRSS:").context("no VmRSS")? + field("HugetlbPages:").unwrap_or(0);
    Ok(kib << 10)
}

/// Page faults of a process so far: its vCPUs' first touches of memory are among them.
///
/// # Errors
/// The process has ended.
pub(super) fn faults(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may contain any characters; minor and major faults are fields 10 and 12.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let count = |field: usize| -> Result<u64> {
        let text = fields.get(field - 3).context("too few fields")?;
        Ok(text.parse()?)
    };
    Ok(count(10)? + count(12)?)
}

/// One moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    at: Instant,
    /// Decrease since the start.
    gone_bytes: u64,
}

/// Progress of the decrease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Maximum decrease.
    pub(super) back_bytes: u64,
    /// Time of the last decrease above noise.
    pub(super) last_step: Option<Instant>,
}

impl Progress {
    fn note(&mut self, gone_bytes: u64, at: Instant) {
        if gone_bytes >= self.back_bytes + STEP_BYTES {
            self.back_bytes = gone_bytes;
            self.last_step = Some(at);
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    samples: Vec<Sample>,
    progress: Progress,
    ended: bool,
}

/// A running recording; ends when dropped.
#[derive(Debug)]
pub(super) struct Recording {
    /// Resident bytes at its start.
    before_bytes: u64,
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

impl Recording {
    /// Begins to sample.
    ///
    /// # Errors
    /// The process has ended.
    pub(super) fn start(pid: u32) -> Result<Self> {
        let before_bytes = resident_bytes(pid)?;
        let shared = Arc::<Mutex<Shared>>::default();
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                // The end of the process is detected elsewhere.
                while let Ok(resident_bytes) = resident_bytes(pid) {
                    let at = Instant::now();
                    let mut shared = lock(&shared);
                    if shared.ended {
                        return;
                    }
                    let gone_bytes = before_bytes.saturating_sub(resident_bytes);
                    shared.progress.note(gone_bytes, at);
                    shared.samples.push(Sample { at, gone_bytes });
                    drop(shared);
                    thread::park_timeout(INTERVAL);
                }
            }
        });
        Ok(Self {
            before_bytes,
            shared,
            thread: Some(thread),
        })
    }

    /// Resident bytes at its start.
    pub(super) fn before_bytes(&self) -> u64 {
        self.before_bytes
    }

    /// Progress of the decrease.
    pub(super) fn progress(&self) -> Progress {
        lock(&self.shared).progress
    }

    /// The samples so far.
    pub(super) fn trace(&self) -> ResidencyTrace {
        ResidencyTrace(lock(&self.shared).samples.clone())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        lock(&self.shared).ended = true;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It ends automatically; a panic would be visible in the samples.
            let _ = thread.join();
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // The samples are consistent even if a thread panicked.
    shared.lock()
}

/// The samples of one free.
#[derive(Debug)]
pub(super) struct ResidencyTrace(Vec<Sample>);

impl ResidencyTrace {
    /// Maximum decrease.
    pub(super) fn back_bytes(&self) -> u64 {
        let gone = self.0.iter().map(|sample| sample.gone_bytes);
        gone.max().unwrap_or(0)
    }

    /// When the decrease reached `bytes`.
    pub(super) fn reached(&self, bytes: u64) -> Option<Instant> {
        let enough = self.0.iter().find(|sample| sample.gone_bytes >= bytes);
        enough.map(|sample| sample.at)
    }

    /// Bytes per second from the last sample before the decrease to 99 % of it.
    pub(super) fn bytes_per_second(&self) -> Option<f64> {
        let last_bytes = self.back_bytes() / 100 * 99;
        let fallen = |sample: &Sample| sample.gone_bytes >= STEP_BYTES;
        let first = self.0.iter().position(fallen)?;
        let begin = self.0[first.saturating_sub(1)].at;
        let seconds = (self.reached(last_bytes)? - begin).as_secs_f64();
        (seconds > 0.0).then(|| last_bytes as f64 / seconds)
    }

    /// The median time between two samples.
    pub(super) fn interval(&self) -> Option<Duration> {
        let mut all: Vec<Duration> = self
            .0
            .windows(2)
            .map(|pair| pair[1].at.duration_since(pair[0].at))
            .collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn trace(begin: Instant, gone_mib: &[u64]) -> ResidencyTrace {
        let samples = (0..).zip(gone_mib).map(|(tick, mib)| Sample {
            at: begin + Duration::from_millis(tick * 10),
            gone_bytes: mib * MIB,
        });
        ResidencyTrace(samples.collect())
    }

    #[test]
    fn fall_tells_when_how_far_and_how_fast() {
        let begin = Instant::now();
        let trace = trace(begin, &[0, 0, 100, 200, 200, 300, 299, 300]);
        let ms = |ms| Some(begin + Duration::from_millis(ms));
        assert_eq!(trace.back_bytes(), 300 * MIB);
        assert_eq!(trace.reached(150 * MIB), ms(30));
        assert_eq!(trace.reached(301 * MIB), None);
        // 297 MiB between 10 and 50 ms.
        let rate = trace.bytes_per_second().unwrap() / MIB as f64;
        assert!((rate - 297.0 / 0.04).abs() < 100.0, "{rate}");
        assert_eq!(trace.interval(), Some(Duration::from_millis(10)));
    }

    #[test]
    fn fall_that_did_not_happen_has_neither_time_nor_rate() {
        let trace = trace(Instant::now(), &[0, 0, 0]);
        assert_eq!(trace.back_bytes(), 0);
        assert_eq!(trace.reached(1), None);
        assert_eq!(trace.bytes_per_second(), None);
    }

    #[test]
    fn progress_is_made_by_more_than_noise() {
        let at = Instant::now();
        let mut progress = Progress::default();
        progress.note(MIB - 1, at);
        assert_eq!(progress, Progress::default());
        progress.note(3 * MIB, at);
        progress.note(4 * MIB - 1, at + Duration::from_secs(1));
        progress.note(2 * MIB, at + Duration::from_secs(2));
        assert_eq!(progress.last_step, Some(at));
        assert_eq!(progress.back_bytes, 3 * MIB);
    }

    #[test]
    fn figures_of_this_process_are_found() {
        let pid = std::process::id();
        assert!(resident_bytes(pid).unwrap() > 0);
        assert!(faults(pid).unwrap() > 0);
    }
}
