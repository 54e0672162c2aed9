//! Decides the next step of a VM that is being saved or woken. Pure.
//!
//! ```text
//!            saved           ended
//!   saving ─────────► ending ─────► standby ──────► waking
//!     │ failed           │ resumed by   ▲   asked      │
//!     ▼                  ▼ another      └──────────────┤ the VMM that loads it has ended
//!   running ◄─────────────             running ◄───────┘ it has loaded the snapshot, and is paused
//!     └─► it runs, or has ended: the folder is removed
//! ```
//! In `saving` and `running`, the VM is its process; otherwise it is the folder. A process is resumed only in
//! `running`, and ended only in `ending`.

use crate::standby::Phase;

/// If a VMM has not ended after this time, it is killed: the VM is in the folder.
const KILL_AFTER_MS: u64 = 10_000;
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

/// Everything that a step depends on.
#[derive(Clone, Debug)]
pub(super) struct Sight<'a> {
    pub(super) phase: Phase,
    /// How long this agent has known the phase.
    pub(super) age_ms: u64,
    pub(super) save: &'a Save,
    /// Whether the VM was found to run when it was to be ended.
    pub(super) was_resumed: bool,
    /// Time since the last order to end or resume.
    pub(super) tried_ms_ago: Option<u64>,
    /// Whether the process of the record has ended.
    pub(super) has_ended: bool,
    /// Whether the folder has a complete snapshot.
    pub(super) is_complete: bool,
    /// Whether a process holds the lock.
    pub(super) is_locked: bool,
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
            Save::Unknown => "the agent ended meanwhile",
        };
        if !self.has_ended {
            return Step::Become(Phase::Running, format!("not saved: {why}"));
        }
        match (self.is_complete, self.save) {
            (false, _) => Step::Remove(format!("the VMM has ended: {why}")),
            // It was paused, and this agent has not resumed it.
            (true, Save::Ended(_)) => Step::Become(
                Phase::Standby,
                "the VMM ended when it had saved it".to_owned(),
            ),
            (true, _) => Step::GiveUp(
                "the VMM has ended without this agent, so the VM may have run after it was saved",
            ),
        }
    }

    fn ending(&self) -> Step {
        if self.has_ended {
            return Step::Become(Phase::Standby, "its memory is free".to_owned());
        }
        if self.was_resumed {
            let why = "another client has resumed it".to_owned();
            return Step::Become(Phase::Running, why);
        }
        match self.vm {
            _ if self.age_ms >= KILL_AFTER_MS && self.may_try() => Step::Kill,
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
            // Who woke it has ended, or is going to ask for this step.
            Some(vm) if vm.is_paused => Step::Become(Phase::Running, "loaded".to_owned()),
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
