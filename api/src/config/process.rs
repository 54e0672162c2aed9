//! The values of `--jail` and `--resource-limits`. They apply to the process and are not part of the VM's configuration.

use std::path::PathBuf;

use api_macros::section;

use crate::options::parse_bytes;

/// A path that the jail shows in addition to those that the other options name.
#[section(
    option = "jail",
    about = "Confine the VMM to the paths that options and these keys name:"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JailConfig {
    /// A file, or a folder with everything in it except other file systems.
    #[key("<path/to/{file/dir}>", required)]
    pub path: PathBuf,
    /// `r` to read, or `rw` to write as well.
    #[key("r|rw", required, default = "r".to_owned())]
    pub access: String,
}

/// Limits of the process, each of them soft and hard. An absent limit stays unchanged.
#[section(option = "resource-limits", about = "Resource limits of the process")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceLimitsConfig {
    /// Open file descriptors (`RLIMIT_NOFILE`). By default the soft limit is raised to the hard limit.
    #[key("<number>")]
    pub open_files: Option<u64>,
    /// Size up to which the VMM can write files (`RLIMIT_FSIZE`). A write beyond it fails. Shared guest memory counts as a file.
    #[key("<size>", read = parse_bytes)]
    pub file_size: Option<u64>,
    /// Size of core dumps of the VMM (`RLIMIT_CORE`).
    #[key("<size>", read = parse_bytes)]
    pub core_size: Option<u64>,
}
