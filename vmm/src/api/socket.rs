//! The API socket: creation, locking and removal.
//!
//! The VMM replaces a socket that a killed VMM left behind, and never the socket of a running process. A lock on
//! `<path>.lock` ensures that only one VMM at a time checks and replaces the socket.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use api::config::PathOrFd;
use virtio_devices::file_lock;
use virtio_devices::listening_socket::{self, SocketFile};

use crate::inherited_fd;

/// Errors of creating the API socket.
#[derive(Debug, thiserror::Error)]
pub enum ApiSocketError {
    /// Another process holds the lock.
    #[error("The API socket {} is in use by another process", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The lock file cannot be created or locked.
    #[error("Cannot lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The path exists but is not a socket.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be created.
    #[error("Cannot create the API socket {}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is not a listening UNIX socket.
    #[error("File descriptor {fd} is not a listening UNIX socket")]
    Descriptor {
        /// The descriptor.
        fd: i32,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its files disappear when this is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    files: Option<SocketFiles>,
}

impl ApiSocket {
    /// Creates the socket, or takes over the inherited one.
    ///
    /// # Errors
    /// It is in use or cannot be created; in this case nothing is left behind.
    pub fn open(place: &PathOrFd) -> Result<Self, ApiSocketError> {
        match place {
            PathOrFd::Path(path) => Self::bind(path),
            PathOrFd::Fd(fd) => Ok(Self {
                listener: inherited_fd::listener(*fd)
                    .map_err(|source| ApiSocketError::Descriptor { fd: *fd, source })?,
                files: None,
            }),
        }
    }

    /// The listening end.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    fn bind(path: &Path) -> Result<Self, ApiSocketError> {
        let mut files = SocketFiles::lock(path)?;
        let (listener, socket) = bind(path)?;
        files.socket = Some(socket);
        Ok(Self {
            listener,
            files: Some(files),
        })
    }

    /// The path of a socket that was created here, not inherited.
    pub fn path(&self) -> Option<&Path> {
        Some(self.files.as_ref()?.socket.as_ref()?.path())
    }
}

/// The files of the socket, removed when dropped. The lock is released last.
#[derive(Debug)]
struct SocketFiles {
    socket: Option<SocketFile>,
    lock_path: PathBuf,
    _lock: File,
}

impl SocketFiles {
    fn lock(socket: &Path) -> Result<Self, ApiSocketError> {
        let mut lock_path = socket.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let fail = |source| ApiSocketError::Lock {
            path: lock_path.clone(),
            source,
        };
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&lock_path)
                .map_err(fail)?;
            file_lock::lock(&file, true, 0).map_err(|error| match error.kind() {
                ErrorKind::WouldBlock => ApiSocketError::InUse {
                    path: socket.to_owned(),
                },
                _ => fail(error),
            })?;
            // Its last owner may have removed the file between our open and our lock. A lock on an unlinked file
            // excludes no other process.
            let ours = file.metadata().map_err(fail)?;
            match fs::metadata(&lock_path) {
                Ok(named) if named.ino() == ours.ino() => {
                    return Ok(Self {
                        socket: None,
                        lock_path,
                        _lock: file,
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(fail(error)),
            }
        }
    }
}

impl Drop for SocketFiles {
    fn drop(&mut self) {
        drop(self.socket.take());
        if let Err(error) = fs::remove_file(&self.lock_path) {
            log::warn!("Cannot remove {}: {error}", self.lock_path.display());
        }
    }
}

/// Listens on the path. Replaces a socket that a killed VMM left behind, and no other file. Programs without our lock,
/// such as other VMMs, may listen there too.
fn bind(path: &Path) -> Result<(UnixListener, SocketFile), ApiSocketError> {
    let path_buf = || path.to_owned();
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ApiSocketError::NotASocket { path: path_buf() });
        }
        // For any other problem, the error from bind is clearer.
        _ => {}
    }
    listening_socket::bind(path).map_err(|source| match source.kind() {
        ErrorKind::AddrInUse => ApiSocketError::InUse { path: path_buf() },
        _ => ApiSocketError::Bind {
            path: path_buf(),
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn api_socket_second_owner_is_refused_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let place = PathOrFd::Path(dir.path().join("s"));
        let first = ApiSocket::open(&place).unwrap();
        assert!(matches!(
            ApiSocket::open(&place),
            Err(ApiSocketError::InUse { .. })
        ));
        UnixStream::connect(dir.path().join("s")).unwrap();
        drop(first);
        assert_eq!(entries(dir.path()), 0);
        drop(ApiSocket::open(&place).unwrap());
        assert_eq!(entries(dir.path()), 0);
    }

    #[test]
    fn api_socket_of_a_killed_owner_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ApiSocket::open(&PathOrFd::Path(path.clone())).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);
    }

    #[test]
    fn api_socket_of_a_process_without_our_lock_is_left_and_not_disturbed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let other = UnixListener::bind(&path).unwrap();
        other.set_nonblocking(true).unwrap();
        let place = PathOrFd::Path(path.clone());
        let refused = ApiSocket::open(&place).unwrap_err();
        assert!(
            matches!(refused, ApiSocketError::InUse { .. }),
            "{refused:?}"
        );
        assert_eq!(
            other.accept().unwrap_err().kind(),
            ErrorKind::WouldBlock,
            "a connection that nobody made"
        );
        UnixStream::connect(&path).unwrap();
        assert_eq!(entries(dir.path()), 1);
        // A socket put in the place of ours is not ours to remove.
        std::fs::remove_file(&path).unwrap();
        let ours = ApiSocket::open(&place).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert_eq!(entries(dir.path()), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn api_socket_does_not_remove_what_is_no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            ApiSocket::open(&PathOrFd::Path(path.clone())),
            Err(ApiSocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        assert_eq!(entries(dir.path()), 1);
    }

    #[test]
    fn api_socket_in_a_missing_folder_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let place = PathOrFd::Path(dir.path().join("none/s"));
        assert!(matches!(
            ApiSocket::open(&place),
            Err(ApiSocketError::Lock { .. })
        ));
    }

    #[test]
    fn api_socket_inherited_must_listen() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let socket = ApiSocket::open(&PathOrFd::Fd(listener.into_raw_fd())).unwrap();
        assert!(socket.path().is_none());
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            ApiSocket::open(&PathOrFd::Fd(file.as_raw_fd())),
            Err(ApiSocketError::Descriptor { .. })
        ));
    }
}
