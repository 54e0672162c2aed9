//! Guests that tests share, because a boot under emulation takes longer than many tests.
//!
//! One idle guest waits for the next test with the same machine. It is ended before any other machine starts, so that
//! each test finds only its own guest on the host. Tests that share a machine therefore form a group, see
//! [`crate::outcome::group`].

use anyhow::{Context, Result, ensure};

pub use crate::linux::end_idle;
use crate::linux::{Guest, IDLE, Machine};

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
