//! The other end of a guest's serial port or console.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use api::config::ConsoleOutputMode;
use virtio_devices::Unpoisoned;
use virtio_devices::console::ConsoleEndpoint;

use super::input::Input;
use super::manager::Watcher;
use super::output::Sink;
use super::pty::Pty;
use super::socket::ConsoleSocket;
use super::streams::Streams;
use super::terminal::{RawMode, standard_input, standard_output};
use super::{InputSink, Output, SerialError, SerialManager};

/// The source and destination of a guest's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointMode {
    /// No source and no destination.
    Null,
    /// Standard output and input.
    Tty,
    /// Standard output only: another device uses the input.
    TtyOutput,
    /// A new pseudo-terminal.
    Pty,
    /// A file, emptied first; no input.
    File(PathBuf),
    /// A UNIX socket for one client at a time.
    Socket(PathBuf),
}

impl EndpointMode {
    /// The configured mode; `None` if no device is configured.
    ///
    /// # Errors
    /// [`SerialError::MissingPath`].
    pub fn from_config(
        mode: ConsoleOutputMode,
        file: Option<&Path>,
        socket: Option<&Path>,
    ) -> Result<Option<Self>, SerialError> {
        let path = |path: Option<&Path>, mode| {
            path.map(Path::to_owned)
                .ok_or(SerialError::MissingPath { mode })
        };
        Ok(Some(match mode {
            ConsoleOutputMode::Off => return Ok(None),
            ConsoleOutputMode::Null => Self::Null,
            ConsoleOutputMode::Tty => Self::Tty,
            ConsoleOutputMode::Pty => Self::Pty,
            ConsoleOutputMode::File => Self::File(path(file, "File")?),
            ConsoleOutputMode::Socket => Self::Socket(path(socket, "Socket")?),
        }))
    }
}

/// An open endpoint. It outlives each machine that uses it, so that a reboot keeps the pseudo-terminal and the socket's
/// client.
pub struct Endpoint {
    output: Output,
    input: Option<Arc<Input>>,
    watcher: Option<Watcher>,
    pty_path: Option<PathBuf>,
    streams: Mutex<Option<Streams>>,
    // Held for the effect of their drop.
    _pty_slave: Option<OwnedFd>,
    _socket: Option<Arc<ConsoleSocket>>,
    _raw_mode: Option<RawMode>,
}

virtio_devices::debug_fields!(Endpoint { output, pty_path });

impl Endpoint {
    /// Opens the endpoint for `mode`. Call it on the control thread, because the manager may start its thread here.
    ///
    /// # Errors
    /// It cannot be opened; nothing is left behind.
    pub fn open(mode: &EndpointMode, manager: &SerialManager) -> Result<Arc<Self>, SerialError> {
        let endpoint = match mode {
            EndpointMode::Null => Self::with_output(Output::null()),
            EndpointMode::Tty => Self::open_tty(manager)?,
            EndpointMode::TtyOutput => Self::open_tty_output(manager)?.0,
            EndpointMode::Pty => Self::open_pty(manager)?,
            EndpointMode::File(path) => Self::open_file(path, manager)?,
            EndpointMode::Socket(path) => Self::open_socket(path, manager)?,
        };
        Ok(Arc::new(endpoint))
    }

    fn with_output(output: Output) -> Self {
        Self {
            output,
            input: None,
            watcher: None,
            pty_path: None,
            streams: Mutex::new(None),
            _pty_slave: None,
            _socket: None,
            _raw_mode: None,
        }
    }

    fn open_tty_output(manager: &SerialManager) -> Result<(Self, Watcher), SerialError> {
        let watcher = manager.watcher().map_err(SerialError::Manager)?;
        let output = Output::unconnected();
        let sink = standard_output().map_err(SerialError::Terminal)?;
        output
            .connect(sink, Some(&watcher))
            .map_err(SerialError::Manager)?;
        Ok((Self::with_output(output), watcher))
    }

