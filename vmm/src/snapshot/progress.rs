//! Progress of a snapshot or a restore.

use std::sync::atomic::{AtomicU64, Ordering};

use api::SnapshotProgress;
use machine::memory::{GuestMemory, Zone};

use crate::events::{EventKind, EventSink};

/// Number of events in total.
const STEPS: u128 = 10;

/// The event for bytes done and bytes in total.
type Kind = fn(u64, u64) -> EventKind;

/// Counts processed RAM and reports each tenth of the total.
pub struct Progress {
    total_bytes: u64,
    done_bytes: AtomicU64,
    events: EventSink,
    kind: Kind,
}

virtio_devices::debug_fields!(Progress {
    total_bytes,
    done_bytes
});

impl Progress {
    /// Starts counting while `memory` is saved.
    pub fn of_snapshot(memory: &GuestMemory, events: EventSink) -> Self {
        Self::new(memory, events, |done_bytes, total_bytes| {
            EventKind::SnapshotProgress {
                done_bytes,
                total_bytes,
            }
        })
    }

    /// Starts counting while `memory` is loaded.
    pub fn of_restore(memory: &GuestMemory, events: EventSink) -> Self {
        Self::new(memory, events, |done_bytes, total_bytes| {
            EventKind::RestoreProgress {
                done_bytes,
                total_bytes,
            }
        })
    }

    fn new(memory: &GuestMemory, events: EventSink, kind: Kind) -> Self {
        Self {
            total_bytes: memory.zones().iter().map(Zone::bytes).sum(),
            done_bytes: AtomicU64::new(0),
            events,
            kind,
        }
    }

    /// Adds `bytes` processed bytes. Must be called by one thread only.
    pub(super) fn add(&self, bytes: u64) {
        let before = self.now();
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        let after = self.now();
        if step(before) != step(after) {
            let kind = (self.kind)(after.done_bytes, after.total_bytes);
            (self.events)(&kind.into());
        }
    }

    /// Raises the processed bytes to `bytes`. Must be called by one thread only.
    pub(super) fn reach(&self, bytes: u64) {
        self.add(bytes.saturating_sub(self.now().done_bytes));
    }

    /// The current figures.
    pub fn now(&self) -> SnapshotProgress {
        SnapshotProgress {
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
        }
    }
}

fn step(progress: SnapshotProgress) -> u128 {
    u128::from(progress.done_bytes) * STEPS / u128::from(progress.total_bytes.max(1))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use api::config::MemoryConfig;

    use super::*;

    #[test]
    fn each_tenth_is_reported_once_and_the_end_with_it() {
        let config = MemoryConfig {
            size: 64 << 20,
            ..MemoryConfig::default()
        };
        let memory = GuestMemory::new(&config, 46).expect("memory");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let recorded = Arc::clone(&seen);
        let sink: EventSink = Arc::new(move |event| {
            let text = format!("{} {:?}", event.kind.name(), event.properties());
            recorded.lock().expect("no panic").push(text);
        });
        let progress = Progress::of_snapshot(&memory, sink);
        for _ in 0..32 {
            progress.add(2 << 20);
        }
        let seen = seen.lock().expect("no panic");
        assert_eq!(seen.len(), 10, "{seen:?}");
        let end = format!(
            "snapshot-progress {:?}",
            [
                ("done_bytes", "67108864".to_owned()),
                ("total_bytes", "67108864".to_owned())
            ]
        );
        assert_eq!(seen.last(), Some(&end));
        assert_eq!(progress.now().done_bytes, 64 << 20);
    }
}
