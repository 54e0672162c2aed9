//! Reads memory, swap and pressure of the machine and of the VMs' control group.

use std::path::{Path, PathBuf};

use super::HostError;
use super::kernel_file::{KernelFile, read_limit, read_text};
use crate::model::{Bytes, CgroupMemory, HostFacts, HugePool, Pressure};

/// Mount point of control groups (version 2). The limits of a group's parents up to here apply to it, too.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Paths of the kernel's files. Tests use their own files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFiles {
    /// Normally `/proc`.
    pub proc: PathBuf,
    /// Mount point of control groups.
    pub cgroup_root: PathBuf,
    /// Folder of the control group that holds the VMs; `None`: the machine is the host.
    pub cgroup: Option<PathBuf>,
}

impl Default for HostFiles {
    fn default() -> Self {
        Self {
            proc: PathBuf::from("/proc"),
            cgroup_root: PathBuf::from(CGROUP_ROOT),
            cgroup: None,
        }
    }
}

impl HostFiles {
    /// Memory of the machine without the pool of huge pages.
    ///
    /// # Errors
    /// The kernel does not provide it.
    pub fn total(&self) -> Result<Bytes, HostError> {
        let meminfo = KernelFile::read(self.proc.join("meminfo"))?;
        Ok(Bytes(meminfo.figure("MemTotal")?) - read_pool(&meminfo).total)
    }

    /// The pressure file to watch: the group's if there is one, because its limit affects the VMs, otherwise the
    /// machine's.
    pub fn pressure_file(&self) -> PathBuf {
        self.cgroup
            .as_ref()
            .map(|group| group.join("memory.pressure"))
            .filter(|file| file.exists())
            .unwrap_or_else(|| self.proc.join("pressure/memory"))
    }
}

/// Number of swapped pages at one time.
#[derive(Clone, Copy, Debug)]
struct SwapCount {
    at_ms: u64,
    in_pages: u64,
    out_pages: u64,
}

/// Reads the host repeatedly; rates refer to the time between two readings.
#[derive(Debug)]
pub struct HostReader {
    files: HostFiles,
    /// Groups that hold the VMs, if none is named.
    groups: Vec<PathBuf>,
    page_bytes: u64,
    last_swap: Option<SwapCount>,
}

impl HostReader {
    /// A reader of these files.
    pub fn new(files: HostFiles) -> Self {
        Self {
            groups: files.cgroup.iter().cloned().collect(),
            files,
            page_bytes: 4096,
            last_swap: None,
        }
    }

    /// The files it reads.
    pub fn files(&self) -> &HostFiles {
        &self.files
    }

    /// The groups that together form the host; if empty, the machine is the host.
    pub(crate) fn groups(&self) -> &[PathBuf] {
        &self.groups
    }

    /// Sets the groups that form the host from now on.
    pub(crate) fn set_groups(&mut self, groups: Vec<PathBuf>) {
        self.groups = groups;
    }

    /// Reads everything once; `at_ms` is the planner's clock.
    ///
    /// # Errors
    /// A file or a figure that every kernel has is missing. A kernel without pressure information is not an error.
    pub fn read(&mut self, at_ms: u64) -> Result<HostFacts, HostError> {
        let proc = &self.files.proc;
        let meminfo = KernelFile::read(proc.join("meminfo"))?;
        let pool = read_pool(&meminfo);
        let vmstat = KernelFile::read(proc.join("vmstat"))?;
        let machine = read_pressure(&proc.join("pressure/memory")).unwrap_or_default();
        let own = self
            .groups
            .iter()
            .filter_map(|group| read_pressure(&group.join("memory.pressure")).ok())
            .reduce(worse);
        let swap = SwapCount {
            at_ms,
            in_pages: vmstat.figure("pswpin")?,
            out_pages: vmstat.figure("pswpout")?,
        };
        let (swap_in_per_s, swap_out_per_s) = self.swap_rates(swap);
        Ok(HostFacts {
            at_ms,
            total: Bytes(meminfo.figure("MemTotal")?) - pool.total,
            available: Bytes(meminfo.figure("MemAvailable")?),
            pool,
            cgroup: read_groups(&self.groups, &self.files.cgroup_root)?,
            // The higher averages of both sources; the totals always come from the same source, so that they only grow.
            pressure: own.map_or(machine, |own| worse(own, machine)),
            swap_total: Bytes(meminfo.figure("SwapTotal")?),
            swap_free: Bytes(meminfo.figure("SwapFree")?),
            swap_in_per_s,
            swap_out_per_s,
        })
    }

