//! A UNIX socket to one guest's console, for one client at a time: the latest.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};

use vmm_sys_util::epoll::EventSet;

use super::Output;
use super::input::Input;
use super::manager::{Source, Watch, Watcher};
use super::output::Sink;

/// Connects a client to an output and an input. The path is removed on drop.
pub(super) struct ConsoleSocket {
    // Before `listener`, which it watches.
    watch: OnceLock<Watch>,
    listener: UnixListener,
    path: PathBuf,
    watcher: Watcher,
    output: Output,
    input: Arc<Input>,
}

impl ConsoleSocket {
    /// Listens on `path`. A socket there that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Something else is there, or somebody listens on it.
    pub(super) fn listen(
        path: &Path,
        watcher: Watcher,
        output: Output,
        input: Arc<Input>,
    ) -> io::Result<Arc<Self>> {
        let listener = bind(path)?;
        let socket = Arc::new(Self {
            watch: OnceLock::new(),
            listener,
            path: path.to_owned(),
            watcher,
            output,
            input,
        });
        socket.listener.set_nonblocking(true)?;
        let weak: Weak<Self> = Arc::downgrade(&socket);
        let fd = socket.listener.as_raw_fd();
        // A socket can always be watched, so there is a watch.
        if let Some(watch) = socket.watcher.watch(fd, weak)? {
            socket.watch.get_or_init(|| watch).arm(EventSet::IN);
        }
        Ok(socket)
    }

    fn connect(&self, client: UnixStream) -> io::Result<()> {
        client.set_nonblocking(true)?;
        let output = OwnedFd::from(client.try_clone()?);
        self.output
            .connect(Sink::new(File::from(output)), Some(&self.watcher))?;
        self.input.set_source(client.into(), &self.watcher)
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
            log::info!("{} is replaced: nobody listens on it", path.display());
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// Whether this is a socket that a process left behind. To connect would take the place of a client of a live one, so a
/// socket of another type tries to: the kernel says "wrong type" where somebody listens, and "refused" where nobody does
/// (`unix_find_bsd` in net/unix/af_unix.c).
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

impl Source for ConsoleSocket {
    fn ready(&self) {
        match self.listener.accept() {
            // It takes the place of the one that is there, which sees the end:
            // an operator whose connection hangs must be able to come back.
            Ok((client, _)) => {
                if let Err(error) = self.connect(client) {
                    log::warn!("{}: client lost: {error}", self.path.display());
                    self.output.disconnect();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("{}: {error}", self.path.display()),
        }
        if let Some(watch) = self.watch.get() {
            watch.arm(EventSet::IN);
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("{} stays: {error}", self.path.display());
        }
    }
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
        // One that is in use is neither taken nor disturbed.
        let refusal = bind(&path).unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::AddrInUse);
        let pending = listener.accept().unwrap_err();
        assert_eq!(pending.kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
        // Nor is what is no socket at all, or only points to one.
        let file = folder.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        let link = folder.path().join("link");
        drop(listener);
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(bind(&link).is_err());
    }
}
