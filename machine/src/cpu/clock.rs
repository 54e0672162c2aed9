//! The guest's clock (kvmclock) and its time stamp counters, which must advance together: a guest compares them and
//! gives up a counter that differs. KVM advances both during a pause. This module keeps their relation over a restore.

use std::time::SystemTime;

use hypervisor::{ClockState, Result, Vcpu, VcpuState, Vm};

/// How often two clocks are read together. The quickest attempt counts, because others may have been interrupted.
const ATTEMPTS: usize = 5;
/// The difference that may remain after a restore. Linux tolerates five times as much within half a second.
const DIFFERENCE_MAX_NS: u64 = 50_000;
/// A larger difference means that this host does not let the counter be set.
const DIFFERENCE_LIMIT_NS: u64 = 1_000_000_000;

/// The clock, with the real time at the same moment.
pub(super) fn read(vm: &Vm) -> Result<ClockState> {
    let (now_ns, clock) = together(|| Ok(real_time_ns()), || vm.clock())?;
    let clock = ClockState::from(clock);
    Ok(ClockState {
        // KVM reports it only if its clock is derived from the counter.
        realtime_ns: clock.realtime_ns.or(Some(now_ns)),
        ..clock
    })
}

/// Makes the time stamp counter of this state that of `vcpu` at the time of `clock`.
pub(super) fn read_tsc(
    vm: &Vm,
    vcpu: &Vcpu,
    clock: &ClockState,
    state: &mut VcpuState,
) -> Result<()> {
    let (now_ns, tsc) = clock_and_tsc(vm, vcpu)?;
    state.set_tsc(tsc);
    state.move_tsc(clock.clock_ns.wrapping_sub(now_ns).cast_signed());
    Ok(())
}

/// Real time since the clock was read, in nanoseconds; 0 if that is unknown.
pub(super) fn since(clock: &ClockState) -> i64 {
    let now = clock.at(real_time_ns());
    i64::try_from(now.clock_ns - clock.clock_ns).unwrap_or(i64::MAX)
}

/// Lets a saved clock continue at the present time. Its difference to the counter of `vcpu`, which has been restored,
/// becomes that of the saved state. Returns the nanoseconds that have passed since.
pub(super) fn restore(vm: &Vm, clock: &ClockState, vcpu: &Vcpu, state: &VcpuState) -> Result<u64> {
    vm.set_clock(&clock.at(real_time_ns()).into())?;
    for _ in 0..ATTEMPTS {
        let (now_ns, tsc) = clock_and_tsc(vm, vcpu)?;
        let Some(counted_ns) = state.ns_until(tsc) else {
            break;
        };
        let counted = clock.clock_ns.wrapping_add_signed(counted_ns);
        if !(DIFFERENCE_MAX_NS..DIFFERENCE_LIMIT_NS).contains(&counted.abs_diff(now_ns)) {
            break;
        }
        // The time until KVM has set the clock is lost. The next attempt measures it.
        let present = ClockState::from(vm.clock()?);
        let clock_ns = present.clock_ns.wrapping_add(counted.wrapping_sub(now_ns));
        let corrected = ClockState {
            clock_ns,
            ..present
        };
        vm.set_clock(&corrected.into())?;
    }
    let now = ClockState::from(vm.clock()?);
    Ok(now.clock_ns.saturating_sub(clock.clock_ns))
}

fn clock_and_tsc(vm: &Vm, vcpu: &Vcpu) -> Result<(u64, u64)> {
    together(|| Ok(vm.clock()?.clock), || vcpu.tsc())
}

/// The value of `sample`, and the time at which it was taken.
fn together<T>(time: impl Fn() -> Result<u64>, sample: impl Fn() -> Result<T>) -> Result<(u64, T)> {
    let attempt = || {
        let before = time()?;
        let value = sample()?;
        let took = time()?.saturating_sub(before);
        Ok((took, before + took / 2, value))
    };
    let mut quickest = attempt()?;
    for _ in 1..ATTEMPTS {
        let next = attempt()?;
        if next.0 < quickest.0 {
            quickest = next;
        }
    }
    let (_, time, value) = quickest;
    Ok((time, value))
}

fn real_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}
