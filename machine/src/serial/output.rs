//! Output: bytes from the guest to the operator.
//!
//! Bytes are written immediately if the other side accepts them. The rest goes into a bounded backlog that the
//! manager's thread writes as soon as it can. A full backlog drops its oldest bytes, because the newest show why a
//! guest crashed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use virtio_devices::Unpoisoned;
use virtio_devices::counters::Count;
use vmm_sys_util::epoll::EventSet;

use super::manager::{Source, Watch, Watcher};
use super::poll::is_writable;

/// Maximum number of bytes that wait for a reader: several thousand lines.
pub const OUTPUT_BACKLOG_BYTES_MAX: usize = 256 << 10;
/// Maximum time to write the last bytes when an output is dropped.
const LAST_WRITE_MAX: Duration = Duration::from_millis(250);
/// Number of bytes that a writable pipe or socket accepts without blocking.
const CAREFUL_WRITE_BYTES: usize = 512;

/// The destination of bytes.
pub(super) struct Sink {
    // Before `file`: a watch is dropped before the descriptor it watches.
    watch: Option<Watch>,
    file: File,
    /// The descriptor is shared with others and may block, so it is polled before each write.
    may_block: bool,
    limit: Option<Limit>,
}

/// The size up to which a file grows.
struct Limit {
    path: PathBuf,
    bytes_max: u64,
    left: u64,
}

impl Sink {
    /// A descriptor in non-blocking mode, or one that never blocks for long.
    pub(super) fn new(file: File) -> Self {
        Self {
            watch: None,
            file,
            may_block: false,
            limit: None,
        }
    }

    /// An empty file that grows up to `bytes_max`.
    pub(super) fn limited(file: File, path: &Path, bytes_max: u64) -> Self {
        Self {
            limit: Some(Limit {
                path: path.to_owned(),
                bytes_max,
                left: bytes_max,
            }),
            ..Self::new(file)
        }
    }

    /// A descriptor that blocks and cannot be changed, because it is shared.
    pub(super) fn blocking(file: File) -> Self {
        Self {
            may_block: true,
            ..Self::new(file)
        }
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut bytes = bytes;
        if let Some(limit) = &self.limit {
            if limit.left == 0 {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let left = usize::try_from(limit.left).unwrap_or(usize::MAX);
            bytes = &bytes[..bytes.len().min(left)];
        }
        if self.may_block {
            if !is_writable(self.file.as_raw_fd(), Duration::ZERO) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            bytes = &bytes[..bytes.len().min(CAREFUL_WRITE_BYTES)];
        }
        match (&self.file).write(bytes) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                if let Some(limit) = &mut self.limit {
                    limit.left = limit.left.saturating_sub(written as u64);
                }
                Ok(written)
            }
            Err(error) => Err(error),
        }
    }

    fn log_loss(&self, error: &io::Error) {
        match &self.limit {
            Some(limit) if limit.left == 0 => log::warn!(
                "{} has its maximum size of {} bytes: further console output is dropped",
                limit.path.display(),
                limit.bytes_max
            ),
            _ => log::warn!("Console output is lost: {error}"),
        }
    }
}

#[derive(Default)]
struct State {
    sink: Option<Sink>,
    backlog: VecDeque<u8>,
}

impl State {
    fn is_watched(&self) -> bool {
        self.sink.as_ref().is_some_and(|sink| sink.watch.is_some())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Bytes are discarded on purpose.
    Null,
    /// One permanent sink.
    Fixed,
    /// One client after another.
    Clients,
}

struct Queue {
    state: Mutex<State>,
    kind: Kind,
    dropped_bytes: AtomicU64,
    connections_refused: Count,
}

/// An output that never blocks and never fails. Clones write to the same place.
#[derive(Clone)]
pub struct Output(Arc<Queue>);

virtio_devices::debug_fields!(Output(it) { dropped_bytes: it.dropped_bytes() });

impl Output {
    fn new(kind: Kind) -> Self {
        Self(Arc::new(Queue {
            state: Mutex::default(),
            kind,
            dropped_bytes: AtomicU64::new(0),
            connections_refused: Count::default(),
        }))
    }

    /// Discards everything.
    pub(super) fn null() -> Self {
        Self::new(Kind::Null)
    }

    /// Writes to one sink, which [`Output::connect`] sets next.
    pub(super) fn unconnected() -> Self {
        Self::new(Kind::Fixed)
    }

    /// Writes to one client after another; keeps the newest bytes between them.
    pub(super) fn for_clients() -> Self {
        Self::new(Kind::Clients)
    }

