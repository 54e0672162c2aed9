//! The clock that all vCPUs of a machine share (kvmclock).

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use serde::{Deserialize, Serialize};
use state::{Part, State, parts};

/// kvmclock at the moment the vCPUs were paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// The guest's clock.
    pub clock_ns: u64,
    /// The host's real time at the same moment, if the kernel reports it.
    pub realtime_ns: Option<u64>,
}

impl State for ClockState {
    const PART: Part = parts::CLOCK;
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
