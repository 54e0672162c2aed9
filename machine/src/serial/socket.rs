//! A UNIX socket for one guest's console. It has one client at a time; a new client replaces the current one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use virtio_devices::ListeningSocket;
use virtio_devices::listening_socket::ACCEPT_PAUSE;
use vmm_sys_util::epoll::EventSet;

use super::Output;
use super::input::Input;
use super::manager::{Source, Watch, Watcher};
use super::output::Sink;

/// Connects a client to an output and an input.
pub(super) struct ConsoleSocket {
    // Before `listener`, which it watches.
    watch: OnceLock<Watch>,
    listener: ListeningSocket,
    watcher: Watcher,
    output: Output,
    input: Arc<Input>,
}

impl ConsoleSocket {
    /// Listens on `path`. A stale socket without a listener is replaced.
    ///
    /// # Errors
    /// The path is not a socket, or another process listens on it.
    pub(super) fn listen(
        path: &Path,
        watcher: Watcher,
        output: Output,
        input: Arc<Input>,
    ) -> io::Result<Arc<Self>> {
        let listener = ListeningSocket::bind(path)?;
        let socket = Arc::new(Self {
            watch: OnceLock::new(),
            listener,
            watcher,
            output,
            input,
        });
        let weak: Weak<Self> = Arc::downgrade(&socket);
        let fd = socket.listener.as_raw_fd();
        // A socket can always be watched, so there is a watch.
        if let Some(watch) = socket.watcher.watch(fd, weak)? {
            socket.watch.get_or_init(|| watch).arm(EventSet::IN);
        }
        Ok(socket)
    }

    fn connect(&self, client: UnixStream) -> io::Result<()> {
        // If there is no descriptor for it, the current client stays.
        let output = OwnedFd::from(client.try_clone()?);
        let connected = self
            .output
            .connect(Sink::new(File::from(output)), Some(&self.watcher))
            .and_then(|()| self.input.set_source(client.into(), &self.watcher));
        if connected.is_err() {
            self.output.disconnect();
        }
        connected
    }

    fn refused(&self, error: &io::Error) {
        if self.output.count_refusal() {
            log::warn!(
                "{}: a client cannot connect: {error}",
                self.listener.path().display()
            );
        }
    }
}

impl Source for ConsoleSocket {
    fn ready(&self) {
        match self.listener.accept() {
            // The new client replaces the current one, which sees the end of the stream: an operator whose connection
            // hangs must be able to reconnect.
            Ok(Some(client)) => {
                if let Err(error) = self.connect(client) {
                    self.refused(&error);
                }
            }
            Ok(None) => {}
            Err(error) => {
                self.refused(&error);
                if let Some(watch) = self.watch.get() {
                    watch.call_later(ACCEPT_PAUSE);
                }
                return;
            }
        }
        if let Some(watch) = self.watch.get() {
            watch.arm(EventSet::IN);
        }
    }
}
