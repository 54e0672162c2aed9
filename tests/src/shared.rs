//! Guests that tests share: under emulation a boot takes longer than what many tests do with the guest.
//!
//! One idle guest waits for the next test that wants the same machine. It is ended before any other machine starts, so
//! that tests that run one after the other find no guest on the host but their own. Tests that share a machine therefore
//! form a group, see [`crate::outcome::group`].

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;

use crate::linux::{Guest, Machine};

static IDLE: Idle<Guest> = Idle::new();

impl Machine<'_> {
    /// Runs `work` with a booted guest. `work` must leave the guest as it found it, because the next test may get the same
    /// guest. If `work` fails or panics, the guest is ended.
    ///
    /// # Errors
    /// The guest does not boot, `work` fails, or the guest no longer responds or the VM's state changed.
    pub fn share<T>(&self, work: impl FnOnce(&mut Guest) -> Result<T>) -> Result<T> {
        let mut guest = self.take_over()?;
        let before = guest.vmm.get("vm.info")?;
        let done = work(&mut guest)?;
        guest
            .wait_serving()
            .context("the test left a guest that does not answer")?;
        let after = guest.vmm.get("vm.info")?;
        ensure!(
            before == after,
            "the test left another VM than it found: {before:#}, {after:#}"
        );
        IDLE.put(self.as_text(), guest);
        Ok(done)
    }

    /// A booted guest for a test that ends it: a shared one that is idle, or a new one.
    ///
    /// # Errors
    /// The guest does not boot.
    pub fn take_over(&self) -> Result<Guest> {
        match IDLE.take(&self.as_text()) {
            Some(guest) => Ok(guest),
            None => self.serve(),
        }
    }

    fn as_text(&self) -> String {
        format!("{self:?}")
    }
}

/// Ends the idle guest.
pub fn end_idle() {
    IDLE.end();
}

/// At most one idle guest, and the machine that it runs on as text. Guests are dropped without the lock, because ending a
/// VMM takes time.
#[derive(Debug)]
struct Idle<T>(Mutex<Option<(String, T)>>);

impl<T> Idle<T> {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The idle guest, if it runs on this machine. Any other is ended.
    fn take(&self, machine: &str) -> Option<T> {
        let idle = self.0.lock().take();
        let same = idle.filter(|(other, _)| other == machine);
        same.map(|(_, guest)| guest)
    }

    /// Keeps a guest instead of the one that is idle.
    fn put(&self, machine: String, guest: T) {
        let replaced = self.0.lock().replace((machine, guest));
        drop(replaced);
    }

    fn end(&self) {
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
