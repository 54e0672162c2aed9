//! Measures how much callable memory guests take at once.

use crate::config::{ControlConfig, SafetyRule};
use crate::model::{Bytes, Ledger};

use super::PlannerMemory;
use super::view::View;

/// Windows that must have been measured before the measurement alone counts: five minutes of windows of ten seconds.
const WINDOWS_MIN: u32 = 30;

/// Ends a window when it is over, and begins the next one.
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
    // A first window would count a VM's whole memory as growth.
    if measured {
        memory.burst.record(growth);
    }
    memory.window_from_ms = now_ms;
}

/// What guests will call in within the reaction time. While little has been measured, a part of what they could call in
/// counts at least.
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
    /// The same books with this burst.
    pub(super) fn with_burst(mut self, burst: Bytes) -> Self {
        self.burst_measured = burst;
        self.burst = burst.min(self.callable_liability);
        self.firm_free = self.available - self.burst - self.promised - self.granted;
        self
    }
}
