//! Huge pages of the host, for guests that are to lie on them.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// One test at a time, so that each can tell its own pages by counting.
static TURN: Mutex<()> = Mutex::new(());

/// Huge pages of 2 MiB, reserved on the host until it is dropped.
pub(crate) struct ReservedHugePages {
    before: String,
    _turn: MutexGuard<'static, ()>,
}

impl ReservedHugePages {
    /// `None` when the host does not give so many.
    pub(crate) fn new(count: u64) -> Result<Option<Self>> {
        // A test that panicked has put the pages back all the same.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let file = format!("{HUGE_PAGES}/nr_hugepages");
        let before = fs::read_to_string(&file)?;
        let wanted = before.trim().parse::<u64>()? + count;
        if fs::write(&file, wanted.to_string()).is_err() {
            return Ok(None);
        }
        let reserved = Self {
            before,
            _turn: turn,
        };
        let got: u64 = fs::read_to_string(&file)?.trim().parse()?;
        Ok((got >= wanted).then_some(reserved))
    }

    /// Pages nobody has.
    pub(crate) fn free() -> Result<u64> {
        let text = fs::read_to_string(format!("{HUGE_PAGES}/free_hugepages"))?;
        Ok(text.trim().parse()?)
    }
}

impl Drop for ReservedHugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(format!("{HUGE_PAGES}/nr_hugepages"), &self.before) {
            println!("     huge pages stay reserved: {error}");
        }
    }
}
