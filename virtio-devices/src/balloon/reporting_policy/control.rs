//! Controls the guest's reporting: policy, pause, resume, report now.
//!
//! ```text
//!            pause, driver supports a policy
//!   Running ────────────────────────► Pausing (reports still discarded)
//!    ▲   │                               │  the driver acknowledges, or the deadline
//!    │   │ pause, any other driver       │  passes, or the driver is gone
//!    │   └────────────────┐              │
//!    │ resume             ▼              ▼
//!    └───────────────── gate closed: reports are no longer discarded
//!                         Pausing until the current batch is done, then Paused
//! ```
//!
//! If a driver acknowledges only after the device has closed the gate, the pause still counts as confirmed. A pause
//! outlives drivers: the next driver finds the flag set, and the gate stays closed, confirmed or not.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ::state::{Part, StateError, parts, require};
use device_facts::policy_space::{VIRTIO_BALLOON_REPORTING_AGAIN, VIRTIO_BALLOON_REPORTING_PAUSED};
use device_facts::{PausePhase, PolicySetting, ReportingPolicy};
use serde::{Deserialize, Serialize};

use super::fields::{FieldWrite, Fields, WordsState};
use super::status::{PolicyStatus, ReportNowStatus, SettingState};
use crate::Unpoisoned;
use crate::reclaim::{DiscardSwitch, InhibitGuard, InhibitReason};

/// Polling interval of a closed gate, until the last batch has passed it.
const SETTLE_LOOK: Duration = Duration::from_millis(2);
/// Maximum time to wait for the last batch: many times the longest discard of one batch.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// Reasons why the guest's reporting cannot be controlled this way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportingError {
    /// Not configured, or guest memory cannot be discarded in blocks.
    #[error("free page reporting is not configured, or the guest's memory does not support it")]
    ReportingNotOffered,
    /// The feature is off.
    #[error("the balloon is not configured with reporting_policy=on")]
    PolicyNotOffered,
    /// No driver, or one without the feature.
    #[error("the guest runs no driver that supports VIRTIO_BALLOON_F_REPORTING_POLICY")]
    GuestDeclined,
    /// The driver has reported that it does not support this request.
    #[error("the guest's driver does not follow {0}")]
    NotFollowed(&'static str),
    /// Another request must be completed first.
    #[error("reporting is paused")]
    Paused,
}

const PART: Part = parts::BALLOON;

/// The saved policy, pause and report requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlState {
    /// The fields of both sides.
    pub words: WordsState,
    /// Present while a pause is requested or complete.
    pub pause: Option<PauseState>,
    /// The request for a full report that the driver has not completed.
    pub report_now_owed: Option<u32>,
}

/// A pause of reporting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseState {
    /// Generation of the policy that requests it.
    pub generation: u32,
    /// Whether the driver has confirmed it.
    pub by_guest: bool,
    /// Whether reports are no longer discarded.
    pub closed: bool,
}

/// The state under its lock, and the condition variable for its changes.
#[derive(Debug)]
pub(in crate::balloon) struct Control {
    policy_offered: bool,
    state: Mutex<State>,
    changed: Condvar,
    /// Passed by each batch of reports.
    gate: Arc<DiscardSwitch>,
}

#[derive(Debug, Default)]
struct State {
    fields: Fields,
    /// A driver is active.
    driver: bool,
    /// The driver supports a policy.
    accepted: bool,
    /// The generation that requests the pause, and its progress.
    pause: Option<Pause>,
    /// The pending request of the current driver.
    report_now_owed: Option<u32>,
}

#[derive(Debug)]
struct Pause {
    generation: u32,
    by_guest: bool,
    closed: Option<Closed>,
}

#[derive(Debug)]
struct Closed {
    guard: InhibitGuard,
    settled: bool,
}

impl Control {
    pub(in crate::balloon) fn new(policy_offered: bool, gate: Arc<DiscardSwitch>) -> Self {
        Self {
            policy_offered,
            state: Mutex::default(),
            changed: Condvar::new(),
            gate,
        }
    }

    pub(in crate::balloon) fn state(&self) -> ControlState {
        let state = self.lock();
        ControlState {
            words: state.fields.state(),
            pause: state.pause.as_ref().map(|pause| PauseState {
                generation: pause.generation,
                by_guest: pause.by_guest,
                closed: pause.closed.is_some(),
            }),
            report_now_owed: state.report_now_owed,
        }
    }

