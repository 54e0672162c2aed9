//! The guest that waits for the next test, see [`crate::shared`].

use parking_lot::Mutex;

/// At most one idle guest, and the machine that it runs on as text. Guests are dropped without the lock, because ending a
/// VMM takes time.
#[derive(Debug)]
pub(crate) struct Idle<T>(Mutex<Option<(String, T)>>);

impl<T> Idle<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The idle guest, if it runs on this machine. Any other is ended.
    pub(crate) fn take(&self, machine: &str) -> Option<T> {
        let idle = self.0.lock().take();
        let same = idle.filter(|(other, _)| other == machine);
        same.map(|(_, guest)| guest)
    }

    /// Keeps a guest instead of the one that is idle.
    pub(crate) fn put(&self, machine: String, guest: T) {
        let replaced = self.0.lock().replace((machine, guest));
        drop(replaced);
    }

    pub(crate) fn end(&self) {
        let idle = self.0.lock().take();
        drop(idle);
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::Idle;

    #[test]
    fn idle_guest_is_for_its_machine_and_ends_before_another_starts() {
        let guest = Rc::new(());
        let is_ended = || Rc::strong_count(&guest) == 1;
        let idle = Idle::new();
        idle.put("plain".to_owned(), Rc::clone(&guest));
        assert!(idle.take("plain").is_some_and(|it| Rc::ptr_eq(&it, &guest)));
        assert!(idle.take("plain").is_none());

        idle.put("plain".to_owned(), Rc::clone(&guest));
        assert!(idle.take("balloon").is_none());
        assert!(is_ended());

        idle.put("plain".to_owned(), Rc::clone(&guest));
        idle.put("balloon".to_owned(), Rc::default());
        assert!(is_ended());
        idle.put("plain".to_owned(), Rc::clone(&guest));
        idle.end();
        assert!(is_ended());
    }
}
