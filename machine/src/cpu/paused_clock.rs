//! The guest's clock (kvmclock) while its vCPUs are paused.

use std::time::SystemTime;

use hypervisor::ClockState;
use hypervisor::bindings::kvm_clock_data;

/// The clock at the moment of the pause, in this process or in the one that saved the machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct PausedClock {
    pub(super) state: ClockState,
    /// The guest was saved: its clock continues as if it had run since. Otherwise it continues from the pause.
    pub(super) follows_real_time: bool,
}

impl PausedClock {
    /// The clock of vCPUs that were just paused.
    pub(super) fn of_pause(clock: kvm_clock_data) -> Self {
        let mut state = ClockState::from(clock);
        // Older kernels do not report it.
        state.realtime_ns.get_or_insert_with(real_time_ns);
        Self {
            state,
            follows_real_time: false,
        }
    }

    /// The clock with which the vCPUs continue now.
    pub(super) fn to_resume(self) -> kvm_clock_data {
        match self.follows_real_time {
            true => self.state.at(real_time_ns()).into(),
            false => self.state.into(),
        }
    }

    /// Real time since the pause, in nanoseconds; 0 if that is unknown.
    pub(super) fn time_since(&self) -> i64 {
        let now = self.state.at(real_time_ns());
        i64::try_from(now.clock_ns - self.state.clock_ns).unwrap_or(i64::MAX)
    }
}

fn real_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
