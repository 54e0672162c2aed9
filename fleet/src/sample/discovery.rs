//! Finds API sockets by patterns, and names the VMs behind them.
//!
//! A VM's name is the text that the pattern's wildcards matched, which distinguishes its socket from others:
//! `/run/vms/*/api.sock` names `/run/vms/web-1/api.sock` `web-1`, `/run/ch/*.sock` names `/run/ch/db.sock` `db`.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use api::SocketInode;
use thiserror::Error;

/// Maximum number of VMs per agent. A pattern that matches more is a mistake, and each VM needs a thread.
pub const VMS_MAX: usize = 4096;

/// A pattern that cannot be used.
#[derive(Debug, Error)]
pub enum PatternError {
    /// Not a glob pattern.
    #[error("{pattern:?} is not a socket pattern")]
    Syntax {
        /// The pattern.
        pattern: String,
        /// The reason.
        #[source]
        source: glob::PatternError,
    },
    /// A relative pattern, which would depend on the agent's working directory.
    #[error("The socket pattern {pattern:?} must start with /")]
    Relative {
        /// The pattern.
        pattern: String,
    },
}

/// Identity of a socket file: another file at the same path is another VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketIdentity {
    device: u64,
    inode: u64,
    changed_ns: i64,
}

impl SocketIdentity {
    /// The file, for connecting to it.
    pub(crate) fn file(self) -> SocketInode {
        SocketInode {
            device: self.device,
            inode: self.inode,
        }
    }
}

impl fmt::Display for SocketIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:x}-{:x}-{:x}",
            self.device, self.inode, self.changed_ns
        )
    }
}

/// A socket that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The VM's name, unique within one scan.
    pub name: String,
    /// Its API socket.
    pub socket: PathBuf,
    /// Its identity.
    pub identity: SocketIdentity,
    /// Its owner.
    pub owner: u32,
    /// The reason why it is not served, regardless of the listener.
    pub fault: Option<&'static str>,
}

/// The patterns to search for.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    patterns: Vec<String>,
}

impl Discovery {
    /// Checks the patterns.
    ///
    /// # Errors
    /// A pattern is relative or invalid.
    pub fn new(patterns: &[String]) -> Result<Self, PatternError> {
        for pattern in patterns {
            glob::Pattern::new(pattern).map_err(|source| PatternError::Syntax {
                pattern: pattern.clone(),
                source,
            })?;
            if !pattern.starts_with('/') {
                return Err(PatternError::Relative {
                    pattern: pattern.clone(),
                });
            }
        }
        Ok(Self {
            patterns: patterns.to_vec(),
        })
    }

    /// The name a socket at this path would get; `None` when no pattern matches it.
    pub fn name(&self, socket: &Path) -> Option<String> {
        // As in a shell, no wildcard matches a slash.
        let options = glob::MatchOptions {
            require_literal_separator: true,
            ..glob::MatchOptions::new()
        };
        self.patterns.iter().find_map(|pattern| {
            glob::Pattern::new(pattern)
                .ok()?
                .matches_path_with(socket, options)
                .then(|| name_of(pattern, socket))
        })
    }

    /// Scans once. The result is sorted by name and omits files that cannot be inspected.
    pub fn scan(&self) -> Vec<Found> {
        let mut by_name = BTreeMap::new();
        for pattern in &self.patterns {
            let Ok(paths) = glob::glob(pattern) else {
                continue;
            };
            for socket in paths.flatten() {
                if by_name.len() >= VMS_MAX {
                    log::error!("more than {VMS_MAX} sockets match; the others are ignored");
                    return by_name.into_values().collect();
                }
                let Some(file) = look(pattern, &socket) else {
                    continue;
                };
                let mut name = name_of(pattern, &socket);
                if by_name
                    .get(&name)
                    .is_some_and(|other: &Found| other.socket != socket)
                {
                    // If two patterns yield the same name, the path is used as the name.
                    name = socket.display().to_string();
                }
                by_name.insert(
                    name.clone(),
                    Found {
                        name,
                        socket,
                        ..file
                    },
                );
            }
        }
        by_name.into_values().collect()
    }
}

/// Inspects the file, except for its name; `None` if it is neither a socket nor a link to one.
fn look(pattern: &str, socket: &Path) -> Option<Found> {
    let metadata = socket.symlink_metadata().ok()?;
    let is_link = metadata.is_symlink();
    if is_link {
        let target = socket.metadata().ok()?;
        target.file_type().is_socket().then_some(())?;
    } else if !metadata.file_type().is_socket() {
        return None;
    }
    Some(Found {
        name: String::new(),
        socket: PathBuf::new(),
        identity: SocketIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            // The kernel's nanoseconds fit for 292 years; a file may have any time.
            changed_ns: metadata
                .ctime()
                .saturating_mul(1_000_000_000)
                .saturating_add(metadata.ctime_nsec()),
        },
        owner: metadata.uid(),
        fault: (is_link || leads_through_link(pattern, socket))
            .then_some("its path leads through a symbolic link"),
    })
}

