//! Measures how long VMs have been idle.

use std::collections::BTreeMap;

use crate::config::PolicyConfig;
use crate::host::ProcessIdentity;
use crate::sample::Activity;

/// The VMs that are watched, by name.
#[derive(Debug, Default)]
pub(super) struct IdleVms(BTreeMap<String, Watch>);

#[derive(Clone, Copy, Debug)]
struct Watch {
    process: ProcessIdentity,
    at_ms: u64,
    activity: Activity,
    /// The first sample of the idle time.
    since_ms: Option<u64>,
}

impl IdleVms {
    /// Adds a sample, and returns for how long the VM has been idle, ms. Activity between two samples counts as spread
    /// over the time between them.
    pub(super) fn sampled(
        &mut self,
        name: &str,
        process: ProcessIdentity,
        (at_ms, activity): (u64, Activity),
        policy: &PolicyConfig,
    ) -> u64 {
        let before = self.0.get(name).filter(|watch| watch.process == process);
        let since_ms = before.and_then(|before| {
            let first_ms = before.since_ms.unwrap_or(before.at_ms);
            before.is_idle(at_ms, activity, policy).then_some(first_ms)
        });
        let watch = Watch {
            process,
            at_ms,
            activity,
            since_ms,
        };
        self.0.insert(name.to_owned(), watch);
        since_ms.map_or(0, |since_ms| at_ms.saturating_sub(since_ms))
    }

    /// Begins again with a VM, or forgets it.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Forgets all VMs that do not exist any more.
    pub(super) fn keep(&mut self, exists: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| exists(name));
    }
}

impl Watch {
    /// Whether the VM was idle from this sample to the next one.
    fn is_idle(&self, at_ms: u64, activity: Activity, policy: &PolicyConfig) -> bool {
        let cpu_ms = activity.cpu_ms.checked_sub(self.activity.cpu_ms);
        let io_bytes = activity.io_bytes.checked_sub(self.activity.io_bytes);
        let (Some(cpu_ms), Some(io_bytes)) = (cpu_ms, io_bytes) else {
            // The counters have begun again.
            return false;
        };
        let elapsed_ms = at_ms.saturating_sub(self.at_ms);
        let io_max = u128::from(policy.idle_io.0) * u128::from(elapsed_ms);
        cpu_ms as f64 <= policy.idle_cpu.0 * elapsed_ms as f64
            && u128::from(io_bytes) * 1000 <= io_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Millis;
    use crate::model::{Bytes, Fraction};

    const PROCESS: ProcessIdentity = ProcessIdentity {
        pid: 7,
        start_ticks: 1,
    };

    fn policy() -> PolicyConfig {
        PolicyConfig {
            idle_standby: Millis(60_000),
            idle_cpu: Fraction(0.02),
            idle_io: Bytes(1000),
            ..PolicyConfig::default()
        }
    }

    /// The idle times after samples of one VM: time, processor time, bytes.
    fn times(samples: &[(u64, u64, u64)]) -> Vec<u64> {
        let mut vms = IdleVms::default();
        let sampled = samples.iter().map(|&(at_ms, cpu_ms, io_bytes)| {
            let activity = Activity { cpu_ms, io_bytes };
            vms.sampled("a", PROCESS, (at_ms, activity), &policy())
        });
        sampled.collect()
    }

    #[test]
    fn idle_time_is_the_time_without_work() {
        let idle = [(0, 500, 9), (5000, 600, 5009), (10_000, 650, 5009)];
        assert_eq!(times(&idle), [0, 5000, 10_000]);
    }

    #[test]
    fn work_of_either_kind_ends_it() {
        let cpu = [(0, 0, 0), (5000, 0, 0), (10_000, 101, 0), (15_000, 101, 0)];
        assert_eq!(times(&cpu), [0, 5000, 0, 5000]);
        let io = [
            (0, 0, 0),
            (5000, 0, 0),
            (10_000, 0, 5001),
            (15_000, 0, 5001),
        ];
        assert_eq!(times(&io), [0, 5000, 0, 5000]);
    }

    #[test]
    fn counters_that_begin_again_or_are_made_up_are_no_idle_time() {
        assert_eq!(
            times(&[(0, 9, 9), (5000, 8, 9), (10_000, 8, 9)]),
            [0, 0, 5000]
        );
        assert_eq!(times(&[(0, 0, 9), (5000, 0, 8)]), [0, 0]);
        assert_eq!(times(&[(0, 0, 0), (u64::MAX, u64::MAX, u64::MAX)]), [0, 0]);
        assert_eq!(times(&[(9, 0, 0), (0, 0, 0)]), [0, 0]);
    }

    #[test]
    fn another_process_begins_again() {
        let mut vms = IdleVms::default();
        let other = ProcessIdentity { pid: 8, ..PROCESS };
        let none = Activity::default();
        let mut sampled = |process, at_ms| vms.sampled("a", process, (at_ms, none), &policy());
        assert_eq!(sampled(PROCESS, 0), 0);
        assert_eq!(sampled(PROCESS, 5000), 5000);
        assert_eq!(sampled(other, 10_000), 0);
        assert_eq!(sampled(other, 15_000), 5000);
        vms.forget("a");
        assert_eq!(vms.sampled("a", other, (20_000, none), &policy()), 0);
        vms.keep(|name| name != "a");
        assert_eq!(vms.sampled("a", other, (25_000, none), &policy()), 0);
    }
}
