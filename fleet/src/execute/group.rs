//! Last-resort measures, which do not need the guest's cooperation: limits on the VMM's control group, and killing the
//! VMM.
//!
//! A limit is written only to a group that contains no process except this VMM and its waiter. Otherwise, the limit would
//! also restrict other processes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use api::WAITER_NAME;
use thiserror::Error;

use crate::model::Bytes;

/// Reasons why a limit was not set.
#[derive(Debug, Error)]
pub enum GroupError {
    /// The process has ended, or is not in a version 2 group.
    #[error("the control group of process {pid} cannot be found")]
    NoGroup {
        /// The process.
        pid: i32,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// Other processes share the group.
    #[error("the control group {} contains processes other than {pid}", path.display())]
    Shared {
        /// The group.
        path: PathBuf,
        /// The process.
        pid: i32,
    },
    /// The kernel rejected the value.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The process could not be killed.
    #[error("cannot kill process {pid}")]
    Kill {
        /// The process.
        pid: i32,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
}

/// Files of a control group that hold a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
pub enum GroupFile {
    /// `memory.max`
    #[strum(serialize = "memory.max")]
    MemoryMax,
    /// `memory.high`
    #[strum(serialize = "memory.high")]
    MemoryHigh,
    /// `memory.swap.max`
    #[strum(serialize = "memory.swap.max")]
    SwapMax,
}

impl GroupFile {
    /// Its name.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Paths of processes and groups. Tests use their own files.
#[derive(Clone, Debug)]
pub struct GroupFiles {
    /// Normally `/proc`.
    pub proc: PathBuf,
    /// Normally `/sys/fs/cgroup`.
    pub cgroup_root: PathBuf,
}

impl GroupFiles {
    /// The group of a process.
    ///
    /// # Errors
    /// The process has ended, or the machine has no version 2 groups.
    pub fn group_of(&self, pid: i32) -> Result<PathBuf, GroupError> {
        let failed = |source| GroupError::NoGroup { pid, source };
        let text =
            fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup")).map_err(failed)?;
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .ok_or_else(|| failed(io::Error::other("its cgroup file has no line 0::")))?;
        Ok(self.cgroup_root.join(path))
    }

    /// Sets a limit of the process's own group; `None` removes it. `lives` returns whether the process is still the
    /// intended one, and is called after its group was determined.
    ///
    /// # Errors
    /// The group is shared or no longer exists, or the kernel rejects the value.
    pub fn limit(
        &self,
        pid: i32,
        file: GroupFile,
        limit: Option<Bytes>,
        lives: impl FnOnce() -> bool,
    ) -> Result<(), GroupError> {
        let path = self.group_of(pid)?;
        if path == self.cgroup_root || !self.is_alone(&path, pid) {
            return Err(GroupError::Shared { path, pid });
        }
        if !lives() {
            let source = io::ErrorKind::NotFound.into();
            return Err(GroupError::NoGroup { pid, source });
        }
        let path = path.join(file.name());
        let text = limit.map_or_else(|| "max".to_owned(), |limit| limit.0.to_string());
        fs::write(&path, text).map_err(|source| GroupError::Write { path, source })
    }

    /// Whether the group contains only this process, and the waiter if the VMM is in a jail.
    fn is_alone(&self, group: &Path, pid: i32) -> bool {
        let Ok(members) = fs::read_to_string(group.join("cgroup.procs")) else {
            return false;
        };
        let (own, others): (Vec<&str>, Vec<&str>) = members
            .split_ascii_whitespace()
            .partition(|it| *it == pid.to_string());
        let is_waiter = |it: &&str| self.waiter_of(pid).is_some_and(|waiter| waiter == *it);
        own.len() == 1 && others.len() <= 1 && others.iter().all(is_waiter)
    }

    /// The id of the process that waits for a VMM in a jail: its parent, if that has the name.
    fn waiter_of(&self, pid: i32) -> Option<String> {
        let status = fs::read_to_string(self.proc.join(pid.to_string()).join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        let parent = parent.trim();
        let name = fs::read_to_string(self.proc.join(parent).join("comm")).ok()?;
        (name.trim_end() == WAITER_NAME).then(|| parent.to_owned())
    }
}