/// Whether a folder that a wildcard matched, or one below it, is a link: a user who can create files there could refer
/// to any socket. The part before the first wildcard is the operator's own choice.
fn leads_through_link(pattern: &str, socket: &Path) -> bool {
    let plain = Path::new(pattern)
        .components()
        .take_while(|component| !has_wildcard(*component))
        .count();
    socket
        .ancestors()
        .skip(1)
        .take_while(|folder| folder.components().count() > plain)
        .any(Path::is_symlink)
}

/// The first component of the path that a wildcard matched; if there is none, the file's stem.
fn name_of(pattern: &str, socket: &Path) -> String {
    let wild = Path::new(pattern)
        .components()
        .zip(socket.components())
        .find(|(pattern, _)| has_wildcard(*pattern))
        .map(|(_, found)| Path::new(found.as_os_str()));
    let named = wild.unwrap_or_else(|| socket.file_name().map_or(socket, Path::new));
    let text = named.to_string_lossy();
    text.strip_suffix(".sock").unwrap_or(&text).to_owned()
}

fn has_wildcard(component: Component<'_>) -> bool {
    component
        .as_os_str()
        .to_string_lossy()
        .contains(['*', '?', '['])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn name_is_what_the_wildcard_matched() {
        for (pattern, socket, name) in [
            ("/run/vms/*/api.sock", "/run/vms/web-1/api.sock", "web-1"),
            ("/run/ch/*.sock", "/run/ch/db.sock", "db"),
            ("/run/ch/vm-?.sock", "/run/ch/vm-7.sock", "vm-7"),
            ("/run/one.sock", "/run/one.sock", "one"),
            ("/run/*/x/*.sock", "/run/a/x/b.sock", "a"),
        ] {
            assert_eq!(name_of(pattern, Path::new(socket)), name, "{pattern}");
        }
    }

    #[test]
    fn name_of_a_socket_to_come_is_that_of_its_pattern() {
        let discovery = Discovery::new(&["/run/ch/*/api.sock".to_owned()]).unwrap();
        let name = |path: &str| discovery.name(Path::new(path));
        assert_eq!(name("/run/ch/a/api.sock").as_deref(), Some("a"));
        assert_eq!(name("/run/ch/a/b/api.sock"), None);
        assert_eq!(name("/run/a.sock"), None);
    }

    #[test]
    fn scan_finds_sockets_only_and_tells_a_replaced_one() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("a.sock");
        let pattern = format!("{}/*.sock", folder.path().display());
        let discovery = Discovery::new(&[pattern]).unwrap();
        std::fs::write(folder.path().join("plain.sock"), "").unwrap();
        let first = UnixListener::bind(&path).unwrap();
        let before = discovery.scan();
        assert_eq!(before.len(), 1);
        assert_eq!(before[0].name, "a");
        assert_eq!(discovery.scan(), before);
        std::fs::remove_file(&path).unwrap();
        assert!(discovery.scan().is_empty());
        let _second = UnixListener::bind(&path).unwrap();
        assert_ne!(discovery.scan()[0].identity, before[0].identity);
        drop(first);
    }

    #[test]
    fn link_to_a_socket_is_named_and_not_served() {
        let folder = tempfile::TempDir::new().unwrap();
        let root = folder.path();
        for name in ["real", "elsewhere"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        let _first = UnixListener::bind(root.join("real/api.sock")).unwrap();
        let _second = UnixListener::bind(root.join("elsewhere/other.sock")).unwrap();
        let link =
            |target: &str, at: &str| std::os::unix::fs::symlink(target, root.join(at)).unwrap();
        std::fs::create_dir(root.join("file")).unwrap();
        link("../elsewhere/other.sock", "file/api.sock");
        link("real", "folder");
        link("nowhere", "dangling");
        let scan = |pattern: String| Discovery::new(&[pattern]).unwrap().scan();
        let found: Vec<(String, bool)> = scan(format!("{}/*/api.sock", root.display()))
            .into_iter()
            .map(|found| (found.name, found.fault.is_some()))
            .collect();
        let named = |name: &str, fault| (name.to_owned(), fault);
        assert_eq!(
            found,
            [
                named("file", true),
                named("folder", true),
                named("real", false)
            ]
        );
        // The operator's own part of the path may contain links.
        let found = scan(format!("{}/folder/*.sock", root.display()));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].fault, None);
    }

    #[test]
    fn patterns_with_the_same_name_fall_back_to_the_path() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut listeners = Vec::new();
        let mut patterns = Vec::new();
        for part in ["x", "y"] {
            let sub = folder.path().join(part);
            std::fs::create_dir(&sub).unwrap();
            listeners.push(UnixListener::bind(sub.join("vm.sock")).unwrap());
            patterns.push(format!("{}/*.sock", sub.display()));
        }
        let found = Discovery::new(&patterns).unwrap().scan();
        assert_eq!(found.len(), 2);
        assert_ne!(found[0].name, found[1].name);
    }

    #[test]
    fn pattern_that_is_relative_or_broken_is_refused() {
        assert!(Discovery::new(&["run/*.sock".to_owned()]).is_err());
        assert!(Discovery::new(&["/run/[a.sock".to_owned()]).is_err());
    }
}
