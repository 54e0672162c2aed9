//! Records host memory over time: a thread samples available memory and the resident memory of each guest's VMM.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;

use crate::host::Host;

/// Interval between two samples: short compared with a turn, long compared with the cost of a sample.
const INTERVAL: Duration = Duration::from_millis(250);

/// One moment.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// Since the recording began.
    pub(crate) seconds: f64,
    /// `MemAvailable` of the host.
    pub(crate) available_bytes: u64,
    /// Resident set of each VMM by guest number.
    pub(crate) resident_bytes: BTreeMap<usize, u64>,
    /// Resident memory of VMMs beyond their guests' own use, for guests whose use is known.
    pub(crate) excess_bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    pids: BTreeMap<usize, u32>,
    own_bytes: BTreeMap<usize, u64>,
    samples: Vec<Sample>,
    ended: bool,
}

/// A running recording; ends when dropped.
#[derive(Debug)]
pub(crate) struct Recorder {
    begun: Instant,
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Begins to sample.
    pub(crate) fn start(host: &Host) -> Recorder {
        let shared = Arc::<Mutex<Shared>>::default();
        let begun = Instant::now();
        let thread = thread::spawn({
            let (shared, host) = (Arc::clone(&shared), host.clone());
            move || {
                while sample(&host, &shared, begun) {
                    thread::park_timeout(INTERVAL);
                }
            }
        });
        Recorder {
            begun,
            shared,
            thread: Some(thread),
        }
    }

    /// Seconds since the start.
    pub(crate) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Records another VMM under this number.
    pub(crate) fn watch(&self, number: usize, pid: u32) {
        self.lock().pids.insert(number, pid);
    }

    /// Sets a guest's own use of memory from now on.
    pub(crate) fn own_use(&self, number: usize, bytes: u64) {
        self.lock().own_bytes.insert(number, bytes);
    }

    /// The samples so far.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        self.lock().samples.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // The samples are consistent even if a thread panicked.
        self.shared.lock()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.lock().ended = true;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It ends automatically; a panic would be visible in the samples.
            let _ = thread.join();
        }
    }
}

/// Takes one sample; false if the recording has ended.
fn sample(host: &Host, shared: &Mutex<Shared>, begun: Instant) -> bool {
    let (pids, own_bytes) = {
        let shared = shared.lock();
        if shared.ended {
            return false;
        }
        (shared.pids.clone(), shared.own_bytes.clone())
    };
    let resident_bytes: BTreeMap<usize, u64> = pids
        .into_iter()
        .filter_map(|(number, pid)| Some((number, resident(pid)?)))
        .collect();
    let excess = own_bytes.iter().filter_map(|(number, own)| {
        let resident = resident_bytes.get(number)?;
        Some(resident.saturating_sub(*own))
    });
    let excess_bytes = excess.sum();
    if let Ok(available_bytes) = host.available_bytes() {
        let sample = Sample {
            seconds: begun.elapsed().as_secs_f64(),
            available_bytes,
            resident_bytes,
            excess_bytes,
        };
        let mut shared = shared.lock();
        shared.samples.push(sample);
    }
    true
}

/// Resident set of a process; `None` when it has ended.
fn resident(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}
