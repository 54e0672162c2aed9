//! Records of the event monitor (`--event-monitor`).
//!
//! Each record is one pretty-printed JSON object followed by an empty line. Readers can split the stream at empty lines
//! or use a parser for concatenated JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time since the VMM process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct EventTimestamp {
    /// Whole seconds.
    pub secs: u64,
    /// Nanoseconds within the second, below 1 000 000 000.
    pub nanos: u32,
}

impl From<Duration> for EventTimestamp {
    fn from(since_start: Duration) -> Self {
        Self {
            secs: since_start.as_secs(),
            nanos: since_start.subsec_nanos(),
        }
    }
}

/// One record of the event monitor.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Event {
    /// When it happened, counted from the start of the VMM process.
    pub timestamp: EventTimestamp,
    /// Which part it happened in: `vmm`, `vm`, `virtio-device`, `cpu_manager`, `guest`.
    pub source: String,
    /// What happened, for example `booted` or `activated`.
    pub event: String,
    /// Details; every value is a string. Written as `null` when there are none.
    #[serde(default)]
    pub properties: Option<BTreeMap<String, String>>,
}

impl Event {
    /// The bytes written to the monitor: pretty JSON, then an empty line.
    pub fn to_record(&self) -> String {
        // Serializing strings and integers cannot fail; an empty record would still keep the stream readable.
        let mut record = serde_json::to_string_pretty(self).unwrap_or_default();
        record.push_str("\n\n");
        record
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn event_without_properties_writes_null_and_an_empty_line() {
        let event = Event {
            timestamp: Duration::from_millis(1500).into(),
            source: "vm".to_owned(),
            event: "booted".to_owned(),
            properties: None,
        };
        let record = event.to_record();
        assert!(record.ends_with("}\n\n"));
        assert!(record.contains("\"properties\": null"), "{record}");
        assert!(record.contains("\"nanos\": 500000000"), "{record}");
        assert_eq!(serde_json::from_str::<Event>(&record).unwrap(), event);
    }
}