    fn swap_rates(&mut self, now: SwapCount) -> (Bytes, Bytes) {
        let Some(last) = self.last_swap.replace(now) else {
            return (Bytes::ZERO, Bytes::ZERO);
        };
        let elapsed_ms = now.at_ms.saturating_sub(last.at_ms).max(1);
        let rate = |now: u64, last: u64| {
            let bytes = now.saturating_sub(last).saturating_mul(self.page_bytes);
            Bytes(bytes.saturating_mul(1000) / elapsed_ms)
        };
        (
            rate(now.in_pages, last.in_pages),
            rate(now.out_pages, last.out_pages),
        )
    }
}

/// The pool of huge pages; kernels without huge pages lack these lines.
fn read_pool(meminfo: &KernelFile) -> HugePool {
    let figure = |name| meminfo.figure(name).unwrap_or(0);
    let page = figure("Hugepagesize");
    let reserved = figure("HugePages_Rsvd");
    let free = figure("HugePages_Free").saturating_sub(reserved);
    HugePool {
        total: Bytes(figure("Hugetlb")),
        free: Bytes(free.saturating_mul(page)),
        reserved: Bytes(reserved.saturating_mul(page)),
        page: Bytes(page),
    }
}

/// The higher averages of both, and the totals of the first.
fn worse(a: Pressure, b: Pressure) -> Pressure {
    Pressure {
        some_avg10: a.some_avg10.max(b.some_avg10),
        full_avg10: a.full_avg10.max(b.full_avg10),
        ..a
    }
}

/// The sum of the groups' figures; `None` if there are no groups, or one of them has no limit.
fn read_groups(groups: &[PathBuf], root: &Path) -> Result<Option<CgroupMemory>, HostError> {
    let mut sum: Option<CgroupMemory> = None;
    for group in groups {
        let Some(memory) = read_group(group, root)? else {
            return Ok(None);
        };
        sum = Some(match sum {
            None => memory,
            Some(sum) => CgroupMemory {
                limit: sum.limit + memory.limit,
                current: sum.current + memory.current,
                reclaimable: sum.reclaimable + memory.reclaimable,
            },
        });
    }
    Ok(sum)
}

/// The group's figures; `None` if neither it nor a parent has a limit.
fn read_group(group: &Path, root: &Path) -> Result<Option<CgroupMemory>, HostError> {
    let mut limit = read_limit(&group.join("memory.max"))?;
    for parent in group.ancestors().skip(1) {
        if parent == root || !parent.starts_with(root) {
            break;
        }
        if let Ok(Some(above)) = read_limit(&parent.join("memory.max")) {
            limit = Some(limit.map_or(above, |limit| limit.min(above)));
        }
    }
    let Some(limit) = limit else {
        return Ok(None);
    };
    let stat = KernelFile::read(group.join("memory.stat"))?;
    let current = read_limit(&group.join("memory.current"))?.unwrap_or(u64::MAX);
    Ok(Some(CgroupMemory {
        limit: Bytes(limit),
        current: Bytes(current),
        reclaimable: Bytes(stat.figure("inactive_file")?)
            + Bytes(stat.figure("slab_reclaimable").unwrap_or(0)),
    }))
}

/// Reads a pressure file (`Documentation/accounting/psi.rst`).
fn read_pressure(path: &Path) -> Result<Pressure, HostError> {
    let text = read_text(path)?;
    parse_pressure(&text).ok_or_else(|| HostError::Form {
        path: path.to_owned(),
        text,
    })
}

fn parse_pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let value = |name: &str| {
            line.split_ascii_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let avg10 = value("avg10")?.parse().ok()?;
        let total = value("total")?.parse().ok()?;
        match line.split_ascii_whitespace().next() {
            Some("some") => (pressure.some_avg10, pressure.some_total_us) = (avg10, total),
            Some("full") => (pressure.full_avg10, pressure.full_total_us) = (avg10, total),
            _ => {}
        }
    }
    text.starts_with("some").then_some(pressure)
}
