//! Reports when drivers activate and release devices, at a bounded rate.
//!
//! A guest can activate and reset a device tens of thousands of times per second. Each device has a token bucket. The
//! first event after a suppressed one carries the number of suppressed events.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use virtio_devices::Unpoisoned;
use virtio_devices::transport::LifecycleListener;

use crate::attempt_limit::AttemptLimit;
use crate::events::{DeviceEvent, DeviceEventKind, DeviceEventSink};

/// Burst of events: firmware, boot loader and kernel each reset and activate a device a few times.
const BURST: u32 = 16;
const REFILL: Duration = Duration::from_millis(250);

/// The listener of one device.
pub(super) struct DeviceEvents {
    sink: DeviceEventSink,
    bucket: Mutex<AttemptLimit>,
}

virtio_devices::debug_fields!(DeviceEvents {});

impl DeviceEvents {
    pub(super) fn new(sink: DeviceEventSink) -> Self {
        Self {
            sink,
            bucket: Mutex::new(AttemptLimit::new(BURST, REFILL, Instant::now())),
        }
    }

    pub(super) fn emit(&self, device: &str, kind: DeviceEventKind) {
        let taken = self.bucket.lock().unpoisoned().take(Instant::now());
        if let Some(left_out) = taken {
            (self.sink)(DeviceEvent {
                device,
                kind,
                left_out,
            });
        }
    }
}

impl LifecycleListener for DeviceEvents {
    fn device_activated(&self, id: &str) {
        self.emit(id, DeviceEventKind::Activated);
    }

    fn device_reset(&self, id: &str) {
        self.emit(id, DeviceEventKind::Reset);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn device_that_is_reset_without_end_emits_few_events() {
        const ROUNDS: u64 = 100_000;
        let seen = Arc::new(Mutex::new((0_u64, 0_u64)));
        let sink: DeviceEventSink = {
            let seen = Arc::clone(&seen);
            Arc::new(move |event| {
                let mut seen = seen.lock().unpoisoned();
                seen.0 += 1;
                seen.1 += event.left_out;
            })
        };
        let events = DeviceEvents::new(sink);
        let started = Instant::now();
        for _ in 0..ROUNDS {
            events.device_activated("_net0");
            events.device_reset("_net0");
        }
        let refilled = started.elapsed().as_millis() / REFILL.as_millis();
        let (emitted, left_out) = *seen.lock().unpoisoned();
        assert!(u128::from(emitted) <= u128::from(BURST) + refilled);
        assert!(emitted >= u64::from(BURST));
        assert!(emitted + left_out <= 2 * ROUNDS);
    }
}