    /// Continues from a saved state. The accepted features show whether there is a driver.
    pub(in crate::balloon) fn restore(&self, saved: &ControlState) -> Result<(), StateError> {
        let fields = Fields::from_state(&saved.words)?;
        let flagged = fields.flags & VIRTIO_BALLOON_REPORTING_PAUSED != 0;
        let pause_is_possible = saved
            .pause
            .is_none_or(|pause| pause.generation <= fields.generation);
        require(
            flagged == saved.pause.is_some() && pause_is_possible,
            PART,
            "pause",
            || format!("cannot be {:?} with flags {:#x}", saved.pause, fields.flags),
        )?;
        let owed = saved.report_now_owed;
        let owed_is_possible = owed.is_none_or(|id| id == fields.report_now_id && id > 0);
        require(owed_is_possible, PART, "report_now_owed", || {
            format!("is {owed:?}, the latest is {}", fields.report_now_id)
        })?;
        let mut state = self.lock();
        state.fields = fields;
        state.report_now_owed = owed;
        state.pause = saved.pause.map(|saved| {
            let mut pause = Pause {
                generation: saved.generation,
                by_guest: saved.by_guest,
                closed: None,
            };
            if saved.closed {
                pause.close(&self.gate);
            }
            pause
        });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only plain stores run under the lock, so no holder can panic.
        self.state.lock().unpoisoned()
    }

    /// Handles a driver's acceptance of features.
    pub(in crate::balloon) fn driver_came(&self, takes_policy: bool) {
        let mut state = self.lock();
        state.driver = true;
        state.accepted = self.policy_offered && takes_policy;
    }

    /// Handles the loss of the driver: an unconfirmed pause becomes the device's, and pending requests are dropped.
    pub(in crate::balloon) fn driver_went(&self) {
        let mut state = self.lock();
        state.driver = false;
        state.accepted = false;
        state.fields.forget_driver();
        state.report_now_owed = None;
        if let Some(pause) = &mut state.pause {
            pause.by_guest = false;
            pause.close(&self.gate);
        }
        self.changed.notify_all();
    }

    /// The policy's part of the configuration space, if there is one.
    pub(in crate::balloon) fn config_bytes(&self) -> Option<impl AsRef<[u8]> + use<>> {
        self.policy_offered.then(|| self.lock().fields.bytes())
    }

    /// Handles a write by the driver to the configuration space.
    pub(in crate::balloon) fn write_config(&self, offset: u64, data: &[u8]) -> FieldWrite {
        let mut state = self.lock();
        if !state.accepted {
            return FieldWrite::Ignored;
        }
        let written = state.fields.write(offset, data);
        if written == FieldWrite::Taken {
            state.take_answers(&self.gate);
            self.changed.notify_all();
        }
        written
    }

    /// Sets the policy. The caller sends the configuration change interrupt.
    pub(in crate::balloon) fn set_policy(&self, policy: ReportingPolicy) {
        let mut state = self.lock();
        let flags = state.fields.flags;
        state.fields.change(policy, flags);
    }

    /// Requests a pause; the caller sends the configuration change interrupt. A second request has no effect.
    pub(in crate::balloon) fn pause(&self) {
        let mut state = self.lock();
        if state.pause.is_some() {
            return;
        }
        state.set_flag(VIRTIO_BALLOON_REPORTING_PAUSED, true);
        let mut pause = Pause {
            generation: state.fields.generation,
            by_guest: false,
            closed: None,
        };
        if !state.accepted {
            pause.close(&self.gate);
        }
        state.pause = Some(pause);
    }

    /// Waits until reports are no longer discarded. If the guest has not confirmed by `deadline`, the gate closes
    /// without it. The result is then `Pausing` only if a batch is still in progress after [`SETTLE_MAX`], and
    /// `Running` only if reporting was resumed in the meantime.
    pub(in crate::balloon) fn wait_for_pause(&self, deadline: Instant) -> PausePhase {
        let mut state = self.lock();
        loop {
            let phase = state.phase();
            if phase != PausePhase::Pausing {
                return phase;
            }
            let now = Instant::now();
            let pause = state.pause.as_mut().expect("there is one while pausing");
            if now >= deadline {
                pause.close(&self.gate);
            }
            if now >= deadline + SETTLE_MAX {
                return phase;
            }
            let patience = match &pause.closed {
                Some(_) => SETTLE_LOOK,
                None => deadline.saturating_duration_since(now),
            };
            let waited = self.changed.wait_timeout(state, patience);
            state = waited.unpoisoned().0;
        }
    }

