//! What happens in a machine, for whoever listens.

use std::sync::Arc;

/// Takes `(source, event, properties)` for the event monitor. Never blocks.
pub type EventSink = Arc<dyn Fn(&str, &str, &[(&str, String)]) + Send + Sync>;
