//! Starts the threads of the VMM, boots the VM of the command line, and waits for the end.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use api::config::{JailConfig, PathOrFd};
use api::{Endpoint, RestoreConfig, VmConfig, VmmPingResponse};
use vmm::api::http::{Deadlines, HttpServer};
use vmm::api::{ApiSocket, Dispatcher};
use vmm::control::{ControlSetup, ControlThread, Ending, Lifecycle};
use vmm::event_monitor::EventMonitor;
use vmm::jail::{self, Jail, JailError, Place};
use vmm::landlock::{self, Need};
use vmm::own_memory;
use vmm::seccomp::Seccomp;
use vmm::signals::{ExitSignals, exit_was_asked_for, survive_file_size_limit};
use vmm::snapshot;
use vmm::threads::{ThreadKind, ThreadStart};
use vmm::view::PublishedView;
use vmm::vm::{Vm, VmContext};

use crate::args::Arguments;

/// Optional parts of this build, as `vmm.ping` lists them.
pub(crate) const FEATURES: &[&str] = &["kvm"];

/// The parsed command line, validated as far as possible without side effects.
#[derive(Debug)]
struct Plan {
    api_socket: Option<PathOrFd>,
    event_monitor: Option<PathOrFd>,
    config: Option<VmConfig>,
    restore: Option<RestoreConfig>,
    /// The VM enables Landlock.
    confined: bool,
    jail: Jail,
}

impl Plan {
    fn new(arguments: &Arguments) -> Result<Self> {
        let api_socket = arguments
            .api_socket
            .as_deref()
            .map(PathOrFd::parse_api_socket);
        let event_monitor = arguments
            .event_monitor
            .as_deref()
            .map(PathOrFd::parse_event_monitor);
        let config = arguments.vm_config()?;
        let restore = arguments.restore_config()?;
        let saved = restore.as_ref().map(saved_config).transpose()?;
        let vm = config.as_ref().or(saved.as_ref());
        let (api_socket, event_monitor) = (api_socket.transpose()?, event_monitor.transpose()?);
        let mut places = arguments.jail()?.as_deref().map(jail_places).transpose()?;
        if let Some(places) = &mut places {
            places.extend(landlock::places(vm.unwrap_or(&VmConfig::default())));
            if let Some(PathOrFd::Path(path)) = &api_socket {
                places.push(Need::socket(path).place());
            }
            if let Some(PathOrFd::Path(path)) = &event_monitor {
                places.push(Need::output(path).place());
            }
            if let Some(request) = &restore {
                let folder = snapshot::folder_of(&request.source_url)?;
                let folders = snapshot::folders(&folder, &|_| Ok(()))?;
                let needs = folders.iter().map(|it| landlock::of_restore(it));
                places.extend(needs.map(|need| need.place()));
            }
        }
        let plan = Self {
            confined: vm.is_some_and(|it| it.landlock_enable),
            jail: Jail::new(
                arguments.user.as_deref(),
                arguments.group.as_deref(),
                arguments.resource_limits()?,
                places,
            )?,
            api_socket,
            event_monitor,
            config,
            restore,
        };
        if plan.api_socket.is_none() && plan.config.is_none() && plan.restore.is_none() {
            bail!(
                "Neither a payload (--kernel, --firmware), nor --restore, nor an --api-socket is given"
            );
        }
        if let Some(config) = &plan.config {
            vmm::config::validate(config).context("Failed to validate config")?;
        }
        Ok(plan)
    }
}

