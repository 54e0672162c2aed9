//! The control groups that limit the VMMs of a host.
//!
//! VMs that a container runtime or systemd placed below a limit reach that limit long before they exhaust the machine's
//! memory. Such a group need not be configured, because it can be derived from the processes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::kernel_file::read_limit;

/// The groups with a limit that together contain all of these processes and do not contain each other: the VMs may use
/// the sum of their limits. Empty if a process is below no limit, because the VMs may then use the machine's memory.
///
/// For a group with one VMM, and possibly its helpers, the parent group counts, because the group's limit is the VM's
/// own.
pub(crate) fn limiting_groups(proc: &Path, root: &Path, pids: &[i32]) -> Vec<PathBuf> {
    let mut limits = BTreeMap::new();
    let mut groups = BTreeSet::new();
    let members: Vec<PathBuf> = pids
        .iter()
        .filter_map(|&pid| group_of(proc, root, pid))
        .collect();
    for group in &members {
        let alone = members.iter().filter(|other| *other == group).count() == 1;
        let group = match group.parent() {
            Some(above) if alone && group != root => above,
            _ => group,
        };
        let mut own = limits_of(group, root).peekable();
        match own.peek() {
            Some((deepest, _)) => groups.insert(deepest.clone()),
            None => return Vec::new(),
        };
        limits.extend(own);
    }
    let mut upwards: Vec<(&PathBuf, u64)> = limits
        .iter()
        .map(|(group, limit)| (group, *limit))
        .collect();
    upwards.sort_by_key(|(group, _)| std::cmp::Reverse(group.components().count()));
    for (above, limit) in upwards {
        let is_below = |group: &PathBuf| group != above && group.starts_with(above);
        let below = groups.iter().filter(|group| is_below(group));
        let sum = below.fold(0_u64, |sum, group| sum.saturating_add(limits[group]));
        if groups.contains(above) || sum >= limit {
            groups.retain(|group| !is_below(group));
            groups.insert(above.clone());
        }
    }
    groups.into_iter().collect()
}

/// This group and its parents that have a limit, deepest first.
fn limits_of(group: &Path, root: &Path) -> impl Iterator<Item = (PathBuf, u64)> {
    group
        .ancestors()
        .take_while(move |part| *part != root && part.starts_with(root))
        .filter_map(|part| {
            let limit = read_limit(&part.join("memory.max")).ok().flatten()?;
            Some((part.to_owned(), limit))
        })
}

fn group_of(proc: &Path, root: &Path, pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(proc.join(pid.to_string()).join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Processes 10 to 13 are in separate groups below `a` and `b`, which are below `vms`; each of the three has the
    /// given limit.
    fn found(a: &str, b: &str, vms: &str, pids: &[i32]) -> Vec<String> {
        let folder = tempfile::TempDir::new().unwrap();
        let (proc, root) = (folder.path().join("proc"), folder.path().join("cgroup"));
        for (pid, group) in [
            (10, "vms/a/1"),
            (11, "vms/a/2"),
            (12, "vms/b/3"),
            (13, "vms/b"),
            (14, "vms/b"),
        ] {
            let process = proc.join(pid.to_string());
            fs::create_dir_all(&process).unwrap();
            fs::write(process.join("cgroup"), format!("0::/{group}\n")).unwrap();
            fs::create_dir_all(root.join(group)).unwrap();
        }
        for group in ["vms/a/1", "vms/a/2", "vms/b/3"] {
            // The VM's own limit.
            fs::write(root.join(group).join("memory.max"), "1024\n").unwrap();
        }
        for (group, limit) in [("vms/a", a), ("vms/b", b), ("vms", vms)] {
            fs::write(root.join(group).join("memory.max"), limit).unwrap();
        }
        let groups = limiting_groups(&proc, &root, pids);
        let name = |group: &PathBuf| group.strip_prefix(&root).unwrap().display().to_string();
        groups.iter().map(name).collect()
    }

    #[test]
    fn group_with_a_limit_that_holds_all_vmms_is_found() {
        assert_eq!(found("max", "max", "8192", &[10, 11, 12]), ["vms"]);
        assert_eq!(found("4096", "max", "max", &[10, 11]), ["vms/a"]);
        assert_eq!(found("4096", "max", "max", &[10]), ["vms/a"]);
        assert_eq!(found("max", "2048", "max", &[12, 13, 14]), ["vms/b"]);
    }

    #[test]
    fn groups_side_by_side_count_together_unless_one_above_is_tighter() {
        let all = [10, 11, 12, 13, 14];
        assert_eq!(found("4096", "2048", "max", &all), ["vms/a", "vms/b"]);
        assert_eq!(found("4096", "2048", "8192", &all), ["vms/a", "vms/b"]);
        assert_eq!(found("4096", "2048", "5000", &all), ["vms"]);
    }

    #[test]
    fn limit_of_a_group_with_one_vmm_is_that_vms_own() {
        let none: [&str; 0] = [];
        assert_eq!(found("max", "max", "max", &[10, 12]), none);
        // Other processes in the group do not matter.
        assert_eq!(found("max", "2048", "max", &[13]), none);
        assert_eq!(found("max", "2048", "8192", &[10, 13]), ["vms"]);
    }

    #[test]
    fn vmm_below_no_limit_leaves_the_machine() {
        let none: [&str; 0] = [];
        assert_eq!(found("4096", "max", "max", &[10, 12]), none);
        assert_eq!(found("4096", "4096", "max", &[]), none);
        assert_eq!(found("4096", "4096", "max", &[99]), none);
    }
}
