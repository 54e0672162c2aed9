//! Files that the VMM may use in addition to those in the configuration.

use std::path::PathBuf;

use api_macros::section;

/// One Landlock rule: a path and the permitted access.
#[section(option = "landlock-rules", about = "Landlock parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LandlockConfig {
    /// A file, or a folder with everything in it.
    #[key("<path/to/{file/dir}>", required)]
    pub path: PathBuf,
    /// `r` to read, `w` to write, create and remove, or both.
    #[key("[rw]", required)]
    pub access: String,
}
