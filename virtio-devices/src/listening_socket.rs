//! A UNIX socket on which the VMM listens, and its path in the file system.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A non-blocking listener. The path is removed on drop.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ListeningSocket {
    /// Listens on `path`. A stale socket without a listener is replaced.
    ///
    /// # Errors
    /// The path is not a socket, or another process listens on it.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = Self {
            listener: bind(path)?,
            path: path.to_owned(),
        };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Accepts the next client; its stream is non-blocking as well. `WouldBlock` if there is none.
    ///
    /// # Errors
    /// No client is waiting, or no descriptor is left.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (client, _) = self.listener.accept()?;
        client.set_nonblocking(true)?;
        Ok(client)
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRawFd for ListeningSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("Cannot remove {}: {error}", self.path.display());
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
            log::info!(
                "{} is replaced, because no process listens on it",
                path.display()
            );
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// Whether this is a stale socket. A stream connection would occupy a client's place in the backlog of a live listener,
/// so the attempt uses another socket type. The kernel returns "wrong type" if there is a listener, and "refused" if
/// there is none (`unix_find_bsd` in net/unix/af_unix.c).
fn is_dead(path: &Path) -> bool {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|found| found.file_type().is_socket());
    let refused = || {
        let probe = UnixDatagram::unbound()?;
        probe.connect(path)
    };
    is_socket && refused().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
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
        let listener = bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        // A socket in use is neither replaced nor disturbed.
        let refusal = bind(&path).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::AddrInUse);
        let pending = listener.accept().unwrap_err();
        assert_eq!(pending.kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
        // The same holds for a file that is not a socket, and for a link to a socket.
        let file = folder.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        let link = folder.path().join("link");
        drop(listener);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(bind(&link).is_err());
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