    /// Writes to `sink` from now on, the backlog first. `watcher` reports when the sink accepts more. Without a
    /// watcher, bytes that the sink does not accept immediately wait for the next write.
    ///
    /// # Errors
    /// The sink cannot be watched.
    pub(super) fn connect(&self, mut sink: Sink, watcher: Option<&Watcher>) -> io::Result<()> {
        if let Some(watcher) = watcher {
            let source: Weak<Queue> = Arc::downgrade(&self.0);
            sink.watch = watcher.watch(sink.file.as_raw_fd(), source)?;
        }
        let mut state = self.0.state();
        state.sink = Some(sink);
        self.0.drain(&mut state);
        Ok(())
    }

    /// Disconnects the sink; pending bytes are kept for the next one.
    pub(super) fn disconnect(&self) {
        self.0.state().sink = None;
    }

    /// Whether everything is discarded.
    pub(super) fn is_null(&self) -> bool {
        self.0.kind == Kind::Null
    }

    /// The descriptor, if it is permanent and may be written without polling first and without a limit.
    ///
    /// # Errors
    /// It cannot be duplicated.
    pub(super) fn try_clone_file(&self) -> io::Result<Option<File>> {
        match &self.0.state().sink {
            Some(sink) if self.0.kind == Kind::Fixed && !sink.may_block && sink.limit.is_none() => {
                sink.file.try_clone().map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Bytes lost because they were not read in time, or because the file could not grow.
    pub fn dropped_bytes(&self) -> u64 {
        self.0.dropped_bytes.load(Ordering::Relaxed)
    }

    /// Attempts to accept a client that failed, mainly for lack of descriptors; `None` if the output is not a socket.
    pub fn connections_refused(&self) -> Option<u64> {
        (self.0.kind == Kind::Clients).then(|| self.0.connections_refused.get())
    }

    /// Counts such an attempt. Returns whether to log it.
    pub(super) fn count_refusal(&self) -> bool {
        self.0.connections_refused.count_loudly()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    fn push(&self, bytes: &[u8]) {
        if self.kind == Kind::Null {
            return;
        }
        let mut state = self.state();
        // With a backlog and a watch, the manager's thread writes. Trying here too would cost two unnecessary system
        // calls per byte.
        if !state.backlog.is_empty() && !state.is_watched() {
            self.drain(&mut state);
        }
        // The common case: one system call writes everything.
        let mut rest = bytes;
        if state.backlog.is_empty()
            && let Some(sink) = &mut state.sink
            && let Ok(written) = sink.write_some(bytes)
        {
            rest = &bytes[written..];
        }
        if rest.is_empty() {
            return;
        }
        let was_empty = state.backlog.is_empty();
        self.keep(&mut state.backlog, rest);
        if was_empty {
            self.drain(&mut state);
        }
    }

    /// Appends to the backlog and drops its oldest bytes if it is full.
    fn keep(&self, backlog: &mut VecDeque<u8>, bytes: &[u8]) {
        let skipped = bytes.len().saturating_sub(OUTPUT_BACKLOG_BYTES_MAX);
        let bytes = &bytes[skipped..];
        let excess = (backlog.len() + bytes.len()).saturating_sub(OUTPUT_BACKLOG_BYTES_MAX);
        backlog.drain(..excess);
        backlog.extend(bytes);
        self.count_dropped(skipped + excess);
    }

    /// Writes as much as the sink accepts, and waits for the sink if bytes remain.
    fn drain(&self, state: &mut State) {
        let State { sink, backlog } = state;
        let Some(open) = sink else {
            return;
        };
        while !backlog.is_empty() {
            match open.write_some(backlog.as_slices().0) {
                Ok(written) => {
                    backlog.drain(..written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(watch) = &open.watch {
                        watch.arm(EventSet::OUT);
                    }
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    // The reader has disconnected; the next one gets the unread bytes.
                    *sink = None;
                    return;
                }
                Err(error) => {
                    if self.dropped_bytes.load(Ordering::Relaxed) == 0 {
                        open.log_loss(&error);
                    }
                    self.count_dropped(backlog.len());
                    backlog.clear();
                }
            }
        }
        // A long backlog is rare, so its memory is freed.
        backlog.shrink_to_fit();
    }

    fn count_dropped(&self, bytes: usize) {
        self.dropped_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Source for Queue {
    fn ready(&self) {
        self.drain(&mut self.state());
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_WRITE_MAX;
        let mut state = self.state();
        while !state.backlog.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let writable = state
                .sink
                .as_ref()
                .is_some_and(|sink| is_writable(sink.file.as_raw_fd(), left));
            if left.is_zero() || !writable {
                return;
            }
            self.drain(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manager::tests::manager;
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn sink(stream: UnixStream) -> Sink {
        stream.set_nonblocking(true).unwrap();
        Sink::new(File::from(OwnedFd::from(stream)))
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn output_to_a_ready_reader_leaves_at_once() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut output = Output::unconnected();
        output.connect(sink(ours), None).unwrap();
        output.write_all(b"hello").unwrap();
        let mut data = [0; 5];
        theirs.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"hello");
    }

    #[test]
    fn slow_reader_gets_everything_in_order_without_blocking_the_writer() {
        let manager = manager();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut output = Output::unconnected();
        output
            .connect(sink(ours), Some(&manager.watcher().unwrap()))
            .unwrap();
        // More than a socket holds, less than socket and backlog.
        let sent = pattern(OUTPUT_BACKLOG_BYTES_MAX);
        output.write_all(&sent).unwrap();
        let mut received = vec![0; sent.len()];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(received, sent);
        assert_eq!(output.dropped_bytes(), 0);
    }

    #[test]
    fn reader_that_never_reads_costs_the_oldest_bytes_only() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut output = Output::unconnected();
        output.connect(sink(ours), None).unwrap();
        let sent = pattern(4 * OUTPUT_BACKLOG_BYTES_MAX);
        for chunk in sent.chunks(1000) {
            output.write_all(chunk).unwrap();
        }
        let dropped = output.dropped_bytes() as usize;
        assert!(dropped > 0);
        assert_eq!(output.0.state().backlog.len(), OUTPUT_BACKLOG_BYTES_MAX);
        let mut received = vec![0; sent.len() - dropped - OUTPUT_BACKLOG_BYTES_MAX];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(received, sent[..received.len()]);
        output.write_all(b"!").unwrap();
        let mut next = [0];
        theirs.read_exact(&mut next).unwrap();
        assert_eq!(next[0], sent[sent.len() - OUTPUT_BACKLOG_BYTES_MAX]);
    }

    #[test]
    fn output_before_a_reader_is_kept_and_after_it_too() {
        let mut output = Output::unconnected();
        output.write_all(b"early ").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        output.connect(sink(ours), None).unwrap();
        output.write_all(b"now").unwrap();
        let mut data = [0; 9];
        (&theirs).read_exact(&mut data).unwrap();
        assert_eq!(&data, b"early now");
        drop(theirs);
        output.write_all(b"late").unwrap();
        assert!(output.0.state().sink.is_none());
        assert_eq!(output.0.state().backlog, b"late");
        assert_eq!(output.dropped_bytes(), 0);
    }

    #[test]
    fn null_output_keeps_nothing() {
        let mut output = Output::null();
        output.write_all(b"anything").unwrap();
        assert!(output.0.state().backlog.is_empty());
        assert_eq!(output.dropped_bytes(), 0);
    }

    #[test]
    fn full_disk_loses_bytes_and_counts_them() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut output = Output::unconnected();
        output.connect(Sink::new(full), None).unwrap();
        output.write_all(b"12345").unwrap();
        assert_eq!(output.dropped_bytes(), 5);
    }

    #[test]
    fn file_grows_up_to_its_limit_and_the_rest_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut output = Output::unconnected();
        let sink = Sink::limited(File::create(&path).unwrap(), &path, 10);
        output.connect(sink, None).unwrap();
        output.write_all(b"123456").unwrap();
        assert_eq!(output.dropped_bytes(), 0);
        output.write_all(b"7890ab").unwrap();
        assert_eq!(output.dropped_bytes(), 2);
        output.write_all(b"cd").unwrap();
        assert_eq!(output.dropped_bytes(), 4);
        assert!(output.0.state().backlog.is_empty());
        assert_eq!(std::fs::read(&path).unwrap(), b"1234567890");
        // A console's own thread would write past the limit.
        assert!(output.try_clone_file().unwrap().is_none());
    }

    #[test]
    fn blocking_descriptor_is_asked_first() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut output = Output::unconnected();
        let sink = Sink::blocking(File::from(OwnedFd::from(ours)));
        output.connect(sink, None).unwrap();
        // This would hang if it blocked.
        output
            .write_all(&pattern(OUTPUT_BACKLOG_BYTES_MAX))
            .unwrap();
        assert!(!output.0.state().backlog.is_empty());
    }
}
