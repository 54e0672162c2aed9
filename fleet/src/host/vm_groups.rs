//! The control group that the VMMs of a host are in together.
//!
//! VMs that a container runtime or systemd put below a limit run into that limit long before they run into the machine's
//! memory. Nobody has to name such a group: the processes say where they are.

use std::fs;
use std::path::{Path, PathBuf};

/// The deepest group that holds all of these processes, if it is another one than the root. A VMM that is alone in its own
/// group does not count with that group but with the one above: its limit is the VM's own.
pub(crate) fn common_group(proc: &Path, root: &Path, pids: &[i32]) -> Option<PathBuf> {
    let mut common: Option<PathBuf> = None;
    for &pid in pids {
        let Some(group) = group_of(proc, root, pid) else {
            continue;
        };
        common = Some(match common {
            None => group,
            Some(common) => shared(&common, &group)?,
        });
    }
    common.filter(|group| group != root && group.join("memory.max").exists())
}

fn group_of(proc: &Path, root: &Path, pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(proc.join(pid.to_string()).join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = root.join(path);
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    if members.trim() == pid.to_string() && group != root {
        return group.parent().map(Path::to_owned);
    }
    Some(group)
}

fn shared(a: &Path, b: &Path) -> Option<PathBuf> {
    a.ancestors()
        .find(|part| b.starts_with(part))
        .map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn put(folder: &Path, pid: i32, group: &str, members: &str) {
        let process = folder.join(format!("proc/{pid}"));
        fs::create_dir_all(&process).unwrap();
        fs::write(process.join("cgroup"), format!("0::/{group}\n")).unwrap();
        let group = folder.join("cgroup").join(group);
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cgroup.procs"), members).unwrap();
        for part in group.ancestors().take_while(|part| *part != folder) {
            fs::write(part.join("memory.max"), "max\n").unwrap();
        }
    }

    #[test]
    fn group_is_the_deepest_that_holds_all_vmms() {
        let folder = tempfile::TempDir::new().unwrap();
        let (proc, root) = (folder.path().join("proc"), folder.path().join("cgroup"));
        let common = |pids: &[i32]| common_group(&proc, &root, pids);
        put(folder.path(), 10, "vms/a", "10\n");
        put(folder.path(), 11, "vms/b", "11\n");
        put(folder.path(), 12, "shared", "12\n13\n");
        put(folder.path(), 13, "shared", "12\n13\n");
        assert_eq!(common(&[10, 11]), Some(root.join("vms")));
        // The limit of a group with one VMM is that VM's.
        assert_eq!(common(&[10]), Some(root.join("vms")));
        assert_eq!(common(&[12, 13]), Some(root.join("shared")));
        assert_eq!(common(&[10, 12]), None);
        assert_eq!(common(&[]), None);
        assert_eq!(common(&[99]), None);
    }
}
