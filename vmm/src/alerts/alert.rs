//! One alert: a rule and its state.
//!
//! ```text
//!             beyond enter                for duration_ms
//!  inactive ───────────────► pending ──────────────────────► active     (entered)
//!     ▲  ▲     back            │                               │
//!     │  └─────────────────────┘                               │
//!     └──────────────── at leave or safer ─────────────────────┘        (left)
//! ```
//! - If a figure is unavailable, a pending entry ends, because the figure may not have stayed beyond; the alert neither
//!   enters nor leaves.
//! - Between `leave` and `enter`, the state does not change.
//! - One step makes one transition at most, so that the rate of steps bounds the rate of events.

use api::{AlertDirection, AlertRule, AlertStatus};

use super::figure::{Figure, Sources};

/// A crossing, to be reported once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transition {
    pub(crate) entered: bool,
    pub(crate) name: String,
    pub(crate) figure: String,
    pub(crate) value: u64,
    /// The value of the rule that was crossed.
    pub(crate) threshold: u64,
}

/// A rule and its state. Times are ms on any clock that does not go back.
#[derive(Clone, Debug)]
pub(super) struct Alert {
    pub(super) rule: AlertRule,
    pub(super) figure: Figure,
    active: bool,
    changed_at_ms: u64,
    beyond_since_ms: Option<u64>,
    value: Option<u64>,
    times_entered: u64,
}

impl Alert {
    /// A rule that has not been evaluated.
    pub(super) fn new(rule: AlertRule, figure: Figure, now_ms: u64) -> Self {
        Self {
            rule,
            figure,
            active: false,
            changed_at_ms: now_ms,
            beyond_since_ms: None,
            value: None,
            times_entered: 0,
        }
    }

    /// Changes the values of the rule. A rule on another figure, or on the other side of it, is a different rule, whose
    /// state starts from inactive.
    pub(super) fn replace(&mut self, rule: AlertRule, figure: Figure, now_ms: u64) {
        if self.rule == rule {
            // Setting the same rule repeatedly does not delay its entry.
            return;
        }
        if self.rule.figure == rule.figure && self.rule.direction == rule.direction {
            self.beyond_since_ms = None;
            self.rule = rule;
        } else {
            *self = Self::new(rule, figure, now_ms);
        }
    }

    /// Evaluates the figure.
    pub(super) fn step(&mut self, now_ms: u64, sources: &Sources) -> Option<Transition> {
        self.value = self.figure.read(sources);
        let Some(value) = self.value else {
            self.beyond_since_ms = None;
            return None;
        };
        let (beyond, safe) = match self.rule.direction {
            AlertDirection::Above => (value > self.rule.enter, value <= self.rule.leave),
            AlertDirection::Below => (value < self.rule.enter, value >= self.rule.leave),
        };
        let crossed = if self.active {
            safe
        } else if beyond {
            let since = *self.beyond_since_ms.get_or_insert(now_ms);
            now_ms.saturating_sub(since) >= self.rule.duration_ms
        } else {
            self.beyond_since_ms = None;
            false
        };
        crossed.then(|| self.cross(now_ms, value))
    }

    fn cross(&mut self, now_ms: u64, value: u64) -> Transition {
        self.active = !self.active;
        self.changed_at_ms = now_ms;
        self.beyond_since_ms = None;
        self.times_entered += u64::from(self.active);
        Transition {
            entered: self.active,
            name: self.rule.name.clone(),
            figure: self.rule.figure.clone(),
            value,
            threshold: if self.active {
                self.rule.enter
            } else {
                self.rule.leave
            },
        }
    }

    /// The representation in the API.
    pub(super) fn status(&self, now_ms: u64) -> AlertStatus {
        AlertStatus {
            rule: self.rule.clone(),
            active: self.active,
            since_ms: now_ms.saturating_sub(self.changed_at_ms),
            value: self.value,
            times_entered: self.times_entered,
        }
    }
}
