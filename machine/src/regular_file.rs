//! Opens files that an operator names.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a file for reading and returns it with its size in bytes; `None` if it is not a regular file.
///
/// # Errors
/// The file cannot be opened.
pub fn open_regular_file(path: &Path) -> io::Result<Option<(File, u64)>> {
    // Opening a FIFO would block until it has a writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}
