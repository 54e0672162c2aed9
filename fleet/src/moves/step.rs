//! Decides the next step of a move, on the source and on the target. Pure.
//!
//! ```text
//!               target       target         source        target
//!   reserved ──────────► starting ──► receiving ──► sending ──► arrived ──► removed by the source
//!      │ target             │             │            │ source           when its VMM has ended
//!      │                    └─────────────┴────────────┼──► failing ──► failed
//!      └───────────────────────────────────────────────│────────────────▲ target
//!                                                      └──► lost
//! ```
//!
//! Only the two VMMs decide which of them runs the VM. No step resumes a VM, and only a VMM without a VM is ended. The
//! steps therefore decide how a move goes on, never who owns the VM.

use crate::cluster::{MovePhase, MoveRecord};

/// Time in which the target must be ready for the VM.
const PREPARE_MS: u64 = 60_000;
/// Time in which the source must begin to send the VM.
const RECEIVE_MS: u64 = 300_000;
/// How long the source waits for the target's reason after a failure.
const REASON_MS: u64 = 3000;

/// What the source sees of its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Here {
    /// The process of the record has ended, or has no VM.
    Gone,
    /// It does not respond.
    Silent,
    Vm {
        is_paused: bool,
        is_sending: bool,
    },
}

/// The result of this agent's request to send the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum SendOrder {
    /// None, or its result is unknown.
    #[default]
    Unknown,
    /// The VMM has begun.
    Accepted,
    /// The VMM has rejected it.
    Refused(String),
}

/// What a step of the source depends on.
#[derive(Clone, Debug)]
pub(super) struct SourceSight<'a> {
    pub(super) record: &'a MoveRecord,
    /// How long this agent has known the phase.
    pub(super) age_ms: u64,
    pub(super) here: Here,
    /// Whether the VM may no longer be sent, because it is being put in standby.
    pub(super) is_in_standby: bool,
    pub(super) order: &'a SendOrder,
    /// How long this agent has seen that the VM runs and is not being sent, after the request.
    pub(super) idle_ms: u64,
}

/// What the target sees at the VM's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum There {
    /// Nobody listens.
    Gone,
    /// It does not respond.
    Silent,
    /// A VMM without a VM.
    Empty,
    Vm {
        runs: bool,
    },
}

/// This agent's request to receive the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ReceiveOrder {
    /// This agent has made none.
    #[default]
    None,
    /// The VMM has not responded yet. The address, once it listens there.
    Waits(Option<String>),
    /// The VMM rejected it, because a request of an earlier agent is in progress.
    Busy,
    /// No VM was received.
    Failed(String),
    /// The VM was received.
    Done,
}

/// What a step of the target depends on.
#[derive(Clone, Debug)]
pub(super) struct TargetSight<'a> {
    pub(super) record: &'a MoveRecord,
    pub(super) age_ms: u64,
    pub(super) there: There,
    pub(super) order: &'a ReceiveOrder,
    /// Whether this agent has started the VMM.
    pub(super) is_started: bool,
    /// Why this host cannot run the VM; only known in `reserved`.
    pub(super) obstacle: Option<String>,
}

/// The next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// None yet.
    Wait,
    /// Write another phase, for a reason.
    Become(MovePhase, String),
    /// Write that the VM can be sent to this address.
    Listen(String),
    /// Write why the VM was not received.
    Refuse(String),
    /// Write that the VMM on the source has ended.
    TellEnd,
    /// Remove the record.
    Remove,
    /// Ask the VMM to send the VM.
    Send,
    /// Start the VMM.
    Start,
    /// Ask the VMM to receive the VM, at a new address.
    Receive,
    /// The same at the address of the record.
    ReceiveAgain,
    /// End the VMM, which has no VM.
    End,
}

fn failing(why: impl Into<String>) -> Step {
    Step::Become(MovePhase::Failing, why.into())
}

