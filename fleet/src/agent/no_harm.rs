//! Actions that an agent must not take on VMs, checked from outside: by the VMs' state, and by the agent's
//! explanations.
//!
//! The chaos runs use it, in virtual time (`chaos`) and with real processes (`bin/ch-fleet/tests/chaos.rs`).

use thiserror::Error;

use super::{Status, VmStatus};
use crate::model::Bytes;

/// Maximum number of changes of direction of one balloon in an hour.
pub const TURNS_MAX: usize = 12;
const HOUR_MS: u64 = 3_600_000;
/// Targets that differ by less count as equal.
const GRAIN: u64 = 1 << 20;

/// Reasons that `explain` may give for a limit or a pause.
const RESTRAINED: [&str; 2] = ["last-resort", "lying"];
/// Reasons that `explain` may give for memory in a balloon while the host has plenty.
const WITHHELD: [&str; 4] = ["unmanaged", "lying", "above-maximum", "dead-band"];

/// The actual state of one VM.
#[derive(Clone, Debug, Default)]
pub struct Actual {
    /// Its name.
    pub vm: String,
    /// Whether it is paused.
    pub paused: bool,
    /// Whether its control group has a limit.
    pub limited: bool,
    /// The last requested balloon, bytes.
    pub target: u64,
}

/// A forbidden action of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Harm {
    /// No agent responds.
    #[error("the agent does not respond")]
    Silent,
    /// A VM is stopped.
    #[error("{vm} is left paused, which is explained as {reason:?}")]
    Paused {
        /// The VM.
        vm: String,
        /// The agent's explanation.
        reason: String,
    },
    /// A control group is limited.
    #[error("{vm} is left limited, which is explained as {reason:?}")]
    Limited {
        /// The VM.
        vm: String,
        /// The agent's explanation.
        reason: String,
    },
    /// Memory is withheld.
    #[error("{vm} is left with a balloon of {target}, which is explained as {reason:?}")]
    Ballooned {
        /// The VM.
        vm: String,
        /// Its balloon.
        target: Bytes,
        /// The agent's explanation.
        reason: String,
    },
    /// A balloon moved back and forth.
    #[error("the balloon of {vm} turned {turns} times within an hour")]
    Turned {
        /// The VM.
        vm: String,
        /// The number of changes.
        turns: usize,
    },
    /// More is reserved than available.
    #[error("{promised} are promised, but only {there} exist")]
    Oversold {
        /// The required memory.
        promised: Bytes,
        /// The available memory.
        there: Bytes,
    },
    /// A reservation was lost.
    #[error("the promise {id} to {vm} is lost")]
    Lost {
        /// Its id.
        id: String,
        /// Its VM.
        vm: String,
    },
    /// A reservation is recorded after its end.
    #[error("promise {id} to {vm} is held too long")]
    Overdue {
        /// Its id.
        id: String,
        /// Its VM.
        vm: String,
    },
}

/// Effects left behind on a host that has plenty of memory and whose VMs respond.
pub fn left_behind(status: &Status, vms: &[Actual]) -> Vec<Harm> {
    let mut harms = Vec::new();
    for actual in vms {
        let said = status.vms.iter().find(|vm| vm.vm == actual.vm);
        let reason = said.map_or_else(|| "not known".to_owned(), |vm| vm.reason.clone());
        let pinned = said.is_some_and(is_pinned);
        let vm = actual.vm.clone();
        let restrained = pinned || RESTRAINED.contains(&reason.as_str());
        if actual.paused && !restrained {
            harms.push(Harm::Paused {
                vm: vm.clone(),
                reason: reason.clone(),
            });
        }
        if actual.limited && !restrained {
            harms.push(Harm::Limited {
                vm: vm.clone(),
                reason: reason.clone(),
            });
        }
        if actual.target >= GRAIN && !pinned && !WITHHELD.contains(&reason.as_str()) {
            let target = Bytes(actual.target);
            harms.push(Harm::Ballooned { vm, target, reason });
        }
    }
    harms
}

fn is_pinned(vm: &VmStatus) -> bool {
    vm.interlock.as_deref() == Some("pinned")
}

/// The directions in which a balloon was moved.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    target: u64,
    grew: Option<bool>,
    at_ms: Vec<u64>,
}

impl Turns {
    /// Records that a balloon of this size was requested, at a time of a monotonic clock.
    pub fn asked(&mut self, target: u64, at_ms: u64) {
        if target.abs_diff(self.target) < GRAIN {
            return;
        }
        let grew = target > self.target;
        if self.grew.is_some_and(|before| before != grew) {
            self.at_ms.push(at_ms);
        }
        (self.target, self.grew) = (target, Some(grew));
    }

    /// The maximum number of changes of direction within an hour.
    pub fn worst(&self) -> usize {
        let within = |from: &u64| {
            let hour = self.at_ms.iter().skip_while(|at| *at < from);
            hour.take_while(|at| **at < from + HOUR_MS).count()
        };
        self.at_ms.iter().map(within).max().unwrap_or(0)
    }

    /// Checks whether that is too often.
    ///
    /// # Errors
    /// It is too often.
    pub fn check(&self, vm: &str) -> Result<(), Harm> {
        let turns = self.worst();
        if turns <= TURNS_MAX {
            return Ok(());
        }
        Err(Harm::Turned {
            vm: vm.to_owned(),
            turns,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn told(reason: &str) -> Status {
        let vm = VmStatus {
            vm: "a".to_owned(),
            reason: reason.to_owned(),
            ..VmStatus::default()
        };
        Status {
            vms: vec![vm],
            ..Status::default()
        }
    }

    #[test]
    fn what_is_left_behind_needs_a_reason() {
        let actual = Actual {
            vm: "a".to_owned(),
            paused: true,
            limited: true,
            target: 1 << 30,
        };
        let harms = |reason| left_behind(&told(reason), std::slice::from_ref(&actual)).len();
        assert_eq!(harms("no-need"), 3);
        assert_eq!(harms("last-resort"), 1);
        assert_eq!(harms("lying"), 0);
        assert_eq!(left_behind(&Status::default(), &[actual]).len(), 3);
    }

    #[test]
    fn turns_count_within_any_hour() {
        let mut turns = Turns::default();
        for step in 0..14_u64 {
            turns.asked((step % 2 + 1) << 30, step * 600_000);
        }
        assert_eq!(turns.worst(), 6);
        turns.check("a").unwrap();
        for step in 0..14_u64 {
            turns.asked((step % 2 + 1) << 30, 10_000_000 + step);
        }
        assert!(turns.check("a").is_err());
        // An equal or nearly equal target is not a change of direction.
        let mut still = Turns::default();
        for step in 0..50 {
            still.asked((1 << 30) + step % 2, step);
        }
        assert_eq!(still.worst(), 0);
    }
}
