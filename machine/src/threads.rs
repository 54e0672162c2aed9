//! The threads of a machine.

use std::sync::Arc;

/// Called first on every thread the VMM starts, with the thread's name; it
/// installs the seccomp filter for that kind of thread.
pub type ThreadStart = Arc<dyn Fn(&str) + Send + Sync>;
