//! The names of the balloon's figures in `vm.counters`: each path has the figures of one list and the skip reasons.

use std::sync::LazyLock;

use device_facts::SkipReason;

use super::accounting::PathFigures;

type Figure = (&'static str, fn(&PathFigures) -> u64);

/// The counters of a path.
const FIGURES: [Figure; 13] = [
    ("chains", |path| path.chains),
    ("batches", |path| path.batches),
    ("syscalls", |path| path.syscalls),
    ("requested_ranges", |path| path.requested.ranges),
    ("requested_bytes", |path| path.requested.bytes),
    ("discarded_ranges", |path| path.discarded.ranges),
    ("discarded_bytes", |path| path.discarded.bytes),
    ("failed_ranges", |path| path.failed.ranges),
    ("failed_bytes", |path| path.failed.bytes),
    ("skipped_bytes", |path| path.skipped.total()),
    ("latency_p50_us", |path| path.latency.percentile_us(50)),
    ("latency_p99_us", |path| path.latency.percentile_us(99)),
    ("latency_max_us", |path| path.latency.max_us()),
];

/// The names of one path's counters: the figures, then the skip reasons.
type PathNames = LazyLock<Vec<String>>;

pub(super) static REPORT: PathNames = LazyLock::new(|| names_of("report"));
pub(super) static INFLATE: PathNames = LazyLock::new(|| names_of("inflate"));
pub(super) static HINT: PathNames = LazyLock::new(|| names_of("hint"));

fn names_of(path: &str) -> Vec<String> {
    let figures = FIGURES.iter().map(|(name, _)| format!("{path}_{name}"));
    let skipped = SkipReason::ALL
        .iter()
        .map(|reason| format!("{path}_skipped_{}_bytes", reason.name()));
    figures.chain(skipped).collect()
}

/// The figures of a path under its names.
pub(super) fn of_path(
    names: &'static PathNames,
    path: &PathFigures,
) -> impl Iterator<Item = (&'static str, u64)> {
    let figures = FIGURES.iter().map(|(_, figure)| figure(path));
    let skipped = SkipReason::ALL
        .iter()
        .map(|reason| path.skipped.get(*reason));
    names.iter().map(String::as_str).zip(figures.chain(skipped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_counter_of_each_reason_carries_its_name() {
        for reason in SkipReason::ALL {
            let mut path = PathFigures::default();
            path.skipped.add(*reason, 5);
            let name = format!("report_skipped_{}_bytes", reason.name());
            let counters: Vec<_> = of_path(&REPORT, &path).filter(|(_, it)| *it > 0).collect();
            assert_eq!(counters, [("report_skipped_bytes", 5), (name.as_str(), 5)]);
        }
    }
}