    fn open_tty(manager: &SerialManager) -> Result<Self, SerialError> {
        let (output_alone, watcher) = Self::open_tty_output(manager)?;
        let input = Input::new(None);
        if let Some(stdin) = standard_input().map_err(SerialError::Terminal)? {
            input
                .set_source(stdin, &watcher)
                .map_err(SerialError::Manager)?;
        }
        Ok(Self {
            input: Some(input),
            watcher: Some(watcher),
            _raw_mode: RawMode::enter().map_err(SerialError::Terminal)?,
            ..output_alone
        })
    }

    fn open_pty(manager: &SerialManager) -> Result<Self, SerialError> {
        let watcher = manager.watcher().map_err(SerialError::Manager)?;
        let pty = Pty::open().map_err(SerialError::Pty)?;
        let output = Output::unconnected();
        let master = pty.master.try_clone().map_err(SerialError::Pty)?;
        output
            .connect(Sink::new(master), Some(&watcher))
            .map_err(SerialError::Manager)?;
        let input = Input::new(None);
        input
            .set_source(pty.master.into(), &watcher)
            .map_err(SerialError::Manager)?;
        Ok(Self {
            input: Some(input),
            watcher: Some(watcher),
            pty_path: Some(pty.path),
            _pty_slave: Some(pty.slave),
            ..Self::with_output(output)
        })
    }

    fn open_file(path: &Path, manager: &SerialManager) -> Result<Self, SerialError> {
        let refused = |source| SerialError::File {
            path: path.to_owned(),
            source,
        };
        let file = create(path).map_err(refused)?;
        // A disk always accepts writes; a FIFO or another terminal may not.
        let watcher = if file.metadata().map_err(refused)?.is_file() {
            None
        } else {
            Some(manager.watcher().map_err(SerialError::Manager)?)
        };
        let output = Output::unconnected();
        output
            .connect(Sink::new(file), watcher.as_ref())
            .map_err(SerialError::Manager)?;
        Ok(Self::with_output(output))
    }

    fn open_socket(path: &Path, manager: &SerialManager) -> Result<Self, SerialError> {
        let watcher = manager.watcher().map_err(SerialError::Manager)?;
        let output = Output::for_clients();
        let input = Input::new(Some(output.clone()));
        let socket =
            ConsoleSocket::listen(path, watcher.clone(), output.clone(), Arc::clone(&input))
                .map_err(|source| SerialError::Socket {
                    path: path.to_owned(),
                    source,
                })?;
        Ok(Self {
            input: Some(input),
            watcher: Some(watcher),
            _socket: Some(socket),
            ..Self::with_output(output)
        })
    }

    /// A writer for the guest's text. It never blocks and never fails.
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// The path that an operator opens to see the guest, with mode `Pty`.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty_path.as_deref()
    }

    /// Input for which the sink had no space.
    pub(super) fn waiting_input(&self) -> Vec<u8> {
        self.input
            .as_ref()
            .map_or_else(Vec::new, |input| input.waiting())
    }

    /// Passes `bytes` to the sink before all other input. Without a source of input they are dropped.
    pub(super) fn put_back_input(&self, bytes: &[u8]) {
        if let Some(input) = &self.input {
            input.put_back(bytes);
        }
    }

    /// Passes input to `sink` from now on. After the sink has rejected some, it must call [`Endpoint::resume_input`]
    /// when it has space again.
    pub fn set_input_sink(&self, sink: Weak<dyn InputSink>) {
        if let Some(input) = &self.input {
            input.set_sink(sink);
        }
    }

    /// The device has space again. Cheap if no input is waiting.
    pub fn resume_input(&self) {
        if let Some(input) = &self.input {
            input.resume();
        }
    }

    /// Both directions as descriptors, for the console device. This endpoint must be kept as long as the device exists.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn console(&self) -> io::Result<ConsoleEndpoint> {
        let mut streams = self.streams.lock().unpoisoned();
        let streams = match &mut *streams {
            Some(streams) => streams,
            None => streams.insert(Streams::new(
                &self.output,
                self.input.as_ref(),
                self.watcher.as_ref(),
            )?),
        };
        streams.connect(self.input.as_ref())
    }
}

/// Creates or empties a file. A FIFO is also opened for reading, so that it can be written before there is a reader.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    match options.open(path) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => options.read(true).open(path),
        result => result,
    }
}

#[cfg(test)]
mod tests;
