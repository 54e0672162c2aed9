//! Opens files of other users.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::StandbyError;

/// Opens a regular file that another user may have put there.
pub(super) fn open_plain(path: &Path) -> Result<File, StandbyError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(StandbyError::system(path))?;
    let found = file.metadata().map_err(StandbyError::system(path))?;
    match found.is_file() {
        true => Ok(file),
        false => Err(StandbyError::NotAFile {
            path: path.to_owned(),
        }),
    }
}
