//! Access to locks whose holder has panicked.

use std::sync::{LockResult, PoisonError};

/// The data of a lock, even if a thread panicked while it held the lock.
///
/// Data under our locks changes in steps that each leave it consistent, so it is usable after a panic. The released
/// program aborts on a panic anyway. Where threads unwind, in tests, the first panic matters and must not cause a
/// second one.
pub trait Unpoisoned {
    /// The guard of the lock, or the result of a wait.
    type Guard;

    /// Returns the guard.
    fn unpoisoned(self) -> Self::Guard;
}

impl<G> Unpoisoned for LockResult<G> {
    type Guard = G;

    fn unpoisoned(self) -> G {
        self.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, RwLock};

    use super::*;

    #[test]
    fn lock_whose_holder_panicked_is_usable() {
        let (mutex, rw_lock) = (Mutex::new(1), RwLock::new(2));
        std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _guards = (mutex.lock(), rw_lock.write());
                panic!("while both locks are held");
            });
            holder.join().expect_err("the thread panicked");
        });
        assert!(mutex.is_poisoned() && rw_lock.is_poisoned());
        *mutex.lock().unpoisoned() += 1;
        assert_eq!(*mutex.lock().unpoisoned(), *rw_lock.read().unpoisoned());
    }
}
