//! Every event that the VMM reports to an outside reader, with its source, name and properties.

use std::sync::Arc;

/// Accepts events for the event monitor. Never blocks.
pub type EventSink = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// An event, and the device that it concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The event itself.
    pub kind: EventKind,
    /// Identifier of the device.
    pub device: Option<&'a str>,
    /// Events of this device that were dropped before this one, because there were too many.
    pub left_out: u64,
}

impl From<EventKind> for Event<'_> {
    fn from(kind: EventKind) -> Self {
        Self {
            kind,
            device: None,
            left_out: 0,
        }
    }
}

impl<'a> Event<'a> {
    /// An event of a device.
    #[must_use]
    pub fn of_device(kind: EventKind, id: &'a str) -> Self {
        Self {
            device: Some(id),
            ..kind.into()
        }
    }

    /// The details; every value is a string.
    #[must_use]
    pub fn properties(&self) -> Vec<(&'static str, String)> {
        let device = self.device.map(|id| ("id", id.to_owned()));
        let left_out = (self.left_out > 0).then(|| ("left_out", self.left_out.to_string()));
        let details = device.into_iter().chain(self.kind.properties());
        details.chain(left_out).collect()
    }
}

macro_rules! events {
    ($(
        $source:literal {
            $($(#[$doc:meta])* $event:ident $name:literal $({ $($property:ident: $type:ty),+ })?)+
        }
    )+) => {
        /// The kind of event. The fields of a kind are the properties of the event.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum EventKind {
            $($($(#[$doc])* $event $({ $($property: $type),+ })?,)+)+
        }

        impl EventKind {
            /// Whether a guest can cause such events as fast as it writes registers.
            #[must_use]
            pub const fn is_by_register(&self) -> bool {
                matches!(
                    self,
                    Self::DeviceActivated | Self::DeviceReset | Self::GuestPanic { .. }
                )
            }

            /// The part of the VMM that caused it.
            #[must_use]
            pub const fn source(&self) -> &'static str {
                match self {
                    $($(Self::$event { .. } => $source,)+)+
                }
            }

            /// Its name on the event monitor.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self {
                    $($(Self::$event { .. } => $name,)+)+
                }
            }

            fn properties(&self) -> Vec<(&'static str, String)> {
                match self {
                    $($(Self::$event $({ $($property),+ })? =>
                        vec![$($((stringify!($property), $property.to_string())),+)?],)+)+
                }
            }
        }
    };
}

events! {
    "vmm" {
        /// The control thread runs.
        VmmStarting "starting"
        /// The program is exiting.
        VmmShutdown "shutdown"
    }
    "vm" {
        /// The machine is being created.
        Booting "booting"
        /// Its vCPUs run.
        Booted "booted"
        /// The machine has ended; its configuration stays.
        Shutdown "shutdown"
        /// The configuration was deleted, too.
        Deleted "deleted"
        /// The guest resets itself too often; its next machine must wait.
        RebootDelayed "reboot-delayed"
        /// A new machine will replace this one.
        Rebooting "rebooting"
        /// The new machine runs.
        Rebooted "rebooted"
        /// The vCPUs are being stopped.
        Pausing "pausing"
        /// The vCPUs have stopped.
        Paused "paused"
        /// The vCPUs are being resumed.
        Resuming "resuming"
        /// The vCPUs run again.
        Resumed "resumed"
        /// A core file of the paused machine is being written.
        Coredumping "coredumping"
        /// The machine is being saved.
        Snapshotting "snapshotting"
        /// Amount of RAM that has been scanned and written.
        SnapshotProgress "snapshot-progress" { done_bytes: u64, total_bytes: u64 }
        /// The snapshot is on stable storage; `paused_ms` is how long a running machine was paused for it.
        Snapshotted "snapshotted" { passes: u32, data_bytes: u64, paused_ms: u64 }
        /// The machine could not be saved; no snapshot was left behind.
        SnapshotFailed "snapshot-failed" { error: String }
        /// A machine is being created from saved files.
        Restoring "restoring"
        /// Amount of RAM whose content has been restored.
        RestoreProgress "restore-progress" { done_bytes: u64, total_bytes: u64 }
        /// The machine exists, is paused, and has its memory.
        Restored "restored"
        /// RAM that is filled on demand is complete.
        MemoryFilled "memory-filled" { demanded_pages: u64, filled_pages: u64 }
        /// RAM cannot be filled any further; the machine ends.
        MemoryFillFailed "memory-fill-failed" { error: String }
        /// The host cannot provide RAM; the machine is paused or ends.
        MemoryUnavailable "memory-unavailable" { error: String, action: &'static str }
        /// The machine could not be created; nothing was left behind.
        RestoreFailed "restore-failed" { error: String }
        /// The machine is being sent to another process.
        MigrationStarted "migration-started"
        /// A pass over RAM begins; 0 is the first.
        MigrationMemoryIteration "migration-memory-iteration" { id: u32 }
        /// vCPUs are held for this part of the time, because the guest writes memory faster than it can be sent.
        MigrationThrottled "migration-throttled" { percent: u8 }
        /// The other process, in which the machine runs, also has the rest of its RAM.
        PostcopyMigrationCompleted "postcopy-migration-completed"
        /// The machine runs in the other process. This process ends.
        MigrationFinished "migration-finished" { passes: u32, wire_bytes: u64, data_bytes: u64, downtime_ms: u64 }
        /// The machine stays here; it runs if it ran before, unless the error states otherwise.
        MigrationFailed "migration-failed" { error: String }
        /// It is unknown where the machine is; it stays paused here.
        MigrationUnconfirmed "migration-unconfirmed" { error: String }
        /// A source can connect.
        MigrationReceiveReady "migration-receive-ready"
        /// A source has connected.
        MigrationReceiveStarted "migration-receive-started"
        /// The machine is here.
        MigrationReceiveFinished "migration-receive-finished"
        /// No machine was received; nothing was left behind.
        MigrationReceiveFailed "migration-receive-failed" { error: String }
        /// Memory or balloon are being resized.
        Resizing "resizing"
        /// The new sizes are set; the guest may still be working on them.
        Resized "resized"
        /// The guest has released a device.
        DeviceRemoved "device-removed" { bdf: String }
    }
    "guest" {
        /// The guest has reported its panic through pvpanic.
        GuestPanic "panic" { event: &'static str }
    }
    "virtio-device" {
        /// A driver initialised the device.
        DeviceActivated "activated"
        /// The driver released it.
        DeviceReset "reset"
        /// The device was hot-plugged.
        DeviceAdded "added" { bdf: String }
        /// The guest has reached the balloon's target.
        BalloonTargetReached "balloon-target-reached" { target_bytes: u64 }
        /// The guest makes no progress towards its target.
        BalloonStuck "balloon-stuck" { target_bytes: u64, actual_bytes: u64, stuck_ms: u64 }
        /// More discards have failed.
        DiscardFailed "balloon-discard-failed" { failed_bytes: u64, new_bytes: u64 }
        /// Reported memory is no longer discarded.
        ReportingPaused "reporting-paused" { by: String }
        /// Reported memory is discarded again.
        ReportingResumed "reporting-resumed"
        /// The guest follows another generation of the policy.
        PolicyAcknowledged "reporting-policy-acknowledged" { generation: u32 }
        /// All free memory has been reported.
        ReportNowDone "report-now-done" { report_now_id: u32 }
        /// An alert became active.
        AlertEntered "reclaim-threshold-entered" { name: String, figure: String, value: u64, threshold: u64 }
        /// An alert ended.
        AlertLeft "reclaim-threshold-left" { name: String, figure: String, value: u64, threshold: u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_the_device_and_the_fields_of_the_kind() {
        let kind = EventKind::BalloonStuck {
            target_bytes: 3,
            actual_bytes: 1,
            stuck_ms: 30_000,
        };
        let event = Event::of_device(kind, "__balloon");
        assert_eq!(event.kind.source(), "virtio-device");
        assert_eq!(event.kind.name(), "balloon-stuck");
        let expected = [
            ("id", "__balloon"),
            ("target_bytes", "3"),
            ("actual_bytes", "1"),
            ("stuck_ms", "30000"),
        ];
        let properties = event.properties();
        let shown: Vec<_> = properties
            .iter()
            .map(|(name, value)| (*name, &**value))
            .collect();
        assert_eq!(shown, expected);
        assert_eq!(Event::from(EventKind::Booted).properties(), []);
        let after_a_flood = Event {
            left_out: 7,
            ..EventKind::DeviceReset.into()
        };
        let left_out = ("left_out", "7".to_owned());
        assert_eq!(after_a_flood.properties(), [left_out]);
    }
}
