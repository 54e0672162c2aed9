//! Interrupt vectors that only record.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use super::DEADLINE;
use crate::pci::{MsiMessage, MsiVectors};

/// Records routes and injections of one function.
#[derive(Debug)]
pub struct MockVectors {
    vectors: Mutex<Vec<Vector>>,
    changed: Condvar,
    refusing: AtomicBool,
}

#[derive(Debug, Clone, Default)]
struct Vector {
    message: Option<MsiMessage>,
    triggered: u64,
}

impl MockVectors {
    /// `count` vectors without routes.
    pub fn new(count: u16) -> Self {
        Self {
            vectors: Mutex::new(vec![Vector::default(); usize::from(count)]),
            changed: Condvar::new(),
            refusing: AtomicBool::new(false),
        }
    }

    /// The route of a vector, if it has one.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        self.lock()[usize::from(vector)].message
    }

    /// Number of times a vector was injected.
    pub fn triggered(&self, vector: u16) -> u64 {
        self.lock()[usize::from(vector)].triggered
    }

    /// Waits until a vector was injected at least `count` times in total.
    ///
    /// # Panics
    /// Not reached within [`DEADLINE`].
    pub fn wait_triggered(&self, vector: u16, count: u64) {
        let (_guard, timeout) = self
            .changed
            .wait_timeout_while(self.lock(), DEADLINE, |vectors| {
                vectors[usize::from(vector)].triggered < count
            })
            .expect("no test panicked in here");
        assert!(!timeout.timed_out(), "no interrupt on vector {vector}");
    }

    /// Simulates a host that rejects every new route.
    pub fn refuse(&self, refusing: bool) {
        self.refusing.store(refusing, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vector>> {
        self.vectors.lock().expect("no test panicked in here")
    }
}

impl MsiVectors for MockVectors {
    fn enable(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        if self.refusing.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.lock()[usize::from(vector)].message = Some(message);
        Ok(())
    }

    fn disable(&self, vector: u16) -> io::Result<()> {
        self.lock()[usize::from(vector)].message = None;
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        let mut vectors = self.lock();
        let vector = &mut vectors[usize::from(vector)];
        if vector.message.is_none() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        vector.triggered += 1;
        self.changed.notify_all();
        Ok(())
    }
}
