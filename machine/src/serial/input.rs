//! Input: bytes from the operator to the guest.
//!
//! A chunk is read when the source has data, and offered to the device. Bytes for which the device has no space stay
//! here, and nothing more is read until [`Input::resume`] reports space again. Until then, the terminal, pty or socket
//! blocks the sender.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use virtio_devices::Unpoisoned;
use vmm_sys_util::epoll::EventSet;

use super::Output;
use super::manager::{Source, Watch, Watcher};

/// Maximum number of bytes read at once, which is also the maximum kept here.
pub(super) const CHUNK_BYTES: usize = 1024;

/// A device that a guest reads from.
pub trait InputSink: Send + Sync {
    /// Accepts as many of the first `bytes` as fit, and returns their number. Never blocks.
    fn accept(&self, bytes: &[u8]) -> usize;
}

struct Open {
    // Before `file`: a watch is dropped before the descriptor it watches.
    watch: Watch,
    file: File,
}

#[derive(Default)]
struct State {
    source: Option<Open>,
    sink: Option<Weak<dyn InputSink>>,
    /// Read, not yet accepted.
    chunk: Vec<u8>,
}

/// Input from one source at a time to one device at a time.
pub(super) struct Input {
    state: Mutex<State>,
    /// Bytes wait for the device. Read without the lock by [`Input::resume`].
    is_paused: AtomicBool,
    /// Disconnected when the source ends; used if the source is a socket, which is also the output.
    output: Option<Output>,
}

impl Input {
    /// No source and no device. `output` is disconnected when a source ends.
    pub(super) fn new(output: Option<Output>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            is_paused: AtomicBool::new(false),
            output,
        })
    }

    /// Reads from `file` from now on, and no longer from the previous source.
    ///
    /// # Errors
    /// The source cannot be watched. A file that is always ready is not read, which is not an error: no user types into
    /// it.
    pub(super) fn set_source(self: &Arc<Self>, file: OwnedFd, watcher: &Watcher) -> io::Result<()> {
        let this: Weak<Self> = Arc::downgrade(self);
        let file = File::from(file);
        if let Some(watch) = watcher.watch(file.as_raw_fd(), this)? {
            watch.arm(EventSet::IN);
            self.state().source = Some(Open { watch, file });
        }
        Ok(())
    }

    /// Passes input to `sink` from now on, starting with waiting bytes.
    pub(super) fn set_sink(&self, sink: Weak<dyn InputSink>) {
        let mut state = self.state();
        state.sink = Some(sink);
        self.offer(&mut state);
    }

    /// Bytes that were read but for which the device had no space.
    pub(super) fn waiting(&self) -> Vec<u8> {
        self.state().chunk.clone()
    }

    /// Queues `bytes` before anything that was read here.
    pub(super) fn put_back(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.chunk.splice(..0, bytes.iter().copied());
        self.offer(&mut state);
    }

    /// The device has space again. Cheap if no bytes are waiting.
    pub(super) fn resume(&self) {
        if self.is_paused.load(Ordering::Acquire) {
            self.offer(&mut self.state());
        }
    }

    /// Offers the chunk; continues reading when all of it is accepted.
    fn offer(&self, state: &mut State) {
        if !state.chunk.is_empty()
            && let Some(sink) = state.sink.as_ref().and_then(Weak::upgrade)
        {
            let accepted = sink.accept(&state.chunk).min(state.chunk.len());
            state.chunk.drain(..accepted);
        }
        let is_paused = !state.chunk.is_empty();
        self.is_paused.store(is_paused, Ordering::Release);
        if let (false, Some(open)) = (is_paused, &state.source) {
            open.watch.arm(EventSet::IN);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }
}

impl Source for Input {
    fn ready(&self) {
        let mut state = self.state();
        let State { source, chunk, .. } = &mut *state;
        let Some(open) = source else {
            return;
        };
        // A hang-up is reported even while bytes wait; epoll will report it again.
        if !chunk.is_empty() {
            return;
        }
        let mut bytes = [0; CHUNK_BYTES];
        match open.file.read(&mut bytes) {
            Ok(count @ 1..) => chunk.extend_from_slice(&bytes[..count]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Ok(0) | Err(_) => {
                *source = None;
                if let Some(output) = &self.output {
                    output.disconnect();
                }
                return;
            }
        }
        self.offer(&mut state);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::manager::tests::manager;
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Condvar;
    use std::time::Duration;

    /// Accepts bytes while it has space.
    #[derive(Default)]
    pub(in super::super) struct Device {
        state: Mutex<(Vec<u8>, usize)>,
        changed: Condvar,
    }

    impl Device {
        pub(in super::super) fn with_room(room: usize) -> Arc<Self> {
            let device = Self::default();
            device.state.lock().unwrap().1 = room;
            Arc::new(device)
        }

        pub(in super::super) fn wait_for(&self, bytes: &[u8]) {
            let state = self.state.lock().unwrap();
            let (state, timeout) = self
                .changed
                .wait_timeout_while(state, Duration::from_secs(10), |state| state.0 != bytes)
                .unwrap();
            assert!(!timeout.timed_out(), "{:?} instead of {bytes:?}", state.0);
        }

        fn add_room(&self, room: usize) {
            self.state.lock().unwrap().1 += room;
        }
    }

    impl InputSink for Device {
        fn accept(&self, bytes: &[u8]) -> usize {
            let mut state = self.state.lock().unwrap();
            let count = bytes.len().min(state.1);
            state.0.extend_from_slice(&bytes[..count]);
            state.1 -= count;
            self.changed.notify_all();
            count
        }
    }

    fn sink_of(device: &Arc<Device>) -> Weak<dyn InputSink> {
        let weak: Weak<Device> = Arc::downgrade(device);
        weak
    }

    #[test]
    fn input_waits_for_room_and_goes_on() {
        let manager = manager();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let input = Input::new(None);
        let device = Device::with_room(3);
        input.set_sink(sink_of(&device));
        input
            .set_source(ours.into(), &manager.watcher().unwrap())
            .unwrap();
        theirs.write_all(b"abcdef").unwrap();
        device.wait_for(b"abc");
        device.add_room(100);
        // The chunk may not have reached the queue yet.
        while !input.is_paused.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        input.resume();
        device.wait_for(b"abcdef");
        theirs.write_all(b"gh").unwrap();
        device.wait_for(b"abcdefgh");
    }

    #[test]
    fn input_before_the_device_is_kept_for_it() {
        let manager = manager();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let input = Input::new(None);
        input
            .set_source(ours.into(), &manager.watcher().unwrap())
            .unwrap();
        theirs.write_all(b"early").unwrap();
        let device = Device::with_room(100);
        input.set_sink(sink_of(&device));
        device.wait_for(b"early");
    }

    #[test]
    fn end_of_the_source_disconnects_the_output() {
        let manager = manager();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let input = Input::new(Some(Output::unconnected()));
        input
            .set_source(ours.into(), &manager.watcher().unwrap())
            .unwrap();
        assert!(input.state().source.is_some());
        drop(theirs);
        while input.state().source.is_some() {
            std::thread::yield_now();
        }
    }
}
