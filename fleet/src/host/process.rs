//! The VMM's process, from outside: which one it is and how much memory it has.
//!
//! Plain Cloud Hypervisor does not say how much of a guest's memory the host really holds; the kernel does. Guest RAM is
//! nearly all of a VMM's anonymous, shared and huge-page memory, so these together stand for it. What the VMM needs for
//! itself (some ten MiB) is in it, which errs on the safe side.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// When it started, clock ticks since the machine did.
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// Looks a process up; `None` when there is none.
    pub(crate) fn of(proc: &Path, pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        // The name, which may hold anything, ends at the last parenthesis; field 22 is the 20th after it.
        let rest = &stat[stat.rfind(')')? + 1..];
        let start_ticks = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_ticks })
    }

    /// True when it is known that this process has ended: there is none of that id, or another one.
    pub(crate) fn has_ended(self, proc: &Path) -> bool {
        match Self::of(proc, self.pid) {
            Some(process) => process != self,
            None => !proc.join(self.pid.to_string()).exists(),
        }
    }

    /// True while it is this process that has the id.
    pub(crate) fn is_alive(self, proc: &Path) -> bool {
        Self::of(proc, self.pid) == Some(self)
    }
}

/// Anonymous and shared memory of a process, bytes.
///
/// # Errors
/// The process is gone, or the file cannot be read or says nothing of memory: then it is not known, which is not 0.
pub(crate) fn resident_bytes(proc: &Path, pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(proc.join(pid.to_string()).join("status"))?;
    sum_resident(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "there is no Rss in its status"))
}

fn sum_resident(status: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_ascii_whitespace().next()?.parse().ok()
    };
    // Kernels without huge pages or shared memory leave those out.
    let sum = kib("RssAnon:")?
        .saturating_add(kib("RssShmem:").unwrap_or(0))
        .saturating_add(kib("HugetlbPages:").unwrap_or(0));
    Some(sum.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn resident_is_anonymous_and_shared_without_files() {
        let status = "VmRSS:\t 300 kB\nRssAnon:\t 100 kB\nRssFile:\t 150 kB\nRssShmem:\t 50 kB\n";
        assert_eq!(sum_resident(status), Some(150 << 10));
        let huge = format!("{status}HugetlbPages:\t 2048 kB\n");
        assert_eq!(sum_resident(&huge), Some((2048 + 150) << 10));
        assert_eq!(sum_resident("Name:\tvmm\n"), None);
    }

    #[test]
    fn identity_of_this_process_is_stable_and_alive() {
        let proc = Path::new("/proc");
        let pid = i32::try_from(std::process::id()).unwrap();
        let identity = ProcessIdentity::of(proc, pid).unwrap();
        assert!(identity.is_alive(proc));
        let later = ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        assert!(!later.is_alive(proc));
        assert!(resident_bytes(proc, pid).unwrap() > 0);
    }
}
