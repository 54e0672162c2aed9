//! A fixed amount of work in the guest, timed there; its cost is measured here.

use anyhow::{Context, Result};
use integration_tests::linux::Guest;
use serde_json::Value;

use crate::compare::rounded;
use crate::cost::Cost;

/// Time and cost of a piece of work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimedWork {
    /// Nanoseconds of the guest's clock.
    ns: u64,
    cost: Cost,
}

impl TimedWork {
    /// Runs `guest-mem WORDS` in the guest, which answers `ok VERB N ns`.
    ///
    /// # Errors
    /// The work fails, or the guest does not respond.
    pub(crate) fn by(guest: &mut Guest, words: &str) -> Result<Self> {
        let pid = guest.vmm.pid();
        let before = Cost::so_far(pid)?;
        let text = guest.shell(&format!("guest-mem {words}"))?;
        let cost = Cost::so_far(pid)?.since(&before);
        let verb = words.split(' ').next().unwrap_or_default();
        let ns = text
            .lines()
            .find_map(|line| {
                line.strip_prefix("ok ")?
                    .strip_prefix(verb)?
                    .strip_suffix(" ns")
            })
            .and_then(|figure| figure.trim().parse().ok())
            .with_context(|| format!("no time in {text:?}"))?;
        Ok(Self { ns, cost })
    }

    /// Subtracts `nothing`: the same steps without the work.
    pub(crate) fn beyond(&self, nothing: &Self) -> Self {
        Self {
            ns: self.ns.saturating_sub(nothing.ns).max(1),
            cost: self.cost.since(&nothing.cost),
        }
    }

    /// Units per second.
    pub(crate) fn per_second(&self, units: u64) -> f64 {
        rounded(units as f64 * 1e9 / self.ns as f64)
    }

    /// Exits and processor time per unit.
    pub(crate) fn each(&self, units: u64) -> Value {
        self.cost.each(units)
    }
}