impl SourceSight<'_> {
    pub(super) fn step(&self) -> Step {
        match self.record.phase {
            MovePhase::Reserved | MovePhase::Starting => self.prepared(),
            MovePhase::Receiving => self.received(),
            MovePhase::Sending => self.sending(),
            MovePhase::Arrived if self.here == Here::Gone => Step::Remove,
            _ => Step::Wait,
        }
    }

    fn prepared(&self) -> Step {
        match self.here {
            Here::Gone => failing("the VM has ended"),
            _ if self.age_ms >= PREPARE_MS => failing(format!(
                "{} was not ready within {} s",
                self.record.to,
                PREPARE_MS / 1000
            )),
            _ => Step::Wait,
        }
    }

    fn received(&self) -> Step {
        match self.here {
            Here::Gone => failing("the VM has ended"),
            Here::Silent => Step::Wait,
            _ if self.is_in_standby => failing("the VM is being put in standby"),
            Here::Vm {
                is_sending: true, ..
            } => failing("the VM is already being sent elsewhere"),
            Here::Vm {
                is_paused: true, ..
            } => failing("the VM is paused"),
            Here::Vm { .. } => Step::Become(MovePhase::Sending, String::new()),
        }
    }

    fn sending(&self) -> Step {
        let refused = self.record.refused.as_deref();
        match (self.here, self.order, refused) {
            (Here::Gone, _, Some(why)) => {
                let text = format!("it has ended, or was lost with its VMM: {why}");
                Step::Become(MovePhase::Lost, text)
            }
            (Here::Gone, _, None) if !self.record.source_gone => Step::TellEnd,
            // The target will find out.
            (Here::Gone | Here::Silent, ..) => Step::Wait,
            // While it is paused, it may belong to the target. The operator decides if that does not end.
            (
                Here::Vm {
                    is_sending,
                    is_paused,
                },
                ..,
            ) if is_sending || is_paused => Step::Wait,
            (_, SendOrder::Refused(why), _) => failing(why),
            (_, _, Some(why)) => failing(why),
            (_, SendOrder::Unknown, None) => Step::Send,
            (_, SendOrder::Accepted, None) if self.idle_ms >= REASON_MS => {
                failing("the migration failed; the VMM's log has the reason")
            }
            _ => Step::Wait,
        }
    }
}

impl TargetSight<'_> {
    pub(super) fn step(&self) -> Step {
        match self.record.phase {
            MovePhase::Reserved => self.reserved(),
            MovePhase::Starting => self.starting(),
            MovePhase::Receiving | MovePhase::Sending => self.receiving(),
            MovePhase::Failing | MovePhase::Lost => self.failing(),
            MovePhase::Arrived | MovePhase::Failed => Step::Wait,
        }
    }

    fn reserved(&self) -> Step {
        let obstacle = self.obstacle.clone();
        let taken = (self.there != There::Gone).then(|| "another VMM has its socket".to_owned());
        match obstacle.or(taken) {
            Some(why) => Step::Become(MovePhase::Failed, why),
            None => Step::Become(MovePhase::Starting, String::new()),
        }
    }

    /// A VMM at the socket is that of this move: the socket was free before this phase.
    fn starting(&self) -> Step {
        if self.age_ms >= PREPARE_MS {
            return failing("the VMM at the target did not start in time");
        }
        match (self.there, self.order) {
            (There::Gone, _) if !self.is_started => Step::Start,
            (There::Gone | There::Silent, _) => Step::Wait,
            (There::Vm { .. }, _) => failing("another VM has its socket"),
            (There::Empty, ReceiveOrder::Waits(Some(url))) => Step::Listen(url.clone()),
            (There::Empty, ReceiveOrder::Failed(why)) => failing(why.clone()),
            (There::Empty, ReceiveOrder::None | ReceiveOrder::Busy) => Step::Receive,
            (There::Empty, _) => Step::Wait,
        }
    }

    fn receiving(&self) -> Step {
        let is_sending = self.record.phase == MovePhase::Sending;
        let gives_up = |why: &str| match is_sending {
            // Only the source knows whether the VM stays there.
            true if self.record.refused.is_none() => Step::Refuse(why.to_owned()),
            true => Step::Wait,
            false => failing(why),
        };
        match (self.there, self.order) {
            (There::Vm { runs: true }, _) => Step::Become(MovePhase::Arrived, String::new()),
            (There::Vm { .. } | There::Silent, _) => Step::Wait,
            (There::Gone, _) => gives_up("the VMM at the target has ended"),
            (There::Empty, ReceiveOrder::Failed(why)) => gives_up(why),
            // The VMM on the source had ended before this one was seen without the VM.
            (There::Empty, _) if self.record.source_gone => {
                gives_up("the VMM on the source has ended")
            }
            _ if !is_sending && self.age_ms >= RECEIVE_MS => {
                failing("the source did not send the VM in time")
            }
            // An agent before this one has asked. Unless that request is in progress, this one is accepted.
            (There::Empty, ReceiveOrder::None | ReceiveOrder::Busy)
                if self.record.refused.is_none() =>
            {
                Step::ReceiveAgain
            }
            _ => Step::Wait,
        }
    }

    fn failing(&self) -> Step {
        let is_lost = self.record.phase == MovePhase::Lost;
        match self.there {
            There::Empty => Step::End,
            There::Gone if !is_lost => Step::Become(MovePhase::Failed, self.record.why.clone()),
            _ => Step::Wait,
        }
    }
}
