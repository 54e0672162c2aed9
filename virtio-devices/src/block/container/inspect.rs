//! Looks into a file that the configuration or an image names.

use std::fs::File;
use std::io;
use std::path::Path;

use super::error::ContainerError;
use crate::block::BlockError;

/// What `read` finds in the file at `path`.
pub(super) fn inspect<T>(
    path: &Path,
    read: impl FnOnce(&File) -> io::Result<Result<T, ContainerError>>,
) -> Result<T, BlockError> {
    let rejected = |source| BlockError::Container {
        path: path.to_path_buf(),
        source,
    };
    let open = |source| BlockError::Open {
        path: path.to_path_buf(),
        source,
    };
    // Opening something else than a file, a FIFO for example, may not return.
    if !std::fs::metadata(path).map_err(open)?.is_file() {
        return Err(rejected(ContainerError::NotAFile));
    }
    let file = File::open(path).map_err(open)?;
    let found = read(&file).map_err(|source| BlockError::Inspect {
        path: path.to_path_buf(),
        source,
    })?;
    found.map_err(rejected)
}
