//! Identifies the process behind a socket without sending a request, because a request to another program may do harm.
//!
//! A pattern can match sockets of other programs. A vhost-user back end, for example, serves one connection, so a query
//! would take the guest's place. The kernel's files show the process of a listening socket, and its command line shows
//! whether it is a VMM.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::host::holds_vm;

/// The flag of a listening socket in `/proc/net/unix`.
const LISTENS: &str = "00010000";

/// The processes behind listening sockets, looked up once.
#[derive(Debug)]
pub(crate) struct SocketOwners<'a> {
    proc: &'a Path,
    /// Several sockets have the same path if it was bound again, or is another file in another mount namespace.
    inodes: BTreeMap<PathBuf, Vec<String>>,
    /// Processes by the targets of their descriptors. Reading all of them is expensive, so it is done only when needed.
    pids: OnceCell<BTreeMap<String, Vec<String>>>,
}

impl<'a> SocketOwners<'a> {
    pub(crate) fn read(proc: &'a Path) -> Self {
        let text = fs::read_to_string(proc.join("net/unix")).unwrap_or_default();
        let mut inodes: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        for line in text.lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            if let [_, _, _, LISTENS, _, _, inode, path] = fields.as_slice() {
                let link = format!("socket:[{inode}]");
                inodes.entry(PathBuf::from(path)).or_default().push(link);
            }
        }
        Self {
            proc,
            inodes,
            pids: OnceCell::new(),
        }
    }

    /// The processes with a socket that listens at this path.
    fn holders(&self, socket: &Path) -> impl Iterator<Item = &String> {
        let links = self.inodes.get(socket).into_iter().flatten();
        links
            .filter_map(|link| self.pids.get_or_init(|| self.read_pids()).get(link))
            .flatten()
    }

    /// The process that listens at `socket`, if it is known and not a VMM. A process that cannot be inspected is
    /// assumed to be a VMM.
    pub(crate) fn stranger(&self, socket: &Path) -> Option<String> {
        let lines: Vec<(&String, Vec<u8>)> = self
            .holders(socket)
            .filter_map(|pid| Some((pid, fs::read(self.proc.join(pid).join("cmdline")).ok()?)))
            .collect();
        if lines.iter().any(|(_, line)| is_vmm(line)) {
            return None;
        }
        let (pid, line) = lines.first()?;
        let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(format!(
            "process {pid} ({})",
            String::from_utf8_lossy(program)
        ))
    }

    /// The process that runs the VM behind `socket`. The kernel reports the process that began to listen, `listener`.
    /// If that is not the VMM, because the VMM inherited the socket, the result is the only process with that socket
    /// that holds a VM.
    pub(crate) fn vmm(&self, socket: &Path, listener: i32) -> i32 {
        let mut vmms: Vec<i32> = self
            .holders(socket)
            .filter_map(|pid| pid.parse().ok())
            .filter(|pid| holds_vm(self.proc, *pid).unwrap_or(false))
            .collect();
        vmms.sort_unstable();
        vmms.dedup();
        match vmms.as_slice() {
            [vmm] => *vmm,
            // There is no such process, as before the VM is created, or it is ambiguous.
            _ => listener,
        }
    }

    fn read_pids(&self) -> BTreeMap<String, Vec<String>> {
        let mut pids: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in fs::read_dir(self.proc).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            let descriptors = fs::read_dir(entry.path().join("fd"));
            for descriptor in descriptors.into_iter().flatten().flatten() {
                let Ok(link) = fs::read_link(descriptor.path()) else {
                    continue;
                };
                if let Some(link) = link.to_str().filter(|link| link.starts_with("socket:")) {
                    pids.entry(link.to_owned()).or_default().push(name.clone());
                }
            }
        }
        pids
    }
}