    /// Ends a pause; the caller sends the configuration change interrupt. Has no effect without a pause.
    pub(in crate::balloon) fn resume(&self) {
        let mut state = self.lock();
        // The gate opens first: reports from a driver that has seen the flag cleared must be accepted.
        if state.pause.take().is_some() {
            state.set_flag(VIRTIO_BALLOON_REPORTING_PAUSED, false);
            self.changed.notify_all();
        }
    }

    /// Requests a report of all free memory, with `again` also of memory that was reported before; the caller sends the
    /// configuration change interrupt. Returns the number of the request.
    pub(in crate::balloon) fn report_now(&self, again: bool) -> Result<u32, ReportingError> {
        let mut state = self.lock();
        if !self.policy_offered {
            return Err(ReportingError::PolicyNotOffered);
        }
        if !state.accepted {
            return Err(ReportingError::GuestDeclined);
        }
        if state.pause.is_some() {
            return Err(ReportingError::Paused);
        }
        let wanted = [
            (PolicySetting::ReportNow, true),
            (PolicySetting::ReportAgain, again),
        ];
        // A driver that has received no policy has not announced what it supports.
        for (setting, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
            if state.fields.followed.is_some_and(|it| !it.follows(setting)) {
                return Err(ReportingError::NotFollowed(setting.name()));
            }
        }
        state.set_flag(VIRTIO_BALLOON_REPORTING_AGAIN, again);
        let id = state.fields.report_now_id.wrapping_add(1).max(1);
        state.fields.report_now_id = id;
        state.report_now_owed = Some(id);
        Ok(id)
    }

    pub(in crate::balloon) fn phase(&self) -> PausePhase {
        self.lock().phase()
    }

    pub(in crate::balloon) fn report_now_status(&self) -> ReportNowStatus {
        let state = self.lock();
        ReportNowStatus {
            id: state.fields.report_now_id,
            pending: state.report_now_owed.is_some(),
            done_id: state.fields.report_now_done,
        }
    }

    pub(in crate::balloon) fn policy_status(&self) -> PolicyStatus {
        let state = self.lock();
        let mut settings = [SettingState::NotOffered; PolicySetting::COUNT];
        if self.policy_offered {
            for (slot, setting) in settings.iter_mut().zip(PolicySetting::ALL) {
                *slot = state.setting(*setting);
            }
        }
        PolicyStatus {
            offered: self.policy_offered,
            generation: state.fields.generation,
            acknowledged: state.fields.followed.map_or(0, |it| it.generation),
            settings,
        }
    }
}

impl State {
    fn set_flag(&mut self, flag: u32, on: bool) {
        let flags = self.fields.flags & !flag | if on { flag } else { 0 };
        if flags != self.fields.flags {
            self.fields.change(self.fields.policy, flags);
        }
    }

    /// Evaluates the fields that the driver has written.
    fn take_answers(&mut self, gate: &Arc<DiscardSwitch>) {
        if let (Some(pause), Some(followed)) = (&mut self.pause, self.fields.followed)
            && followed.generation >= pause.generation
        {
            // A driver that does not support pauses has announced that, so there is no confirmation to wait for.
            pause.by_guest = followed.follows(PolicySetting::Pause);
            pause.close(gate);
        }
        if self.report_now_owed == Some(self.fields.report_now_done) {
            self.report_now_owed = None;
        }
    }

    fn phase(&mut self) -> PausePhase {
        let Some(pause) = &mut self.pause else {
            return PausePhase::Running;
        };
        let by_guest = pause.by_guest;
        let settled = pause.closed.as_mut().is_some_and(Closed::is_settled);
        match (settled, by_guest) {
            (false, _) => PausePhase::Pausing,
            (true, true) => PausePhase::PausedByGuest,
            (true, false) => PausePhase::PausedByDevice,
        }
    }

