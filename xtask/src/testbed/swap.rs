//! Creates a swap area, so that the emulated host needs no mkswap.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use anyhow::{Context as _, Result};

use crate::paths;

const PAGE_BYTES: u64 = 4096;

/// Creates a nameless sparse file of `bytes` with a swap header: it is gone when the last
/// process that has it open ends.
pub(crate) fn create(bytes: u64) -> Result<File> {
    let pages = bytes / PAGE_BYTES;
    let file = nameless(pages * PAGE_BYTES).context("creating swap space")?;
    file.write_all_at(&header(pages), 0)
        .context("writing the swap header")?;
    Ok(file)
}

/// Creates a nameless sparse file of zeros.
pub(super) fn nameless(bytes: u64) -> Result<File> {
    let dir = paths::target();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(&dir)
        .with_context(|| format!("creating a file in {}", dir.display()))?;
    file.set_len(bytes)?;
    Ok(file)
}

/// `union swap_header` of include/linux/swap.h: version and last page after 1024 bytes of boot
/// block, the magic at the end of the first page.
fn header(pages: u64) -> Vec<u8> {
    let last = u32::try_from(pages.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut page = vec![0; 4096];
    page[1024..1028].copy_from_slice(&1u32.to_le_bytes());
    page[1028..1032].copy_from_slice(&last.to_le_bytes());
    page[4086..].copy_from_slice(b"SWAPSPACE2");
    page
}

#[cfg(test)]
mod tests {
    use super::header;

    #[test]
    fn swap_header_names_version_last_page_and_magic() {
        let page = header(256);
        assert_eq!(page.len(), 4096);
        assert_eq!(page[1024..1032], [1, 0, 0, 0, 255, 0, 0, 0]);
        assert!(page.ends_with(b"SWAPSPACE2"));
    }
}
