//! Limits of control groups on huge pages.
//!
//! | File of the group | Charged when | Exceeded |
//! | --- | --- | --- |
//! | `hugetlb.2MB.rsvd.max` | pages are mapped | the mapping fails |
//! | `hugetlb.2MB.max` | a page is first accessed | SIGBUS |
//!
//! The second would end the guest after the boot, so the VMM reads it before. Both are found only in control groups of
//! version 2 that the VMM can read; in others, the host reports its limits by its own means.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::ZoneError;
use super::layout::{GIB, MIB};

/// Where control groups of version 2 are mounted.
const ROOT: &str = "/sys/fs/cgroup";
const MEMBERSHIP: &str = "/proc/self/cgroup";

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counts {
    /// Pages that were accessed.
    Used,
    /// Pages that were mapped with a reservation.
    Reserved,
}

/// Checks that this process's control groups permit `bytes` more of huge pages.
///
/// # Errors
/// [`ZoneError::HugePageLimit`], with the file of the lowest limit.
pub(super) fn check(counts: Counts, bytes: u64, page_bytes: u64) -> Result<(), ZoneError> {
    let Ok(membership) = fs::read_to_string(MEMBERSHIP) else {
        return Ok(());
    };
    match lowest(Path::new(ROOT), &membership, counts, page_bytes) {
        Some((left_bytes, path)) if left_bytes < bytes => Err(ZoneError::HugePageLimit {
            path,
            left_bytes,
            bytes,
        }),
        _ => Ok(()),
    }
}

/// The bytes left below the lowest limit of the group and its parents, and the file with this limit.
fn lowest(
    root: &Path,
    membership: &str,
    counts: Counts,
    page_bytes: u64,
) -> Option<(u64, PathBuf)> {
    let mut lines = membership.lines();
    let own = lines.find_map(|line| line.strip_prefix("0::/"))?;
    let folder = root.join(own);
    let groups = folder
        .ancestors()
        .take_while(|group| group.starts_with(root));
    let limits = groups.filter_map(|group| left(group, counts, page_bytes));
    limits.min_by_key(|(left_bytes, _)| *left_bytes)
}

/// `None` without a limit.
fn left(group: &Path, counts: Counts, page_bytes: u64) -> Option<(u64, PathBuf)> {
    let size = match page_bytes {
        GIB.. => format!("{}GB", page_bytes / GIB),
        MIB.. => format!("{}MB", page_bytes / MIB),
        _ => format!("{}KB", page_bytes / 1024),
    };
    let kind = match counts {
        Counts::Used => "",
        Counts::Reserved => "rsvd.",
    };
    let file = |name| group.join(format!("hugetlb.{size}.{kind}{name}"));
    let number = |path: &Path| -> Option<u64> {
        let text = fs::read_to_string(path).ok()?;
        text.trim().parse().ok()
    };
    let path = file("max");
    let (limit, current) = (number(&path)?, number(&file("current"))?);
    Some((limit.saturating_sub(current), path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_the_lowest_of_the_group_and_its_parents() {
        let root = tempfile::tempdir().unwrap();
        let child = root.path().join("vms/one");
        fs::create_dir_all(&child).unwrap();
        let write = |group: &str, name: &str, text: &str| {
            fs::write(root.path().join(group).join(name), text).unwrap();
        };
        let lowest = |membership, counts, page_bytes| {
            super::lowest(root.path(), membership, counts, page_bytes)
        };
        let own = "4:memory:/x\n0::/vms/one\n";
        assert_eq!(lowest(own, Counts::Used, 2 * MIB), None);
        write("vms/one", "hugetlb.2MB.max", "max\n");
        write("vms/one", "hugetlb.2MB.current", "0\n");
        assert_eq!(lowest(own, Counts::Used, 2 * MIB), None);
        write("vms", "hugetlb.2MB.max", "8388608\n");
        write("vms", "hugetlb.2MB.current", "2097152\n");
        let of_parent = root.path().join("vms/hugetlb.2MB.max");
        assert_eq!(
            lowest(own, Counts::Used, 2 * MIB),
            Some((6 << 20, of_parent))
        );
        write("vms/one", "hugetlb.2MB.max", "4194304\n");
        let of_child = child.join("hugetlb.2MB.max");
        assert_eq!(
            lowest(own, Counts::Used, 2 * MIB),
            Some((4 << 20, of_child))
        );
        // Other counts and page sizes have their own files.
        assert_eq!(lowest(own, Counts::Reserved, 2 * MIB), None);
        assert_eq!(lowest(own, Counts::Used, GIB), None);
        write("vms/one", "hugetlb.1GB.rsvd.max", "0\n");
        write("vms/one", "hugetlb.1GB.rsvd.current", "1073741824\n");
        let reserved = child.join("hugetlb.1GB.rsvd.max");
        assert_eq!(lowest(own, Counts::Reserved, GIB), Some((0, reserved)));
        // Without version 2 there is nothing to read.
        assert_eq!(lowest("4:memory:/vms/one\n", Counts::Used, 2 * MIB), None);
    }
}
