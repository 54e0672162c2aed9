//! What each endpoint does and where.
//!
//! | Where | Endpoints | Why |
//! | --- | --- | --- |
//! | HTTP thread | `vmm.ping`, `vm.info`, `GET vm.reclaim-thresholds` | read the published view: O(1) |
//! | an `api-query` thread | `vm.counters`, `vm.balloon-stats`, `vm.reclaim-stats` | may take time or wait for the guest |
//! | control thread | everything that changes something | it owns the VM |
//! | control thread, then an `api-query` thread | `vm.balloon-reporting` | asked for in order, then waited for |

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::{
    Endpoint, ErrorBody, ReclaimThresholdsChange, VmBalloonHinting, VmBalloonReporting,
    VmRemoveDevice, VmState, VmmPingResponse,
};
use machine::pc::PcError;
use micro_http::{Body, Method, Request, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::http::{Answer, Handler, Reply};
use crate::config::NewDevice;
use crate::control::{
    ControlError, ControlHandle, MachineObserver, PublishedView, RequestError, RequestKind,
    VmAnswer, VmRequest,
};
use crate::threads::{QUERY_THREAD, ThreadKind, ThreadStart};
use crate::thresholds::PolicySight;
use crate::vm::{BalloonStatsError, HotplugError, VmError};

/// Queries at the same time. More than there are connections, so that only clients that do not wait for their answer
/// meet the limit.
const QUERIES_MAX: usize = 16;
const QUERY_STACK_BYTES: usize = 256 << 10;
/// How long `vm.balloon-stats` waits for the guest, as long as upstream does.
const BALLOON_STATS_WAIT: Duration = Duration::from_secs(1);
/// How long a pause of reporting waits for the guest to confirm it. A guest that reports hands over its batches within
/// milliseconds; what takes longer is wedged, and is shut out.
const PAUSE_WAIT: Duration = Duration::from_secs(5);

/// What every error of an endpoint starts with, as upstream's does.
#[derive(Debug, thiserror::Error)]
#[error("Error from API")]
struct ApiError<E: Error + 'static>(#[source] E);

/// A query that failed.
#[derive(Debug, thiserror::Error)]
enum QueryError {
    #[error("{kind}")]
    Observer {
        kind: RequestKind,
        #[source]
        cause: BalloonStatsError,
    },
    #[error("The request needs a thread and none could be started")]
    Thread(#[source] std::io::Error),
    #[error("{QUERIES_MAX} queries are under way already")]
    TooMany,
}

/// Serves the table of endpoints.
pub struct Dispatcher {
    view: Arc<PublishedView>,
    control: ControlHandle,
    identity: VmmPingResponse,
    queries: Queries,
}

/// Asks the machine on threads of their own.
#[derive(Clone)]
struct Queries {
    view: Arc<PublishedView>,
    thread_start: ThreadStart,
    under_way: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dispatcher").finish_non_exhaustive()
    }
}

impl Handler for Dispatcher {
    fn handle(&self, request: Request, reply: Reply) {
        let there: Vec<_> = Endpoint::at_path(request.uri().get_abs_path()).collect();
        if there.is_empty() {
            reply.send(Answer::error(StatusCode::NotFound, &ErrorBody::not_found()));
            return;
        }
        // A method that the path does not have is 400 and not 405, because upstream's is.
        let method = request.method();
        let Some(endpoint) = there.into_iter().find(|at| method == method_of(*at)) else {
            reply.send(bad_request(&["Bad Request"]));
            return;
        };
        // Whoever has no use for descriptors closes them here.
        let fds = match endpoint {
            Endpoint::VmAddNet => request.files.into_iter().map(OwnedFd::from).collect(),
            _ => Vec::new(),
        };
        match check_body(endpoint, request.body) {
            Ok(body) => self.serve(endpoint, &body, fds, reply),
            Err(answer) => reply.send(answer),
        }
    }
}

impl Dispatcher {
    /// A dispatcher that reads `view` and hands changes to `control`.
    pub fn new(
        view: Arc<PublishedView>,
        control: ControlHandle,
        identity: VmmPingResponse,
        thread_start: ThreadStart,
    ) -> Self {
        Self {
            queries: Queries {
                view: Arc::clone(&view),
                thread_start,
                under_way: Arc::default(),
            },
            view,
            control,
            identity,
        }
    }

    fn serve(&self, endpoint: Endpoint, body: &[u8], fds: Vec<OwnedFd>, reply: Reply) {
        match endpoint {
            Endpoint::VmmPing => reply.send(Answer::json(&self.identity)),
            Endpoint::VmInfo => reply.send(self.info()),
            Endpoint::VmCounters => self.queries.ask(RequestKind::Counters, reply, |observer| {
                Ok(observer.counters())
            }),
            Endpoint::VmBalloonStats => {
                self.queries
                    .ask(RequestKind::BalloonStats, reply, |observer| {
                        observer.balloon_stats(Instant::now() + BALLOON_STATS_WAIT)
                    });
            }
            Endpoint::VmReclaimStats => {
                self.queries
                    .ask(RequestKind::ReclaimStats, reply, |observer| {
                        observer.reclaim_stats()
                    });
            }
            Endpoint::VmReclaimThresholds => reply.send(thresholds(&self.view)),
            Endpoint::VmSetReclaimThresholds => match parse(body) {
                Ok(change) => self.set_thresholds(change, reply),
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmCreate => match parse(body) {
                Ok(config) => self.change(endpoint, VmRequest::Create(config), reply),
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmResize => match parse(body) {
                Ok(resize) => self.change(endpoint, VmRequest::Resize(resize), reply),
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmBalloonHinting => match parse::<VmBalloonHinting>(body) {
                Ok(VmBalloonHinting { action }) => {
                    self.change(endpoint, VmRequest::BalloonHinting(action), reply);
                }
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmAddDisk => {
                self.add_device(parse(body).map(NewDevice::Disk), fds, reply);
            }
            Endpoint::VmAddNet => self.add_device(parse(body).map(NewDevice::Net), fds, reply),
            Endpoint::VmAddBalloon => {
                self.add_device(parse(body).map(NewDevice::Balloon), fds, reply);
            }
            Endpoint::VmRemoveDevice => match parse::<VmRemoveDevice>(body) {
                Ok(VmRemoveDevice { id }) => {
                    self.change(endpoint, VmRequest::RemoveDevice(id), reply);
                }
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmBalloonReporting => match parse(body) {
                Ok(request) => self.steer_reporting(request, reply),
                Err(answer) => reply.send(answer),
            },
            Endpoint::VmBoot => self.change(endpoint, VmRequest::Boot, reply),
            Endpoint::VmDelete => self.change(endpoint, VmRequest::Delete, reply),
            Endpoint::VmShutdown => self.change(endpoint, VmRequest::Shutdown, reply),
            Endpoint::VmReboot => self.change(endpoint, VmRequest::Reboot, reply),
            Endpoint::VmPause => self.change(endpoint, VmRequest::Pause, reply),
            Endpoint::VmResume => self.change(endpoint, VmRequest::Resume, reply),
            Endpoint::VmPowerButton => self.change(endpoint, VmRequest::PowerButton, reply),
            Endpoint::VmmShutdown => self.change(endpoint, VmRequest::ShutdownVmm, reply),
        }
    }

    fn info(&self) -> Answer {
        match self.view.get().info() {
            Some(info) => Answer::json(&info),
            None => request_failed(RequestError {
                kind: RequestKind::Info,
                cause: ControlError::VmNotCreated,
            }),
        }
    }

    fn change(&self, endpoint: Endpoint, request: VmRequest, reply: Reply) {
        let success = match endpoint.success_status() {
            200 => StatusCode::OK,
            _ => StatusCode::NoContent,
        };
        self.control.submit(
            request,
            Box::new(move |outcome| {
                reply.send(match outcome {
                    Ok(_) => Answer::empty(success),
                    Err(error) => {
                        log::warn!("{}", api::error_chain(&error).join(": "));
                        request_failed(error)
                    }
                });
            }),
        );
    }

    /// Adds a device, unless its description cannot be read.
    fn add_device(&self, device: Result<NewDevice, Answer>, fds: Vec<OwnedFd>, reply: Reply) {
        let device = match device {
            Ok(device) => device,
            Err(answer) => {
                reply.send(answer);
                return;
            }
        };
        self.control.submit(
            VmRequest::AddDevice(Box::new(device), fds),
            Box::new(move |outcome| {
                reply.send(match outcome {
                    Ok(VmAnswer::Added(info)) => Answer::json(&info),
                    Ok(VmAnswer::Done) => Answer::no_content(),
                    Err(error) => {
                        log::warn!("{}", api::error_chain(&error).join(": "));
                        request_failed(error)
                    }
                });
            }),
        );
    }

    /// Changes thresholds and answers with what came of it.
    fn set_thresholds(&self, change: ReclaimThresholdsChange, reply: Reply) {
        let view = Arc::clone(&self.view);
        self.control.submit(
            VmRequest::SetReclaimThresholds(change),
            Box::new(move |outcome| {
                reply.send(match outcome {
                    Ok(_) => thresholds(&view),
                    Err(error) => request_failed(error),
                });
            }),
        );
    }

    /// Asks for it in order with everything else, then answers with what came of it.
    fn steer_reporting(&self, request: VmBalloonReporting, reply: Reply) {
        let queries = self.queries.clone();
        self.control.submit(
            VmRequest::BalloonReporting(request),
            Box::new(move |outcome| match outcome {
                Ok(_) => queries.reporting(reply),
                Err(error) => {
                    log::warn!("{}", api::error_chain(&error).join(": "));
                    reply.send(request_failed(error));
                }
            }),
        );
    }
}

impl Queries {
    /// Answers with the state of reporting once a pause that was asked for is one. A guest that stands still is not
    /// waited for.
    fn reporting(&self, reply: Reply) {
        let machine = self.view.get().machine.clone();
        let runs = machine.is_some_and(|machine| machine.state == VmState::Running);
        let patience = if runs { PAUSE_WAIT } else { Duration::ZERO };
        self.ask(RequestKind::BalloonReporting, reply, move |observer| {
            observer.reporting(Instant::now() + patience)
        });
    }

    /// Asks the machine on a thread of its own: it may have to wait for the guest, and a guest may be wedged.
    fn ask<T: Serialize + 'static>(
        &self,
        kind: RequestKind,
        reply: Reply,
        ask: impl FnOnce(&dyn MachineObserver) -> Result<T, BalloonStatsError> + Send + 'static,
    ) {
        let view = self.view.get();
        let machine = match &view.machine {
            // Only a running guest can refill its statistics.
            Some(machine)
                if kind != RequestKind::BalloonStats || machine.state == VmState::Running =>
            {
                machine
            }
            _ => {
                let cause = ControlError::VmNotRunning;
                reply.send(request_failed(RequestError { kind, cause }));
                return;
            }
        };
        let Some(ticket) = Ticket::take(&self.under_way) else {
            reply.send(query_failed(
                StatusCode::ServiceUnavailable,
                QueryError::TooMany,
            ));
            return;
        };
        let observer = Arc::clone(&machine.observer);
        let thread_start = Arc::clone(&self.thread_start);
        // Shared with this thread only for the case that there is no other.
        let reply = Arc::new(Mutex::new(Some(reply)));
        let own_reply = Arc::clone(&reply);
        let spawned = std::thread::Builder::new()
            .name(QUERY_THREAD.to_owned())
            .stack_size(QUERY_STACK_BYTES)
            .spawn(move || {
                thread_start(ThreadKind::ApiQuery);
                let answer = match ask(&*observer) {
                    Ok(value) => Answer::json(&value),
                    Err(cause) => query_failed(
                        StatusCode::InternalServerError,
                        QueryError::Observer { kind, cause },
                    ),
                };
                drop(ticket);
                send_once(&own_reply, answer);
            });
        if let Err(error) = spawned {
            let answer = query_failed(StatusCode::InternalServerError, QueryError::Thread(error));
            send_once(&reply, answer);
        }
    }
}

fn thresholds(view: &PublishedView) -> Answer {
    let view = view.get();
    let sight = match &view.machine {
        Some(machine) => machine.observer.reporting_policy(),
        None => PolicySight::NoMachine,
    };
    match &view.thresholds {
        Some(thresholds) => Answer::json(&thresholds.status(sight)),
        None => request_failed(RequestError {
            kind: RequestKind::ReclaimThresholds,
            cause: ControlError::VmNotCreated,
        }),
    }
}

fn send_once(reply: &Mutex<Option<Reply>>, answer: Answer) {
    let taken = reply.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(reply) = taken {
        reply.send(answer);
    }
}

/// One of the [`QUERIES_MAX`] places, given back when dropped.
struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    fn take(queries: &Arc<AtomicUsize>) -> Option<Self> {
        queries
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count < QUERIES_MAX).then_some(count + 1)
            })
            .ok()?;
        Some(Self(Arc::clone(queries)))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn method_of(endpoint: Endpoint) -> Method {
    match endpoint.method() {
        api::Method::Get => Method::Get,
        api::Method::Put => Method::Put,
    }
}

/// A body where none belongs, or none where one belongs, is 400.
fn check_body(endpoint: Endpoint, body: Option<Body>) -> Result<Vec<u8>, Answer> {
    match (endpoint.request(), body) {
        (Some(_), Some(body)) => Ok(body.body),
        (None, None) => Ok(Vec::new()),
        (Some(_), None) | (None, Some(_)) => Err(bad_request(&["Bad Request"])),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Answer> {
    serde_json::from_slice(body)
        .map_err(|error| bad_request(&["Failed to deserialize JSON", &error.to_string()]))
}

fn bad_request(chain: &[&str]) -> Answer {
    let chain = ErrorBody(chain.iter().map(|text| (*text).to_owned()).collect());
    Answer::error(StatusCode::BadRequest, &chain)
}

fn request_failed(error: RequestError) -> Answer {
    let adds_device = matches!(
        error.kind,
        RequestKind::AddDisk | RequestKind::AddNet | RequestKind::AddBalloon
    );
    let status = match &error.cause {
        ControlError::VmNotCreated | ControlError::VmMissingConfig => StatusCode::NotFound,
        // Upstream answers 409 to a name used twice; the HTTP crate does not know that status.
        ControlError::ConfigValidation(_)
        | ControlError::Thresholds(_)
        | ControlError::MemoryOutOfRange { .. }
        | ControlError::Machine(VmError::MemoryResize(_))
        | ControlError::Machine(VmError::Reporting(_)) => StatusCode::BadRequest,
        // Found only where the host is known, and still the configuration's fault.
        ControlError::Machine(VmError::Pc(error)) if error.is_of_configuration() => {
            StatusCode::BadRequest
        }
        ControlError::Device(fault) | ControlError::Machine(VmError::Hotplug(fault)) => match fault
        {
            HotplugError::NoSuchDevice { .. } => StatusCode::NotFound,
            HotplugError::NotRemovable { .. }
            | HotplugError::BalloonInflated { .. }
            | HotplugError::StillLeaving { .. }
            | HotplugError::BalloonPresent { .. } => StatusCode::BadRequest,
        },
        // What was asked for names an image or a tap that cannot be used, or there is no slot for it.
        ControlError::Machine(VmError::Pc(PcError::Device { .. })) if adds_device => {
            StatusCode::BadRequest
        }
        ControlError::QueueFull => StatusCode::ServiceUnavailable,
        ControlError::VmAlreadyCreated
        | ControlError::VmNotRunning
        | ControlError::InvalidStateTransition { .. }
        | ControlError::VcpuHotplug { .. }
        | ControlError::MemoryHotplug { .. }
        | ControlError::Machine(_) => StatusCode::InternalServerError,
    };
    Answer::error(status, &ErrorBody::new(&ApiError(error)))
}

fn query_failed(status: StatusCode, error: QueryError) -> Answer {
    Answer::error(status, &ErrorBody::new(&ApiError(error)))
}
