//! Responses to failed requests: maps each cause to a status.

use std::error::Error;

use api::ErrorBody;
use machine::pc::PcError;

use super::http::{Answer, Status};
use crate::config::{RateLimiterError, ValidationError};
use crate::control::{LifecycleError, RequestError};
use crate::landlock::LandlockError;
use crate::snapshot::SnapshotError;
use crate::vm::{HotplugError, VmError};

/// The start of every error of an endpoint, as upstream has it.
#[derive(Debug, thiserror::Error)]
#[error("Error from API")]
struct ApiError<E: Error + 'static>(#[source] E);

/// The response with `status` and the chain of causes of `error`.
pub(super) fn answer<E: Error + 'static>(status: Status, error: E) -> Answer {
    Answer::error(status, &ErrorBody::new(&ApiError(error)))
}

/// The response to a request that failed.
pub(super) fn request_failed(error: RequestError) -> Answer {
    let adds_device = error.endpoint.adds_device();
    let status = match &error.cause {
        LifecycleError::VmNotCreated | LifecycleError::VmMissingConfig => Status::NotFound,
        LifecycleError::ConfigValidation(
            ValidationError::IdentifierNotUnique { .. } | ValidationError::DuplicateDiskPath { .. },
        ) => Status::Conflict,
        LifecycleError::ConfigValidation(_)
        | LifecycleError::Landlock(LandlockError::Outside { .. } | LandlockError::Path(_))
        | LifecycleError::Thresholds(_)
        | LifecycleError::MemoryOutOfRange { .. }
        | LifecycleError::Machine(VmError::MemoryResize(_))
        | LifecycleError::Machine(VmError::Reporting(_)) => Status::BadRequest,
        LifecycleError::Machine(VmError::DiskResize(error)) if error.is_of_request() => {
            Status::BadRequest
        }
        // Detected only where the host is known, and still the configuration's fault.
        LifecycleError::Machine(VmError::Pc(error)) if error.is_of_configuration() => {
            Status::BadRequest
        }
        LifecycleError::Device(fault) | LifecycleError::Machine(VmError::Hotplug(fault)) => {
            match fault {
                HotplugError::NoSuchDevice { .. } => Status::NotFound,
                // The guest may release the device at any moment, so the same request may succeed later.
                HotplugError::StillLeaving { .. } => Status::TooManyRequests,
                HotplugError::NotRemovable { .. }
                | HotplugError::BalloonInflated { .. }
                | HotplugError::BalloonPresent { .. } => Status::BadRequest,
                // As upstream.
                HotplugError::VsockPresent { .. } => Status::InternalServerError,
            }
        }
        LifecycleError::RateLimiter(RateLimiterError::Unknown { .. }) => Status::NotFound,
        LifecycleError::RateLimiter(RateLimiterError::InGroup { .. }) => Status::BadRequest,
        LifecycleError::Snapshot(SnapshotError::NetTwice { .. }) => Status::Conflict,
        LifecycleError::Snapshot(error) | LifecycleError::Machine(VmError::Snapshot(error))
            if error.is_of_request() =>
        {
            Status::BadRequest
        }
        LifecycleError::Machine(VmError::Pc(PcError::State(_))) => Status::BadRequest,
        // As with a device that is still leaving: the same request may succeed later.
        LifecycleError::Machine(VmError::Pc(PcError::Leaving { .. })) => Status::TooManyRequests,
        // The request names an image or a tap that cannot be used, or there is no slot for the device.
        LifecycleError::Machine(VmError::Pc(PcError::Device { .. })) if adds_device => {
            Status::BadRequest
        }
        LifecycleError::QueueFull => Status::ServiceUnavailable,
        LifecycleError::VmAlreadyCreated
        | LifecycleError::VmNotRunning
        | LifecycleError::InvalidStateTransition { .. }
        | LifecycleError::NotPaused
        | LifecycleError::Snapshot(_)
        | LifecycleError::VcpuHotplug { .. }
        | LifecycleError::MemoryHotplug { .. }
        | LifecycleError::Landlock(_)
        | LifecycleError::Machine(_) => Status::InternalServerError,
    };
    answer(status, error)
}
