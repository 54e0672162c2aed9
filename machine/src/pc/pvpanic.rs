//! The device through which a guest reports its panic: QEMU's pvpanic on PCI, as in Cloud Hypervisor.
//!
//! The driver reads the supported events from one byte of BAR 0, and writes events to it. The machine continues to run.

use std::fmt;
use std::sync::{Mutex, MutexGuard};

use state::StateError;
use virtio_devices::Unpoisoned;
use virtio_devices::pci::{
    Bar, ConfigSpace, DoorbellRegister, Identity, PciConfigState, PciFunction,
};

use super::device_events::DeviceEvents;
use crate::events::{DeviceEventKind, GuestPanic};

/// The name of the device.
pub const PVPANIC_ID: &str = "__pvpanic";
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    revision: 1,
    // A system peripheral of no particular kind.
    class: 0x08,
    subclass: 0x80,
    subsystem_vendor: 0x1b36,
    subsystem: 0x0011,
};
const BAR_INDEX: u8 = 0;
/// One page, so that a guest can map it alone.
const BAR_BYTES: u32 = 0x1000;
/// The one register.
const EVENTS: u64 = 0;
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The function on the bus.
pub(crate) struct Pvpanic {
    config: Mutex<ConfigSpace>,
    events: DeviceEvents,
}

impl fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pvpanic").finish_non_exhaustive()
    }
}

impl Pvpanic {
    /// Reports to `events`, which limits the rate.
    pub(super) fn new(events: DeviceEvents) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_memory_bar_32(BAR_INDEX, BAR_BYTES);
        Self {
            config: Mutex::new(config),
            events,
        }
    }

    /// A function that reports to no one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn unheard() -> Self {
        Self::new(DeviceEvents::new(std::sync::Arc::new(|_| {})))
    }

    /// Its configuration space; it has no other state.
    pub(crate) fn state(&self) -> PciConfigState {
        self.config().state()
    }

    /// # Errors
    /// The state belongs to another function.
    pub(crate) fn restore(&self, state: &PciConfigState) -> Result<(), StateError> {
        self.config().restore(state)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unpoisoned()
    }
}

impl PciFunction for Pvpanic {
    fn id(&self) -> &str {
        PVPANIC_ID
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut config = self.config();
        let before = bar(&config);
        config.write(offset, data);
        bar(&config) != before
    }

    fn bars(&self) -> Vec<Bar> {
        vec![bar(&self.config())]
    }

    fn set_bar_address(&self, index: u8, address: u64) {
        self.config().set_bar_address(index, address);
    }

    fn bar_read(&self, _index: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENTS, Some(byte)) = (offset, data.first_mut()) {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&self, _index: u8, offset: u64, data: &[u8]) {
        let (EVENTS, Some(&byte)) = (offset, data.first()) else {
            return;
        };
        let panic = match byte {
            PANICKED => GuestPanic::Panicked,
            CRASH_LOADED => GuestPanic::CrashLoaded,
            _ => GuestPanic::Unknown,
        };
        self.events
            .emit(PVPANIC_ID, DeviceEventKind::GuestPanic(panic));
    }

    fn with_doorbells(&self, _visit: &mut dyn FnMut(DoorbellRegister<'_>)) {}

    fn resume(&self) {}

    fn reset(&self) {
        self.config().reset_command();
    }
}

fn bar(config: &ConfigSpace) -> Bar {
    Bar {
        index: BAR_INDEX,
        size_bytes: u64::from(BAR_BYTES),
        is_64bit: false,
        address: config.bar_address(BAR_INDEX),
        decoded: config.memory_decoded(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    type Seen = Arc<Mutex<Vec<(DeviceEventKind, u64)>>>;

    fn pvpanic() -> (Pvpanic, Seen) {
        let seen = Seen::default();
        let sink = Arc::clone(&seen);
        let events = DeviceEvents::new(Arc::new(move |event| {
            sink.lock().unpoisoned().push((event.kind, event.left_out));
        }));
        (Pvpanic::new(events), seen)
    }

    #[test]
    fn pvpanic_reports_the_event_that_is_written() {
        let (pvpanic, seen) = pvpanic();
        let mut data = [0xff; 2];
        pvpanic.bar_read(0, 0, &mut data);
        assert_eq!(data, [3, 0]);
        for value in [1, 2, 3, 0] {
            pvpanic.bar_write(0, 0, &[value]);
        }
        pvpanic.bar_write(0, 1, &[1]);
        pvpanic.bar_write(0, 0, &[]);
        let kinds = [
            GuestPanic::Panicked,
            GuestPanic::CrashLoaded,
            GuestPanic::Unknown,
            GuestPanic::Unknown,
        ];
        let expected = kinds.map(|panic| (DeviceEventKind::GuestPanic(panic), 0));
        assert_eq!(*seen.lock().unpoisoned(), expected);
    }

    #[test]
    fn pvpanic_written_without_end_reports_a_few() {
        let (pvpanic, seen) = pvpanic();
        for _ in 0..100_000 {
            pvpanic.bar_write(0, 0, &[1]);
        }
        assert!(seen.lock().unpoisoned().len() < 10_000);
    }

    #[test]
    fn pvpanic_is_a_function_with_one_bar_of_32_bits() {
        let (pvpanic, _) = pvpanic();
        let mut ids = [0; 4];
        pvpanic.config_read(0, &mut ids);
        assert_eq!(u32::from_le_bytes(ids), 0x0011_1b36);
        pvpanic.set_bar_address(0, 0xc000_1000);
        assert!(pvpanic.config_write(4, &[2, 0]));
        assert!(!pvpanic.config_write(4, &[2, 0]));
        let expected = Bar {
            index: 0,
            size_bytes: 0x1000,
            is_64bit: false,
            address: 0xc000_1000,
            decoded: true,
        };
        assert_eq!(pvpanic.bars(), [expected]);
        pvpanic.config_write(0x10, &[0xff; 8]);
        let mut sizes = [0; 8];
        pvpanic.config_read(0x10, &mut sizes);
        assert_eq!(sizes, [0, 0xf0, 0xff, 0xff, 0, 0, 0, 0]);
        pvpanic.reset();
        assert!(!pvpanic.bars()[0].decoded);
    }
}
