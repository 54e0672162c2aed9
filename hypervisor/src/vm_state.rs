//! The clock that all vCPUs of a machine share (kvmclock).

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use serde::{Deserialize, Serialize};
use state::{Fields, Part, State, StateError, parts};

/// kvmclock at the moment the vCPUs were paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// The guest's clock.
    pub clock_ns: u64,
    /// The host's real time at the same moment; absent in a state of version 1.
    pub realtime_ns: Option<u64>,
}

impl State for ClockState {
    const PART: Part = parts::CLOCK;

    /// In version 1, the time stamp counters were those of a later moment, so they cannot be moved to the present.
    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        fields.insert("realtime_ns".to_owned(), ().into());
        Ok(())
    }
}

impl ClockState {
    /// This clock at the real time `now_ns`. It does not go back, should the host's real time do so.
    #[must_use]
    pub fn at(&self, now_ns: u64) -> Self {
        let Some(realtime_ns) = self.realtime_ns else {
            return *self;
        };
        let elapsed = now_ns.saturating_sub(realtime_ns);
        Self {
            clock_ns: self.clock_ns.saturating_add(elapsed),
            realtime_ns: Some(realtime_ns + elapsed),
        }
    }
}

impl From<kvm_clock_data> for ClockState {
    fn from(kvm: kvm_clock_data) -> Self {
        Self {
            clock_ns: kvm.clock,
            realtime_ns: (kvm.flags & KVM_CLOCK_REALTIME != 0).then_some(kvm.realtime),
        }
    }
}

impl From<ClockState> for kvm_clock_data {
    fn from(state: ClockState) -> Self {
        Self {
            clock: state.clock_ns,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_moves_with_real_time_and_never_back() {
        let clock = |clock_ns, realtime_ns| ClockState {
            clock_ns,
            realtime_ns,
        };
        assert_eq!(clock(5, Some(100)).at(130), clock(35, Some(130)));
        assert_eq!(clock(5, Some(100)).at(99), clock(5, Some(100)));
        assert_eq!(clock(5, None).at(130), clock(5, None));
        assert_eq!(
            clock(u64::MAX, Some(0)).at(u64::MAX),
            clock(u64::MAX, Some(u64::MAX))
        );
    }
}
