//! Tells which pages of private guest RAM hold something, for code that saves guest RAM.

use std::io;

use super::pagemap::Pagemap;

/// The page tables of this process, read page by page.
#[derive(Debug)]
pub struct HeldPages {
    pagemap: Pagemap,
}

impl HeldPages {
    /// # Errors
    /// The page map of this process cannot be opened.
    pub fn open() -> io::Result<Self> {
        let pagemap = Pagemap::open()?;
        Ok(Self { pagemap })
    }

    /// Marks in `held` which pages of a private anonymous mapping from host address `start` on are in RAM or in swap.
    /// The others were never touched or given back, so they read as zeros. Makes no page resident.
    ///
    /// # Errors
    /// The page tables cannot be read.
    pub fn mark(&self, start: u64, held: &mut [bool]) -> io::Result<()> {
        self.pagemap.mark_held(start, held)
    }
}
