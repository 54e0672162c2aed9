//! Locks that separate agents: on the state folder, on the folder of VMs in standby, and on each VM.
//!
//! Two agents with one folder would both reserve the same memory. Two agents that manage the same VM would move its
//! balloon in opposite directions. The kernel releases the locks when the agent ends, even if it is killed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::geteuid;

use crate::sample::SocketIdentity;

/// Held while an agent uses the folder.
#[derive(Debug)]
pub(super) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the lock of a state folder; an error of kind `WouldBlock` means that another agent has it.
    pub(super) fn take(folder: &Path) -> io::Result<Self> {
        Self::take_file(&folder.join("lock"))
    }

    /// The same for a folder of VMs in standby, where names without a dot are those of VMs.
    pub(super) fn take_standby(folder: &Path) -> io::Result<Self> {
        Self::take_file(&folder.join(".lock"))
    }

    fn take_file(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            // A user who can open the file can lock it, and thus keep the agent from starting.
            .mode(0o600)
            .open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { _file: file })
    }
}

/// Held while an agent manages a VM: a name in the abstract socket namespace, derived from the file of the VM's socket.
#[derive(Debug)]
pub(super) struct VmLock {
    _listener: Option<UnixListener>,
}

impl VmLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// Another agent has it, or the system rejects it.
    pub(super) fn take(socket: &SocketIdentity) -> io::Result<Self> {
        let name = format!("ch-fleet/{socket}");
        let address = SocketAddr::from_abstract_name(name.as_bytes())?;
        let same = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self {
                _listener: Some(listener),
            }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => holder(&same, error),
            Err(error) => Err(error),
        }
    }
}

/// Its holder. Any user can take a name; only an agent's own user, or root, can keep a VM from this agent.
fn holder(address: &SocketAddrUnix, in_use: io::Error) -> io::Result<VmLock> {
    // The holder accepts no connections, so this does not block either.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    if connect(&stream, address).is_err() {
        return Err(in_use);
    }
    let peer = socket_peercred(&stream)?;
    if !peer.uid.is_root() && peer.uid != geteuid() {
        log::warn!(
            "user {} holds the name of a VM's lock; it is ignored",
            peer.uid.as_raw()
        );
        return Ok(VmLock { _listener: None });
    }
    let text = format!(
        "another agent serves it already (process {})",
        peer.pid.as_raw_nonzero()
    );
    Err(io::Error::new(io::ErrorKind::AddrInUse, text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::sample::Discovery;

    #[test]
    fn folder_belongs_to_one_agent_until_it_ends() {
        let folder = tempfile::TempDir::new().unwrap();
        let first = FolderLock::take(folder.path()).unwrap();
        let lock = folder.path().join("lock").metadata().unwrap();
        assert_eq!(lock.permissions().mode() & 0o077, 0);
        let second = FolderLock::take(folder.path()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        FolderLock::take(folder.path()).unwrap();
    }

    #[test]
    fn vm_belongs_to_one_agent_and_the_other_is_told_which() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("a.sock");
        let _vmm = UnixListener::bind(&path).unwrap();
        let pattern = path.display().to_string();
        let found = Discovery::new(&[pattern]).unwrap().scan();
        let first = VmLock::take(&found[0].identity).unwrap();
        let second = VmLock::take(&found[0].identity).unwrap_err();
        let text = second.to_string();
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        drop(first);
        VmLock::take(&found[0].identity).unwrap();
    }

    #[test]
    fn lock_whose_holder_takes_no_more_connections_is_not_waited_for() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("a.sock");
        let _vmm = UnixListener::bind(&path).unwrap();
        let pattern = path.display().to_string();
        let found = Discovery::new(&[pattern]).unwrap().scan();
        let _first = VmLock::take(&found[0].identity).unwrap();
        let name = format!("ch-fleet/{}", found[0].identity);
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let mut held = Vec::new();
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            if connect(&socket, &address).is_err() {
                break;
            }
            held.push(socket);
        }
        let refusal = VmLock::take(&found[0].identity).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::AddrInUse);
    }
}
