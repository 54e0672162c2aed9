//! Identity and memory of the VMM's process, read from outside.
//!
//! Plain Cloud Hypervisor does not report how much of a guest's memory is resident, but the kernel does. Guest RAM is
//! nearly all of a VMM's anonymous, shared and huge-page memory, so their sum is used as an estimate. It includes the
//! VMM's own memory (some 10 MiB), which errs on the safe side.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::model::Bytes;

/// Link target of a descriptor of a KVM VM.
const KVM_VM: &str = "anon_inode:kvm-vm";

/// Identifies a process unambiguously, even if a later one has the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Its start time, in clock ticks since the machine booted.
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// Looks up a process; `None` if it does not exist.
    pub(crate) fn of(proc: &Path, pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        // The name, which may contain any characters, ends at the last parenthesis; field 22 is the 20th after it.
        let rest = &stat[stat.rfind(')')? + 1..];
        let start_ticks = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_ticks })
    }

    /// True if this process is known to have ended: no process, or another one, has its id.
    pub(crate) fn has_ended(self, proc: &Path) -> bool {
        match Self::of(proc, self.pid) {
            Some(process) => process != self,
            None => !proc.join(self.pid.to_string()).exists(),
        }
    }
}

/// A process identified by a descriptor. Operations on it affect this process or fail, even if another process has the
/// id by then.
#[derive(Clone, Debug)]
pub struct Process {
    identity: ProcessIdentity,
    handle: Option<Arc<OwnedFd>>,
}

impl PartialEq for Process {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Process {
    /// Opens a process; `None` if none has the id. `handle` is its descriptor, if known.
    pub(crate) fn hold(proc: &Path, pid: i32, handle: Option<OwnedFd>) -> Option<Self> {
        let open = || pidfd_open(positive(pid)?, PidfdFlags::empty()).ok();
        let handle = handle.or_else(open).map(Arc::new);
        let process = Self {
            identity: ProcessIdentity::of(proc, pid)?,
            handle,
        };
        // If the process is still alive, the lookup found this process.
        process
            .handle
            .as_ref()
            .is_none_or(|_| process.lives())
            .then_some(process)
    }

    /// A process of which only the identity is known.
    #[cfg(test)]
    pub(crate) fn known(identity: ProcessIdentity) -> Self {
        Self {
            identity,
            handle: None,
        }
    }

    /// Its identity.
    pub fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// Its id, which another process may have after this one has ended.
    pub(crate) fn pid(&self) -> i32 {
        self.identity.pid
    }

    /// Whether it is known to be alive.
    pub(crate) fn lives(&self) -> bool {
        self.handle
            .as_ref()
            .is_some_and(|handle| !has_ended(handle))
    }

    /// Whether it is known to have ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.handle.as_ref().is_some_and(|handle| has_ended(handle))
    }

    /// Kills it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match &self.handle {
            // Only VMMs are killed, and init is not one.
            Some(handle) if self.identity.pid > 1 => {
                pidfd_send_signal(handle.as_fd(), Signal::KILL).map_err(io::Error::from)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Whether the process of a descriptor has ended, which makes the descriptor readable.
pub(crate) fn has_ended(handle: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&now)) != Ok(0)
}

fn positive(pid: i32) -> Option<Pid> {
    (pid > 0).then_some(pid).and_then(Pid::from_raw)
}

/// Whether a process holds a VM of KVM.
///
/// # Errors
/// Its descriptors cannot be read.
pub(crate) fn holds_vm(proc: &Path, pid: i32) -> io::Result<bool> {
    let descriptors = fs::read_dir(proc.join(pid.to_string()).join("fd"))?;
    let mut links = descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    Ok(links.any(|link| link == Path::new(KVM_VM)))
}