    fn setting(&self, setting: PolicySetting) -> SettingState {
        if !self.driver {
            return SettingState::DriverNotReady;
        }
        if !self.accepted {
            return SettingState::GuestDeclined;
        }
        if self.fields.generation == 0 {
            return SettingState::NotSet;
        }
        match self.fields.followed {
            Some(it) if it.generation == self.fields.generation => match it.follows(setting) {
                true => SettingState::InEffect,
                false => SettingState::NotFollowed,
            },
            _ => SettingState::NotAcknowledged,
        }
    }
}

impl Pause {
    fn close(&mut self, gate: &Arc<DiscardSwitch>) {
        self.closed.get_or_insert_with(|| Closed {
            guard: gate.inhibit(InhibitReason::ReportingPaused),
            settled: false,
        });
    }
}

impl Closed {
    /// Whether no batch is passing the gate. Once true, this stays true.
    fn is_settled(&mut self) -> bool {
        self.settled = self.settled || self.guard.is_settled();
        self.settled
    }
}

#[cfg(test)]
mod tests {
    use device_facts::policy_space::{GUEST_GENERATION, GUEST_SETTINGS, REPORT_NOW_DONE};

    use super::*;

    const ALL: u32 = 0xff;

    fn new(policy_offered: bool) -> Control {
        Control::new(policy_offered, Arc::default())
    }

    fn control(accepted: bool) -> Control {
        let control = new(true);
        control.driver_came(accepted);
        control
    }