/// Runs the VMM until it ends.
///
/// # Errors
/// It could not start, or the machine failed.
pub(crate) fn run(arguments: &Arguments, start: Instant) -> Result<()> {
    let plan = Plan::new(arguments)?;
    survive_file_size_limit().context("Cannot ignore SIGXFSZ")?;
    own_memory::open();
    let mut exit_signals = ExitSignals::hold()?;
    plan.jail.enter().context("Cannot confine the process")?;
    let seccomp = Arc::new(Seccomp::new(arguments.seccomp.into())?);
    let mut thread_start = seccomp.hook();
    if plan.confined {
        thread_start = landlock::confine_observers(thread_start)?;
    }
    let events = open_events(plan.event_monitor.as_ref(), start, &thread_start)?;
    let socket = plan.api_socket.as_ref().map(ApiSocket::open).transpose()?;

    let view = Arc::new(PublishedView::default());
    let control = start_control(arguments.no_shutdown, &view, &thread_start, &events)?;
    let server = match &socket {
        Some(socket) => Some(start_server(socket, &view, &control, &thread_start)?),
        None => None,
    };
    exit_signals.deliver_to(control.handle().exit_event())?;
    let booted = match (plan.config, plan.restore) {
        (Some(config), _) => boot(&control, config),
        (None, Some(request)) => restore(&control, request),
        (None, None) => Ok(()),
    };
    if booted.is_err() {
        // The boot's error is returned; errors of stopping are only logged.
        let ended = control.handle().call(Endpoint::VmmShutdown, Lifecycle::end);
        drop(ended);
    } else {
        if plan.confined {
            landlock::confine_to_removal(socket.as_ref().and_then(ApiSocket::path))?;
        }
        seccomp.apply(ThreadKind::Main)?;
    }
    let ending = control.join();
    // The server is dropped first, because it still has to send the last responses. Then the socket's files are
    // removed.
    drop(server);
    drop(socket);
    drop(events);
    match booted {
        Err(error) if exit_was_asked_for() => log::info!("The boot was abandoned: {error:#}"),
        booted => booted?,
    }
    match ending {
        Ending::Regular => Ok(()),
        Ending::MachineFailed => bail!("The machine has failed; see the log for the reason"),
    }
}

fn jail_places(paths: &[JailConfig]) -> Result<Vec<Place>, JailError> {
    paths.iter().map(Place::configured).collect()
}

fn open_events(
    place: Option<&PathOrFd>,
    start: Instant,
    thread_start: &ThreadStart,
) -> Result<EventMonitor> {
    let Some(place) = place else {
        return Ok(EventMonitor::off());
    };
    let thread_start = Arc::clone(thread_start);
    Ok(EventMonitor::open(place, start, move || {
        thread_start(ThreadKind::EventMonitor);
    })?)
}

fn start_control(
    no_shutdown: bool,
    view: &Arc<PublishedView>,
    thread_start: &ThreadStart,
    events: &EventMonitor,
) -> Result<ControlThread> {
    let context = VmContext::new(Arc::clone(thread_start), events.sink())
        .context("Cannot create eventfds")?;
    let thread_start = Arc::clone(thread_start);
    Ok(ControlThread::start(ControlSetup {
        make_machine: |config, context, snapshot| Ok(Box::new(Vm::new(config, context, snapshot)?)),
        view: Arc::clone(view),
        context,
        no_shutdown,
        events_are_read: events.is_on(),
        on_start: Box::new(move || thread_start(ThreadKind::Control)),
    })?)
}

fn start_server(
    socket: &ApiSocket,
    view: &Arc<PublishedView>,
    control: &ControlThread,
    thread_start: &ThreadStart,
) -> Result<HttpServer> {
    let dispatcher = Dispatcher::new(
        Arc::clone(view),
        control.handle(),
        identity(),
        Arc::clone(thread_start),
    );
    let listener = socket
        .listener()
        .context("Cannot listen on the API socket")?;
    let thread_start = Arc::clone(thread_start);
    Ok(HttpServer::start(
        listener,
        dispatcher,
        Deadlines::default(),
        move || thread_start(ThreadKind::HttpServer),
    )?)
}

fn boot(control: &ControlThread, config: VmConfig) -> Result<()> {
    let handle = control.handle();
    handle.call(Endpoint::VmCreate, |vm| vm.create(config))?;
    handle.call(Endpoint::VmBoot, Lifecycle::boot)?;
    Ok(())
}

/// The unmodified configuration of the snapshot to restore.
fn saved_config(request: &RestoreConfig) -> Result<VmConfig> {
    let folder = snapshot::folder_of(&request.source_url)?;
    Ok(snapshot::saved_config(&folder)?)
}

fn restore(control: &ControlThread, request: RestoreConfig) -> Result<()> {
    // Its descriptors belong to this process.
    let restored = move |vm: &mut Lifecycle| vm.restore(&request, Vec::new());
    control.handle().call(Endpoint::VmRestore, restored)?;
    Ok(())
}

fn identity() -> VmmPingResponse {
    VmmPingResponse {
        build_version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: jail::process_id().into(),
        features: FEATURES.iter().map(|&name| name.to_owned()).collect(),
    }
}
