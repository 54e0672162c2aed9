//! Maps each endpoint to its action and thread.
//!
//! | Where | Endpoints | Why |
//! | --- | --- | --- |
//! | HTTP thread | `vmm.ping`, `vm.info`, `GET vm.reclaim-thresholds` | read the published view: O(1) |
//! | an `api-query` thread | `vm.counters`, `vm.balloon-stats`, `vm.reclaim-stats` | may take time or wait for the guest |
//! | control thread | everything that changes something | it owns the VM |
//! | control thread, then the thread of the migration | `vm.receive-migration` | waits for the source |
//! | control thread, then the thread `snapshot` | `vm.snapshot-merge` | reads and writes all files |
//! | control thread, for a running VM then the thread `snapshot` | `vm.snapshot` | writes RAM while the VM runs |
//! | control thread, then an `api-query` thread | `vm.balloon-reporting` | requested in order, then awaited |

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{
    Endpoint, ErrorBody, JsonSchema, VmBalloonHinting, VmBalloonReporting, VmRemoveDevice,
    VmmPingResponse,
};
use micro_http::{Body, Method, Request};
use serde::de::DeserializeOwned;

use super::body;
use super::failure::request_failed;
use super::http::{Answer, Handler, Reply, Status};
use super::query::Queries;
use crate::config::NewDevice;
use crate::control::{ControlHandle, Done, Lifecycle, LifecycleError, RequestError};
use crate::reporting_policy::GuestPolicy;
use crate::threads::ThreadStart;
use crate::view::PublishedView;

/// How long `vm.balloon-stats` waits for the guest, the same as upstream.
const BALLOON_STATS_WAIT: Duration = Duration::from_secs(1);

/// Serves the table of endpoints.
pub struct Dispatcher {
    view: Arc<PublishedView>,
    control: ControlHandle,
    identity: VmmPingResponse,
    queries: Queries,
}

virtio_devices::debug_fields!(Dispatcher {});

/// One request: its content, and the way back to its sender.
struct Call {
    endpoint: Endpoint,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    reply: Reply,
}

impl Call {
    /// Parses the body; rejects the request if the body is invalid.
    fn read_body<T: DeserializeOwned + JsonSchema>(mut self) -> Option<(T, Self)> {
        match body::read(self.endpoint, &std::mem::take(&mut self.body)) {
            Ok(value) => Some((value, self)),
            Err(error) => {
                self.reply.send(bad_request(&[
                    "Failed to deserialize JSON",
                    &error.to_string(),
                ]));
                None
            }
        }
    }
}

impl Handler for Dispatcher {
    fn handle(&self, request: Request, reply: Reply) {
        let there: Vec<_> = Endpoint::at_path(request.uri().get_abs_path()).collect();
        if there.is_empty() {
            reply.send(Answer::error(Status::NotFound, &ErrorBody::not_found()));
            return;
        }
        // An unsupported method is 400 and not 405, as in upstream.
        let method = request.method();
        let Some(endpoint) = there.into_iter().find(|at| method == method_of(*at)) else {
            reply.send(bad_request(&["Bad Request"]));
            return;
        };
        // An unexpected or missing body.
        if endpoint.request().is_some() != request.body.is_some() {
            reply.send(bad_request(&["Bad Request"]));
            return;
        }
        self.serve(Call {
            endpoint,
            body: request.body.map_or_else(Vec::new, |Body { body }| body),
            fds: request.files.into_iter().map(OwnedFd::from).collect(),
            reply,
        });
    }
}

impl Dispatcher {
    /// A dispatcher that reads `view` and passes changes to `control`.
    pub fn new(
        view: Arc<PublishedView>,
        control: ControlHandle,
        identity: VmmPingResponse,
        thread_start: ThreadStart,
    ) -> Self {
        Self {
            queries: Queries::new(Arc::clone(&view), thread_start),
            view,
            control,
            identity,
        }
    }

