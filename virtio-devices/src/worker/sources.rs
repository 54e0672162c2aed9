//! The event sources of a worker thread: commands, doorbells and the handler's own descriptors.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::error::WorkerError;

/// A doorbell of the transport: one per queue, written by KVM.
pub type Doorbell = EventFd;

/// Maximum number of events per wait. Further ones stay ready.
const WAKES_PER_WAIT: usize = 16;

// The epoll data: the kind of descriptor in the upper half, its number in the lower half.
const KIND_SOURCE: u64 = 0;
const KIND_IDLE: u64 = 1 << 32;
const KIND_DOORBELL: u64 = 2 << 32;
const KIND_COMMAND: u64 = 3 << 32;
const KIND_MASK: u64 = !0 << 32;

/// The reason why the thread woke up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// A command is waiting.
    Command,
    /// The doorbell of this queue was signalled; it is not drained yet.
    Doorbell(u16),
    /// A source of the active device, by its token.
    Source(u32),
    /// An idle source, by its token.
    Idle(u32),
}

/// The set in which a handler registers further descriptors (readable, level-triggered). A reset drops all of them.
///
/// A descriptor whose other end is closed is always readable: a handler that reads end-of-file must
/// [`EventSources::remove`] it.
#[derive(Debug)]
pub struct EventSources {
    epoll: Epoll,
    sources: Vec<(RawFd, u32)>,
    doorbells: Vec<(u16, Arc<Doorbell>)>,
}

impl EventSources {
    /// An empty set.
    ///
    /// # Errors
    /// `epoll_create1` failed.
    pub fn new() -> Result<Self, WorkerError> {
        let epoll = Epoll::new().map_err(host("epoll_create1"))?;
        Ok(Self {
            epoll,
            sources: Vec::new(),
            doorbells: Vec::new(),
        })
    }

    /// Wakes the handler with `token` whenever `fd` is readable.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn add(&mut self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.watch(fd, KIND_SOURCE | u64::from(token))?;
        self.sources.push((fd, token));
        Ok(())
    }

    /// Wakes the handler with `token` whenever `fd` is writable. Use it only while there is data to write, because most
    /// descriptors are nearly always writable.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn add_writable(&mut self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.watch_for(EventSet::OUT, fd, KIND_SOURCE | u64::from(token))?;
        self.sources.push((fd, token));
        Ok(())
    }

    /// Stops watching `fd`; unknown descriptors are ignored.
    ///
    /// # Errors
    /// `epoll_ctl` failed.
    pub fn remove(&mut self, fd: RawFd) -> Result<(), WorkerError> {
        let Some(at) = self.sources.iter().position(|(known, _)| *known == fd) else {
            return Ok(());
        };
        self.sources.swap_remove(at);
        self.unwatch(fd).map_err(host("epoll_ctl(DEL)"))
    }

    /// Watches the descriptor that announces commands.
    pub(crate) fn watch_commands(&self, event: &EventFd) -> Result<(), WorkerError> {
        self.watch(event.as_raw_fd(), KIND_COMMAND)
    }

    /// Watches a descriptor that stays watched across resets.
    pub(crate) fn watch_idle(&self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.watch(fd, KIND_IDLE | u64::from(token))
    }

    /// Watches a queue's doorbell.
    pub(crate) fn add_doorbell(
        &mut self,
        queue_index: u16,
        doorbell: &Arc<Doorbell>,
    ) -> Result<(), WorkerError> {
        self.watch(doorbell.as_raw_fd(), KIND_DOORBELL | u64::from(queue_index))?;
        self.doorbells.push((queue_index, Arc::clone(doorbell)));
        Ok(())
    }

    /// The queues whose doorbells are watched.
    pub(crate) fn queue_indices(&self) -> Vec<u16> {
        self.doorbells.iter().map(|(index, _)| *index).collect()
    }

    /// Drains the doorbell. False if that queue is no longer watched.
    pub(crate) fn drain_doorbell(&self, queue_index: u16) -> bool {
        let Some((_, doorbell)) = self
            .doorbells
            .iter()
            .find(|(known, _)| *known == queue_index)
        else {
            return false;
        };
        // EAGAIN: already drained. The wake-up is served nevertheless.
        doorbell.read().ok();
        true
    }

    /// Whether a source of the active device still has this token.
    pub(crate) fn has_source(&self, token: u32) -> bool {
        self.sources.iter().any(|(_, known)| *known == token)
    }

    /// Drops all doorbells and all sources of the active device.
    pub(crate) fn clear(&mut self) {
        for (fd, _) in self.sources.drain(..) {
            // Closing a descriptor has already removed it from the set (EBADF, ENOENT).
            self.epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default())
                .ok();
        }
        for (_, doorbell) in self.doorbells.drain(..) {
            // As above; the doorbell itself cannot be closed while it is referenced here.
            self.epoll
                .ctl(
                    ControlOperation::Delete,
                    doorbell.as_raw_fd(),
                    EpollEvent::default(),
                )
                .ok();
        }
    }

    /// Sleeps until a source is ready. Clears `wakes` and fills it with the ready sources. `timeout_ms` is as for
    /// `epoll_wait` (-1: no timeout). An empty list means a timeout or a signal.
    pub(crate) fn wait(&self, timeout_ms: i32, wakes: &mut Vec<Wake>) -> Result<(), WorkerError> {
        wakes.clear();
        let mut events = [EpollEvent::default(); WAKES_PER_WAIT];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(host("epoll_wait")(error)),
        };
        wakes.extend(events[..count].iter().map(|event| wake(event.data())));
        Ok(())
    }

    fn watch(&self, fd: RawFd, datum: u64) -> Result<(), WorkerError> {
        self.watch_for(EventSet::IN, fd, datum)
    }

    fn watch_for(&self, events: EventSet, fd: RawFd, datum: u64) -> Result<(), WorkerError> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, datum))
            .map_err(host("epoll_ctl(ADD)"))
    }

    fn unwatch(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

fn wake(datum: u64) -> Wake {
    // Truncation separates the lower half from the kind; it was stored from a u16 or u32.
    match datum & KIND_MASK {
        KIND_COMMAND => Wake::Command,
        KIND_DOORBELL => Wake::Doorbell(datum as u16),
        KIND_IDLE => Wake::Idle(datum as u32),
        _ => Wake::Source(datum as u32),
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::Host { what, source }
}
