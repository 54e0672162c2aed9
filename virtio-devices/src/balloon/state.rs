//! The saved state of the balloon. It does not include discarded memory, which is simply absent from guest RAM.
//!
//! Nor does it include times (latencies, rates, the age of statistics), because they are meaningless on another host.

use std::collections::BTreeMap;

use ::state::{Part, Saved, State, StateError, parts, require};
use serde::{Deserialize, Serialize};

use super::accounting::{GuestFaults, Path, PathFigures};
use super::hinting::HintingState;
use super::reporting_policy::ControlState;
use super::shared::Shared;
use crate::reclaim::{Extent, SkippedBytes};

const PART: Part = parts::BALLOON;
/// Upper bound of every counter, even of bytes; larger saved values would wrap around later.
const COUNTER_MAX: u64 = 1 << 62;

/// The values written by driver and host, and the balloon's counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// The target in pages.
    pub num_pages: u32,
    /// The balloon's size in pages, as the guest reports it.
    pub actual: u32,
    /// Id of the hinting run, as the guest sees it.
    pub free_page_hint_cmd_id: u32,
    /// The value with which the guest fills free pages.
    pub poison_val: u32,
    /// The run of free page hinting.
    pub hinting: HintingState,
    /// Reporting policy, pause and requested reports.
    pub control: ControlState,
    /// Reported ranges.
    pub report: PathState,
    /// Inflated pages.
    pub inflate: PathState,
    /// Hinted blocks.
    pub hint: PathState,
    /// Pages that the guest took back.
    pub deflate: ExtentState,
    /// Faults of the driver, by name.
    pub faults: BTreeMap<String, u64>,
}

impl State for BalloonState {
    const PART: Part = PART;
}

/// Ranges and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtentState {
    /// The number of ranges.
    pub ranges: u64,
    /// The number of bytes in all of them.
    pub bytes: u64,
}

impl From<Extent> for ExtentState {
    fn from(extent: Extent) -> Self {
        Self {
            ranges: extent.ranges,
            bytes: extent.bytes,
        }
    }
}

impl From<ExtentState> for Extent {
    fn from(state: ExtentState) -> Self {
        Self {
            ranges: state.ranges,
            bytes: state.bytes,
        }
    }
}

/// Counters of one path by which memory returns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathState {
    /// The guest's claims.
    pub requested: ExtentState,
    /// Memory discarded.
    pub discarded: ExtentState,
    /// Memory that failed to be discarded.
    pub failed: ExtentState,
    /// Bytes not discarded on purpose, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Chains completed.
    pub chains: u64,
    /// Batches processed.
    pub batches: u64,
    /// System calls that discard.
    pub syscalls: u64,
}

impl PathState {
    fn of(figures: &PathFigures) -> Self {
        let skipped = figures.skipped.iter().filter(|(_, bytes)| *bytes > 0);
        Self {
            requested: figures.requested.into(),
            discarded: figures.discarded.into(),
            failed: figures.failed.into(),
            skipped: skipped
                .map(|(reason, bytes)| (reason.name().to_owned(), bytes))
                .collect(),
            chains: figures.chains,
            batches: figures.batches,
            syscalls: figures.syscalls,
        }
    }

    fn counters(&self) -> impl Iterator<Item = u64> {
        let extents = [self.requested, self.discarded, self.failed];
        let plain = [self.chains, self.batches, self.syscalls];
        extents
            .into_iter()
            .flat_map(|extent| [extent.ranges, extent.bytes])
            .chain(plain)
            .chain(self.skipped.values().copied())
    }

    fn figures(&self, field: &'static str) -> Result<PathFigures, StateError> {
        possible(field, self.counters())?;
        let mut skipped = SkippedBytes::default();
        for (name, bytes) in &self.skipped {
            let reason = skipped
                .iter()
                .map(|(reason, _)| reason)
                .find(|it| it.name() == name);
            let unknown =
                || StateError::invalid(PART, field, format!("skipped for unknown {name:?}"));
            skipped.add(reason.ok_or_else(unknown)?, *bytes);
        }
        Ok(PathFigures {
            requested: self.requested.into(),
            discarded: self.discarded.into(),
            failed: self.failed.into(),
            skipped,
            chains: self.chains,
            batches: self.batches,
            syscalls: self.syscalls,
            ..PathFigures::default()
        })
    }
}

fn possible(
    field: &'static str,
    mut counters: impl Iterator<Item = u64>,
) -> Result<(), StateError> {
    let wrong = counters.find(|count| *count > COUNTER_MAX);
    require(wrong.is_none(), PART, field, || {
        format!("has counted to {wrong:?}")
    })
}

/// The saved state of the queue half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonWorkerState {
    /// Head of the statistics chain, kept until new statistics are requested.
    pub parked: Option<u16>,
}

impl State for BalloonWorkerState {
    const PART: Part = parts::BALLOON_WORKER;
}

impl Shared {
    pub(super) fn state(&self) -> BalloonState {
        let path = |path| PathState::of(&self.ledger.path(path));
        let faults = *self.ledger.faults();
        BalloonState {
            num_pages: self.config.num_pages(),
            actual: self.config.actual(),
            free_page_hint_cmd_id: self.config.hint_cmd_id(),
            poison_val: self.config.poison_val(),
            hinting: self.hinting.state(),
            control: self.control.state(),
            report: path(Path::Report),
            inflate: path(Path::Inflate),
            hint: path(Path::Hint),
            deflate: (*self.ledger.deflate()).into(),
            faults: faults
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
        }
    }

    pub(super) fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state = saved.read::<BalloonState>()?;
        let report = state.report.figures("report")?;
        let inflate = state.inflate.figures("inflate")?;
        let hint = state.hint.figures("hint")?;
        let HintingState {
            runs_requested,
            runs_completed,
            ..
        } = state.hinting;
        possible("hinting", [runs_requested, runs_completed].into_iter())?;
        possible(
            "deflate",
            [state.deflate.ranges, state.deflate.bytes].into_iter(),
        )?;
        possible("faults", state.faults.values().copied())?;
        let mut faults = GuestFaults::default();
        for (name, count) in &state.faults {
            require(faults.set(name, *count), PART, "faults", || {
                format!("has an unknown one: {name:?}")
            })?;
        }
        self.hinting
            .restore(&state.hinting, state.free_page_hint_cmd_id)?;
        self.control.restore(&state.control)?;
        self.config.restore(
            state.num_pages,
            state.actual,
            state.free_page_hint_cmd_id,
            state.poison_val,
        );
        *self.ledger.path(Path::Report) = report;
        *self.ledger.path(Path::Inflate) = inflate;
        *self.ledger.path(Path::Hint) = hint;
        *self.ledger.deflate() = state.deflate.into();
        *self.ledger.faults() = faults;
        Ok(())
    }
}