    fn serve(&self, call: Call) {
        let endpoint = call.endpoint;
        match endpoint {
            Endpoint::VmmPing => call.reply.send(Answer::json(&self.identity)),
            Endpoint::VmInfo => call.reply.send(self.info()),
            Endpoint::VmReclaimThresholds => call.reply.send(thresholds(endpoint, &self.view)),
            Endpoint::VmCounters => self
                .queries
                .ask(endpoint, call.reply, |observer| Ok(observer.counters())),
            Endpoint::VmReclaimStats => self
                .queries
                .ask(endpoint, call.reply, |observer| observer.reclaim_stats()),
            Endpoint::VmBalloonStats => self.queries.ask(endpoint, call.reply, |observer| {
                observer.balloon_stats(Instant::now() + BALLOON_STATS_WAIT)
            }),
            Endpoint::VmCreate => self.change_to(call, Lifecycle::create),
            Endpoint::VmBoot => self.change(call, Lifecycle::boot),
            Endpoint::VmDelete => self.change(call, Lifecycle::delete),
            Endpoint::VmShutdown => self.change(call, Lifecycle::shutdown),
            Endpoint::VmReboot => self.change(call, Lifecycle::reboot),
            Endpoint::VmPause => self.change(call, Lifecycle::pause),
            Endpoint::VmResume => self.change(call, Lifecycle::resume),
            Endpoint::VmResize => self.change_to(call, Lifecycle::resize),
            Endpoint::VmmShutdown => self.change(call, Lifecycle::end),
            Endpoint::VmPowerButton => {
                self.change(call, |vm| vm.on_machine(|machine| machine.power_button()));
            }
            Endpoint::VmNmi => self.change(call, |vm| {
                vm.on_machine(|machine| {
                    machine.nmi();
                    Ok(())
                })
            }),
            Endpoint::VmResizeZone => self.change_to(call, |vm, resize| vm.resize_zone(&resize)),
            Endpoint::VmResizeDisk => self.change_to(call, |vm, resize| vm.resize_disk(&resize)),
            Endpoint::VmUpdateRateLimiter => {
                self.change_to(call, |vm, update| vm.update_rate_limiter(&update));
            }
            Endpoint::VmSnapshot => self.start(call, Lifecycle::start_snapshot),
            Endpoint::VmSnapshotMerge => self.start(call, Lifecycle::start_merge),
            Endpoint::VmCoredump => self.change_to(call, |vm, request| vm.coredump(&request)),
            Endpoint::VmRestore => {
                if let Some((request, mut call)) = call.read_body() {
                    let fds = std::mem::take(&mut call.fds);
                    self.change(call, move |vm| vm.restore(&request, fds));
                }
            }
            Endpoint::VmSendMigration => {
                let control = self.control.clone();
                self.change_to(call, move |vm, request| {
                    vm.send_migration(&request, &control)
                });
            }
            Endpoint::VmReceiveMigration => self.start(call, Lifecycle::start_receiving),
            Endpoint::VmCancelMigration => self.change(call, Lifecycle::cancel_migration),
            Endpoint::VmBalloonHinting => {
                self.change_to(call, |vm, VmBalloonHinting { action }| {
                    vm.on_machine(|machine| machine.balloon_hinting(action))
                });
            }
            Endpoint::VmRemoveDevice => {
                self.change_to(call, |vm, VmRemoveDevice { id }| vm.remove_device(&id));
            }
            Endpoint::VmAddDisk => self.add_device(call, NewDevice::Disk),
            Endpoint::VmAddNet => self.add_device(call, NewDevice::Net),
            Endpoint::VmAddFs => self.add_device(call, NewDevice::Fs),
            Endpoint::VmAddGenericVhostUser => self.add_device(call, NewDevice::GenericVhostUser),
            Endpoint::VmAddDevice => self.add_device(call, NewDevice::Assigned),
            Endpoint::VmAddPmem => self.add_device(call, NewDevice::Pmem),
            Endpoint::VmAddVsock => self.add_device(call, NewDevice::Vsock),
            Endpoint::VmAddBalloon => self.add_device(call, NewDevice::Balloon),
            Endpoint::VmSetReclaimThresholds => self.set_thresholds(call),
            Endpoint::VmBalloonReporting => self.steer_reporting(call),
        }
    }

    fn info(&self) -> Answer {
        match self.view.get().info() {
            Some(info) => Answer::json(&info),
            None => not_created(Endpoint::VmInfo),
        }
    }

