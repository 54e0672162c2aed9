//! Responses to failed requests: maps each cause to a status.

use std::error::Error;
use std::io::ErrorKind;

use api::{Endpoint, ErrorBody};
use machine::pc::PcError;

use super::http::{Answer, Status};
use crate::config::{RateLimiterError, ValidationError};
use crate::control::{LifecycleError, RequestError};
use crate::landlock::LandlockError;
use crate::snapshot::SnapshotError;
use crate::vm::{HotplugError, VmError};

/// The first line of every endpoint's error, the same as upstream's.
#[derive(Debug, thiserror::Error)]
#[error("Error from API")]
struct ApiError<E: Error + 'static>(#[source] E);

/// The response with `status` and the chain of causes of `error`.
pub(super) fn answer<E: Error + 'static>(status: Status, error: E) -> Answer {
    Answer::error(status, &ErrorBody::new(&ApiError(error)))
}

/// The cause that decides the status: a snapshot of a running VM fails with what the control thread could not do.
fn deciding(cause: &LifecycleError) -> &LifecycleError {
    match cause {
        LifecycleError::Snapshot(SnapshotError::Owner(source)) => {
            source.downcast_ref().unwrap_or(cause)
        }
        _ => cause,
    }
}

/// The response to a request that failed.
pub(super) fn request_failed(error: RequestError) -> Answer {
    let names_device = error.endpoint.adds_device() || error.endpoint == Endpoint::VmRestore;
    let status = match deciding(&error.cause) {
        LifecycleError::VmNotCreated
        | LifecycleError::VmMissingConfig
        | LifecycleError::NoSuchZone { .. } => Status::NotFound,
        LifecycleError::ConfigValidation(
            ValidationError::IdentifierNotUnique { .. }
            | ValidationError::DuplicateDiskPath { .. }
            | ValidationError::DuplicateDevicePath { .. },
        ) => Status::Conflict,
        LifecycleError::ConfigValidation(_)
        | LifecycleError::Landlock(
            LandlockError::Outside { .. }
            | LandlockError::OutsideJail { .. }
            | LandlockError::TerminalInJail
            | LandlockError::Path(_),
        )
        | LifecycleError::Thresholds(_)
        | LifecycleError::MemoryOutOfRange { .. }
        | LifecycleError::ZoneOutOfRange { .. }
        | LifecycleError::Machine(VmError::MemoryResize(_))
        | LifecycleError::Machine(VmError::Reporting(_)) => Status::BadRequest,
        LifecycleError::Machine(VmError::DiskResize(error)) if error.is_of_request() => {
            Status::BadRequest
        }
        // Detected only on the host, but still an error in the configuration.
        LifecycleError::Machine(VmError::Pc(error)) if error.is_of_configuration() => {
            Status::BadRequest
        }
        LifecycleError::Device(fault) | LifecycleError::Machine(VmError::Hotplug(fault)) => {
            match fault {
                HotplugError::NoSuchDevice { .. } => Status::NotFound,
                // The guest may release the device at any moment, so the same request may succeed later.
                HotplugError::StillLeaving { .. } => Status::TooManyRequests,
                HotplugError::NotRemovable { .. }
                | HotplugError::NotIommuSegment { .. }
                | HotplugError::OfBackEnd { .. }
                | HotplugError::BalloonInflated { .. }
                | HotplugError::BalloonPresent { .. } => Status::BadRequest,
                // As upstream.
                HotplugError::VsockPresent { .. } => Status::InternalServerError,
            }
        }
        LifecycleError::CoreUrl { .. } => Status::BadRequest,
        LifecycleError::Migration(error) if error.is_of_request() => Status::BadRequest,
        LifecycleError::CoreFile { source, .. } => match source.kind() {
            ErrorKind::AlreadyExists | ErrorKind::NotFound => Status::BadRequest,
            _ => Status::InternalServerError,
        },
        LifecycleError::RateLimiter(RateLimiterError::Unknown { .. }) => Status::NotFound,
        LifecycleError::RateLimiter(RateLimiterError::InGroup { .. }) => Status::BadRequest,
        LifecycleError::Snapshot(SnapshotError::NetTwice { .. }) => Status::Conflict,
        LifecycleError::Snapshot(error) | LifecycleError::Machine(VmError::Snapshot(error))
            if error.is_of_request() =>
        {
            Status::BadRequest
        }
        LifecycleError::Machine(VmError::Pc(PcError::State(error))) if !error.is_of_host() => {
            Status::BadRequest
        }
        // As with a pending removal, the same request may succeed later.
        LifecycleError::ResetPending
        | LifecycleError::Machine(VmError::Pc(
            PcError::Leaving { .. } | PcError::LeavingVcpus { .. },
        )) => Status::TooManyRequests,
        // The request or the saved configuration names an image or a tap that cannot be used, the saved state is not
        // that of the device, or there is no slot for it.
        LifecycleError::Machine(VmError::Pc(PcError::Device { .. })) if names_device => {
            Status::BadRequest
        }
        LifecycleError::QueueFull => Status::ServiceUnavailable,
        LifecycleError::VmAlreadyCreated
        | LifecycleError::VmNotRunning
        | LifecycleError::InvalidStateTransition { .. }
        | LifecycleError::NotPaused
        | LifecycleError::Migrating
        | LifecycleError::Saving
        | LifecycleError::Merging
        | LifecycleError::DisksReleased
        | LifecycleError::MemoryIncomplete
        | LifecycleError::NotMigrating
        | LifecycleError::Committed
        | LifecycleError::HasRunElsewhere
        | LifecycleError::Migration(_)
        | LifecycleError::Snapshot(_)
        | LifecycleError::VcpusOutOfRange { .. }
        | LifecycleError::MemoryHotplug { .. }
        | LifecycleError::Landlock(_)
        | LifecycleError::Machine(_) => Status::InternalServerError,
    };
    answer(status, error)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use machine::cpu::CpuError;
    use machine::memory::on_demand::OnDemandError;
    use machine::memory::{ContentError, MemoryError};
    use state::{StateError, parts};
    use virtio_devices::WorkerError;

    use super::*;

    /// Statuses that `docs/api.md` documents for snapshots and that the tests of every endpoint do not cover.
    #[test]
    fn failed_snapshot_and_restore_have_the_documented_status() {
        let invalid = || StateError::invalid(parts::MEMORY, "zones", "differ");
        let host = || StateError::host(parts::VCPU, io::Error::other("KVM"));
        let path = || PathBuf::from("/s/state.json");
        let file = |kind: io::ErrorKind| {
            LifecycleError::Snapshot(SnapshotError::File {
                action: "write",
                path: path(),
                source: kind.into(),
            })
        };
        let on_restore = |error| LifecycleError::Machine(VmError::Snapshot(error));
        let of_owner = |error| LifecycleError::Snapshot(SnapshotError::Owner(Box::new(error)));
        let in_pc = |error| LifecycleError::Machine(VmError::Pc(error));
        let id = || "_disk0".to_owned();
        let device = || PcError::Device {
            id: id(),
            source: "no such image".into(),
        };
        let damaged = SnapshotError::Damaged {
            path: path(),
            reason: "cut",
        };
        let chunk = ContentError::Damaged {
            zone: "mem0".to_owned(),
            offset: 0,
        };
        let no_page_tables = ContentError::Pages(io::Error::other("host"));
        let too_large = MemoryError::SizeOverflow;
        let shared = OnDemandError::Backing {
            zone: "mem0".to_owned(),
            backing: "memfd-shared",
        };
        let refused = OnDemandError::Unavailable {
            device: io::ErrorKind::PermissionDenied.into(),
            source: io::ErrorKind::PermissionDenied.into(),
        };
        let ended = WorkerError::Unresponsive { reason: "ended" };
        let (save, restore) = (Endpoint::VmSnapshot, Endpoint::VmRestore);
        let cases = [
            (save, LifecycleError::ResetPending, 429),
            (save, in_pc(PcError::Leaving { id: id() }), 429),
            (save, of_owner(in_pc(PcError::Leaving { id: id() })), 429),
            (save, of_owner(LifecycleError::VmNotRunning), 500),
            (save, file(io::ErrorKind::StorageFull), 500),
            (
                save,
                in_pc(PcError::DeviceState {
                    id: id(),
                    source: ended,
                }),
                500,
            ),
            (save, in_pc(PcError::Cpu(CpuError::NotPaused)), 500),
            (restore, file(io::ErrorKind::NotFound), 400),
            (restore, file(io::ErrorKind::PermissionDenied), 500),
            (restore, LifecycleError::Snapshot(damaged), 400),
            (
                restore,
                LifecycleError::Snapshot(SnapshotError::State(invalid())),
                400,
            ),
            (restore, on_restore(SnapshotError::State(invalid())), 400),
            (restore, on_restore(SnapshotError::State(host())), 500),
            (restore, on_restore(SnapshotError::Content(chunk)), 400),
            (
                restore,
                on_restore(SnapshotError::Content(no_page_tables)),
                500,
            ),
            (restore, on_restore(SnapshotError::Memory(too_large)), 400),
            (restore, on_restore(SnapshotError::OnDemand(shared)), 400),
            (
                restore,
                LifecycleError::Snapshot(SnapshotError::OnDemand(refused)),
                500,
            ),
            (save, on_restore(SnapshotError::Incomplete), 500),
            (restore, in_pc(PcError::State(invalid())), 400),
            (restore, in_pc(PcError::State(host())), 500),
            (restore, in_pc(device()), 400),
            (Endpoint::VmBoot, in_pc(device()), 500),
            (
                restore,
                LifecycleError::Snapshot(SnapshotError::NetTwice { id: id() }),
                409,
            ),
        ];
        for (endpoint, cause, status) in cases {
            let told = cause.to_string();
            let answer = request_failed(RequestError { endpoint, cause });
            assert_eq!(answer.status as u16, status, "{endpoint:?}: {told}");
        }
    }
}
