//! The thread that waits for terminals, pseudo-terminals and sockets.
//!
//! Every watch is one-shot. Once a source is ready, it is not watched until it rearms its watch, from any thread. A
//! source whose consumer has no space therefore costs nothing. A source that cannot continue now may be called again
//! later.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_devices::Unpoisoned;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::threads::{MachineThread, MachineThreadStart, SERIAL_THREAD};

/// Maximum number of events per epoll call.
const EVENTS_MAX: usize = 8;
const STOP_TOKEN: u64 = 0;

/// A source with a descriptor to wait for. `ready` runs on the manager's thread and must not block.
pub(super) trait Source: Send + Sync {
    /// The awaited event occurred, or the other side closed. The watch is no longer armed.
    fn ready(&self);
}

struct Shared {
    epoll: Epoll,
    /// Weak: a source owns its watch and disappears when its owner drops it.
    sources: Mutex<BTreeMap<u64, Weak<dyn Source>>>,
    /// When to call which source.
    later: Mutex<BTreeMap<u64, Instant>>,
    next_token: AtomicU64,
    stop: EventFd,
}

impl Shared {
    fn sources(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<dyn Source>>> {
        self.sources.lock().unpoisoned()
    }

    fn later(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.later.lock().unpoisoned()
    }

    /// The table is not locked while a source runs, because the source may be dropped there, and its watch with it.
    fn call(&self, token: u64) {
        let source = self.sources().get(&token).and_then(Weak::upgrade);
        if let Some(source) = source {
            source.ready();
        }
    }

    /// The time until a source is called without an event; -1 if there is none.
    fn timeout_ms(&self) -> i32 {
        let Some(due) = self.later().values().min().copied() else {
            return -1;
        };
        // Rounded up: the thread would otherwise wake too early, again and again.
        let wait_ms = due.saturating_duration_since(Instant::now()).as_millis() + 1;
        i32::try_from(wait_ms).unwrap_or(i32::MAX)
    }

    fn call_due(&self) {
        let now = Instant::now();
        let mut called = Vec::new();
        self.later().retain(|token, due| {
            if *due <= now {
                called.push(*token);
            }
            *due > now
        });
        for token in called {
            self.call(token);
        }
    }
}

/// Owner of the thread, which starts with the first watch. Watches are created only on the control thread, so that the
/// new thread does not inherit a vCPU's seccomp filter.
pub struct SerialManager {
    shared: Arc<Shared>,
    thread_start: MachineThreadStart,
    thread: Mutex<Option<JoinHandle<()>>>,
}

virtio_devices::debug_fields!(SerialManager {});

impl SerialManager {
    /// A manager without a thread. `thread_start` is called first on the thread.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(thread_start: MachineThreadStart) -> io::Result<Self> {
        let shared = Shared {
            epoll: Epoll::new()?,
            sources: Mutex::default(),
            later: Mutex::default(),
            next_token: AtomicU64::new(STOP_TOKEN + 1),
            stop: EventFd::new(EFD_NONBLOCK)?,
        };
        shared.epoll.ctl(
            ControlOperation::Add,
            shared.stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, STOP_TOKEN),
        )?;
        Ok(Self {
            shared: Arc::new(shared),
            thread_start,
            thread: Mutex::new(None),
        })
    }

    /// Starts the thread if necessary and returns a handle that creates watches.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn watcher(&self) -> io::Result<Watcher> {
        let mut thread = self.thread.lock().unpoisoned();
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread_start = Arc::clone(&self.thread_start);
            let handle = std::thread::Builder::new()
                .name(SERIAL_THREAD.to_owned())
                .spawn(move || {
                    thread_start(MachineThread::Serial);
                    run(&shared);
                })?;
            *thread = Some(handle);
        }
        Ok(Watcher(Arc::clone(&self.shared)))
    }
}

impl Drop for SerialManager {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().unpoisoned().take();
        let Some(thread) = thread else {
            return;
        };
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("{SERIAL_THREAD} cannot be stopped: {error}");
            return;
        }
        if thread.join().is_err() {
            log::error!("{SERIAL_THREAD} panicked");
        }
    }
}

fn run(shared: &Shared) {
    let mut events = [EpollEvent::default(); EVENTS_MAX];
    loop {
        let count = match shared.epoll.wait(shared.timeout_ms(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                log::error!("{SERIAL_THREAD} cannot wait: {error}");
                return;
            }
        };
        for event in &events[..count] {
            if event.data() == STOP_TOKEN {
                return;
            }
            shared.call(event.data());
        }
        shared.call_due();
    }
}

/// Creates watches; their thread is running.
#[derive(Clone)]
pub(super) struct Watcher(Arc<Shared>);

