//! The host side of a guest's serial port or console.

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
    File {
        /// The path.
        path: PathBuf,
        /// Size up to which a regular file grows.
        bytes_max: Option<u64>,
    },
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
        bytes_max: Option<u64>,
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
            ConsoleOutputMode::File => Self::File {
                path: path(file, "File")?,
                bytes_max,
            },
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
            EndpointMode::File { path, bytes_max } => Self::open_file(path, *bytes_max, manager)?,
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

    /// A socket that no client ever opens.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn without_client() -> Arc<Self> {
        Arc::new(Self {
            input: Some(Input::new(None)),
            ..Self::with_output(Output::for_clients())
        })
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

    fn open_file(
        path: &Path,
        bytes_max: Option<u64>,
        manager: &SerialManager,
    ) -> Result<Self, SerialError> {
        let refused = |source| SerialError::File {
            path: path.to_owned(),
            source,
        };
        let file = create(path).map_err(refused)?;
        let is_file = file.metadata().map_err(refused)?.is_file();
        let bytes_max = bytes_max.filter(|_| is_file);
        // A disk always accepts writes; a FIFO or another terminal may not. The console's own thread must not write past
        // a limit.
        let watcher = match is_file && bytes_max.is_none() {
            true => None,
            false => Some(manager.watcher().map_err(SerialError::Manager)?),
        };
        let sink = match bytes_max {
            Some(bytes_max) => Sink::limited(file, path, bytes_max),
            None => Sink::new(file),
        };
        let output = Output::unconnected();
        output
            .connect(sink, watcher.as_ref())
            .map_err(SerialError::Manager)?;
        Ok(Self {
            watcher,
            ..Self::with_output(output)
        })
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
mod tests {
    //! Tests each kind of endpoint from the operator's side.

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use virtio_devices::listening_socket::ACCEPT_PAUSE;

    use super::super::input::tests::Device;
    use super::super::manager::tests::manager;
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn read_exactly(from: &mut impl Read, count: usize) -> Vec<u8> {
        let mut data = vec![0; count];
        from.read_exact(&mut data).unwrap();
        data
    }

    fn listen_to(endpoint: &Endpoint) -> Arc<Device> {
        let device = Device::with_room(usize::MAX);
        let weak: Weak<Device> = Arc::downgrade(&device);
        endpoint.set_input_sink(weak);
        device
    }

    #[test]
    fn config_modes_are_understood() {
        let path = Some(Path::new("/x"));
        let from = EndpointMode::from_config;
        assert_eq!(
            from(ConsoleOutputMode::Off, None, None, None).unwrap(),
            None
        );
        assert_eq!(
            from(ConsoleOutputMode::File, path, Some(7), None).unwrap(),
            Some(EndpointMode::File {
                path: "/x".into(),
                bytes_max: Some(7)
            })
        );
        assert_eq!(
            from(ConsoleOutputMode::Socket, None, None, path).unwrap(),
            Some(EndpointMode::Socket("/x".into()))
        );
        assert!(matches!(
            from(ConsoleOutputMode::File, None, None, path),
            Err(SerialError::MissingPath { mode: "File" })
        ));
    }

    #[test]
    fn file_is_emptied_and_written_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "old text").unwrap();
        let endpoint = Endpoint::open(
            &EndpointMode::File {
                path: path.clone(),
                bytes_max: None,
            },
            &manager(),
        )
        .unwrap();
        endpoint.output().write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn file_that_cannot_be_made_is_an_error_with_its_path() {
        let mode = EndpointMode::File {
            path: "/nonexistent/log".into(),
            bytes_max: None,
        };
        let error = Endpoint::open(&mode, &manager()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cannot open console file /nonexistent/log"
        );
    }

    /// The operator's side of a pseudo-terminal.
    fn operator_of(endpoint: &Endpoint) -> File {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(endpoint.pty_path().unwrap())
            .unwrap()
    }

    #[test]
    fn pty_passes_bytes_unchanged_both_ways() {
        let manager = manager();
        let endpoint = Endpoint::open(&EndpointMode::Pty, &manager).unwrap();
        let device = listen_to(&endpoint);
        let mut operator = operator_of(&endpoint);
        endpoint.output().write_all(b"login\r\n").unwrap();
        assert_eq!(read_exactly(&mut operator, 7), b"login\r\n");
        operator.write_all(b"root\r\x03\x04").unwrap();
        device.wait_for(b"root\r\x03\x04");
    }

    #[test]
    fn pty_outlives_an_operator() {
        let manager = manager();
        let endpoint = Endpoint::open(&EndpointMode::Pty, &manager).unwrap();
        let device = listen_to(&endpoint);
        for sent in [b"a", b"b"] {
            let mut operator = operator_of(&endpoint);
            operator.write_all(sent).unwrap();
            let all = if sent == b"a" { &b"a"[..] } else { b"ab" };
            device.wait_for(all);
        }
    }

    #[test]
    fn socket_serves_the_latest_client_and_keeps_what_nobody_read() {
        let manager = manager();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let endpoint = Endpoint::open(&EndpointMode::Socket(path.clone()), &manager).unwrap();
        let device = listen_to(&endpoint);
        endpoint.output().write_all(b"early").unwrap();

        let mut first = UnixStream::connect(&path).unwrap();
        assert_eq!(read_exactly(&mut first, 5), b"early");
        first.write_all(b"hello").unwrap();
        device.wait_for(b"hello");

        let mut second = UnixStream::connect(&path).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        second.write_all(b"!").unwrap();
        device.wait_for(b"hello!");
        endpoint.output().write_all(b"to you").unwrap();
        assert_eq!(read_exactly(&mut second, 6), b"to you");

        drop(second);
        let mut third = UnixStream::connect(&path).unwrap();
        third.write_all(b"?").unwrap();
        device.wait_for(b"hello!?");
        endpoint.output().write_all(b"last").unwrap();
        assert_eq!(read_exactly(&mut third, 4), b"last");

        drop(endpoint);
        assert!(!path.exists());
    }

    /// Runs in a separate process, because the limit of descriptors applies to the process.
    #[test]
    fn client_of_a_socket_waits_without_a_spin_while_descriptors_are_out() {
        const CASE: &str = "SERIAL_TEST_WITHOUT_DESCRIPTORS";
        const TEST: &str = "serial::endpoint::tests::client_of_a_socket_waits_without_a_spin_while_descriptors_are_out";
        if std::env::var_os(CASE).is_none() {
            let limited = "ulimit -n 64 && exec \"$0\" --exact \"$1\" --test-threads=1";
            let output = std::process::Command::new("sh")
                .args(["-c", limited])
                .arg(std::env::current_exe().unwrap())
                .args([TEST])
                .env(CASE, "1")
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        const ATTEMPTS: u64 = 3;
        let manager = manager();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let endpoint = Endpoint::open(&EndpointMode::Socket(path.clone()), &manager).unwrap();
        let mut taken = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            taken.push(file);
        }
        taken.pop();
        let started = Instant::now();
        let mut client = UnixStream::connect(&path).unwrap();
        while endpoint.output().connections_refused() < Some(ATTEMPTS) {
            assert!(started.elapsed() < DEADLINE, "nobody tried to accept it");
            std::thread::yield_now();
        }
        // Between two attempts is a pause.
        assert!(started.elapsed() >= ACCEPT_PAUSE * (ATTEMPTS as u32 - 1));
        drop(taken);
        endpoint.output().write_all(b"late").unwrap();
        assert_eq!(read_exactly(&mut client, 4), b"late");
    }

    #[test]
    fn socket_that_exists_is_an_error_and_stays() {
        let manager = manager();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mode = EndpointMode::Socket(path.clone());
        let first = Endpoint::open(&mode, &manager).unwrap();
        assert!(matches!(
            Endpoint::open(&mode, &manager),
            Err(SerialError::Socket { .. })
        ));
        assert!(path.exists());
        drop(first);
    }

    #[test]
    fn null_endpoint_has_no_input_and_needs_no_thread() {
        let endpoint = Endpoint::open(&EndpointMode::Null, &manager()).unwrap();
        endpoint.output().write_all(b"x").unwrap();
        endpoint.resume_input();
        endpoint.console().unwrap();
    }

    #[test]
    fn fifo_without_a_reader_is_written_without_blocking() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        let status = std::process::Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success());
        let manager = manager();
        let endpoint = Endpoint::open(
            &EndpointMode::File {
                path: path.clone(),
                bytes_max: None,
            },
            &manager,
        )
        .unwrap();
        endpoint.output().write_all(b"kept").unwrap();
        let mut reader = File::open(&path).unwrap();
        assert_eq!(read_exactly(&mut reader, 4), b"kept");
    }

    #[test]
    fn file_with_a_limit_grows_no_further() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mode = EndpointMode::File {
            path: path.clone(),
            bytes_max: Some(5),
        };
        let manager = manager();
        let endpoint = Endpoint::open(&mode, &manager).unwrap();
        // Two machines, one after the other.
        for text in [b"abc", b"def"] {
            endpoint.output().write_all(text).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"abcde");
        assert_eq!(endpoint.output().dropped_bytes(), 1);
        // The console's output passes through this thread.
        assert!(endpoint.watcher.is_some());
    }

    #[test]
    fn terminal_of_which_another_has_the_input_is_written_and_not_read() {
        let manager = manager();
        let endpoint = Endpoint::open(&EndpointMode::TtyOutput, &manager).unwrap();
        assert!(endpoint.input.is_none());
        assert!(endpoint._raw_mode.is_none());
    }
}
