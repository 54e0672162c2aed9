//! Decides the next step of a VM that is being saved or woken; a pure function.
//!
//! ```text
//!            saved           ended
//!   saving ─────────► ending ─────► standby ──────► waking
//!     │ failed           │ resumed by   ▲   asked      │
//!     ▼                  ▼ another      └──────────────┤ the VMM that loads it has ended
//!   running ◄─────────────             running ◄───────┘ it has loaded the snapshot, and is paused
//!     └─► it runs, or has ended: the folder is removed
//! ```
//! If the VMM ends in `saving` or `ending` without an order of this agent, another client may have resumed the VM after
//! it was saved. The operator decides then.
//!
//! In `saving` and `running`, the VM is its process; otherwise it is the folder. A process is resumed only in
//! `running`, and ended only in `ending`.

use crate::standby::Phase;

/// If a paused VMM has not ended after this time, it is killed: the VM is in the folder.
const KILL_AFTER_MS: u64 = 10_000;
/// The reason to give up.
const MAY_HAVE_RUN: &str =
    "the VMM has ended without this agent, so the VM may have run after it was saved";
/// Time between two attempts to end or resume a VM.
const AGAIN_MS: u64 = 2000;

/// How far the save is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Save {
    /// An earlier agent ordered it.
    #[default]
    Unknown,
    /// The order is in progress.
    Ordered,
    /// The order has ended; the reason if it failed.
    Ended(Result<(), String>),
}

/// The result of this agent's orders to end the VMM in `ending`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum EndOrder {
    /// None found the state of the VM.
    #[default]
    Unknown,
    /// The first one is in progress.
    InProgress,
    /// The VM was paused, and its VMM was asked to end.
    Paused,
    /// The VM was not paused: another client has resumed it.
    Resumed,
}

/// Everything that a step depends on.
#[derive(Clone, Debug)]
pub(super) struct Sight<'a> {
    pub(super) phase: Phase,
    /// How long this agent has known the phase.
    pub(super) age_ms: u64,
    pub(super) save: &'a Save,
    pub(super) end: EndOrder,
    /// Time since the last order to end or resume.
    pub(super) tried_ms_ago: Option<u64>,
    /// Whether the process of the record has ended.
    pub(super) has_ended: bool,
    /// Whether the folder has a complete snapshot; in `ending`, also if that is unknown.
    pub(super) is_complete: bool,
    /// Whether a process holds the lock.
    pub(super) is_locked: bool,
    /// Whether the client that wakes the VM kills the VMM.
    pub(super) is_abandoned: bool,
    /// The VM at the socket, if its process is that of the record or, in `waking`, has the lock open.
    pub(super) vm: Option<SeenVm>,
}

/// A VM that responds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SeenVm {
    /// Whether it is known to run, and no order may still change that.
    pub(super) runs: bool,
    pub(super) is_paused: bool,
    /// Whether an order is in progress.
    pub(super) is_busy: bool,
}

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// None yet.
    Wait,
    /// End the VMM through its API.
    End,
    /// Kill the VMM.
    Kill,
    /// Resume the VM.
    Resume,
    /// Write another phase to the record.
    Become(Phase, String),
    /// Remove the folder.
    Remove(String),
    /// Leave everything to the operator.
    GiveUp(&'static str),
}

impl Sight<'_> {
    pub(super) fn step(&self) -> Step {
        match self.phase {
            Phase::Saving => self.saving(),
            Phase::Ending => self.ending(),
            Phase::Standby => Step::Wait,
            Phase::Waking => self.waking(),
            Phase::Running => self.running(),
        }
    }

    fn saving(&self) -> Step {
        let why = match self.save {
            Save::Ordered => return Step::Wait,
            Save::Ended(Ok(())) => return Step::Become(Phase::Ending, "saved".to_owned()),
            Save::Ended(Err(why)) => why.as_str(),
            Save::Unknown => "the agent ended during the save",
        };
        if !self.has_ended {
            return Step::Become(Phase::Running, format!("not saved: {why}"));
        }
        match self.is_complete {
            false => Step::Remove(format!("the VMM has ended: {why}")),
            true => Step::GiveUp(MAY_HAVE_RUN),
        }
    }

    fn ending(&self) -> Step {
        let runs = self.vm.is_some_and(|vm| vm.runs);
        // First of all: then the folder is outdated, even if the VM has ended since.
        if self.end == EndOrder::Resumed || runs {
            let why = "another client has resumed it".to_owned();
            return Step::Become(Phase::Running, why);
        }
        let is_paused = self.end == EndOrder::Paused;
        if self.has_ended {
            return match self.end {
                EndOrder::Paused => Step::Become(Phase::Standby, "its memory is free".to_owned()),
                EndOrder::InProgress
                    if self.tried_ms_ago.is_some_and(|ago| ago < KILL_AFTER_MS) =>
                {
                    Step::Wait
                }
                _ => Step::GiveUp(MAY_HAVE_RUN),
            };
        }
        if !self.is_complete && self.end == EndOrder::Unknown {
            let why = "the snapshot cannot be used".to_owned();
            return Step::Become(Phase::Running, why);
        }
        match self.vm {
            _ if is_paused && self.age_ms >= KILL_AFTER_MS && self.may_try() => Step::Kill,
            Some(vm) if !vm.is_busy && self.may_try() => Step::End,
            _ => Step::Wait,
        }
    }

    fn waking(&self) -> Step {
        match self.vm {
            _ if !self.is_locked => Step::Become(
                Phase::Standby,
                "the VMM that loaded it has ended".to_owned(),
            ),
            // The client has ended, or is going to request this step.
            Some(vm) if vm.is_paused && !self.is_abandoned => {
                Step::Become(Phase::Running, "loaded".to_owned())
            }
            _ => Step::Wait,
        }
    }

    fn running(&self) -> Step {
        match self.vm {
            _ if self.has_ended => Step::Remove("the VM has ended".to_owned()),
            Some(vm) if vm.runs => Step::Remove("the VM runs".to_owned()),
            Some(vm) if !vm.is_busy && self.may_try() => Step::Resume,
            _ => Step::Wait,
        }
    }

    fn may_try(&self) -> bool {
        self.tried_ms_ago.is_none_or(|ago| ago >= AGAIN_MS)
    }
}
