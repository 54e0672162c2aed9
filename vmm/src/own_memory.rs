//! Host memory that the kernel attributes to this process: the charge of its control group, or its resident set.
//!
//! The residency of guest RAM comes from the page tables. It does not include memory that the kernel keeps after a part
//! of a huge page was discarded. Only the charge of the control group does
//! (docs/decisions/0021-partly-discarded-huge-pages-are-split.md).

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use virtio_devices::Unpoisoned;

use crate::jail;

const PROC: &str = "/proc/self";
const GROUPS: &str = "/sys/fs/cgroup";
/// Maximum length of a file that is read; `memory.stat` has some 2 KiB.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Memory that a process may map although it is charged elsewhere: its program on a file system in memory, and pages that
/// are unmapped between the two figures.
const ELSEWHERE_MAX: u64 = 32 << 20;

/// The files of the process's group, which it cannot open any more once it is confined.
static GROUP: Mutex<Option<Group>> = Mutex::new(None);

/// Host memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnMemory {
    pub(crate) bytes: u64,
    /// The name of the method, as in `charged_method`.
    pub(crate) method: &'static str,
}

/// Opens the files of the process's control group. Must be called before the process is confined.
pub fn open() {
    // Without a group, the resident set is used.
    *group() = Group::of(Path::new(PROC), Path::new(GROUPS)).ok();
}

/// Reads the current figures. The charge does not distinguish RAM in files from other page cache, so it needs
/// `without_files`.
///
/// # Errors
/// The kernel's figures of this process cannot be read.
pub(crate) fn read(without_files: bool) -> io::Result<OwnMemory> {
    let status = fs::read_to_string(Path::new(PROC).join("status"))?;
    let charge = without_files.then(|| {
        let mut group = group();
        let current = group_path(Path::new(PROC))?;
        if group.as_ref().is_none_or(|known| known.path != current) {
            *group = Group::of(Path::new(PROC), Path::new(GROUPS)).ok();
        }
        group.as_mut()?.charge(&Members::of_this_process(), &status)
    });
    Ok(OwnMemory::of(charge.flatten(), &status))
}

impl OwnMemory {
    /// Memory stays charged to the group in which the process was when it touched it. If its group is charged for less
    /// than it maps, the rest is charged to an earlier one.
    fn of(charge: Option<u64>, status: &str) -> Self {
        let mapped = kib(status, "RssAnon:") + kib(status, "RssShmem:");
        let least = mapped.saturating_sub(ELSEWHERE_MAX);
        match charge.filter(|bytes| *bytes >= least) {
            Some(bytes) => Self {
                bytes,
                method: "cgroup",
            },
            None => Self {
                bytes: kib(status, "VmRSS:") + kib(status, "HugetlbPages:"),
                method: "process",
            },
        }
    }
}

fn group() -> MutexGuard<'static, Option<Group>> {
    GROUP.lock().unpoisoned()
}

