//! Free page reporting in wire types: requests, and the state of a pause.

use api::{ReportNow, ReportingAction, ReportingStatus, VmBalloonReporting};
use virtio_devices::balloon::reporting_policy::{ReportNowStatus, ReportingError};
use virtio_devices::balloon::{BalloonHandle, PausePhase, ReportingState};

/// Executes a request. A pause is only requested, not awaited.
pub(crate) fn steer(
    balloon: &BalloonHandle,
    request: VmBalloonReporting,
) -> Result<(), ReportingError> {
    match request.action {
        ReportingAction::Pause => balloon.pause_reporting(),
        ReportingAction::Resume => balloon.resume_reporting(),
        ReportingAction::ReportNow => balloon.report_now(request.again).map(drop),
    }
}

/// The status without a balloon.
pub(crate) fn missing() -> ReportingStatus {
    ReportingStatus {
        reason: Some("inactive: the machine has no balloon".to_owned()),
        ..ReportingStatus::default()
    }
}

/// The status with a balloon.
pub(crate) fn status(
    reporting: ReportingState,
    pause: PausePhase,
    wish: ReportNowStatus,
) -> ReportingStatus {
    ReportingStatus {
        active: reporting.is_active(),
        reason: (!reporting.is_active()).then(|| reporting.to_string()),
        state: pause.state().to_owned(),
        paused_by: pause.paused_by().map(str::to_owned),
        report_now: ReportNow {
            id: wish.id,
            pending: wish.pending,
            done_id: wish.done_id,
        },
    }
}
