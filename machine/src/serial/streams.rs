//! An endpoint as a pair of descriptors, for a device with its own thread.
//!
//! ```text
//!  device's worker ◄── socket pair ◄── PipeSink ◄── Input
//!  device's worker ──► the file itself, or
//!                  ──► socket pair ──► Input ──► OutputSink ──► Output
//! ```
//!
//! The second kind of output handles what a descriptor alone cannot: changing clients, and a standard output that
//! blocks.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock, Weak};

use virtio_devices::console::ConsoleEndpoint;
use vmm_sys_util::epoll::EventSet;

use super::input::Input;
use super::manager::{Source, Watch, Watcher};
use super::{InputSink, Output};

/// The parts behind a device's descriptors; they must live as long as the device.
pub(super) struct Streams {
    input: Option<Arc<PipeSink>>,
    output: Option<OutputStream>,
}

struct OutputStream {
    file: File,
    _pump: Option<(Arc<Input>, Arc<OutputSink>)>,
}

impl Streams {
    /// Streams from and to the given halves of an endpoint.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn new(
        output: &Output,
        input: Option<&Arc<Input>>,
        watcher: Option<&Watcher>,
    ) -> io::Result<Self> {
        let input = match (input, watcher) {
            (Some(input), Some(watcher)) => Some(PipeSink::new(input, watcher)?),
            _ => None,
        };
        let output = match (output.try_clone_file()?, watcher) {
            (Some(file), _) => Some(OutputStream { file, _pump: None }),
            (None, _) if output.is_null() => None,
            (None, Some(watcher)) => Some(OutputStream::pumped(output, watcher)?),
            (None, None) => None,
        };
        Ok(Self { input, output })
    }

    /// Connects `input` to a new device and returns the descriptors for it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn connect(&self, input: Option<&Arc<Input>>) -> io::Result<ConsoleEndpoint> {
        let read = match (&self.input, input) {
            (Some(pipe), Some(input)) => {
                let sink: Weak<PipeSink> = Arc::downgrade(pipe);
                input.set_sink(sink);
                Some(pipe.reader.try_clone()?)
            }
            _ => None,
        };
        let write = match &self.output {
            Some(stream) => Some(stream.file.try_clone()?.into()),
            None => None,
        };
        Ok(ConsoleEndpoint::new(read, write))
    }
}

impl OutputStream {
    fn pumped(output: &Output, watcher: &Watcher) -> io::Result<Self> {
        let (reader, writer) = nonblocking_pair()?;
        let sink = Arc::new(OutputSink(output.clone()));
        let pump = Input::new(None);
        let weak: Weak<OutputSink> = Arc::downgrade(&sink);
        pump.set_sink(weak);
        pump.set_source(reader.into(), watcher)?;
        Ok(Self {
            file: File::from(OwnedFd::from(writer)),
            _pump: Some((pump, sink)),
        })
    }
}

fn nonblocking_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    writer.set_nonblocking(true)?;
    Ok((reader, writer))
}

/// Passes a device's output on. There is always space, at least in the backlog.
struct OutputSink(Output);

impl InputSink for OutputSink {
    fn accept(&self, bytes: &[u8]) -> usize {
        // The output accepts everything and never fails.
        self.0.clone().write(bytes).unwrap_or(bytes.len())
    }
}

/// Passes input on to a device, as much as the sockets can hold.
struct PipeSink {
    // Before `writer`: a watch is dropped before the descriptor it watches.
    watch: OnceLock<Watch>,
    writer: UnixStream,
    reader: OwnedFd,
    input: Weak<Input>,
}

impl PipeSink {
    fn new(input: &Arc<Input>, watcher: &Watcher) -> io::Result<Arc<Self>> {
        let (reader, writer) = nonblocking_pair()?;
        let pipe = Arc::new(Self {
            watch: OnceLock::new(),
            writer,
            reader: reader.into(),
            input: Arc::downgrade(input),
        });
        let weak: Weak<Self> = Arc::downgrade(&pipe);
        // A socket can always be watched, so there is a watch.
        if let Some(watch) = watcher.watch(pipe.writer.as_raw_fd(), weak)? {
            pipe.watch.get_or_init(|| watch);
        }
        Ok(pipe)
    }
}

impl InputSink for PipeSink {
    fn accept(&self, bytes: &[u8]) -> usize {
        let accepted = (&self.writer).write(bytes).unwrap_or(0);
        if accepted < bytes.len()
            && let Some(watch) = self.watch.get()
        {
            watch.arm(EventSet::OUT);
        }
        accepted
    }
}

impl Source for PipeSink {
    fn ready(&self) {
        if let Some(input) = self.input.upgrade() {
            input.resume();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manager::tests::manager;
    use super::super::output::Sink;
    use super::*;
    use std::io::Read;
    use std::time::{Duration, Instant};

    fn read_exactly(mut from: &UnixStream, count: usize) -> Vec<u8> {
        let mut data = vec![0; count];
        from.read_exact(&mut data).unwrap();
        data
    }

    #[test]
    fn input_stream_carries_more_than_it_holds() {
        let manager = manager();
        let watcher = manager.watcher().unwrap();
        let input = Input::new(None);
        let streams = Streams::new(&Output::null(), Some(&input), Some(&watcher)).unwrap();
        streams.connect(Some(&input)).unwrap();
        let (ours, mut operator) = UnixStream::pair().unwrap();
        input.set_source(ours.into(), &watcher).unwrap();

        // More than all sockets on the path can hold: the operator must wait.
        let sent: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 253) as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || operator.write_all(&sent));
        let reader = &streams.input.as_ref().unwrap().reader;
        let device = UnixStream::from(reader.try_clone().unwrap());
        device.set_nonblocking(false).unwrap();
        assert!(read_exactly(&device, expected.len()) == expected);
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn output_stream_of_a_plain_descriptor_is_that_descriptor() {
        let (ours, operator) = UnixStream::pair().unwrap();
        let output = Output::unconnected();
        let sink = Sink::new(File::from(OwnedFd::from(ours)));
        output.connect(sink, None).unwrap();
        let streams = Streams::new(&output, None, None).unwrap();
        let mut file = &streams.output.as_ref().unwrap().file;
        file.write_all(b"direct").unwrap();
        assert_eq!(read_exactly(&operator, 6), b"direct");
    }

    #[test]
    fn output_stream_to_a_limited_file_obeys_its_limit() {
        let manager = manager();
        let watcher = manager.watcher().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let output = Output::unconnected();
        let sink = Sink::limited(File::create(&path).unwrap(), &path, 5);
        output.connect(sink, Some(&watcher)).unwrap();
        let streams = Streams::new(&output, None, Some(&watcher)).unwrap();
        let mut device = &streams.output.as_ref().unwrap().file;
        device.write_all(b"abcdefgh").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while output.dropped_bytes() < 3 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        assert_eq!(output.dropped_bytes(), 3);
        assert_eq!(std::fs::read(&path).unwrap(), b"abcde");
    }

    #[test]
    fn output_stream_to_clients_survives_each_of_them() {
        let manager = manager();
        let watcher = manager.watcher().unwrap();
        let output = Output::for_clients();
        let streams = Streams::new(&output, None, Some(&watcher)).unwrap();
        let mut device = &streams.output.as_ref().unwrap().file;
        for text in [b"one", b"two"] {
            let (ours, operator) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let sink = Sink::new(File::from(OwnedFd::from(ours)));
            output.connect(sink, Some(&watcher)).unwrap();
            device.write_all(text).unwrap();
            assert_eq!(read_exactly(&operator, 3), text);
            output.disconnect();
        }
    }
}
