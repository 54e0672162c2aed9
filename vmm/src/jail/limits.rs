//! Resource limits of the process.

use api::config::ResourceLimitsConfig;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::JailError;

pub(super) fn apply(limits: &ResourceLimitsConfig) -> Result<(), JailError> {
    for (resource, name, value) in [
        (Resource::Nofile, "open files", limits.open_files),
        (Resource::Fsize, "the size of files", limits.file_size),
        (Resource::Core, "the size of core dumps", limits.core_size),
    ] {
        let Some(value) = value else { continue };
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        setrlimit(resource, limit).map_err(|source| {
            JailError::failed(format!("set the limit of {name} to {value}"), source)
        })?;
    }
    Ok(())
}
