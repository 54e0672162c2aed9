//! The names of the balloon's figures in `vm.counters`.
//!
//! Counter names are constants, so all paths spell theirs out from one list.

use super::accounting::PathFigures;
use crate::reclaim::SkipReason;

/// Names of the figures of one path.
#[derive(Debug)]
pub(super) struct PathNames {
    figures: [&'static str; FIGURES],
    skipped: [&'static str; SkipReason::ALL.len()],
}

const FIGURES: usize = 13;

macro_rules! path_names {
    ($path:literal) => {
        PathNames {
            figures: [
                concat!($path, "_chains"),
                concat!($path, "_batches"),
                concat!($path, "_syscalls"),
                concat!($path, "_requested_ranges"),
                concat!($path, "_requested_bytes"),
                concat!($path, "_discarded_ranges"),
                concat!($path, "_discarded_bytes"),
                concat!($path, "_failed_ranges"),
                concat!($path, "_failed_bytes"),
                concat!($path, "_skipped_bytes"),
                concat!($path, "_latency_p50_us"),
                concat!($path, "_latency_p99_us"),
                concat!($path, "_latency_max_us"),
            ],
            skipped: [
                concat!($path, "_skipped_outside_ram_bytes"),
                concat!($path, "_skipped_duplicate_bytes"),
                concat!($path, "_skipped_unaligned_bytes"),
                concat!($path, "_skipped_backing_page_larger_bytes"),
                concat!($path, "_skipped_private_file_bytes"),
                concat!($path, "_skipped_unsupported_backing_bytes"),
                concat!($path, "_skipped_inhibited_bytes"),
                concat!($path, "_skipped_page_poison_bytes"),
                concat!($path, "_skipped_hint_stale_bytes"),
                concat!($path, "_skipped_hint_not_held_bytes"),
                concat!($path, "_skipped_reporting_paused_bytes"),
            ],
        }
    };
}

pub(super) const REPORT: PathNames = path_names!("report");
pub(super) const INFLATE: PathNames = path_names!("inflate");
pub(super) const HINT: PathNames = path_names!("hint");

/// The figures of a path under its names.
pub(super) fn of_path(
    names: &PathNames,
    path: &PathFigures,
) -> impl Iterator<Item = (&'static str, u64)> {
    let figures: [u64; FIGURES] = [
        path.chains,
        path.batches,
        path.syscalls,
        path.requested.ranges,
        path.requested.bytes,
        path.discarded.ranges,
        path.discarded.bytes,
        path.failed.ranges,
        path.failed.bytes,
        path.skipped.total(),
        path.latency.percentile_us(50),
        path.latency.percentile_us(99),
        path.latency.max_us(),
    ];
    let skipped = SkipReason::ALL.map(|reason| path.skipped.get(reason));
    let figures = names.figures.into_iter().zip(figures);
    figures.chain(names.skipped.into_iter().zip(skipped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_counter_of_each_reason_carries_its_name() {
        for reason in SkipReason::ALL {
            let name = REPORT.skipped[reason as usize];
            assert_eq!(name, format!("report_skipped_{}_bytes", reason.name()));
        }
    }

    #[test]
    fn skip_reasons_are_explained_to_operators() {
        let manual = include_str!("../../../docs/balloon.md");
        for reason in SkipReason::ALL {
            let row = format!("| `{}` |", reason.name());
            assert!(manual.contains(&row), "{row} is missing");
        }
    }
}