    fn answer(control: &Control, settings: u32) {
        let generation = control.lock().fields.generation;
        for (offset, word) in [(GUEST_SETTINGS, settings), (GUEST_GENERATION, generation)] {
            let written = control.write_config(offset, &word.to_le_bytes());
            assert_eq!(written, FieldWrite::Taken);
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn pause_of_a_driver_that_follows_is_confirmed_by_it() {
        let control = control(true);
        control.pause();
        assert_eq!(control.phase(), PausePhase::Pausing);
        assert!(control.gate.begin().is_ok(), "its reports are still taken");
        answer(&control, ALL);
        assert_eq!(control.phase(), PausePhase::PausedByGuest);
        assert!(
            control.gate.begin().is_err(),
            "its word is not all there is"
        );
        control.resume();
        assert_eq!(control.phase(), PausePhase::Running);
        assert!(control.gate.begin().is_ok());
    }

    #[test]
    fn pause_without_a_capable_driver_is_the_devices_at_once() {
        for control in [new(false), new(true), control(false)] {
            control.pause();
            control.pause();
            assert_eq!(control.phase(), PausePhase::PausedByDevice);
            assert!(control.gate.begin().is_err());
            control.resume();
            assert_eq!(control.phase(), PausePhase::Running);
        }
    }

    #[test]
    fn driver_that_says_it_does_not_pause_is_not_waited_for() {
        let control = control(true);
        control.pause();
        answer(&control, ALL & !PolicySetting::Pause.mask());
        assert_eq!(control.phase(), PausePhase::PausedByDevice);
    }

    #[test]
    fn answer_to_an_older_generation_confirms_nothing() {
        let control = control(true);
        control.set_policy(ReportingPolicy::default());
        control.pause();
        control.write_config(GUEST_SETTINGS, &ALL.to_le_bytes());
        control.write_config(GUEST_GENERATION, &1_u32.to_le_bytes());
        assert_eq!(control.phase(), PausePhase::Pausing);
        control.write_config(GUEST_GENERATION, &2_u32.to_le_bytes());
        assert_eq!(control.phase(), PausePhase::PausedByGuest);
    }

    #[test]
    fn guest_that_does_not_confirm_in_time_is_shut_out_and_may_confirm_later() {
        let control = control(true);
        control.pause();
        assert_eq!(control.wait_for_pause(soon()), PausePhase::PausedByDevice);
        answer(&control, ALL);
        assert_eq!(control.phase(), PausePhase::PausedByGuest);
    }

    #[test]
    fn pause_waits_for_the_batch_that_is_under_way() {
        let control = control(false);
        let batch = control.gate.begin().expect("nobody has paused");
        control.pause();
        assert_eq!(control.phase(), PausePhase::Pausing);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| control.wait_for_pause(Instant::now()));
            drop(batch);
            assert_eq!(waiter.join().unwrap(), PausePhase::PausedByDevice);
        });
        // A report that is rejected at the gate does not undo that.
        assert!(control.gate.begin().is_err());
        assert_eq!(control.phase(), PausePhase::PausedByDevice);
    }

    #[test]
    fn pause_outlives_its_driver_and_asks_the_next_one() {
        let control = control(true);
        control.pause();
        control.driver_went();
        assert_eq!(control.phase(), PausePhase::PausedByDevice);
        control.driver_came(true);
        assert_eq!(control.phase(), PausePhase::PausedByDevice);
        answer(&control, ALL);
        assert_eq!(control.phase(), PausePhase::PausedByGuest);
        control.driver_went();
        assert_eq!(control.phase(), PausePhase::PausedByDevice);
    }

    #[test]
    fn resume_wakes_whoever_waits_for_the_pause() {
        let control = &control(true);
        control.pause();
        std::thread::scope(|scope| {
            let far = Instant::now() + Duration::from_secs(600);
            let waiter = scope.spawn(move || control.wait_for_pause(far));
            control.resume();
            assert_eq!(waiter.join().unwrap(), PausePhase::Running);
        });
    }

    #[test]
    fn report_now_is_refused_to_whoever_cannot() {
        let none = new(false);
        assert_eq!(
            none.report_now(false),
            Err(ReportingError::PolicyNotOffered)
        );
        let declined = control(false);
        assert_eq!(
            declined.report_now(false),
            Err(ReportingError::GuestDeclined)
        );
        let able = control(true);
        assert_eq!(able.report_now(true), Ok(1), "it has not said what it does");
        answer(&able, PolicySetting::ReportNow.mask());
        assert_eq!(able.report_now(false), Ok(2));
        let again = ReportingError::NotFollowed("report_again");
        assert_eq!(able.report_now(true), Err(again));
        answer(&able, 0);
        let now = ReportingError::NotFollowed("report_now");
        assert_eq!(able.report_now(false), Err(now));
        able.pause();
        assert_eq!(able.report_now(false), Err(ReportingError::Paused));
    }

    #[test]
    fn report_now_is_done_when_the_guest_names_the_latest() {
        let control = control(true);
        control.report_now(false).unwrap();
        let id = control.report_now(false).unwrap();
        for (done, pending) in [(1_u32, true), (id, false)] {
            control.write_config(REPORT_NOW_DONE, &done.to_le_bytes());
            let status = control.report_now_status();
            assert_eq!((status.done_id, status.pending), (done, pending));
        }
        let id = control.report_now(false).unwrap();
        control.driver_went();
        let status = control.report_now_status();
        assert_eq!((status.id, status.pending, status.done_id), (id, false, 0));
    }

    #[test]
    fn again_is_a_change_of_the_policy_and_goes_with_the_next_wish() {
        let control = control(true);
        let flags = || {
            let fields = control.lock().fields;
            (fields.flags, fields.generation)
        };
        control.report_now(false).unwrap();
        assert_eq!(flags(), (0, 0));
        control.report_now(true).unwrap();
        assert_eq!(flags(), (VIRTIO_BALLOON_REPORTING_AGAIN, 1));
        control.report_now(true).unwrap();
        assert_eq!(flags(), (VIRTIO_BALLOON_REPORTING_AGAIN, 1));
        control.report_now(false).unwrap();
        assert_eq!(flags(), (0, 2));
    }

    #[test]
    fn setting_says_why_it_is_not_in_effect() {
        let state = |control: &Control| control.policy_status().of(PolicySetting::AgeMsMin);
        assert_eq!(state(&new(false)), SettingState::NotOffered);
        assert_eq!(state(&new(true)), SettingState::DriverNotReady);
        assert_eq!(state(&control(false)), SettingState::GuestDeclined);
        let able = control(true);
        assert_eq!(state(&able), SettingState::NotSet);
        able.set_policy(ReportingPolicy::default());
        assert_eq!(state(&able), SettingState::NotAcknowledged);
        answer(&able, !PolicySetting::AgeMsMin.mask() & ALL);
        assert_eq!(state(&able), SettingState::NotFollowed);
        answer(&able, ALL);
        assert_eq!(state(&able), SettingState::InEffect);
        able.set_policy(ReportingPolicy::default());
        assert_eq!(state(&able), SettingState::NotAcknowledged);
        assert_eq!(able.policy_status().acknowledged, 1);
    }
}
