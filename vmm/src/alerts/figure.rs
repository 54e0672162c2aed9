//! Figures by name: a number of `vm.reclaim-stats` by its path, or a counter of a device.

use std::collections::BTreeMap;

use api::{
    BalloonStats, GuestReporting, GuestSample, LastBatch, ReclaimPath, ReclaimStats, VmCounters,
};
use device_facts::SkipReason;
use serde_json::Value;

use super::NAME_LENGTH_MAX;

/// Figures that need a measurement of residency.
const MEASURED: &[&str] = &[
    "configured_bytes",
    "resident_bytes",
    "reclaimed_bytes",
    "repopulated_bytes",
    "swapped_bytes",
    "resident_sample_us",
    "resident_age_ms",
];
/// The map that omits zero entries.
const SPARSE: &str = "skipped_bytes";

/// The source of a figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    /// A number of `vm.reclaim-stats`, by the names that lead to it.
    Reclaim(Vec<String>),
    /// A counter of `vm.counters`.
    Counter { device: String, counter: String },
}

/// The data to read for a set of figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// `vm.reclaim-stats`.
    pub(crate) reclaim: bool,
    /// With a measurement of residency, which is the expensive part.
    pub(crate) residency: bool,
    /// `vm.counters`.
    pub(crate) counters: bool,
}

/// The values read at one moment; absent if not needed or not available.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    pub(crate) reclaim: Option<Value>,
    pub(crate) counters: Option<VmCounters>,
}

impl Figure {
    /// The figure called `name`, if such a figure can exist. Whether a device has a counter is known only while it
    /// runs.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let parts: Vec<_> = name.split('/').collect();
        if name.len() > NAME_LENGTH_MAX || parts.contains(&"") {
            return None;
        }
        let every = every_figure();
        if every.get(parts[0]).is_some() {
            return follow(&every, &parts)
                .filter(|leaf| leaf.is_u64())
                .map(|_| Self::Reclaim(parts.iter().map(|&part| part.to_owned()).collect()));
        }
        let [device, counter] = parts[..] else {
            return None;
        };
        Some(Self::Counter {
            device: device.to_owned(),
            counter: counter.to_owned(),
        })
    }

    /// Adds what this figure needs.
    pub(crate) fn add_needs(&self, needs: &mut Needs) {
        match self {
            Self::Reclaim(path) => {
                needs.reclaim = true;
                needs.residency |= MEASURED.contains(&path[0].as_str());
            }
            Self::Counter { .. } => needs.counters = true,
        }
    }

    /// Its value; `None` if it is currently unavailable.
    pub(crate) fn read(&self, sources: &Sources) -> Option<u64> {
        match self {
            Self::Reclaim(path) => {
                let stats = sources.reclaim.as_ref()?;
                let (name, parents) = path.split_last()?;
                let parent = follow(stats, parents)?;
                match parent.get(name) {
                    Some(value) => value.as_u64(),
                    None => (parents.last().is_some_and(|last| last == SPARSE)).then_some(0),
                }
            }
            Self::Counter { device, counter } => {
                let counters = sources.counters.as_ref()?;
                counters.get(device)?.get(counter).copied()
            }
        }
    }
}

fn follow<'a, T: AsRef<str>>(start: &'a Value, path: &[T]) -> Option<&'a Value> {
    path.iter()
        .try_fold(start, |value, name| value.get(name.as_ref()))
}

/// Statistics with every optional field present.
fn every_figure() -> Value {
    let mut stats = BalloonStats::default();
    for statistic in BalloonStats::TABLE {
        stats.set(statistic.tag, 0);
    }
    let mut reporting = GuestReporting::default();
    for statistic in GuestReporting::TABLE {
        reporting.set(statistic.tag, 0);
    }
    let skipped: BTreeMap<_, _> = SkipReason::ALL
        .iter()
        .map(|reason| (reason.name().to_owned(), 0))
        .collect();
    let path = ReclaimPath {
        skipped_bytes: skipped,
        last_batch: Some(LastBatch::default()),
        ..ReclaimPath::default()
    };
    let every = ReclaimStats {
        swapped_bytes: Some(0),
        obtainable_bytes: Some(0),
        report: path.clone(),
        inflate: path.clone(),
        hint: path,
        guest: Some(GuestSample {
            stats,
            reporting: Some(reporting),
            age_ms: 0,
        }),
        ..ReclaimStats::default()
    };
    // Serialising numbers and strings cannot fail; without the result, no figure would be known.
    serde_json::to_value(every).unwrap_or_default()
}