/// Whether a command line, with arguments terminated by zeros, is that of a VMM with this API.
fn is_vmm(line: &[u8]) -> bool {
    let mut arguments = line.split(|byte| *byte == 0);
    let program = arguments.next().unwrap_or_default();
    let name = program
        .rsplit(|byte| *byte == b'/')
        .next()
        .unwrap_or_default();
    // A process that is ending, or a kernel thread, has an empty command line.
    line.is_empty()
        || name.starts_with(b"cloud-hypervisor")
        || arguments.any(|argument| argument.starts_with(b"--api-socket"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(proc: &Path, pid: &str, inode: &str, line: &str) {
        let folder = proc.join(pid);
        fs::create_dir_all(folder.join("fd")).unwrap();
        symlink(format!("socket:[{inode}]"), folder.join("fd/3")).unwrap();
        fs::write(folder.join("cmdline"), line).unwrap();
    }

    #[test]
    fn vmm_that_inherited_its_socket_is_found_by_its_vm() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = folder.path();
        fs::create_dir(proc.join("net")).unwrap();
        let line =
            format!("0000000000000000: 00000002 00000000 {LISTENS} 0001 01 11 /run/a.sock\n");
        fs::write(proc.join("net/unix"), line).unwrap();
        // Both the launcher and the VMM hold the socket.
        process(proc, "100", "11", "/usr/bin/launcher\0");
        process(
            proc,
            "200",
            "11",
            "/usr/bin/cloud-hypervisor\0--api-socket\0fd=3\0",
        );
        process(proc, "300", "99", "/usr/bin/cloud-hypervisor\0");
        let vmm = || SocketOwners::read(proc).vmm(Path::new("/run/a.sock"), 100);
        assert_eq!(vmm(), 100, "there is no VM yet");
        let hold = |pid: &str| symlink("anon_inode:kvm-vm", proc.join(pid).join("fd/9")).unwrap();
        hold("300");
        assert_eq!(vmm(), 100, "that VM is another's");
        hold("200");
        assert_eq!(vmm(), 200);
        hold("100");
        assert_eq!(vmm(), 100, "it cannot be told which");
    }

    #[test]
    fn path_that_was_bound_anew_names_no_vmm_while_two_have_one() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = folder.path();
        fs::create_dir(proc.join("net")).unwrap();
        let line = |inode| {
            format!("0000000000000000: 00000002 00000000 {LISTENS} 0001 01 {inode} /run/a.sock\n")
        };
        let hold = |pid: &str| symlink("anon_inode:kvm-vm", proc.join(pid).join("fd/9")).unwrap();
        process(proc, "200", "11", "/usr/bin/cloud-hypervisor\0");
        process(proc, "300", "12", "/usr/bin/cloud-hypervisor\0");
        hold("300");
        for order in [["11", "12"], ["12", "11"]] {
            fs::write(proc.join("net/unix"), order.map(line).concat()).unwrap();
            let owners = SocketOwners::read(proc);
            assert_eq!(owners.vmm(Path::new("/run/a.sock"), 1), 300);
        }
        hold("200");
        let owners = SocketOwners::read(proc);
        assert_eq!(owners.vmm(Path::new("/run/a.sock"), 1), 1);
    }

    #[test]
    fn stranger_is_who_listens_and_is_no_vmm() {
        let folder = tempfile::TempDir::new().unwrap();
        let proc = folder.path();
        fs::create_dir(proc.join("net")).unwrap();
        let line = |flags: &str, inode: &str, path: &str| {
            format!("0000000000000000: 00000002 00000000 {flags} 0001 01 {inode} {path}\n")
        };
        let table = [
            "Num       RefCount Protocol Flags    Type St Inode Path\n".to_owned(),
            line(LISTENS, "11", "/run/a.sock"),
            line(LISTENS, "12", "/run/b.sock"),
            line(LISTENS, "13", "/run/c.sock"),
            line("00000000", "14", "/run/d.sock"),
            line(LISTENS, "15", "/run/e.sock"),
        ];
        fs::write(proc.join("net/unix"), table.concat()).unwrap();
        process(
            proc,
            "101",
            "11",
            "/usr/bin/cloud-hypervisor\0--memory\0size=1G\0",
        );
        process(proc, "102", "12", "/opt/vmm\0--api-socket=/run/b.sock\0");
        process(proc, "103", "13", "/usr/bin/spdk_tgt\0-S\0/run\0");
        process(proc, "104", "14", "/usr/bin/spdk_tgt\0");
        let owners = SocketOwners::read(proc);
        let stranger = |path: &str| owners.stranger(Path::new(path));
        assert_eq!(stranger("/run/a.sock"), None);
        assert_eq!(stranger("/run/b.sock"), None);
        assert_eq!(
            stranger("/run/c.sock").as_deref(),
            Some("process 103 (/usr/bin/spdk_tgt)")
        );
        // A socket that does not listen, one without a known listener, and an unknown path.
        assert_eq!(stranger("/run/d.sock"), None);
        assert_eq!(stranger("/run/e.sock"), None);
        assert_eq!(stranger("/run/f.sock"), None);
    }
}
