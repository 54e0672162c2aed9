//! Huge pages of the host, for guests and memory backed by them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use parking_lot::{Mutex, MutexGuard};

/// Serializes tests, so that each can count its own pages.
static TURN: Mutex<()> = Mutex::new(());

/// Huge pages reserved on the host until it is dropped.
#[derive(Debug)]
pub struct ReservedHugePages {
    /// The kernel's folder with the settings for pages of this size.
    pool: PathBuf,
    before: String,
    _turn: MutexGuard<'static, ()>,
}

impl ReservedHugePages {
    /// Reserves pages of 2 MiB. `None` if the host does not have enough.
    ///
    /// # Errors
    /// The kernel's figure is not a number.
    pub fn new(count: u64) -> Result<Option<Self>> {
        Self::of(2 << 20, count)
    }

    /// Reserves pages of `page_bytes`. `None` if the host has no such pages, or not enough.
    ///
    /// # Errors
    /// As [`ReservedHugePages::new`].
    pub fn of(page_bytes: u64, count: u64) -> Result<Option<Self>> {
        // A test that panicked has released its pages nevertheless.
        let turn = TURN.lock();
        let name = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes / 1024);
        let pool = PathBuf::from(name);
        let file = pool.join("nr_hugepages");
        let Ok(before) = fs::read_to_string(&file) else {
            return Ok(None);
        };
        let wanted = before.trim().parse::<u64>()? + count;
        // Caches obstruct the allocation of huge pages; without this there are fewer of them.
        drop(fs::write("/proc/sys/vm/drop_caches", "3"));
        if fs::write(&file, wanted.to_string()).is_err() {
            return Ok(None);
        }
        let reserved = Self {
            pool,
            before,
            _turn: turn,
        };
        let got: u64 = fs::read_to_string(&file)?.trim().parse()?;
        Ok((got >= wanted).then_some(reserved))
    }

    /// Number of free pages.
    ///
    /// # Errors
    /// As [`ReservedHugePages::new`].
    pub fn free(&self) -> Result<u64> {
        self.figure("free_hugepages")
    }

    fn figure(&self, name: &str) -> Result<u64> {
        let file = self.pool.join(name);
        let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        Ok(text.trim().parse()?)
    }
}

impl ReservedHugePages {
    /// Takes all pages out of the pool that are free and not reserved, until the result is dropped.
    ///
    /// # Errors
    /// The pool cannot be changed.
    pub fn take_free(&self) -> Result<TakenHugePages> {
        let file = self.pool.join("nr_hugepages");
        let all = fs::read_to_string(&file)?;
        // The kernel keeps those that are used or reserved.
        fs::write(&file, "0")?;
        let taken = TakenHugePages { file, all };
        let (free, reserved) = (self.free()?, self.figure("resv_hugepages")?);
        ensure!(
            free == reserved,
            "{free} huge pages are free, {reserved} of them reserved"
        );
        Ok(taken)
    }
}

/// Huge pages that the pool lacks until this is dropped.
#[derive(Debug)]
pub struct TakenHugePages {
    file: PathBuf,
    all: String,
}

impl Drop for TakenHugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.file, &self.all) {
            println!("     huge pages stay away: {error}");
        }
    }
}

impl Drop for ReservedHugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.pool.join("nr_hugepages"), &self.before) {
            println!("     huge pages stay reserved: {error}");
        }
    }
}
