//! A UNIX socket to one guest's console, for one client at a time: the latest.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
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
    /// Listens on `path`, which must not exist.
    pub(super) fn listen(
        path: &Path,
        watcher: Watcher,
        output: Output,
        input: Arc<Input>,
    ) -> io::Result<Arc<Self>> {
        let listener = UnixListener::bind(path)?;
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
