//! A UNIX socket on which the VMM listens, and its path in the file system.

use std::fs::{self, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a thread accepts no clients after [`accept`] has failed. The client is still in the backlog, so that the
/// listener stays ready and would wake the thread endlessly.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A non-blocking listener. The path is removed on drop.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl ListeningSocket {
    /// Listens on `path`. A stale socket without a listener is replaced.
    ///
    /// # Errors
    /// The path is not a socket, or another process listens on it.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, file })
    }

    /// Accepts the next client, as [`accept`].
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        accept(&self.listener)
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl AsRawFd for ListeningSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

/// The file of a socket that this process has bound. Removed on drop, unless another file has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

impl SocketFile {
    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let path = &self.path;
        let removed = match path.symlink_metadata() {
            Ok(found) if Identity::of(&found) != self.identity => {
                log::warn!("{} is left, because it was replaced", path.display());
                return;
            }
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            log::warn!("Cannot remove {}: {error}", path.display());
        }
    }
}

/// Accepts the next client of a non-blocking listener; its stream is non-blocking as well. `None` if none is waiting.
///
/// # Errors
/// The client could not be accepted, mainly because no descriptor is left. It still waits: try again after
/// [`ACCEPT_PAUSE`].
pub fn accept(listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    loop {
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true)?;
                return Ok(Some(client));
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                // A client that hung up while it waited.
                io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                _ => return Err(error),
            },
        }
    }
}

/// Distinguishes a file from others that had or will have its path. A file system may reuse the number of an inode at
/// once; its modification time then differs.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            modified: (file.mtime(), file.mtime_nsec()),
        }
    }
}

/// Listens on `path`, as [`ListeningSocket::bind`].
///
/// # Errors
/// `AddrInUse`: the path is not a socket, or another process listens on it.
pub fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let stale = find_stale(path).ok_or(error)?;
            log::info!(
                "{} is replaced, because no process listens on it",
                path.display()
            );
            remove(path, &stale)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    let file = SocketFile {
        path: path.to_owned(),
        identity: Identity::of(&path.symlink_metadata()?),
    };
    Ok((listener, file))
}

/// The identity of a socket on which no process listens. A stream connection would occupy a client's place in the backlog
/// of a live listener, so the attempt uses another socket type. The kernel returns "wrong type" if there is a listener,
/// and "refused" if there is none (`unix_find_bsd` in net/unix/af_unix.c).
fn find_stale(path: &Path) -> Option<Identity> {
    let found = path.symlink_metadata().ok()?;
    let probe = || UnixDatagram::unbound()?.connect(path);
    let is_stale = found.file_type().is_socket()
        && probe().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    is_stale.then(|| Identity::of(&found))
}

/// Removes this file and no other: another process may have replaced it since it was found. Therefore the file is moved
/// aside before it is compared.
fn remove(path: &Path, stale: &Identity) -> io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    // Not the process id, which is 1 for every VMM in a jail.
    aside.push(format!(".stale-{:016x}", RandomState::new().hash_one(0)));
    let aside = PathBuf::from(aside);
    fs::rename(path, &aside)?;
    if Identity::of(&aside.symlink_metadata()?) == *stale {
        return fs::remove_file(&aside);
    }
    fs::rename(&aside, path)?;
    Err(io::ErrorKind::AddrInUse.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_that_nobody_listens_on_is_replaced_and_others_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        // A process that was killed leaves its socket behind.
        drop(UnixListener::bind(&path).unwrap());
        let listener = ListeningSocket::bind(&path).unwrap();
        // A socket in use is neither replaced nor disturbed.
        let refusal = bind(&path).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::AddrInUse);
        assert!(listener.accept().unwrap().is_none());
        UnixStream::connect(&path).unwrap();
        // The same holds for a file that is not a socket, and for a link to a socket.
        let file = folder.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        let link = folder.path().join("link");
        drop(listener);
        drop(UnixListener::bind(&path).unwrap());
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(bind(&link).is_err());
        assert!(link.is_symlink() && path.exists());
    }

    #[test]
    fn socket_that_another_process_replaced_meanwhile_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let stale = find_stale(&path).unwrap();
        let aside = folder.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        let other = ListeningSocket::bind(&path).unwrap();
        let refusal = remove(&path, &stale).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        // The same holds for a socket that is no longer ours when we end.
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        let third = ListeningSocket::bind(&path).unwrap();
        drop(other);
        UnixStream::connect(&path).unwrap();
        drop(third);
        assert!(!path.exists());
        remove(&aside, &stale).unwrap();
        assert!(!aside.exists());
    }

    #[test]
    fn socket_dropped_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = ListeningSocket::bind(&path).unwrap();
        assert_eq!(socket.path(), path);
        assert!(path.exists());
        drop(socket);
        assert!(!path.exists());
    }
}