    /// Makes a change on the control thread. `answer` turns the result of a successful change into the response.
    fn submit<T: 'static>(
        &self,
        Call {
            endpoint, reply, ..
        }: Call,
        change: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
        answer: impl FnOnce(T, Reply) + Send + 'static,
    ) {
        self.control
            .submit(endpoint, change, move |outcome| match outcome {
                Ok(result) => answer(result, reply),
                Err(error) => {
                    log::warn!("{}", api::error_line(&error));
                    reply.send(request_failed(error));
                }
            });
    }

    /// Makes a change that needs no body and responds without one.
    fn change(
        &self,
        call: Call,
        change: impl FnOnce(&mut Lifecycle) -> Result<(), LifecycleError> + Send + 'static,
    ) {
        let success = match call.endpoint.success_status() {
            200 => Status::Ok,
            _ => Status::NoContent,
        };
        self.submit(call, change, move |(), reply| {
            reply.send(Answer::empty(success));
        });
    }

    /// Makes the change that the body describes and responds without a body.
    fn change_to<B: DeserializeOwned + JsonSchema + Send + 'static>(
        &self,
        call: Call,
        change: impl FnOnce(&mut Lifecycle, B) -> Result<(), LifecycleError> + Send + 'static,
    ) {
        if let Some((body, call)) = call.read_body() {
            self.change(call, move |vm| change(vm, body));
        }
    }

    /// Starts the work that the body describes and responds when it has ended.
    fn start<B: DeserializeOwned + JsonSchema + Send + 'static>(
        &self,
        call: Call,
        start: impl FnOnce(
            &mut Lifecycle,
            &B,
            &ControlHandle,
            &mut Option<Done>,
        ) -> Result<(), LifecycleError>
        + Send
        + 'static,
    ) {
        if let Some((body, call)) = call.read_body() {
            self.control.submit_long(
                call.endpoint,
                move |vm, control, done| start(vm, &body, control, done),
                move |outcome| call.reply.send(ended(outcome)),
            );
        }
    }

    /// Adds the device that the body describes.
    fn add_device<B: DeserializeOwned + JsonSchema>(
        &self,
        call: Call,
        device: impl FnOnce(B) -> NewDevice,
    ) {
        let Some((config, mut call)) = call.read_body() else {
            return;
        };
        let device = device(config);
        let fds = match device {
            NewDevice::Net(_) => std::mem::take(&mut call.fds),
            // No other device uses descriptors: the call closes them.
            NewDevice::Disk(_)
            | NewDevice::Fs(_)
            | NewDevice::GenericVhostUser(_)
            | NewDevice::Assigned(_)
            | NewDevice::Pmem(_)
            | NewDevice::Vsock(_)
            | NewDevice::Balloon(_) => Vec::new(),
        };
        self.submit(
            call,
            move |vm| vm.add_device(device, fds),
            |added, reply| {
                reply.send(added.map_or_else(Answer::no_content, |info| Answer::json(&info)));
            },
        );
    }

    /// Changes thresholds and responds with their new status.
    fn set_thresholds(&self, call: Call) {
        let view = Arc::clone(&self.view);
        let endpoint = call.endpoint;
        if let Some((change, call)) = call.read_body() {
            self.submit(
                call,
                move |vm| vm.set_thresholds(&change),
                move |(), reply| reply.send(thresholds(endpoint, &view)),
            );
        }
    }

    /// Controls reporting in order with all other changes, then waits for the result on a separate thread.
    fn steer_reporting(&self, call: Call) {
        let queries = self.queries.clone();
        if let Some((request, call)) = call.read_body::<VmBalloonReporting>() {
            self.submit(
                call,
                move |vm| vm.balloon_reporting(request),
                move |(), reply| queries.reporting(reply),
            );
        }
    }
}

/// The response when the work of another thread has ended.
fn ended(outcome: Result<(), RequestError>) -> Answer {
    match outcome {
        Ok(()) => Answer::no_content(),
        Err(error) => {
            log::warn!("{}", api::error_line(&error));
            request_failed(error)
        }
    }
}

fn thresholds(endpoint: Endpoint, view: &PublishedView) -> Answer {
    let view = view.get();
    let guest_policy = match &view.machine {
        Some(machine) => machine.observer.reporting_policy(),
        None => GuestPolicy::NoMachine,
    };
    match &view.thresholds {
        Some(thresholds) => Answer::json(&thresholds.status(guest_policy)),
        None => not_created(endpoint),
    }
}

fn not_created(endpoint: Endpoint) -> Answer {
    let cause = LifecycleError::VmNotCreated;
    request_failed(RequestError { endpoint, cause })
}

fn method_of(endpoint: Endpoint) -> Method {
    match endpoint.method() {
        api::Method::Get => Method::Get,
        api::Method::Put => Method::Put,
    }
}

fn bad_request(chain: &[&str]) -> Answer {
    let chain = ErrorBody(chain.iter().map(|text| (*text).to_owned()).collect());
    Answer::error(Status::BadRequest, &chain)
}
