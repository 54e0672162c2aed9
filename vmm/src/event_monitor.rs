//! The event monitor (`--event-monitor`): writes events for an outside reader without blocking.
//!
//! Senders put events into a bounded queue; a separate thread writes them to a non-blocking descriptor. If the reader
//! is slow, whole events are dropped and counted, and the stream stays well-formed. Without a monitor, nothing is
//! formatted, queued or started.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use api::Event;
use api::config::PathOrFd;

use crate::events::EventSink;
use crate::inherited_fd;
use crate::threads::EVENT_THREAD;

/// Maximum number of queued events: enough for a burst of device activations, not a backlog.
const QUEUE_LENGTH: usize = 256;
/// Maximum number of queued events that guest register writes caused, so that they cannot displace other events.
const REGISTER_EVENTS_MAX: usize = QUEUE_LENGTH / 2;
const STACK_BYTES: usize = 128 << 10;

/// Errors of starting the event monitor.
#[derive(Debug, thiserror::Error)]
pub enum EventMonitorError {
    /// The file cannot be opened.
    #[error("Cannot open the event monitor's file {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor cannot be used.
    #[error("File descriptor {fd} cannot serve the event monitor")]
    Descriptor {
        /// The descriptor.
        fd: i32,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The thread cannot be started.
    #[error("Cannot start the thread {EVENT_THREAD}")]
    Spawn(#[source] io::Error),
}

/// Accepts events. Dropping it writes the queued events and ends the thread; later events are lost.
#[derive(Debug, Default)]
pub struct EventMonitor {
    writer: Option<Writer>,
}

#[derive(Debug)]
enum Message {
    Write {
        record: Event,
        /// Counts in `register_events` while it is queued.
        by_register: bool,
    },
    Stop,
}

#[derive(Debug)]
struct Writer {
    queue: SyncSender<Message>,
    register_events: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    start: Instant,
    thread: Option<JoinHandle<()>>,
}

impl EventMonitor {
    /// A monitor that ignores all events.
    pub fn off() -> Self {
        Self::default()
    }

    /// A monitor that writes to `place`. Times count from `start`; `on_start` is called first on the thread.
    ///
    /// # Errors
    /// The place is not writable.
    pub fn open(
        place: &PathOrFd,
        start: Instant,
        on_start: impl FnOnce() + Send + 'static,
    ) -> Result<Self, EventMonitorError> {
        let file = match place {
            PathOrFd::Path(path) => open(path).map_err(|source| EventMonitorError::Open {
                path: path.clone(),
                source,
            })?,
            PathOrFd::Fd(fd) => inherited_fd::non_blocking_file(*fd)
                .map_err(|source| EventMonitorError::Descriptor { fd: *fd, source })?,
        };
        Self::write_to(file, start, on_start)
    }

    fn write_to(
        file: File,
        start: Instant,
        on_start: impl FnOnce() + Send + 'static,
    ) -> Result<Self, EventMonitorError> {
        let (queue, events) = sync_channel(QUEUE_LENGTH);
        let register_events = Arc::new(AtomicUsize::new(0));
        let lost = Arc::new(AtomicU64::new(0));
        let mut stream = Stream {
            file,
            unwritten: Vec::new(),
            register_events: Arc::clone(&register_events),
            lost: Arc::clone(&lost),
        };
        let thread = std::thread::Builder::new()
            .name(EVENT_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                on_start();
                stream.run(&events);
            })
            .map_err(EventMonitorError::Spawn)?;
        Ok(Self {
            writer: Some(Writer {
                queue,
                register_events,
                lost,
                start,
                thread: Some(thread),
            }),
        })
    }

    /// Whether events are written anywhere.
    pub fn is_on(&self) -> bool {
        self.writer.is_some()
    }

    /// The callback that sends an event. Never blocks.
    pub fn sink(&self) -> EventSink {
        let Some(writer) = &self.writer else {
            return Arc::new(|_| {});
        };
        let queue = writer.queue.clone();
        let register_events = Arc::clone(&writer.register_events);
        let lost = Arc::clone(&writer.lost);
        let start = writer.start;
        Arc::new(move |event| {
            let by_register = event.kind.is_by_register();
            if by_register && register_events.load(Ordering::Relaxed) >= REGISTER_EVENTS_MAX {
                lost.fetch_add(1, Ordering::Relaxed);
                return;
            }
            let record = Event {
                timestamp: start.elapsed().into(),
                source: event.kind.source().to_owned(),
                event: event.kind.name().to_owned(),
                properties: owned(event.properties()),
            };
            // Incremented before sending, because the thread decrements it. Concurrent vCPUs may exceed the limit by
            // one each.
            register_events.fetch_add(usize::from(by_register), Ordering::Relaxed);
            let message = Message::Write {
                record,
                by_register,
            };
            if queue.try_send(message).is_err() {
                register_events.fetch_sub(usize::from(by_register), Ordering::Relaxed);
                lost.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// The number of dropped events.
    pub fn lost_events(&self) -> u64 {
        self.writer
            .as_ref()
            .map_or(0, |writer| writer.lost.load(Ordering::Relaxed))
    }
}

fn owned(properties: Vec<(&'static str, String)>) -> Option<BTreeMap<String, String>> {
    if properties.is_empty() {
        return None;
    }
    let owned = (properties.into_iter()).map(|(name, value)| (name.to_owned(), value));
    Some(owned.collect())
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The thread never waits for the reader, so the queue will soon have room. Sending fails only if the thread
        // panicked.
        drop(self.queue.send(Message::Stop));
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("The thread {EVENT_THREAD} panicked");
        }
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            log::warn!("The reader of the event monitor was too slow for {lost} events");
        }
    }
}

/// Opens the file for writing without blocking. It is opened for reading as well, because opening a pipe without a
/// reader for writing alone would fail.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    match options
        .clone()
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
    {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => options.read(true).open(path),
        opened => opened,
    }
}

/// The thread's side.
struct Stream {
    file: File,
    /// The rest of a partly written event.
    unwritten: Vec<u8>,
    register_events: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
}

impl Stream {
    fn run(&mut self, events: &Receiver<Message>) {
        while let Ok(Message::Write {
            record,
            by_register,
        }) = events.recv()
        {
            let register_events = &self.register_events;
            register_events.fetch_sub(usize::from(by_register), Ordering::Relaxed);
            if !self.write(record.to_record().as_bytes()) {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        log::trace!(
            "The event monitor on descriptor {} ends",
            self.file.as_raw_fd()
        );
    }

    /// False if the reader has no room for the event. A partly written event must be completed to keep the stream
    /// well-formed.
    fn write(&mut self, record: &[u8]) -> bool {
        let rest = std::mem::take(&mut self.unwritten);
        let left = self.write_part(&rest);
        if left < rest.len() {
            self.unwritten = rest[left..].to_vec();
            return false;
        }
        let left = self.write_part(record);
        if left > 0 {
            self.unwritten = record[left..].to_vec();
        }
        left > 0
    }

    fn write_part(&mut self, mut bytes: &[u8]) -> usize {
        let all = bytes.len();
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => break,
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        all - bytes.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Read;
    use std::os::fd::{IntoRawFd, OwnedFd};
    use std::time::Duration;

    use super::*;
    use crate::events::{self, EventKind};

    fn pipe() -> (File, File) {
        let (reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        let fd = writer.into_raw_fd();
        (
            OwnedFd::from(reader).into(),
            inherited_fd::non_blocking_file(fd).unwrap(),
        )
    }

    fn events_of(text: &str) -> Vec<Event> {
        text.split_terminator("\n\n")
            .map(|record| serde_json::from_str(record).unwrap())
            .collect()
    }

    #[test]
    fn event_monitor_writes_each_event_with_an_empty_line() {
        let (mut reader, writer) = pipe();
        let monitor = EventMonitor::write_to(writer, Instant::now(), || {}).unwrap();
        monitor.sink()(&EventKind::Booted.into());
        let activated = EventKind::DeviceActivated;
        monitor.sink()(&events::Event::of_device(activated, "__balloon"));
        drop(monitor);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("}\n\n"));
        let events = events_of(&text);
        assert_eq!(events.len(), 2);
        assert_eq!(
            (events[0].source.as_str(), events[0].event.as_str()),
            ("vm", "booted")
        );
        assert_eq!(events[1].properties.as_ref().unwrap()["id"], "__balloon");
    }

    #[test]
    fn event_monitor_full_pipe_loses_whole_events_and_counts_them() {
        let (mut reader, writer) = pipe();
        let monitor = EventMonitor::write_to(writer, Instant::now(), || {}).unwrap();
        let sink = monitor.sink();
        const EVENTS: u64 = 5000;
        for number in 0..EVENTS {
            let event = EventKind::DiscardFailed {
                failed_bytes: number,
                new_bytes: 1,
            };
            sink(&event.into());
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while monitor.lost_events() == 0 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        let lost = Arc::clone(&monitor.writer.as_ref().unwrap().lost);
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        drop(monitor);
        let text = reading.join().unwrap();
        // The last event may be truncated by the end of the stream; it does not count as lost.
        let complete = &text[..text.rfind("\n\n").unwrap() + 2];
        let seen = events_of(complete).len() as u64;
        assert!(seen + lost.load(Ordering::Relaxed) >= EVENTS - 1);
        assert!(seen < EVENTS);
    }

    #[test]
    fn event_monitor_keeps_room_for_other_events_when_devices_flood_it() {
        const OTHERS: usize = QUEUE_LENGTH - REGISTER_EVENTS_MAX;
        let (mut reader, writer) = pipe();
        let (begin, may_begin) = std::sync::mpsc::channel::<()>();
        let wait = move || may_begin.recv().unwrap();
        let monitor = EventMonitor::write_to(writer, Instant::now(), wait).unwrap();
        let sink = monitor.sink();
        for _ in 0..1000 {
            sink(&EventKind::DeviceReset.into());
        }
        for _ in 0..OTHERS {
            sink(&EventKind::Resized.into());
        }
        assert_eq!(monitor.lost_events(), 1000 - REGISTER_EVENTS_MAX as u64);
        begin.send(()).unwrap();
        drop(monitor);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let events = events_of(&text);
        let others = events.iter().filter(|event| event.source == "vm");
        assert_eq!(others.count(), OTHERS);
    }

    #[test]
    fn event_monitor_pipe_without_a_reader_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name is a valid C string for the whole call.
        #[allow(unsafe_code)]
        let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
        assert_eq!(made, 0);
        let place = PathOrFd::Path(path);
        let monitor = EventMonitor::open(&place, Instant::now(), || {}).unwrap();
        monitor.sink()(&EventKind::Booted.into());
        drop(monitor);
    }

    #[test]
    fn event_monitor_off_takes_everything() {
        let monitor = EventMonitor::off();
        monitor.sink()(&EventKind::Booted.into());
        assert_eq!(monitor.lost_events(), 0);
        assert!(!monitor.is_on());
    }

    #[test]
    fn event_monitor_closed_descriptor_is_an_error() {
        let place = PathOrFd::Fd(1 << 20);
        assert!(matches!(
            EventMonitor::open(&place, Instant::now(), || {}),
            Err(EventMonitorError::Descriptor { .. })
        ));
    }
}
