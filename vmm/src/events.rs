//! What the VMM tells an outside reader.

use std::sync::Arc;

/// Takes `(source, event, properties)` for the event monitor. Never blocks.
pub type EventSink = Arc<dyn Fn(&str, &str, &[(&str, String)]) + Send + Sync>;
