//! The paths that a jail shows.

use std::path::PathBuf;

use api::config::JailConfig;

use super::JailError;

/// A path that the jail shows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The path.
    pub path: PathBuf,
    /// Files can be written there.
    pub writable: bool,
    /// The VMM creates the file if it does not exist.
    pub creates: bool,
}

impl Place {
    /// One of the paths of `--jail`.
    ///
    /// # Errors
    /// The access is neither `r` nor `rw`.
    pub fn configured(config: &JailConfig) -> Result<Self, JailError> {
        let writable = match config.access.as_str() {
            "r" => false,
            "rw" => true,
            _ => return Err(JailError::Access(config.clone())),
        };
        Ok(Self {
            path: config.path.clone(),
            writable,
            creates: false,
        })
    }
}