/// The group of version 2 of a process.
fn group_path(proc: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(proc.join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// The processes of a VMM.
struct Members {
    pid: u32,
    /// The VMM has a waiter, whose memory is negligible.
    is_waited_for: bool,
}

impl Members {
    fn of_this_process() -> Self {
        Self {
            pid: std::process::id(),
            is_waited_for: jail::is_entered(),
        }
    }

    /// Whether a group with this list has no other process.
    fn are_all(&self, list: &str) -> bool {
        let (own, others): (Vec<&str>, Vec<&str>) = list
            .split_ascii_whitespace()
            .partition(|it| *it == self.pid.to_string());
        // The kernel shows a process outside the pid namespace as 0.
        own.len() == 1 && (others.is_empty() || (self.is_waited_for && others == ["0"]))
    }
}

/// Open files of a control group.
struct Group {
    /// Below the mount point.
    path: PathBuf,
    members: File,
    current: File,
    parts: File,
}

impl Group {
    fn of(proc: &Path, root: &Path) -> io::Result<Self> {
        let path = group_path(proc).ok_or(io::ErrorKind::NotFound)?;
        let folder = root.join(&path);
        let open = |name: &str| File::open(folder.join(name));
        Ok(Self {
            members: open("cgroup.procs")?,
            current: open("memory.current")?,
            parts: open("memory.stat")?,
            path,
        })
    }

    /// The memory that is charged to the group, without page cache and the kernel's own; `None` if the group has other
    /// members.
    fn charge(&mut self, own: &Members, status: &str) -> Option<u64> {
        if !own.are_all(&reread(&mut self.members)?) {
            return None;
        }
        let current: u64 = reread(&mut self.current)?.trim().parse().ok()?;
        let parts = reread(&mut self.parts)?;
        let part = |name: &str| {
            let mut lines = parts.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value
                .and_then(|value| value.parse::<u64>().ok())
                .unwrap_or(0)
        };
        // `file` includes memory that is shared between processes, such as a memfd.
        let cache = part("file").saturating_sub(part("shmem"));
        // Huge pages of the host's pool are charged only if the host is configured so.
        let pool = match part("hugetlb") {
            0 => kib(status, "HugetlbPages:"),
            _ => 0,
        };
        let own = current.saturating_sub(cache).saturating_sub(part("kernel"));
        Some(own.saturating_add(pool))
    }
}

/// The content of a file of the kernel, which is generated anew at each read from its start.
fn reread(file: &mut File) -> Option<String> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The value of a line `name  number kB`, in bytes; 0 if there is none.
fn kib(status: &str, name: &str) -> u64 {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.split_whitespace().next());
    number
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0)
        << 10
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Files of a process in group `vms/web`.
    fn files(members: &str, current: u64, parts: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("groups/vms/web");
        fs::create_dir_all(&group).unwrap();
        fs::write(folder.path().join("cgroup"), "1:cpu:/x\n0::/vms/web\n").unwrap();
        fs::write(group.join("cgroup.procs"), members).unwrap();
        fs::write(group.join("memory.current"), format!("{current}\n")).unwrap();
        fs::write(group.join("memory.stat"), parts).unwrap();
        folder
    }

    fn charge(files: &tempfile::TempDir, status: &str) -> Option<u64> {
        let mut group = Group::of(files.path(), &files.path().join("groups")).unwrap();
        assert_eq!(group.path, Path::new("vms/web"));
        let own = Members {
            pid: 7,
            is_waited_for: false,
        };
        group.charge(&own, status)
    }

    #[test]
    fn charge_of_a_group_excludes_page_cache_and_the_kernels_memory() {
        let parts = format!(
            "anon {}\nfile {}\nkernel {}\nkernel_stack 1\nfile_mapped 9\nshmem {}\n",
            300 * MIB,
            150 * MIB,
            20 * MIB,
            50 * MIB
        );
        let files = files("7\n", 600 * MIB, &parts);
        // 600 charged, less 100 of page cache and 20 of the kernel: 80 more than is mapped.
        assert_eq!(charge(&files, ""), Some(480 * MIB));
        let huge = "HugetlbPages:\t   2048 kB\n";
        assert_eq!(charge(&files, huge), Some(482 * MIB));
        // A host that charges them.
        let parts = format!("{parts}hugetlb 2097152\n");
        let files = self::files("7\n", 600 * MIB, &parts);
        assert_eq!(charge(&files, huge), Some(480 * MIB));
    }

    #[test]
    fn group_with_other_processes_tells_nothing() {
        for members in ["7\n8\n", "8\n", "0\n", ""] {
            assert_eq!(charge(&files(members, MIB, ""), ""), None, "{members:?}");
        }
    }

    #[test]
    fn group_of_a_vmm_in_a_jail_contains_its_waiter_as_well() {
        let own = |is_waited_for| Members {
            pid: 1,
            is_waited_for,
        };
        for list in ["0\n1\n", "1\n0\n"] {
            assert!(own(true).are_all(list));
            assert!(!own(false).are_all(list));
        }
        assert!(own(true).are_all("1\n"));
        for list in ["0\n0\n1\n", "0\n", "0\n1\n2\n", ""] {
            assert!(!own(true).are_all(list), "{list:?}");
        }
    }

    #[test]
    fn charge_below_what_is_mapped_is_that_of_a_group_the_process_has_just_joined() {
        let status = "VmRSS:\t  307200 kB\nRssAnon:\t  204800 kB\nRssShmem:\t  51200 kB\n";
        for (charge, bytes, method) in [
            (Some(600 * MIB), 600 * MIB, "cgroup"),
            (Some(218 * MIB), 218 * MIB, "cgroup"),
            (Some(217 * MIB), 300 * MIB, "process"),
            (Some(0), 300 * MIB, "process"),
            (None, 300 * MIB, "process"),
        ] {
            assert_eq!(OwnMemory::of(charge, status), OwnMemory { bytes, method });
        }
    }

    #[test]
    fn impossible_figures_are_0_or_nothing() {
        assert_eq!(
            charge(&files("7\n", MIB, "file 9999999999\nkernel x\n"), ""),
            Some(0)
        );
        let files = files("7\n", MIB, "");
        fs::write(files.path().join("groups/vms/web/memory.current"), "max\n").unwrap();
        assert_eq!(charge(&files, ""), None);
        assert!(Group::of(files.path(), Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn process_without_a_group_of_its_own_has_its_resident_set() {
        let own = read(false).unwrap();
        assert_eq!(own.method, "process");
        // This test is mapped.
        assert!(own.bytes > MIB, "{own:?}");
    }
}