impl Watcher {
    /// Watches `fd` on behalf of `source`; the watch is not armed yet. `None` for a file that is always ready, for
    /// example on a disk.
    ///
    /// # Errors
    /// The kernel rejected the descriptor.
    pub(super) fn watch(&self, fd: RawFd, source: Weak<dyn Source>) -> io::Result<Option<Watch>> {
        let token = self.0.next_token.fetch_add(1, Ordering::Relaxed);
        let unarmed = EpollEvent::new(EventSet::ONE_SHOT, token);
        // One-shot with no events still reports a hang-up once, so the source must be registered before.
        self.0.sources().insert(token, source);
        match self.0.epoll.ctl(ControlOperation::Add, fd, unarmed) {
            Ok(()) => Ok(Some(Watch {
                shared: Arc::clone(&self.0),
                fd,
                token,
            })),
            Err(error) => {
                self.0.sources().remove(&token);
                if error.raw_os_error() == Some(libc::EPERM) {
                    return Ok(None);
                }
                Err(error)
            }
        }
    }
}

/// A watched descriptor; must be dropped before the descriptor is closed.
pub(super) struct Watch {
    shared: Arc<Shared>,
    fd: RawFd,
    token: u64,
}

impl Watch {
    /// Calls the source once when one of `events` occurs.
    pub(super) fn arm(&self, events: EventSet) {
        let event = EpollEvent::new(events | EventSet::ONE_SHOT, self.token);
        if let Err(error) = self
            .shared
            .epoll
            .ctl(ControlOperation::Modify, self.fd, event)
        {
            log::error!("A console is no longer watched: {error}");
        }
    }

    /// Calls the source once after `delay`. Only for a source that is being called: the manager's thread does not wake for
    /// an earlier time.
    pub(super) fn call_later(&self, delay: Duration) {
        let due = Instant::now() + delay;
        self.shared.later().insert(self.token, due);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.sources().remove(&self.token);
        self.shared.later().remove(&self.token);
        if let Err(error) =
            self.shared
                .epoll
                .ctl(ControlOperation::Delete, self.fd, EpollEvent::default())
        {
            log::error!("A console cannot be unwatched: {error}");
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    pub(in super::super) fn manager() -> SerialManager {
        SerialManager::new(Arc::new(|_| ())).unwrap()
    }

    struct Reader {
        stream: Mutex<UnixStream>,
        sender: mpsc::Sender<u8>,
    }

    impl Source for Reader {
        fn ready(&self) {
            let mut byte = [0];
            self.stream.lock().unwrap().read_exact(&mut byte).unwrap();
            self.sender.send(byte[0]).unwrap();
        }
    }

    #[test]
    fn source_is_called_once_for_each_arming() {
        const DEADLINE: Duration = Duration::from_secs(10);
        let manager = manager();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (sender, receiver) = mpsc::channel();
        let fd = ours.as_raw_fd();
        let reader = Arc::new(Reader {
            stream: Mutex::new(ours),
            sender,
        });
        let weak = Arc::downgrade(&reader);
        let watch = manager.watcher().unwrap().watch(fd, weak).unwrap().unwrap();
        watch.arm(EventSet::IN);
        theirs.write_all(b"ab").unwrap();
        assert_eq!(receiver.recv_timeout(DEADLINE), Ok(b'a'));
        watch.arm(EventSet::IN);
        assert_eq!(receiver.recv_timeout(DEADLINE), Ok(b'b'));
        drop(watch);
        assert!(manager.shared.sources().is_empty());
    }

    #[test]
    fn file_on_a_disk_is_not_watched() {
        let manager = manager();
        let file = tempfile::tempfile().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let source: Arc<dyn Source> = Arc::new(Reader {
            stream: Mutex::new(ours),
            sender: mpsc::channel().0,
        });
        let watcher = manager.watcher().unwrap();
        let watch = watcher.watch(file.as_raw_fd(), Arc::downgrade(&source));
        assert!(watch.unwrap().is_none());
    }

    #[test]
    fn thread_has_its_name_and_calls_the_hook_first() {
        let (sender, receiver) = mpsc::channel();
        let sender = Mutex::new(sender);
        let manager = SerialManager::new(Arc::new(move |kind| {
            let thread = std::thread::current();
            let told = (kind, thread.name().map(str::to_owned));
            sender.lock().unwrap().send(told).unwrap();
        }))
        .unwrap();
        manager.watcher().unwrap();
        drop(manager);
        let (hook, thread) = receiver.recv().unwrap();
        assert_eq!(hook, MachineThread::Serial);
        assert_eq!(thread.as_deref(), Some(SERIAL_THREAD));
        assert!(receiver.recv().is_err());
    }
}
