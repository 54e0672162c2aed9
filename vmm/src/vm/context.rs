//! The machine's interface to the rest of the program.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use machine::events::{DeviceEventKind, GuestPanic};
use machine::pc::PcContext;
use machine::serial::{Endpoint, EndpointMode, SerialManager};
use machine::signals::VmSignals;
use virtio_devices::Unpoisoned;

use crate::events::{Event, EventKind, EventSink};
use crate::snapshot::RestoreContext;
use crate::threads::{ThreadKind, ThreadStart};

/// Services that a machine needs from the program that runs it.
#[derive(Clone)]
pub struct VmContext {
    /// Signals to the control thread.
    pub signals: Arc<VmSignals>,
    /// Seccomp hook for every thread.
    pub thread_start: ThreadStart,
    /// Event monitor.
    pub events: EventSink,
    /// Endpoints of the serial port and the consoles; kept across reboots.
    pub consoles: Arc<Consoles>,
}

virtio_devices::debug_fields!(VmContext { signals });

impl VmContext {
    /// A context with no signal raised and no consoles.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(thread_start: ThreadStart, events: EventSink) -> io::Result<Self> {
        Ok(Self {
            signals: Arc::new(VmSignals::new()?),
            thread_start,
            events,
            consoles: Arc::default(),
        })
    }

    /// The part that the machine itself needs.
    pub(super) fn of_machine(&self) -> PcContext {
        let events = Arc::clone(&self.events);
        PcContext {
            signals: Arc::clone(&self.signals),
            thread_start: self.start_of_machine_threads(),
            events: Arc::new(move |event| {
                // As in upstream, a panic is an event of the guest and not of a device.
                let (kind, device) = match event.kind {
                    DeviceEventKind::Activated => (EventKind::DeviceActivated, Some(event.device)),
                    DeviceEventKind::Reset => (EventKind::DeviceReset, Some(event.device)),
                    DeviceEventKind::GuestPanic(panic) => (guest_panic(panic), None),
                };
                events(&Event {
                    kind,
                    device,
                    left_out: event.left_out,
                });
            }),
        }
    }

    /// The part that restored RAM needs.
    pub(super) fn of_restore(&self) -> RestoreContext {
        RestoreContext {
            events: Arc::clone(&self.events),
            signals: Arc::clone(&self.signals),
            thread_start: self.start_of_machine_threads(),
        }
    }

    pub(super) fn start_of_machine_threads(&self) -> machine::threads::MachineThreadStart {
        let thread_start = Arc::clone(&self.thread_start);
        Arc::new(move |thread| thread_start(ThreadKind::Machine(thread)))
    }
}

/// Converts a panic to the event with upstream's names.
fn guest_panic(panic: GuestPanic) -> EventKind {
    EventKind::GuestPanic {
        event: match panic {
            GuestPanic::Panicked => "panic",
            GuestPanic::CrashLoaded => "crash_loaded",
            GuestPanic::Unknown => "unknown_event",
        },
    }
}

/// The open endpoints of one VM. They outlive its machines, so that a reboot
/// keeps the pseudo-terminal and the socket's client.
#[derive(Default)]
pub struct Consoles {
    open: Mutex<Open>,
}

/// An endpoint, and the mode for which it was opened.
pub(super) type Known = Option<(EndpointMode, Arc<Endpoint>)>;

#[derive(Default)]
pub(super) struct Open {
    pub(super) serial: Known,
    pub(super) console: Known,
    pub(super) debug_console: Known,
    /// Dropped last, because endpoints remove themselves from its list when dropped.
    pub(super) manager: Option<SerialManager>,
}

virtio_devices::debug_fields!(Consoles {});

impl Consoles {
    /// Closes all endpoints: the VM is deleted.
    pub fn close(&self) {
        *self.lock() = Open::default();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unpoisoned()
    }
}
