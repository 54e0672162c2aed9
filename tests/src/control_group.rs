//! Control groups of version 2: a host of limited memory.

// UNSAFETY: a program that is about to start moves itself, before it has memory of its own.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// A control group; it is removed when dropped.
#[derive(Debug)]
pub struct Group(PathBuf);

impl Group {
    /// Whether groups of this host account for memory.
    #[must_use]
    pub fn is_possible() -> bool {
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.subtree_control"));
        controllers.is_ok_and(|text| text.split_whitespace().any(|name| name == "memory"))
    }

    /// Creates a group of this size, above which the kernel kills.
    ///
    /// # Errors
    /// The group cannot be created.
    pub fn new(bytes: u64) -> Result<Group> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("test-{}-{number}", std::process::id());
        let group = Group(Path::new(ROOT).join(name));
        fs::create_dir(&group.0).with_context(|| group.0.display().to_string())?;
        fs::write(group.0.join("memory.max"), bytes.to_string()).context("memory.max")?;
        Ok(group)
    }

    /// The group's path below the root, as in `/proc/PID/cgroup`.
    #[must_use]
    pub fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        format!("/{}", name.to_string_lossy())
    }

    /// Moves a process into the group. The memory that it has stays charged to its former group.
    ///
    /// # Errors
    /// There is no such process.
    pub fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("cgroup.procs")
    }

    /// Makes a program start in the group, so that all its memory is charged to it.
    ///
    /// # Errors
    /// The group was removed.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let mut options = File::options();
        let members = options.write(true).open(self.0.join("cgroup.procs"))?;
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || (&members).write_all(b"0")) };
        Ok(())
    }

    /// Number of processes that the kernel killed because it was out of memory.
    ///
    /// # Errors
    /// The figure cannot be read.
    pub fn oom_kills(&self) -> Result<u64> {
        let (file, name) = ("memory.events", "oom_kill");
        let text = fs::read_to_string(self.0.join(file))?;
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.and_then(|value| value.parse().ok());
        value.with_context(|| format!("no {name} in {file}"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Fails only if guests in the group could not be ended, which has been reported.
        let _ = fs::remove_dir(&self.0);
    }
}
