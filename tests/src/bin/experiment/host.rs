//! The experiment's host: this machine, or a cgroup of the requested size if the machine is larger.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// OOM score of a guest's VMM, which must not inherit this process's immunity.
pub(crate) const OOM_SCORE_ADJ_DEFAULT: &str = "0";

/// Maximum size of a machine that is used as the host itself, as a percentage of the requested size.
const LARGER_PERCENT_MAX: u64 = 110;

/// The host whose memory is measured and limited.
#[derive(Clone, Debug)]
pub(crate) enum Host {
    /// The machine.
    Machine,
    /// The cgroup (v2) in this folder.
    Cgroup(PathBuf),
}

impl Host {
    /// A host of `bytes`, of which this process is part. If memory runs out, the kernel must kill guests, not this
    /// process, and cannot delay this by swapping.
    pub(crate) fn enter(bytes: u64) -> Result<Host> {
        fs::write("/proc/self/oom_score_adj", "-1000").context("oom_score_adj")?;
        let machine_bytes = field("/proc/meminfo", "MemTotal:")? << 10;
        if machine_bytes <= bytes / 100 * LARGER_PERCENT_MAX {
            let swaps = fs::read_to_string("/proc/swaps")?;
            ensure!(swaps.lines().count() <= 1, "the host has swap: {swaps}");
            return Ok(Host::Machine);
        }
        let folder = PathBuf::from(format!("/sys/fs/cgroup/experiment-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        for (file, value) in [
            ("memory.max", bytes.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("cgroup.procs", std::process::id().to_string()),
        ] {
            // A kernel without swap has no limit for it.
            if file == "memory.swap.max" && !folder.join(file).exists() {
                continue;
            }
            fs::write(folder.join(file), value).with_context(|| format!("cgroup {file}"))?;
        }
        Ok(Host::Cgroup(folder))
    }

    /// Total memory.
    pub(crate) fn total_bytes(&self) -> Result<u64> {
        match self {
            Host::Machine => Ok(field("/proc/meminfo", "MemTotal:")? << 10),
            Host::Cgroup(folder) => field(folder.join("memory.max"), ""),
        }
    }

    /// Memory that is available without taking more than page cache.
    pub(crate) fn available_bytes(&self) -> Result<u64> {
        match self {
            Host::Machine => Ok(field("/proc/meminfo", "MemAvailable:")? << 10),
            Host::Cgroup(folder) => {
                let used = field(folder.join("memory.current"), "")?;
                let cache = field(folder.join("memory.stat"), "inactive_file ")?;
                Ok((self.total_bytes()? + cache).saturating_sub(used))
            }
        }
    }

    /// Number of processes that the kernel killed because it was out of memory.
    pub(crate) fn oom_kills(&self) -> Result<u64> {
        match self {
            Host::Machine => field("/proc/vmstat", "oom_kill "),
            Host::Cgroup(folder) => field(folder.join("memory.events"), "oom_kill "),
        }
    }
}

/// The number after `name` at the start of a line.
fn field(path: impl Into<PathBuf>, name: &str) -> Result<u64> {
    let path = path.into();
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let value = value.and_then(|rest| rest.split_whitespace().next());
    value
        .and_then(|word| word.parse().ok())
        .with_context(|| format!("{}: no number behind {name:?}", path.display()))
}
