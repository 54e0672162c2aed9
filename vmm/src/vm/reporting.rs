//! Free page reporting in the words of the wire: the policy, and where a pause stands.

use api::{ReportNow, ReportingAction, ReportingPolicy, ReportingStatus, VmBalloonReporting};
use virtio_devices::balloon::policy::{ControlError, PausePhase, PolicySettings, ReportNowStatus};
use virtio_devices::balloon::{BalloonHandle, ReportingState};

/// Carries out a request; a pause is only asked for here.
pub(super) fn steer(
    balloon: &BalloonHandle,
    request: VmBalloonReporting,
) -> Result<(), ControlError> {
    match request.action {
        ReportingAction::Pause => balloon.pause_reporting(),
        ReportingAction::Resume => balloon.resume_reporting(),
        ReportingAction::ReportNow => balloon.report_now(request.again).map(drop),
    }
}

/// The policy as the device takes it. It has been checked; what does not fit all the same is as much as fits.
pub(super) fn settings(policy: ReportingPolicy) -> PolicySettings {
    let word = |value| u32::try_from(value).unwrap_or(u32::MAX);
    PolicySettings {
        order_min: word(policy.order_min),
        pending_blocks: word(policy.pending_blocks),
        delay_ms_max: word(policy.delay_ms_max),
        age_ms_min: word(policy.age_ms_min),
        bytes_per_second_max: policy.bytes_per_second_max,
    }
}

/// Without a balloon.
pub(super) fn missing() -> ReportingStatus {
    ReportingStatus {
        reason: Some("inactive: the machine has no balloon".to_owned()),
        ..ReportingStatus::default()
    }
}

/// With one.
pub(super) fn status(
    reporting: ReportingState,
    pause: PausePhase,
    wish: ReportNowStatus,
) -> ReportingStatus {
    let (state, paused_by) = match pause {
        PausePhase::Running => ("running", None),
        PausePhase::Pausing => ("pausing", None),
        PausePhase::PausedByGuest => ("paused", Some("guest")),
        PausePhase::PausedByDevice => ("paused", Some("device")),
    };
    ReportingStatus {
        active: reporting.is_active(),
        reason: (!reporting.is_active()).then(|| reporting.to_string()),
        state: state.to_owned(),
        paused_by: paused_by.map(str::to_owned),
        report_now: ReportNow {
            id: wish.id,
            pending: wish.pending,
            done_id: wish.done_id,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_nobody_has_set_is_what_the_device_starts_with() {
        assert_eq!(
            settings(ReportingPolicy::default()),
            PolicySettings::default()
        );
    }
}