/// The effective user and group of a process.
///
/// # Errors
/// The process has ended, or the file does not contain them.
pub(crate) fn ids_of(proc: &Path, pid: i32) -> io::Result<(u32, u32)> {
    let status = fs::read_to_string(proc.join(pid.to_string()).join("status"))?;
    let id = |name: &str| -> Option<u32> {
        let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
        // The real id comes first.
        rest.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    let ids = id("Uid:").zip(id("Gid:"));
    ids.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its status has no Uid"))
}

/// Processor time that a process has used, ms.
///
/// # Errors
/// The process has ended, or the file does not contain it.
pub(crate) fn cpu_ms(proc: &Path, pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat"))?;
    let ticks = || -> Option<u64> {
        // As in `ProcessIdentity::of`; fields 14 and 15, of which the first includes the guest's time.
        let rest = &stat[stat.rfind(')')? + 1..];
        let mut fields = rest.split_ascii_whitespace().skip(11);
        let (user, system): (u64, u64) =
            (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(user.saturating_add(system))
    };
    let ticks = ticks().ok_or(io::ErrorKind::InvalidData)?;
    Ok(ticks.saturating_mul(1000) / clock_ticks_per_second().max(1))
}

/// Host memory of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessMemory {
    /// Anonymous and shared memory.
    pub(crate) resident: Bytes,
    /// Memory of the pool of huge pages.
    pub(crate) huge: Bytes,
}

impl ProcessMemory {
    /// Reads it.
    ///
    /// # Errors
    /// The process has ended, or the file cannot be read or contains no figures. The memory is then unknown, not 0.
    pub(crate) fn read(proc: &Path, pid: i32) -> io::Result<Self> {
        let status = fs::read_to_string(proc.join(pid.to_string()).join("status"))?;
        Self::of(&status)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its status has no Rss"))
    }

    fn of(status: &str) -> Option<Self> {
        let figure = |name: &str| -> Option<Bytes> {
            let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
            Some(Bytes(kib.saturating_mul(1024)))
        };
        // Kernels without huge pages or shared memory omit these lines.
        Some(Self {
            resident: figure("RssAnon:")? + figure("RssShmem:").unwrap_or_default(),
            huge: figure("HugetlbPages:").unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn resident_is_anonymous_and_shared_without_files() {
        let status = "VmRSS:\t 300 kB\nRssAnon:\t 100 kB\nRssFile:\t 150 kB\nRssShmem:\t 50 kB\n";
        let memory = ProcessMemory {
            resident: Bytes(150 << 10),
            huge: Bytes::ZERO,
        };
        assert_eq!(ProcessMemory::of(status), Some(memory));
        let huge = format!("{status}HugetlbPages:\t 2048 kB\n");
        let memory = ProcessMemory {
            huge: Bytes::mib(2),
            ..memory
        };
        assert_eq!(ProcessMemory::of(&huge), Some(memory));
        assert_eq!(ProcessMemory::of("Name:\tvmm\n"), None);
    }

    #[test]
    fn identity_of_this_process_is_stable_and_alive() {
        let proc = Path::new("/proc");
        let pid = i32::try_from(std::process::id()).unwrap();
        let identity = ProcessIdentity::of(proc, pid).unwrap();
        assert!(!identity.has_ended(proc));
        let later = ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        assert!(later.has_ended(proc));
        assert!(ProcessMemory::read(proc, pid).unwrap().resident > Bytes::ZERO);
    }

    #[test]
    fn process_that_has_ended_cannot_be_taken_for_another_of_its_id() {
        let proc = Path::new("/proc");
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::hold(proc, pid, None).unwrap();
        assert!(process.lives() && !process.has_ended());
        process.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.lives() && process.has_ended());
        assert!(process.kill().is_err());
        assert!(Process::hold(proc, pid, None).is_none());
    }

    #[test]
    fn init_and_everybody_are_never_killed() {
        for pid in [-1, 0, 1] {
            let identity = ProcessIdentity {
                pid,
                start_ticks: 0,
            };
            let handle = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
            let handle = Some(Arc::new(handle));
            assert!(Process { identity, handle }.kill().is_err());
            assert!(Process::hold(Path::new("/nowhere"), pid, None).is_none());
        }
    }

    #[test]
    fn vm_is_told_by_the_descriptor_of_kvm() {
        let folder = tempfile::TempDir::new().unwrap();
        let fd = folder.path().join("7/fd");
        fs::create_dir_all(&fd).unwrap();
        std::os::unix::fs::symlink("anon_inode:kvm-vcpu:0", fd.join("3")).unwrap();
        assert!(!holds_vm(folder.path(), 7).unwrap());
        std::os::unix::fs::symlink(KVM_VM, fd.join("4")).unwrap();
        assert!(holds_vm(folder.path(), 7).unwrap());
        assert!(holds_vm(folder.path(), 8).is_err());
    }
}
