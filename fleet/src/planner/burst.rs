//! Measures how much callable memory guests take simultaneously.

use crate::config::{ControlConfig, SafetyRule};
use crate::model::{Bytes, Ledger};

use super::PlannerMemory;
use super::view::View;

/// Minimum number of windows for the measurement alone to count: five minutes of windows of ten seconds.
const WINDOWS_MIN: u32 = 30;

/// Ends a window when its time is over, and begins the next one.
pub(super) fn record(
    memory: &mut PlannerMemory,
    views: &mut [View<'_>],
    now_ms: u64,
    control: &ControlConfig,
) {
    if now_ms < memory.window_from_ms.saturating_add(control.react.0) {
        return;
    }
    let mut measured = false;
    let mut growth = Bytes::ZERO;
    for view in views.iter_mut().filter(|view| view.facts.sample.is_some()) {
        if let Some(before) = view.memory.window_resident {
            measured = true;
            growth += view.sample.resident - before;
        }
        view.memory.window_resident = Some(view.sample.resident);
    }
    // A VM's first window does not count, because all of its memory would be growth.
    if measured {
        memory.burst.record(growth);
    }
    memory.window_from_ms = now_ms;
}

/// Memory that guests are expected to take within the reaction time. While there are few measurements, it is at least a
/// fraction of the callable memory.
pub(super) fn expected(memory: &PlannerMemory, liability: Bytes, control: &ControlConfig) -> Bytes {
    if !control.safety.has(SafetyRule::Burst) {
        return Bytes::ZERO;
    }
    let measured = memory
        .burst
        .quantile(control.burst_quantile.0)
        .unwrap_or_default();
    if memory.burst.windows() < WINDOWS_MIN {
        measured.max(liability.part(control.burst_prior))
    } else {
        measured
    }
}

impl Ledger {
    /// The same ledger with this burst.
    pub(super) fn with_burst(mut self, burst: Bytes) -> Self {
        self.burst_measured = burst;
        self.burst = burst.min(self.callable_liability);
        self.firm_free = self.available - self.burst - self.promised - self.granted;
        self
    }
}
