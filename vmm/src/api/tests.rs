//! Tests every endpoint in every state, through the socket, with a fake machine.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use api::config::{MemoryConfig, PathOrFd, RateLimiterConfig};
use api::{
    BalloonStatsResponse, DeviceNode, Endpoint, HintingAction, PciDeviceInfo, ReclaimStats,
    ReportingAction, ReportingPolicy, ReportingStatus, VmBalloonReporting, VmConfig, VmCounters,
    VmmPingResponse,
};
use serde_json::{Value, json};

use super::http::{Deadlines, HttpServer};
use super::*;
use virtio_devices::balloon::HintingError;
use virtio_devices::balloon::reporting_policy::ReportingError;

use crate::config::NewDevice;
use crate::control::{ControlSetup, ControlThread, Ending, GUEST_RESET_INTERVAL, Lifecycle};
use crate::reporting_policy::GuestPolicy;
use crate::snapshot::Snapshot;
use crate::threads::{ThreadKind, ThreadStart};
use crate::view::PublishedView;
use crate::vm::{
    BalloonStatsError, HotplugError, Machine, MachineObserver, SavedMachine, VmContext, VmError,
    WrittenFiles,
};
use machine::cpu::VcpuBrake;
use machine::memory::{GuestMemory, MemoryFailure, WriteTracker};
use machine::pc::PcError;
use machine::signals::VmSignals;
use state::Saved;

const PATIENCE: Duration = Duration::from_secs(20);

/// Machines are created on another thread from a configuration alone, so its command line selects their behaviour.
#[derive(Debug)]
struct FakeMachine {
    vcpus: u32,
    vcpus_leave: bool,
    observer: FakeObserver,
    leaving: Vec<String>,
    memory: MemoryConfig,
    /// Sizes of RAM after each addition.
    grown_to: Vec<u64>,
    /// RAM that the host cannot provide.
    failure: Option<MemoryFailure>,
    /// The host may lack memory: failures are found without a signal.
    may_run_out: bool,
}

#[derive(Debug, Clone)]
struct FakeObserver {
    ram_bytes: u64,
    balloon_bytes: Option<Arc<AtomicU64>>,
    wedged: bool,
    steered: Steered,
}

/// The reporting requests that the machine received: the policy's delay, and pauses.
type Steered = Arc<Mutex<Vec<String>>>;

/// Blocks one thread while a test checks the others.
struct Gate(Mutex<bool>, Condvar);

/// Closed while a test needs a machine that is slow to create.
static SLOW: Gate = Gate::open();
/// Closed while a test needs a guest that does not respond.
static WEDGED: Gate = Gate::open();
/// Closed while a test needs a guest that does not confirm a pause of reporting.
static PAUSING: Gate = Gate::open();

impl Gate {
    const fn open() -> Self {
        Self(Mutex::new(true), Condvar::new())
    }

    fn set(&self, open: bool) {
        *self.0.lock().unwrap() = open;
        self.1.notify_all();
    }

    fn pass(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open));
    }
}

impl FakeMachine {
    fn make(
        config: &mut VmConfig,
        _context: &VmContext,
        _snapshot: Option<&Snapshot>,
    ) -> Result<Box<dyn Machine>, VmError> {
        let behaviour = config.payload.clone().unwrap().cmdline.unwrap_or_default();
        if behaviour == "broken" {
            return Err(VmError::MissingBalloon);
        }
        if behaviour == "narrow" {
            // Simulates a host with fewer physical address bits than the configuration expects.
            GuestMemory::validate(&config.memory, 33)
                .map_err(|error| VmError::Pc(PcError::Memory(error)))?;
        }
        if let Some(path) = behaviour.strip_prefix("opens ") {
            std::fs::File::open(path).map_err(|error| VmError::device("file", error))?;
        }
        if behaviour == "slow" {
            SLOW.pass();
        }
        Ok(Box::new(Self {
            leaving: Vec::new(),
            vcpus: config.cpus.boot_vcpus,
            vcpus_leave: false,
            memory: config.memory.clone(),
            grown_to: Vec::new(),
            may_run_out: behaviour == "stalls",
            failure: ["lacks a page", "stalls", "lost a page"]
                .contains(&behaviour.as_str())
                .then(|| MemoryFailure {
                    reason: format!("the guest {behaviour}"),
                    can_continue: behaviour != "lost a page",
                }),
            observer: FakeObserver {
                ram_bytes: config.memory.total_bytes().unwrap(),
                balloon_bytes: config
                    .balloon
                    .as_ref()
                    .map(|balloon| Arc::new(AtomicU64::new(balloon.size))),
                wedged: behaviour == "wedged",
                steered: Steered::default(),
            },
        }))
    }
}

impl FakeMachine {
    /// Its RAM, which is not kept.
    fn memory(&self) -> GuestMemory {
        let mut memory = GuestMemory::new(&self.memory, 46).unwrap();
        for bytes in &self.grown_to {
            memory.add_dimm(memory.map_dimm(*bytes).unwrap().unwrap());
        }
        memory
    }
}

impl Machine for FakeMachine {
    fn boot(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn shutdown(self: Box<Self>) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&self) -> Result<SavedMachine, VmError> {
        let memory = self.memory();
        let part = json!({"version": 1});
        let map = Saved::of(&memory.state());
        let pc = json!({
            "version": 1, "memory": map, "vcpus": part, "ioapic": part, "pci_bus": part, "pci_hotplug": part,
            "devices": {}, "pvpanic": null, "serial": null, "cmos": part, "pm_timer": part, "ged": part,
        });
        let pc = serde_json::from_value(pc).unwrap();
        Ok(SavedMachine { pc, memory })
    }

    fn state(&self) -> Result<SavedMachine, VmError> {
        self.save()
    }

    fn is_memory_complete(&self) -> bool {
        true
    }

    fn track_writes(&self) -> Result<WriteTracker, VmError> {
        Err(VmError::MissingMem)
    }

    fn brake(&self) -> Option<VcpuBrake> {
        None
    }

    fn written_files(&self) -> WrittenFiles {
        WrittenFiles::default()
    }

    fn hold_disks(&self, _hold: bool) -> Result<(), VmError> {
        Ok(())
    }

    fn write_core(&self, _file: &std::fs::File) -> Result<(), VmError> {
        Ok(())
    }

    fn power_button(&self) -> Result<(), VmError> {
        Ok(())
    }

    fn nmi(&self) {}

    fn resize_disk(&self, id: &str, _bytes: u64) -> Result<(), VmError> {
        match id {
            "_disk0" => Ok(()),
            _ => Err(VmError::Hotplug(HotplugError::NoSuchDevice {
                id: id.to_owned(),
            })),
        }
    }

    fn set_rate_limit(&self, id: &str, limit: Option<&RateLimiterConfig>) -> Result<(), VmError> {
        let mut steered = self.observer.steered.lock().unwrap();
        steered.push(format!("limit of {id} {}", limit.is_some()));
        Ok(())
    }

    fn resize_balloon(&self, bytes: u64) -> Result<(), VmError> {
        let actual = self.observer.balloon_bytes.as_ref();
        actual
            .ok_or(VmError::MissingBalloon)?
            .store(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn settle_vcpus(&mut self) -> Result<(), VmError> {
        // Its guest never releases a vCPU.
        match self.vcpus_leave {
            false => Ok(()),
            true => Err(VmError::Pc(PcError::LeavingVcpus { count: 1 })),
        }
    }

    fn resize_vcpus(&mut self, count: u32) -> Result<(), VmError> {
        self.settle_vcpus()?;
        let mut steered = self.observer.steered.lock().unwrap();
        steered.push(format!("{count} vCPUs"));
        drop(steered);
        self.vcpus_leave = count < self.vcpus;
        self.vcpus = count;
        Ok(())
    }

    fn grow_memory(&mut self, total_bytes: u64) -> Result<(), VmError> {
        let dimm = self.memory().map_dimm(total_bytes);
        if dimm
            .map_err(|error| VmError::Pc(PcError::Grow(error)))?
            .is_some()
        {
            self.grown_to.push(total_bytes);
            self.observer.ram_bytes = total_bytes;
        }
        Ok(())
    }

    fn resize_memory(&self, zone_id: &str, hotplugged_bytes: u64) -> Result<(), VmError> {
        let mut steered = self.observer.steered.lock().unwrap();
        steered.push(format!("memory of {zone_id} {hotplugged_bytes}"));
        Ok(())
    }

    fn balloon_hinting(&self, action: HintingAction) -> Result<(), VmError> {
        match action {
            HintingAction::Start => Ok(()),
            HintingAction::Stop => Err(VmError::Hinting(HintingError::NotOffered)),
        }
    }

    fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError> {
        let id = device.id().unwrap().to_owned();
        if self.leaving.contains(&id) {
            return Err(VmError::Hotplug(HotplugError::StillLeaving { id }));
        }
        if id == "bad" {
            let source = "no such image".into();
            return Err(VmError::Pc(PcError::Device { id, source }));
        }
        if let NewDevice::Balloon(balloon) = device {
            self.observer.balloon_bytes = Some(Arc::new(AtomicU64::new(balloon.size)));
        }
        Ok(PciDeviceInfo {
            id,
            bdf: "0000:00:05.0".to_owned(),
        })
    }

    fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        let bytes = self.observer.balloon().unwrap_or(0);
        if id == "__balloon" && bytes > 0 {
            return Err(VmError::Hotplug(HotplugError::BalloonInflated {
                id: id.to_owned(),
                ballooned_bytes: bytes,
                target_bytes: bytes,
            }));
        }
        self.leaving.push(id.to_owned());
        Ok(())
    }

    fn take_ejected(&mut self) -> Vec<PciDeviceInfo> {
        let gone = self.leaving.drain(..);
        gone.map(|id| PciDeviceInfo {
            id,
            bdf: "0000:00:05.0".to_owned(),
        })
        .collect()
    }

    fn balloon_reporting(&self, request: VmBalloonReporting) -> Result<(), VmError> {
        if request.action == ReportingAction::ReportNow {
            return Err(VmError::Reporting(ReportingError::GuestDeclined));
        }
        let mut steered = self.observer.steered.lock().unwrap();
        steered.push(format!("{:?}", request.action));
        Ok(())
    }

    fn set_reporting_policy(&self, policy: ReportingPolicy) {
        let mut steered = self.observer.steered.lock().unwrap();
        steered.push(format!("delay {}", policy.delay_ms_max));
    }

    fn may_run_out_of_memory(&self) -> bool {
        self.may_run_out
    }

    fn memory_failure(&mut self) -> Option<MemoryFailure> {
        self.failure.clone()
    }

    fn observer(&self) -> Arc<dyn MachineObserver> {
        Arc::new(self.observer.clone())
    }
}

impl FakeObserver {
    fn balloon(&self) -> Result<u64, BalloonStatsError> {
        let actual = self.balloon_bytes.as_ref();
        Ok(actual
            .ok_or(BalloonStatsError::MissingBalloon)?
            .load(Ordering::Relaxed))
    }
}

impl MachineObserver for FakeObserver {
    fn memory_actual_size_bytes(&self) -> u64 {
        self.ram_bytes.saturating_sub(self.balloon().unwrap_or(0))
    }

    fn counters(&self) -> VmCounters {
        BTreeMap::from([("_disk0".to_owned(), BTreeMap::new())])
    }

    fn balloon_stats(&self, deadline: Instant) -> Result<BalloonStatsResponse, BalloonStatsError> {
        assert!(deadline > Instant::now());
        if self.wedged {
            WEDGED.pass();
        }
        let balloon_actual = self.balloon()?;
        Ok(BalloonStatsResponse {
            balloon_actual,
            ..Default::default()
        })
    }

    fn reclaim_stats(&self) -> Result<ReclaimStats, BalloonStatsError> {
        Ok(ReclaimStats {
            ballooned_bytes: self.balloon()?,
            balloon_target_bytes: self.balloon()?,
            ..Default::default()
        })
    }

    fn balloon_figures(&self) -> Result<ReclaimStats, BalloonStatsError> {
        self.reclaim_stats()
    }

    fn reporting_policy(&self) -> GuestPolicy {
        GuestPolicy::NoBalloon
    }

    /// Returns the requests that the machine received in place of a reason.
    fn reporting(&self, deadline: Instant) -> Result<ReportingStatus, BalloonStatsError> {
        if self.wedged {
            PAUSING.pass();
        }
        let running = deadline > Instant::now() + PATIENCE / 10;
        Ok(ReportingStatus {
            active: running,
            reason: Some(self.steered.lock().unwrap().join(", ")),
            ..Default::default()
        })
    }

    fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        BTreeMap::from([("__balloon".to_owned(), DeviceNode::default())])
    }
}

type Events = Arc<Mutex<Vec<String>>>;

struct Vmm {
    dir: tempfile::TempDir,
    signals: Arc<VmSignals>,
    events: Events,
    control: Option<ControlThread>,
    view: Arc<PublishedView>,
    /// Threads for queries that were ever started.
    query_threads: Arc<AtomicUsize>,
    _server: HttpServer,
    _socket: ApiSocket,
}

fn vmm_with(no_shutdown: bool) -> Vmm {
    let dir = tempfile::tempdir().unwrap();
    let events = Events::default();
    let recorded = Arc::clone(&events);
    let view = Arc::new(PublishedView::default());
    let shown = Arc::clone(&view);
    let sink: crate::events::EventSink = Arc::new(move |event| {
        let (source, name) = (event.kind.source(), event.kind.name());
        let mut text = format!("{source} {name}");
        if name == "snapshot-progress" {
            // As a client would see it now.
            let progress = shown.get().info().unwrap().snapshot_progress.unwrap();
            text += &format!(" {}/{}", progress.done_bytes, progress.total_bytes);
        }
        recorded.lock().unwrap().push(text);
    });
    let query_threads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&query_threads);
    let thread_start: ThreadStart = Arc::new(move |kind| {
        if kind == ThreadKind::ApiQuery {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let context = VmContext::new(Arc::clone(&thread_start), sink).unwrap();
    let signals = Arc::clone(&context.signals);
    let control = ControlThread::start(ControlSetup {
        make_machine: FakeMachine::make,
        view: Arc::clone(&view),
        context,
        no_shutdown,
        events_are_read: true,
        on_start: Box::new(|| {}),
    })
    .unwrap();
    let socket = ApiSocket::open(&PathOrFd::Path(dir.path().join("s"))).unwrap();
    let identity = VmmPingResponse {
        version: "1".to_owned(),
        ..Default::default()
    };
    let dispatcher = Dispatcher::new(Arc::clone(&view), control.handle(), identity, thread_start);
    let server = HttpServer::start(
        socket.listener().unwrap(),
        dispatcher,
        Deadlines::default(),
        || {},
    )
    .unwrap();
    Vmm {
        dir,
        signals,
        events,
        control: Some(control),
        view,
        query_threads,
        _server: server,
        _socket: socket,
    }
}

fn vmm() -> Vmm {
    vmm_with(false)
}

#[derive(Debug)]
struct Response {
    status: u16,
    body: Value,
}

impl Vmm {
    fn send(&self, method: &str, path: &str, body: Option<&str>) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: localhost\r\n").unwrap();
        if let Some(body) = body {
            write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        } else {
            write!(stream, "\r\n").unwrap();
        }
        stream
    }

    fn raw(&self, method: &str, path: &str, body: Option<&str>) -> Response {
        receive(&mut self.send(method, path, body))
    }

    fn call(&self, endpoint: Endpoint, body: Option<&str>) -> Response {
        self.raw(endpoint.method().as_str(), &endpoint.path(), body)
    }

    fn ok(&self, endpoint: Endpoint, body: Option<&str>) -> Value {
        let response = self.call(endpoint, body);
        assert_eq!(
            response.status,
            endpoint.success_status(),
            "{endpoint:?}: {response:?}"
        );
        response.body
    }

    fn create(&self, cmdline: &str) {
        let config = json!({
            "payload": {"kernel": "/k", "cmdline": cmdline},
            "disks": [{"path": "/d"}],
            "balloon": {"size": 0},
        });
        self.ok(Endpoint::VmCreate, Some(&config.to_string()));
    }

    fn state(&self) -> Value {
        self.ok(Endpoint::VmInfo, None)["state"].clone()
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::yield_now();
        }
    }

    fn has_event(&self, event: &str) -> bool {
        self.events.lock().unwrap().iter().any(|seen| seen == event)
    }

    fn join(mut self) -> Ending {
        self.control.take().unwrap().join()
    }
}

fn receive(stream: &mut UnixStream) -> Response {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head["HTTP/1.1 ".len()..].split('\r').next().unwrap();
    let mut body = Vec::new();
    if let Some((_, rest)) = head.split_once("Content-Length: ") {
        body.resize(rest.split('\r').next().unwrap().parse().unwrap(), 0);
        stream.read_exact(&mut body).unwrap();
    }
    Response {
        status: status.trim().parse().unwrap(),
        body: match body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&body).unwrap(),
        },
    }
}

const RESIZE: &str = r#"{"desired_balloon": 4096}"#;
const THRESHOLDS: &str = r#"{"alerts": [{"name": "a", "figure": "ballooned_bytes",
    "direction": "above", "enter": 4095, "leave": 0}]}"#;
const PAUSE: &str = r#"{"action": "pause"}"#;
const CONFIG: &str = r#"{"payload": {"kernel": "/k"}}"#;

fn body_of(endpoint: Endpoint) -> Option<&'static str> {
    match endpoint {
        Endpoint::VmCreate => Some(CONFIG),
        Endpoint::VmResize => Some(RESIZE),
        Endpoint::VmResizeZone => Some(r#"{"id": "a", "desired_ram": 4096}"#),
        Endpoint::VmResizeDisk => Some(r#"{"id": "_disk0", "desired_size": 4096}"#),
        // The disk gets its name at boot.
        Endpoint::VmUpdateRateLimiter => Some(r#"{"id": "_disk0"}"#),
        Endpoint::VmSetReclaimThresholds => Some(THRESHOLDS),
        Endpoint::VmBalloonHinting => Some(r#"{"action": "start"}"#),
        Endpoint::VmAddDisk => Some(r#"{"path": "/e"}"#),
        Endpoint::VmAddNet => Some("{}"),
        Endpoint::VmAddFs => Some(r#"{"tag": "t", "socket": "/f"}"#),
        Endpoint::VmAddGenericVhostUser => {
            Some(r#"{"device_type": 4, "socket": "/g", "queue_sizes": [64]}"#)
        }
        Endpoint::VmAddDevice => Some(r#"{"path": "/sys/x"}"#),
        Endpoint::VmAddPmem => Some(r#"{"file": "/m"}"#),
        Endpoint::VmAddVsock => Some(r#"{"cid": 3, "socket": "/s"}"#),
        Endpoint::VmAddBalloon => Some(r#"{"size": 0}"#),
        Endpoint::VmRemoveDevice => Some(r#"{"id": "__balloon"}"#),
        Endpoint::VmBalloonReporting => Some(PAUSE),
        Endpoint::VmSnapshot => Some(r#"{"destination_url": "file:///nonexistent"}"#),
        Endpoint::VmSnapshotMerge => Some(
            r#"{"source_url": "file:///nonexistent", "destination_url": "file:///nonexistent"}"#,
        ),
        Endpoint::VmCoredump => Some(r#"{"destination_url": "file:///nonexistent/core"}"#),
        Endpoint::VmRestore => Some(r#"{"source_url": "file:///nonexistent"}"#),
        Endpoint::VmSendMigration => Some(r#"{"destination_url": "tcp:host:1"}"#),
        Endpoint::VmReceiveMigration => Some(r#"{"receiver_url": "unix:relative"}"#),
        _ => None,
    }
}

/// Status in the states "nothing", "Created", "Running", "Paused".
fn expected(endpoint: Endpoint) -> [u16; 4] {
    match endpoint {
        Endpoint::VmmPing | Endpoint::VmmShutdown => [200; 4],
        Endpoint::VmInfo | Endpoint::VmReclaimThresholds | Endpoint::VmSetReclaimThresholds => {
            [404, 200, 200, 200]
        }
        Endpoint::VmCreate => [204, 500, 500, 500],
        Endpoint::VmBoot => [404, 204, 500, 500],
        Endpoint::VmReboot => [404, 404, 204, 204],
        Endpoint::VmPause => [500, 500, 204, 500],
        Endpoint::VmResume => [500, 500, 500, 204],
        Endpoint::VmShutdown
        | Endpoint::VmPowerButton
        | Endpoint::VmNmi
        | Endpoint::VmBalloonHinting => [500, 500, 204, 204],
        // It has no zones.
        Endpoint::VmResizeZone => [404; 4],
        Endpoint::VmResizeDisk => [404, 500, 204, 204],
        Endpoint::VmUpdateRateLimiter => [404, 404, 204, 204],
        Endpoint::VmCounters | Endpoint::VmReclaimStats | Endpoint::VmBalloonReporting => {
            [500, 500, 200, 200]
        }
        Endpoint::VmBalloonStats => [500, 500, 200, 500],
        Endpoint::VmResize => [404, 204, 204, 204],
        Endpoint::VmAddDevice
        | Endpoint::VmAddDisk
        | Endpoint::VmAddNet
        | Endpoint::VmAddPmem
        | Endpoint::VmAddVsock => [404, 204, 200, 200],
        // Its memory is not shared.
        Endpoint::VmAddFs | Endpoint::VmAddGenericVhostUser => [404, 400, 400, 400],
        // The VM has a balloon already.
        Endpoint::VmAddBalloon => [404, 400, 400, 400],
        Endpoint::VmRemoveDevice => [404, 204, 204, 204],
        Endpoint::VmDelete => [204; 4],
        // The folder is checked last.
        Endpoint::VmSnapshot => [500, 500, 500, 400],
        Endpoint::VmSnapshotMerge => [400; 4],
        Endpoint::VmCoredump => [500, 500, 400, 400],
        Endpoint::VmRestore => [400, 500, 500, 500],
        Endpoint::VmSendMigration => [500, 500, 400, 400],
        Endpoint::VmReceiveMigration => [400, 500, 500, 500],
        Endpoint::VmCancelMigration => [500; 4],
    }
}

#[test]
fn rate_limits_change_before_the_boot_and_after_it_and_bad_ones_change_nothing() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": {"ops": {"size": 9, "refill_time": 1}}}],
        "disks": [{"path": "/d", "id": "data"}, {"path": "/e", "id": "member", "rate_limit_group": "g"}],
        "balloon": {"size": 0},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    let update = |id: &str, refill_time: u64| {
        let bandwidth = json!({"size": 4096, "one_time_burst": 1, "refill_time": refill_time});
        let body = json!({"id": id, "rate_limiter_config": {"bandwidth": bandwidth}});
        vmm.call(Endpoint::VmUpdateRateLimiter, Some(&body.to_string()))
    };
    let config = || vmm.ok(Endpoint::VmInfo, None)["config"].clone();
    assert_eq!(update("data", 100).status, 204);
    let bandwidth = &config()["disks"][0]["rate_limiter_config"]["bandwidth"];
    assert_eq!(bandwidth["refill_time"], 100);

    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(update("g", 200).status, 204);
    let before = config();
    let limit = &before["rate_limit_groups"][0]["rate_limiter_config"];
    assert_eq!(limit["bandwidth"]["refill_time"], 200);
    assert!(limit["ops"].is_null(), "replaced: {limit}");
    let response = update("member", 100);
    assert_eq!(response.status, 400, "{response:?}");
    let response = update("data", 86_400_001);
    assert_eq!(response.status, 400);
    let chain = response.body.to_string();
    assert!(
        chain.contains("bandwidth refill_time must be at most 86400000 ms"),
        "{chain}"
    );
    for body in [
        r#"{"rate_limiter_config": {}}"#,
        r#"{"id": "data", "limit": {}}"#,
        r#"{"id": "data", "rate_limiter_config": {"ops": {"size": 1}}}"#,
        r#"{"id": "data", "rate_limiter_config": {"ops": {"size": -1, "refill_time": 1}}}"#,
    ] {
        let response = vmm.call(Endpoint::VmUpdateRateLimiter, Some(body));
        assert_eq!(response.status, 400, "{body}");
    }
    assert_eq!(config(), before, "nothing has changed");
    vmm.ok(Endpoint::VmUpdateRateLimiter, Some(r#"{"id": "data"}"#));
    assert!(config()["disks"][0]["rate_limiter_config"].is_null());
    let reporting = vmm.ok(Endpoint::VmBalloonReporting, Some(PAUSE));
    let reason = reporting["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("limit of g true, limit of data false"),
        "{reason}"
    );
}

/// The saved state of the machine contains its IOMMU, and a restore needs a configuration with one.
#[test]
fn machine_keeps_its_iommu_when_the_last_device_behind_it_goes() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "disks": [{"path": "/d", "id": "a", "iommu": true}, {"path": "/e", "id": "b", "iommu": true}],
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmRemoveDevice, Some(r#"{"id": "b"}"#));
    let iommu = || vmm.ok(Endpoint::VmInfo, None)["config"]["iommu"].clone();
    assert_eq!(iommu(), false, "no machine exists yet");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmRemoveDevice, Some(r#"{"id": "a"}"#));
    assert_eq!(iommu(), true);
}

#[test]
fn endpoints_answer_in_every_state_as_upstream_does() {
    for &endpoint in Endpoint::ALL {
        for (state, status) in expected(endpoint).into_iter().enumerate() {
            let vmm = vmm();
            if state > 0 {
                vmm.create("");
            }
            if state > 1 {
                vmm.ok(Endpoint::VmBoot, None);
            }
            if state > 2 {
                vmm.ok(Endpoint::VmPause, None);
            }
            let response = vmm.call(endpoint, body_of(endpoint));
            assert_eq!(
                response.status, status,
                "{endpoint:?} in state {state}: {response:?}"
            );
            if status >= 400 {
                let chain = response.body.as_array().unwrap();
                assert_eq!(chain[0], "Error from API", "{endpoint:?}");
                assert!(chain.len() >= 3, "{endpoint:?}: {chain:?}");
            } else {
                assert_eq!(
                    response.body.is_null(),
                    status == 204 || endpoint.response().is_none()
                );
            }
        }
    }
}

#[test]
fn endpoints_refuse_other_methods_and_wrong_bodies_with_400() {
    let vmm = vmm();
    for &endpoint in Endpoint::ALL {
        let other = match endpoint.method() {
            api::Method::Get => "PUT",
            api::Method::Put => "GET",
        };
        let shared = Endpoint::at_path(&endpoint.path()).count() > 1;
        for method in [other, "POST", "DELETE"] {
            if shared && method == other {
                continue;
            }
            assert_eq!(
                vmm.raw(method, &endpoint.path(), None).status,
                400,
                "{method} {endpoint:?}"
            );
        }
        let wrong = match body_of(endpoint) {
            Some(_) => None,
            None => Some("{}"),
        };
        assert_eq!(vmm.call(endpoint, wrong).status, 400, "{endpoint:?}");
    }
    for path in ["/", "/api/v1/vm.unknown", "/api/v1/vm.info/x"] {
        let response = vmm.raw("GET", path, None);
        assert_eq!(
            (response.status, response.body),
            (404, json!(["Not Found"])),
            "{path}"
        );
    }
}

#[test]
fn core_file_is_written_in_a_pause_and_never_over_another_file() {
    let vmm = vmm();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("core");
    let body = json!({"destination_url": format!("file://{}", path.display())}).to_string();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmCoredump, Some(&body));
    assert!(path.is_file());
    assert_eq!(vmm.state(), "Running");
    let events = vmm.events.lock().unwrap().clone();
    let events: Vec<_> = events.iter().map(String::as_str).rev().take(5).collect();
    let expected = [
        "vm resumed",
        "vm resuming",
        "vm coredumping",
        "vm paused",
        "vm pausing",
    ];
    assert_eq!(events, expected);
    let again = vmm.call(Endpoint::VmCoredump, Some(&body));
    assert_eq!(again.status, 400, "{again:?}");
    for url in ["core", "file://core", "http:///core"] {
        let body = json!({"destination_url": url}).to_string();
        assert_eq!(vmm.call(Endpoint::VmCoredump, Some(&body)).status, 400);
    }
    std::fs::remove_file(&path).unwrap();
    vmm.ok(Endpoint::VmPause, None);
    vmm.ok(Endpoint::VmCoredump, Some(&body));
    assert_eq!(vmm.state(), "Paused");
}

#[test]
fn vm_saved_is_the_same_after_a_restore() {
    let vmm = vmm();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let to = json!({"destination_url": url}).to_string();
    let from = |resume| json!({"source_url": url, "resume": resume}).to_string();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmSetReclaimThresholds, Some(THRESHOLDS));
    vmm.ok(Endpoint::VmPause, None);
    let before = vmm.ok(Endpoint::VmInfo, None)["config"].clone();
    vmm.ok(Endpoint::VmSnapshot, Some(&to));
    assert!(vmm.has_event("vm snapshotting") && vmm.has_event("vm snapshotted"));
    let bytes = 512 << 20;
    assert!(vmm.has_event(&format!("vm snapshot-progress {bytes}/{bytes}")));
    assert!(
        vmm.ok(Endpoint::VmInfo, None)
            .get("snapshot_progress")
            .is_none()
    );
    assert_eq!(vmm.state(), "Paused");
    let again = vmm.call(Endpoint::VmSnapshot, Some(&to));
    assert_eq!(again.status, 400, "{again:?}");
    vmm.ok(Endpoint::VmDelete, None);

    vmm.ok(Endpoint::VmRestore, Some(&from(false)));
    assert!(vmm.has_event("vm restoring") && vmm.has_event("vm restored"));
    let info = vmm.ok(Endpoint::VmInfo, None);
    assert_eq!(
        (&info["state"], &info["config"]),
        (&json!("Paused"), &before)
    );
    let thresholds = vmm.ok(Endpoint::VmReclaimThresholds, None);
    assert_eq!(thresholds["alerts"][0]["enter"], 4095);
    vmm.ok(Endpoint::VmResume, None);
    vmm.ok(Endpoint::VmDelete, None);
    vmm.ok(Endpoint::VmRestore, Some(&from(true)));
    assert_eq!(vmm.state(), "Running");
    vmm.ok(Endpoint::VmDelete, None);

    // A restore that fails leaves nothing behind.
    std::fs::write(folder.path().join("state.json"), "{}").unwrap();
    let damaged = vmm.call(Endpoint::VmRestore, Some(&from(false)));
    assert_eq!(damaged.status, 400, "{damaged:?}");
    assert!(vmm.has_event("vm restore-failed"));
    assert_eq!(vmm.call(Endpoint::VmInfo, None).status, 404);
    vmm.create("");
}

#[test]
fn snapshot_that_fails_ends_with_an_event_and_the_vm_stays_paused() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmPause, None);
    let to = body_of(Endpoint::VmSnapshot);
    assert_eq!(vmm.call(Endpoint::VmSnapshot, to).status, 400);
    assert!(vmm.has_event("vm snapshotting") && vmm.has_event("vm snapshot-failed"));
    assert!(!vmm.has_event("vm snapshotted"));
    assert_eq!(vmm.state(), "Paused");
}

#[test]
fn reset_that_the_guest_requests_as_it_is_paused_is_not_lost_in_a_snapshot() {
    let vmm = vmm();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let to = json!({"destination_url": url}).to_string();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmPause, None);
    vmm.signals.reset.write(1).unwrap();
    let refused = vmm.call(Endpoint::VmSnapshot, Some(&to));
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!(refused.body.to_string().contains("requested a reset"));
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    vmm.ok(Endpoint::VmResume, None);
    vmm.wait_until("rebooted", |vmm| vmm.has_event("vm rebooted"));
    vmm.ok(Endpoint::VmPause, None);
    vmm.ok(Endpoint::VmSnapshot, Some(&to));
}

#[test]
fn endpoints_refuse_what_is_no_json() {
    let vmm = vmm();
    for (endpoint, body) in [
        (Endpoint::VmCreate, "not json"),
        (Endpoint::VmCreate, r#"{"cpus": 7}"#),
        (Endpoint::VmResize, r#"{"desired_balloon": -1}"#),
        (Endpoint::VmBalloonHinting, r#"{"action": "status"}"#),
        (Endpoint::VmBalloonHinting, "{}"),
        (Endpoint::VmBalloonReporting, r#"{"action": "report_now"}"#),
    ] {
        let response = vmm.call(endpoint, Some(body));
        assert_eq!(response.status, 400);
        assert_eq!(response.body[0], "Failed to deserialize JSON");
        assert!(response.body[1].is_string());
    }
    for body in [
        r#"{"remove":["zzz"]}"#,
        r#"{"policy":{"order_min":200}}"#,
        "[]",
    ] {
        let response = vmm.call(Endpoint::VmSetReclaimThresholds, Some(body));
        assert_eq!(response.status, 400, "{body}");
        assert_eq!(response.body[0], "Failed to deserialize JSON");
    }
    vmm.ok(
        Endpoint::VmCreate,
        Some(r#"{"payload": {"kernel": "/k"}, "of_a_later_version": {}}"#),
    );
    let deep = "[".repeat(1 << 20);
    assert_eq!(vmm.call(Endpoint::VmCreate, Some(&deep)).status, 400);
}

#[test]
fn devices_added_become_part_of_the_configuration_until_they_are_removed() {
    let vmm = vmm();
    vmm.create("");
    let ids = |vmm: &Vmm| -> Vec<Value> {
        let info = vmm.ok(Endpoint::VmInfo, None);
        let disks = info["config"]["disks"].as_array().unwrap();
        disks.iter().map(|disk| disk["id"].clone()).collect()
    };
    let add = |body: &str| vmm.call(Endpoint::VmAddDisk, Some(body));
    assert_eq!(add(r#"{"path": "/e", "id": "cold"}"#).status, 204);
    vmm.ok(Endpoint::VmBoot, None);
    let added = add(r#"{"path": "/f"}"#);
    assert_eq!(added.body, json!({"id": "_disk1", "bdf": "0000:00:05.0"}));
    assert!(vmm.has_event("virtio-device added"));
    assert_eq!(ids(&vmm), ["_disk0", "cold", "_disk1"]);

    for (body, status) in [
        (r#"{"path": "/g", "id": "cold"}"#, 409),
        (r#"{"path": "/g", "id": "__x"}"#, 400),
        (r#"{"path": "/g", "pci_device_id": 32}"#, 400),
        (r#"{"path": "/f"}"#, 409),
        (r#"{"path": "/g", "image_type": "Vhdx"}"#, 400),
        (r#"{"path": "/g", "id": "bad"}"#, 400),
        (r#"{"id": "no-path"}"#, 400),
        (r#"{"path": 7}"#, 400),
    ] {
        assert_eq!(add(body).status, status, "{body}");
    }
    let chain = add(r#"{"path": "/g", "id": "bad"}"#).body;
    assert_eq!(
        chain,
        json!([
            "Error from API",
            "The disk could not be added to the VM",
            "Cannot create device bad",
            "no such image"
        ])
    );
    assert_eq!(ids(&vmm), ["_disk0", "cold", "_disk1"]);

    let remove = |id: &str| {
        let body = json!({ "id": id }).to_string();
        vmm.call(Endpoint::VmRemoveDevice, Some(&body)).status
    };
    assert_eq!(remove("cold"), 204);
    assert_eq!(ids(&vmm), ["_disk0", "_disk1"]);
    let again = add(r#"{"path": "/g", "id": "cold"}"#);
    assert_eq!(again.status, 429, "its removal is pending: {again:?}");
    assert_eq!(ids(&vmm), ["_disk0", "_disk1"]);
    vmm.signals.ejected.write(1).unwrap();
    vmm.wait_until("the removal is told", |vmm| {
        vmm.has_event("vm device-removed")
    });
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(ids(&vmm), ["_disk0", "_disk1"]);
    vmm.ok(Endpoint::VmShutdown, None);
    assert_eq!(remove("nobody"), 404);
    assert_eq!(remove("_disk1"), 204);
    assert_eq!(ids(&vmm), ["_disk0"]);
}

#[test]
fn generated_name_is_used_once_in_the_life_of_a_vm() {
    let vmm = vmm();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let added = |body: &str| vmm.ok(Endpoint::VmAddDisk, Some(body))["id"].clone();
    let remove = |id: &str| {
        let body = json!({ "id": id }).to_string();
        vmm.ok(Endpoint::VmRemoveDevice, Some(&body));
    };
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(added(r#"{"path": "/f"}"#), "_disk1");
    remove("_disk1");
    assert_eq!(added(r#"{"path": "/g"}"#), "_disk2", "the guest has _disk1");
    remove("_disk2");
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(added(r#"{"path": "/h", "id": "_disk7"}"#), "_disk7");
    remove("_disk7");
    vmm.ok(Endpoint::VmPause, None);
    let to = json!({"destination_url": url}).to_string();
    vmm.ok(Endpoint::VmSnapshot, Some(&to));
    vmm.ok(Endpoint::VmDelete, None);
    let from = json!({"source_url": url}).to_string();
    vmm.ok(Endpoint::VmRestore, Some(&from));
    assert_eq!(added(r#"{"path": "/i"}"#), "_disk8");
    vmm.ok(Endpoint::VmDelete, None);
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(added(r#"{"path": "/f"}"#), "_disk1", "another VM");
}

#[test]
fn shared_folder_can_be_added_to_shared_memory() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 1 << 30, "shared": true},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    for id in ["_fs0", "_fs1"] {
        let added = vmm.call(Endpoint::VmAddFs, body_of(Endpoint::VmAddFs));
        assert_eq!(added.status, 200);
        assert!(format!("{:?}", added.body).contains(id));
    }
}

#[test]
fn vsock_device_can_be_added_once() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    let add = || vmm.call(Endpoint::VmAddVsock, body_of(Endpoint::VmAddVsock));
    assert_eq!(add().status, 200);
    let refused = add();
    assert_eq!(refused.status, 500);
    let body = format!("{:?}", refused.body);
    assert!(
        body.contains("already has a vsock device, _vsock"),
        "{body}"
    );
}

#[test]
fn balloon_comes_once_and_goes_only_when_it_is_empty() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    let remove = || vmm.call(Endpoint::VmRemoveDevice, Some(r#"{"id": "__balloon"}"#));
    let add = |body: &str| vmm.call(Endpoint::VmAddBalloon, Some(body));
    assert_eq!(
        add(r#"{"size": 0}"#).body[2],
        "The VM already has balloon __balloon"
    );
    vmm.ok(Endpoint::VmResize, Some(RESIZE));
    let refused = remove();
    assert_eq!(refused.status, 400);
    let cause = refused.body[2].as_str().unwrap();
    assert!(cause.contains("holds 4096 bytes"), "{cause}");
    vmm.ok(Endpoint::VmResize, Some(r#"{"desired_balloon": 0}"#));
    assert_eq!(remove().status, 204);
    assert_eq!(add(r#"{"size": 0}"#).status, 429, "its removal is pending");
    vmm.signals.ejected.write(1).unwrap();
    vmm.wait_until("the removal is told", |vmm| {
        vmm.has_event("vm device-removed")
    });
    let config = vmm.ok(Endpoint::VmInfo, None)["config"].clone();
    assert!(config.get("balloon").is_none(), "{config}");
    assert_eq!(add(r#"{"size": 1152921504606846976}"#).status, 400);
    assert_eq!(add(r#"{"size": 0, "stats_poll_ms": 1}"#).status, 400);
    assert_eq!(add(r#"{"size": 8192}"#).body["id"], "__balloon");
    assert_eq!(
        vmm.ok(Endpoint::VmReclaimStats, None)["balloon_target_bytes"],
        8192
    );
}

#[test]
fn queries_one_after_another_share_a_thread() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    for endpoint in [Endpoint::VmCounters, Endpoint::VmReclaimStats].repeat(8) {
        vmm.ok(endpoint, None);
    }
    assert_eq!(vmm.query_threads.load(Ordering::Relaxed), 1);
}

#[test]
fn hinting_that_the_balloon_refuses_tells_why() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    let response = vmm.call(Endpoint::VmBalloonHinting, Some(r#"{"action": "stop"}"#));
    assert_eq!(response.status, 500);
    let refusal = HintingError::NotOffered.to_string();
    assert_eq!(
        response.body,
        json!([
            "Error from API",
            "Free page hinting could not be started or stopped",
            "Cannot start or stop free page hinting",
            refusal
        ])
    );
}

#[test]
fn report_now_to_a_guest_that_cannot_is_refused_as_the_callers_mistake() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    let wish = r#"{"action": "report-now", "again": true}"#;
    let response = vmm.call(Endpoint::VmBalloonReporting, Some(wish));
    assert_eq!(response.status, 400);
    let refusal = ReportingError::GuestDeclined.to_string();
    assert_eq!(
        response.body,
        json!([
            "Error from API",
            "Free page reporting could not be controlled",
            "Cannot control free page reporting",
            refusal
        ])
    );
}

#[test]
fn policy_and_pause_reach_every_machine_until_the_vm_is_deleted() {
    let vmm = vmm();
    vmm.create("");
    let set = |delay: u64| {
        let change = json!({"reporting_policy": {"delay_ms_max": delay}}).to_string();
        vmm.ok(Endpoint::VmSetReclaimThresholds, Some(&change))
    };
    let not_running = set(70)["reporting_policy"].clone();
    assert_eq!(not_running["reason"], "the VM is not running");
    vmm.ok(Endpoint::VmBoot, None);
    let status = set(80)["reporting_policy"].clone();
    assert_eq!(status["reason"], "the machine has no balloon");
    assert_eq!(status["settings"]["pause"]["in_effect"], false);
    let reason = |action: &str| {
        let body = json!({"action": action}).to_string();
        vmm.ok(Endpoint::VmBalloonReporting, Some(&body))["reason"].clone()
    };
    assert_eq!(reason("pause"), "delay 70, delay 80, Pause");
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(reason("resume"), "delay 80, Pause, Resume");
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(reason("pause"), "delay 80, Pause");
    vmm.ok(Endpoint::VmDelete, None);
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(reason("resume"), "Resume");
}

#[test]
fn pause_of_reporting_waits_for_a_guest_that_runs_and_holds_up_nobody() {
    let vmm = vmm();
    vmm.create("wedged");
    vmm.ok(Endpoint::VmBoot, None);
    PAUSING.set(false);
    let path = Endpoint::VmBalloonReporting.path();
    let mut waiting = vmm.send("PUT", &path, Some(PAUSE));
    assert_eq!(vmm.state(), "Running");
    vmm.ok(Endpoint::VmResize, Some(RESIZE));
    PAUSING.set(true);
    let response = receive(&mut waiting);
    assert_eq!(response.body["active"], true, "it had time to confirm");
    vmm.ok(Endpoint::VmPause, None);
    let answer = vmm.ok(Endpoint::VmBalloonReporting, Some(PAUSE));
    assert_eq!(answer["active"], false, "it stands still and got no time");
}

#[test]
fn endpoints_error_chain_names_the_request_and_the_cause() {
    let vmm = vmm();
    assert_eq!(
        vmm.call(Endpoint::VmPause, None).body,
        json!([
            "Error from API",
            "The VM could not be paused",
            "VM is not running"
        ])
    );
    assert_eq!(
        vmm.call(Endpoint::VmBoot, None).body,
        json!([
            "Error from API",
            "The VM could not boot",
            "VM config is missing"
        ])
    );
    vmm.ok(Endpoint::VmCreate, Some(CONFIG));
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(
        vmm.call(Endpoint::VmResize, Some(RESIZE)).body,
        json!([
            "Error from API",
            "The VM could not be resized",
            "Missing virtio-balloon, can't proceed as expected"
        ])
    );
}

#[test]
fn boot_of_a_configuration_that_makes_no_sense_is_400() {
    let vmm = vmm();
    let config = json!({"payload": {"kernel": "/k"}, "balloon": {"size": 512 << 20}});
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    let response = vmm.call(Endpoint::VmBoot, None);
    assert_eq!(response.status, 400);
    assert_eq!(response.body[2], "Failed to validate config");
    assert_eq!(vmm.state(), "Created");
}

#[test]
fn boot_of_a_configuration_with_two_devices_of_one_name_or_image_is_409() {
    for disks in [
        json!([{"path": "/a", "id": "x"}, {"path": "/b", "id": "x"}]),
        json!([{"path": "/a"}, {"path": "/a"}]),
    ] {
        let vmm = vmm();
        let config = json!({"payload": {"kernel": "/k"}, "disks": disks});
        vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
        let response = vmm.call(Endpoint::VmBoot, None);
        assert_eq!(response.status, 409, "{response:?}");
        assert_eq!(response.body[2], "Failed to validate config");
    }
}

#[test]
fn boot_of_more_ram_than_the_host_can_address_is_400() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k", "cmdline": "narrow"},
        "memory": {"size": 8_u64 << 30},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    let response = vmm.call(Endpoint::VmBoot, None);
    assert_eq!(response.status, 400);
    let text = "Guest RAM of 8589934592 bytes does not fit 33 bits of physical address";
    assert_eq!(response.body[3], text);
}

#[test]
fn boot_that_fails_leaves_the_configuration_and_nothing_else() {
    let vmm = vmm();
    vmm.create("broken");
    for _ in 0..2 {
        assert_eq!(vmm.call(Endpoint::VmBoot, None).status, 500);
        assert_eq!(vmm.state(), "Created");
    }
    let info = vmm.ok(Endpoint::VmInfo, None);
    assert!(info["config"]["disks"][0].get("id").is_none());
}

#[test]
fn resize_of_the_balloon_shows_in_info_and_survives_shutdown() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(
        Endpoint::VmResize,
        Some(r#"{"desired_balloon": 268435456, "desired_vcpus": 1, "desired_ram": 536870912}"#),
    );
    let info = vmm.ok(Endpoint::VmInfo, None);
    assert_eq!(info["memory_actual_size"], 256 << 20);
    assert_eq!(info["config"]["balloon"]["size"], 256 << 20);
    assert_eq!(info["config"]["disks"][0]["id"], "_disk0");
    assert!(info["device_tree"]["__balloon"].is_object());
    vmm.ok(Endpoint::VmShutdown, None);
    let info = vmm.ok(Endpoint::VmInfo, None);
    assert_eq!(info["state"], "Created");
    assert_eq!(info["memory_actual_size"], 512 << 20);
    assert!(info.get("device_tree").is_none());
    assert_eq!(info["config"]["balloon"]["size"], 256 << 20);
}

#[test]
fn resize_of_the_balloon_to_all_ram_or_more_is_refused_and_changes_nothing() {
    let vmm = vmm();
    vmm.create("");
    let size = || vmm.ok(Endpoint::VmInfo, None)["config"]["balloon"]["size"].clone();
    let sizes = [512u64 << 20, 1 << 30, 17_592_186_044_416, u64::MAX];
    // Stored, running, and still running after all the rejected requests.
    for _ in 0..2 {
        for bytes in sizes {
            let body = json!({"desired_balloon": bytes}).to_string();
            assert_eq!(vmm.call(Endpoint::VmResize, Some(&body)).status, 400);
            assert_eq!(size(), 0);
        }
        if vmm.state() == "Created" {
            vmm.ok(Endpoint::VmBoot, None);
        }
    }
    vmm.ok(Endpoint::VmReboot, None);
    vmm.ok(Endpoint::VmShutdown, None);
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn resize_before_a_boot_is_refused_if_the_vm_could_not_boot_with_it() {
    let zones = json!({"size": 0, "zones": [{"id": "z", "size": 512 << 20}]});
    let plain = json!({"size": 512 << 20});
    let room = json!({
        "size": 512 << 20, "hotplug_method": "VirtioMem", "hotplug_size": 1 << 30,
    });
    for (memory, desired, status) in [
        (&zones, json!({"desired_ram": 1 << 30}), 500),
        (&plain, json!({"desired_ram": 0}), 400),
        (&plain, json!({"desired_ram": 4097 << 10}), 400),
        (&plain, json!({"desired_ram": u64::MAX}), 400),
        (&plain, json!({"desired_vcpus": 0}), 500),
        (&plain, json!({"desired_vcpus": 9}), 500),
        (&plain, json!({"desired_balloon": 4096}), 500),
        (&room, json!({"desired_ram": 256 << 20}), 400),
        (&room, json!({"desired_ram": 2_u64 << 30}), 400),
        (&room, json!({"desired_ram": (512 << 20) + 1}), 400),
    ] {
        let vmm = vmm();
        let cpus = json!({"boot_vcpus": 1, "max_vcpus": 4});
        let config = json!({"payload": {"kernel": "/k"}, "cpus": cpus, "memory": memory});
        vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
        let stored = || vmm.ok(Endpoint::VmInfo, None)["config"].clone();
        // Created, and after a shutdown.
        for _ in 0..2 {
            let before = stored();
            let answer = vmm.call(Endpoint::VmResize, Some(&desired.to_string()));
            assert_eq!(answer.status, status, "{memory} {desired}: {answer:?}");
            assert_eq!(stored(), before, "{memory} {desired}");
            vmm.ok(Endpoint::VmBoot, None);
            vmm.ok(Endpoint::VmShutdown, None);
        }
    }
}

/// A VM that runs with 512 MiB, and can get 1 GiB more.
fn growing_vmm() -> Vmm {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 512 << 20, "hotplug_method": "VirtioMem", "hotplug_size": 1 << 30},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    vmm
}

#[test]
fn resize_before_a_boot_is_of_the_whole_ram() {
    let vmm = growing_vmm();
    let resize = |mib: u64| {
        let body = json!({"desired_ram": mib << 20}).to_string();
        vmm.ok(Endpoint::VmResize, Some(&body));
        let memory = &vmm.ok(Endpoint::VmInfo, None)["config"]["memory"];
        ["size", "hotplugged_size"].map(|key| memory[key].as_u64().unwrap_or(0) >> 20)
    };
    assert_eq!(resize(1024), [512, 512]);
    vmm.ok(Endpoint::VmShutdown, None);
    // Its present total, then other sizes.
    for (mib, expected) in [
        (1024, [512, 512]),
        (1536, [512, 1024]),
        (512, [512, 0]),
        (640, [512, 128]),
    ] {
        assert_eq!(resize(mib), expected);
    }
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn resize_that_fails_has_changed_nothing() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
        "memory": {"size": 512 << 20, "hotplug_size": 1 << 30},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    let refused = |body: Value, status| {
        let before = vmm.ok(Endpoint::VmInfo, None);
        let answer = vmm.call(Endpoint::VmResize, Some(&body.to_string()));
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert_eq!(vmm.ok(Endpoint::VmInfo, None), before, "{body}");
    };
    let steered = || {
        let view = vmm.view.get();
        let observer = &view.machine.as_ref().unwrap().observer;
        let shown = observer.reporting(Instant::now() + PATIENCE).unwrap();
        shown.reason.unwrap()
    };
    // There is no balloon. A memory device of 600 MiB cannot be made.
    let none = json!({"desired_vcpus": 3, "desired_ram": 640 << 20, "desired_balloon": 4096});
    refused(none, 500);
    refused(json!({"desired_vcpus": 3, "desired_ram": 600 << 20}), 400);
    assert_eq!(steered(), "");
    // The guest does not release the second vCPU.
    vmm.ok(Endpoint::VmResize, Some(r#"{"desired_vcpus": 1}"#));
    refused(json!({"desired_vcpus": 2, "desired_ram": 640 << 20}), 429);
    assert_eq!(steered(), "1 vCPUs");
}

#[test]
fn resize_of_a_running_vm_refuses_hotplug_before_it_touches_the_balloon() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    for (body, status) in [
        (r#"{"desired_vcpus": 2, "desired_balloon": 4096}"#, 500),
        (r#"{"desired_ram": 4096, "desired_balloon": 4096}"#, 400),
        (
            r#"{"desired_ram": 4294967296, "desired_balloon": 4096}"#,
            400,
        ),
    ] {
        assert_eq!(vmm.call(Endpoint::VmResize, Some(body)).status, status);
    }
    assert_eq!(
        vmm.ok(Endpoint::VmInfo, None)["config"]["balloon"]["size"],
        0
    );
}

#[test]
fn resize_of_the_vcpus_is_stored_and_waits_for_a_pending_removal() {
    let vmm = vmm();
    let config = json!({"payload": {"kernel": "/k"}, "cpus": {"boot_vcpus": 2, "max_vcpus": 4}});
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    let resize = |vcpus: u32| {
        let body = json!({ "desired_vcpus": vcpus }).to_string();
        vmm.call(Endpoint::VmResize, Some(&body)).status
    };
    let stored = || vmm.ok(Endpoint::VmInfo, None)["config"]["cpus"]["boot_vcpus"].clone();
    for refused in [0, 5] {
        assert_eq!(resize(refused), 500);
    }
    for vcpus in [4, 4, 3] {
        assert_eq!(resize(vcpus), 204);
        assert_eq!(stored(), vcpus);
    }
    // The guest has not released the fourth vCPU.
    for vcpus in [4, 2] {
        assert_eq!(resize(vcpus), 429);
        assert_eq!(stored(), 3);
    }
    assert_eq!(resize(3), 204);
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(resize(2), 204);
}

#[test]
fn resize_of_ram_that_can_grow_is_kept_and_bounded() {
    let vmm = growing_vmm();
    let resize = |mib: u64| {
        let body = json!({"desired_ram": mib << 20}).to_string();
        vmm.call(Endpoint::VmResize, Some(&body))
    };
    let hotplugged =
        || vmm.ok(Endpoint::VmInfo, None)["config"]["memory"]["hotplugged_size"].clone();
    assert_eq!(resize(1024).status, 204);
    assert_eq!(hotplugged(), 512 << 20);
    for mib in [511, 1537] {
        let refused = resize(mib);
        assert_eq!(refused.status, 400);
        let text = "must be between 536870912 and 1610612736 bytes";
        assert!(
            refused.body.to_string().contains(text),
            "{:?}",
            refused.body
        );
    }
    assert_eq!(hotplugged(), 512 << 20);
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(hotplugged(), 512 << 20);
    assert_eq!(resize(512).status, 204);
    assert!(hotplugged().is_null());
}

#[test]
fn ram_grows_by_memory_devices_and_shrinks_with_a_reboot() {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 512 << 20, "hotplug_size": 1 << 30},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    let resize = |mib: u64| {
        let body = json!({"desired_ram": mib << 20}).to_string();
        vmm.call(Endpoint::VmResize, Some(&body))
    };
    // The configuration of the next boot, and that of this machine.
    let sizes = || {
        let info = vmm.ok(Endpoint::VmInfo, None);
        [
            &info["config"]["memory"]["size"],
            &info["memory_actual_size"],
        ]
        .map(|bytes| bytes.as_u64().unwrap() >> 20)
    };
    assert_eq!(resize(640).status, 204);
    assert_eq!(sizes(), [640, 640]);
    for (mib, text) in [
        (700, "a multiple of 134217728 bytes"),
        (2048, "grow by at most 939524096 bytes"),
        (1, "is less than 2097152 bytes"),
    ] {
        let refused = resize(mib);
        assert_eq!(refused.status, 400);
        assert!(
            refused.body.to_string().contains(text),
            "{:?}",
            refused.body
        );
    }
    assert_eq!(sizes(), [640, 640]);
    assert_eq!(resize(512).status, 204);
    assert_eq!(sizes(), [512, 640]);
    assert_eq!(resize(768).status, 204);
    assert_eq!(sizes(), [768, 768]);
    assert_eq!(resize(600).status, 204);
    assert_eq!(sizes(), [600, 768]);

    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    vmm.ok(Endpoint::VmPause, None);
    let body = json!({"destination_url": url}).to_string();
    vmm.ok(Endpoint::VmSnapshot, Some(&body));
    vmm.ok(Endpoint::VmDelete, None);
    let body = json!({"source_url": url}).to_string();
    vmm.ok(Endpoint::VmRestore, Some(&body));
    assert_eq!(sizes(), [600, 768]);
    vmm.ok(Endpoint::VmReboot, None);
    assert_eq!(sizes(), [600, 600]);
}

#[test]
fn zone_is_resized_within_its_room_and_others_stay() {
    let vmm = vmm();
    let zones = json!([
        {"id": "a", "size": 512 << 20},
        {"id": "b", "size": 256 << 20, "hotplug_size": 1 << 30},
    ]);
    let config = json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 0, "hotplug_method": "VirtioMem", "zones": zones},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    let resize = |id: &str, bytes: u64| {
        let body = json!({"id": id, "desired_ram": bytes}).to_string();
        vmm.call(Endpoint::VmResizeZone, Some(&body)).status
    };
    let sizes = || {
        let zones = &vmm.ok(Endpoint::VmInfo, None)["config"]["memory"]["zones"];
        let of = |at: usize| {
            let mib = |key: &str| zones[at][key].as_u64().unwrap_or(0) >> 20;
            [mib("size"), mib("hotplugged_size")]
        };
        [of(0), of(1)]
    };
    // Before the boot, a zone that cannot grow gets another size.
    assert_eq!(resize("a", 384 << 20), 204);
    assert_eq!(resize("b", 512 << 20), 204);
    assert_eq!(sizes(), [[384, 0], [256, 256]]);
    vmm.ok(Endpoint::VmBoot, None);
    for (id, bytes, status) in [
        ("mem0", 1 << 30, 404),
        ("a", 512 << 20, 400),
        ("a", 256 << 20, 400),
        ("b", 128 << 20, 400),
        ("b", 2 << 30, 400),
        ("b", (300 << 20) + 1, 400),
        ("b", u64::MAX, 400),
    ] {
        assert_eq!(resize(id, bytes), status, "{id} {bytes}");
        assert_eq!(sizes(), [[384, 0], [256, 256]]);
    }
    for body in ["{}", r#"{"id": "b"}"#, r#"{"id": "b", "desired_ram": -1}"#] {
        assert_eq!(vmm.call(Endpoint::VmResizeZone, Some(body)).status, 400);
    }
    // What it has.
    assert_eq!(resize("a", 384 << 20), 204);
    assert_eq!(resize("b", 1280 << 20), 204);
    assert_eq!(sizes(), [[384, 0], [256, 1024]]);
    assert_eq!(resize("b", 256 << 20), 204);
    assert_eq!(sizes(), [[384, 0], [256, 0]]);
    let reporting = vmm.ok(
        Endpoint::VmBalloonReporting,
        Some(r#"{"action": "resume"}"#),
    );
    let steered = reporting["reason"].as_str().unwrap();
    assert!(
        steered.starts_with("memory of b 1073741824, memory of b 0"),
        "{steered}"
    );
    let body = json!({"desired_ram": 1 << 30}).to_string();
    assert_eq!(vmm.call(Endpoint::VmResize, Some(&body)).status, 500);
}

#[test]
fn ram_in_zones_cannot_grow() {
    let vmm = vmm();
    let zone = json!({"id": "a", "size": 512 << 20});
    let config = json!({
        "payload": {"kernel": "/k"},
        "memory": {"size": 0, "hotplug_size": 1 << 30, "zones": [zone]},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    for mib in [640, 256] {
        let body = json!({"desired_ram": mib << 20}).to_string();
        let refused = vmm.call(Endpoint::VmResize, Some(&body));
        assert_eq!(refused.status, 500);
        assert!(refused.body.to_string().contains("it is in zones"));
    }
}

#[test]
fn reads_are_answered_while_a_boot_takes_its_time() {
    let vmm = vmm();
    vmm.create("slow");
    SLOW.set(false);
    let mut boot = vmm.send("PUT", "/api/v1/vm.boot", None);
    vmm.wait_until("booting", |vmm| vmm.has_event("vm booting"));
    assert_eq!(vmm.state(), "Created");
    vmm.ok(Endpoint::VmmPing, None);
    SLOW.set(true);
    assert_eq!(receive(&mut boot).status, 204);
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn wedged_guest_delays_nobody_but_who_asked_it() {
    let vmm = vmm();
    vmm.create("wedged");
    vmm.ok(Endpoint::VmBoot, None);
    WEDGED.set(false);
    let mut asked: Vec<_> = (0..4)
        .map(|_| vmm.send("GET", "/api/v1/vm.balloon-stats", None))
        .collect();
    vmm.ok(Endpoint::VmInfo, None);
    vmm.ok(Endpoint::VmCounters, None);
    vmm.ok(Endpoint::VmPause, None);
    vmm.ok(Endpoint::VmResume, None);
    WEDGED.set(true);
    for stream in &mut asked {
        assert_eq!(receive(stream).status, 200);
    }
}

#[test]
fn thresholds_cross_once_are_kept_over_pause_and_reboot_and_go_with_the_vm() {
    let vmm = vmm();
    vmm.create("");
    let set = vmm.ok(Endpoint::VmSetReclaimThresholds, Some(THRESHOLDS));
    let read = vmm.ok(Endpoint::VmReclaimThresholds, None);
    assert_eq!(set["reporting_policy"], read["reporting_policy"]);
    assert_eq!(set["alerts"][0]["name"], read["alerts"][0]["name"]);
    assert_eq!(set["alerts"][0]["active"], false);
    assert_eq!(set["reporting_policy"]["in_effect"], false);
    assert!(set["reporting_policy"]["reason"].is_string());
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmResize, Some(RESIZE));
    let entered = "virtio-device reclaim-threshold-entered";
    let left = "virtio-device reclaim-threshold-left";
    vmm.wait_until("entered", |vmm| vmm.has_event(entered));
    vmm.ok(Endpoint::VmPause, None);
    vmm.ok(Endpoint::VmReboot, None);
    let alert = vmm.ok(Endpoint::VmReclaimThresholds, None)["alerts"][0].clone();
    assert_eq!(
        (&alert["active"], &alert["value"]),
        (&json!(true), &json!(4096))
    );
    vmm.ok(Endpoint::VmResize, Some(r#"{"desired_balloon": 0}"#));
    vmm.wait_until("left", |vmm| vmm.has_event(left));
    let crossings = vmm.events.lock().unwrap().clone();
    let crossings = crossings.iter().filter(|event| event.contains("threshold"));
    assert_eq!(crossings.collect::<Vec<_>>(), [entered, left]);
    vmm.ok(Endpoint::VmDelete, None);
    assert_eq!(vmm.call(Endpoint::VmReclaimThresholds, None).status, 404);
    vmm.create("");
    assert_eq!(
        vmm.ok(Endpoint::VmReclaimThresholds, None)["alerts"],
        json!([])
    );
}

#[test]
fn balloon_target_reached_is_told_without_an_alert() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmResize, Some(RESIZE));
    let reached = "virtio-device balloon-target-reached";
    vmm.wait_until("reached", |vmm| vmm.has_event(reached));
}

#[test]
fn thresholds_that_make_no_sense_are_400_and_change_nothing() {
    let vmm = vmm();
    vmm.create("");
    let before = vmm.ok(Endpoint::VmReclaimThresholds, None);
    let good = json!({"name": "a", "figure": "x/y", "direction": "below", "enter": 1, "leave": 2});
    let bad = json!({"name": "b", "figure": "x/y", "direction": "below", "enter": 2, "leave": 1});
    let change = json!({"alerts": [good, bad], "reporting_policy": {"order_min": 1}});
    let response = vmm.call(Endpoint::VmSetReclaimThresholds, Some(&change.to_string()));
    assert_eq!(response.status, 400);
    assert_eq!(
        response.body,
        json!([
            "Error from API",
            "The reclaim thresholds could not be changed",
            "Failed to validate thresholds",
            "Alert \"b\"",
            "leave (1) must not be below enter (2)"
        ])
    );
    assert_eq!(vmm.ok(Endpoint::VmReclaimThresholds, None), before);
}

#[test]
fn guest_power_off_ends_the_vmm() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.signals.shutdown.write(1).unwrap();
    let events = Arc::clone(&vmm.events);
    assert_eq!(vmm.join(), Ending::Regular);
    let events = events.lock().unwrap();
    assert_eq!(
        events[events.len() - 3..],
        ["vm shutdown", "vm deleted", "vmm shutdown"]
    );
}

#[test]
fn guest_power_off_with_no_shutdown_leaves_the_configuration() {
    let vmm = vmm_with(true);
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.signals.shutdown.write(1).unwrap();
    vmm.wait_until("shut down", |vmm| vmm.view.get().machine.is_none());
    assert_eq!(vmm.state(), "Created");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.ok(Endpoint::VmmShutdown, None);
    assert_eq!(vmm.join(), Ending::Regular);
}

#[test]
fn guest_reset_starts_the_machine_anew_once() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.signals.reset.write(1).unwrap();
    vmm.wait_until("rebooted", |vmm| vmm.has_event("vm rebooted"));
    assert_eq!(vmm.state(), "Running");
    vmm.ok(Endpoint::VmmShutdown, None);
    let events = Arc::clone(&vmm.events);
    assert_eq!(vmm.join(), Ending::Regular);
    let seen = events.lock().unwrap();
    assert_eq!(
        seen[..],
        [
            "vmm starting",
            "vm booting",
            "vm booted",
            "vm rebooting",
            "vm rebooted",
            "vm shutdown",
            "vm deleted",
            "vmm shutdown"
        ]
    );
}

#[test]
fn guest_that_resets_itself_without_end_must_wait_and_the_operator_must_not() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    let count = |vmm: &Vmm, name: &str| {
        let events = vmm.events.lock().unwrap();
        events.iter().filter(|event| *event == name).count()
    };
    let outcomes = |vmm: &Vmm| count(vmm, "vm rebooted") + count(vmm, "vm reboot-delayed");
    let reset_until_delayed = |times: usize| {
        let mut resets = 0;
        while count(&vmm, "vm reboot-delayed") < times {
            assert!(resets < 1000, "no reset is delayed");
            resets += 1;
            let before = outcomes(&vmm);
            vmm.signals.reset.write(1).unwrap();
            vmm.wait_until("reset or delayed", |vmm| outcomes(vmm) > before);
        }
    };
    reset_until_delayed(1);
    let rebooted = count(&vmm, "vm rebooted");
    // The delayed reset is eventually carried out. Further requests until then are merged into it.
    vmm.signals.reset.write(1).unwrap();
    vmm.wait_until("rebooted", |vmm| count(vmm, "vm rebooted") > rebooted);
    assert_eq!(count(&vmm, "vm reboot-delayed"), 1);
    reset_until_delayed(2);
    // While it waits, requests are served, and a machine that the operator reboots does not inherit the delay.
    assert_eq!(vmm.state(), "Running");
    vmm.ok(Endpoint::VmReboot, None);
    let rebooted = count(&vmm, "vm rebooted");
    vmm.ok(Endpoint::VmPause, None);
    vmm.ok(Endpoint::VmResume, None);
    vmm.ok(Endpoint::VmShutdown, None);
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(count(&vmm, "vm rebooted"), rebooted);
    vmm.ok(Endpoint::VmmShutdown, None);
    assert_eq!(vmm.join(), Ending::Regular);
}

#[test]
fn reset_that_waits_survives_a_new_balloon_and_never_starts_a_paused_vm() {
    let vmm = vmm();
    let config = json!({"payload": {"kernel": "/k"}});
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    let count = |name: &str| {
        let events = vmm.events.lock().unwrap();
        events.iter().filter(|event| *event == name).count()
    };
    let reset = || {
        let outcomes = || count("vm rebooted") + count("vm reboot-delayed");
        let before = outcomes();
        vmm.signals.reset.write(1).unwrap();
        vmm.wait_until("reset or delayed", |_| outcomes() > before);
    };
    while count("vm reboot-delayed") == 0 {
        assert!(count("vm rebooted") < 1000, "no reset is delayed");
        reset();
    }
    let rebooted = count("vm rebooted");
    let add = vmm.call(Endpoint::VmAddBalloon, body_of(Endpoint::VmAddBalloon));
    assert_eq!(add.status, 200);
    vmm.ok(Endpoint::VmPause, None);
    // Waits longer than any reset is delayed. The control thread, which would carry it out, serves these requests.
    let due = Instant::now() + GUEST_RESET_INTERVAL;
    while Instant::now() < due {
        vmm.ok(Endpoint::VmResize, Some("{}"));
    }
    vmm.ok(Endpoint::VmResize, Some("{}"));
    assert_eq!(vmm.state(), "Paused");
    assert_eq!(count("vm rebooted"), rebooted);
    vmm.ok(Endpoint::VmResume, None);
    vmm.wait_until("rebooted", |_| count("vm rebooted") > rebooted);
    // A reset that the guest requested while it was being paused is delayed as well.
    vmm.ok(Endpoint::VmPause, None);
    vmm.signals.reset.write(1).unwrap();
    vmm.ok(Endpoint::VmResize, Some("{}"));
    vmm.ok(Endpoint::VmResize, Some("{}"));
    assert_eq!(vmm.state(), "Paused");
    assert_eq!(count("vm rebooted"), rebooted + 1);
    vmm.ok(Endpoint::VmResume, None);
    vmm.wait_until("rebooted", |_| count("vm rebooted") == rebooted + 2);
    assert_eq!(vmm.state(), "Running");
}

#[test]
fn machine_that_fails_ends_the_vmm_with_a_failure() {
    let vmm = vmm();
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    vmm.signals.failed.write(1).unwrap();
    assert_eq!(vmm.join(), Ending::MachineFailed);
}

/// A running machine whose RAM the host cannot provide, with the state `guest`.
fn vmm_without_memory(guest: &str, action: &str) -> Vmm {
    let vmm = vmm();
    let config = json!({
        "payload": {"kernel": "/k", "cmdline": guest},
        "memory": {"size": 512 << 20, "on_unavailable": action},
    });
    vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    vmm.ok(Endpoint::VmBoot, None);
    vmm
}

#[test]
fn machine_that_lacks_memory_ends_or_is_paused_as_configured() {
    const EVENT: &str = "vm memory-unavailable";
    for (guest, action, ends) in [
        ("lacks a page", "Shutdown", true),
        ("lacks a page", "Pause", false),
        ("stalls", "Shutdown", true),
        ("stalls", "Pause", false),
        // The guest cannot continue without what it has missed.
        ("lost a page", "Pause", true),
    ] {
        let vmm = vmm_without_memory(guest, action);
        if guest != "stalls" {
            vmm.signals.memory.write(1).unwrap();
        }
        vmm.wait_until(EVENT, |vmm| vmm.has_event(EVENT));
        if ends {
            assert_eq!(vmm.join(), Ending::MachineFailed, "{guest}, {action}");
        } else {
            vmm.wait_until("paused", |vmm| vmm.state() == "Paused");
            // It lacks the page again, until the operator frees some.
            let paused = |vmm: &Vmm| {
                let events = vmm.events.lock().unwrap();
                events.iter().filter(|it| *it == "vm paused").count()
            };
            vmm.ok(Endpoint::VmResume, None);
            vmm.signals.memory.write(1).unwrap();
            vmm.wait_until("paused again", |vmm| paused(vmm) == 2);
            vmm.ok(Endpoint::VmDelete, None);
        }
    }
}

#[test]
fn signals_without_a_machine_change_nothing() {
    let vmm = vmm();
    for signal in [
        &vmm.signals.shutdown,
        &vmm.signals.reset,
        &vmm.signals.failed,
        &vmm.signals.memory,
    ] {
        signal.write(1).unwrap();
    }
    vmm.create("");
    vmm.ok(Endpoint::VmBoot, None);
    assert_eq!(vmm.state(), "Running");
    assert!(!vmm.has_event("vm rebooting"));
}

#[test]
fn wish_to_end_waits_for_one_request_however_many_there_are() {
    let control = vmm().control.take().unwrap();
    let handle = control.handle();
    let (let_go, held) = std::sync::mpsc::channel();
    let first = move |_: &mut Lifecycle| {
        held.recv().unwrap();
        Ok(())
    };
    handle.submit(Endpoint::VmPowerButton, first, drop);
    let served = Arc::new(AtomicU64::new(0));
    for _ in 0..8 {
        let served = Arc::clone(&served);
        let next = move |_: &mut Lifecycle| {
            served.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        handle.submit(Endpoint::VmPowerButton, next, drop);
    }
    handle.exit_event().write(1).unwrap();
    let_go.send(()).unwrap();
    assert_eq!(control.join(), Ending::Regular);
    assert_eq!(served.load(Ordering::Relaxed), 0);
    assert!(handle.call(Endpoint::VmPause, Lifecycle::pause).is_err());
}

/// A folder with a disk in the VM's configuration, files that a rule allows, and a file that neither mentions.
struct Confined {
    vmm: Vmm,
    folder: tempfile::TempDir,
}

impl Confined {
    /// `None` where the kernel has no Landlock.
    fn new() -> Option<Self> {
        if let Err(error) = crate::landlock::confine_observers(Arc::new(|_| {})) {
            test_skip::skip(error);
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("rule")).unwrap();
        for name in ["disk", "rule/disk", "other"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let vmm = vmm();
        Some(Self { vmm, folder })
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// A VM whose machine opens the file `opens`.
    fn create(&self, opens: &str) {
        let config = json!({
            "payload": {"kernel": "/k", "cmdline": format!("opens {}", self.path(opens))},
            "disks": [{"path": self.path("disk")}],
            "landlock_enable": true,
            "landlock_rules": [{"path": self.path("rule"), "access": "rw"}],
        });
        self.vmm.ok(Endpoint::VmCreate, Some(&config.to_string()));
    }

    fn add_disk(&self, disk: &Value) -> Response {
        self.vmm.call(Endpoint::VmAddDisk, Some(&disk.to_string()))
    }
}

#[test]
fn landlock_confines_the_machine_to_the_files_of_its_configuration() {
    let Some(confined) = Confined::new() else {
        return;
    };
    confined.create("disk");
    confined.vmm.ok(Endpoint::VmBoot, None);
    confined.vmm.ok(Endpoint::VmReboot, None);
    confined.vmm.ok(Endpoint::VmDelete, None);
    confined.create("other");
    let refused = confined.vmm.call(Endpoint::VmBoot, None);
    assert_eq!(refused.status, 500);
    assert!(
        refused.body.to_string().contains("Permission denied"),
        "{refused:?}"
    );
}

#[test]
fn landlock_lets_disks_be_added_that_the_rules_allow_and_names_the_others() {
    let Some(confined) = Confined::new() else {
        return;
    };
    confined.create("disk");
    // Before the boot there are no rules yet: this disk becomes part of the configuration.
    let early = confined.path("other");
    std::fs::write(confined.path("late"), "").unwrap();
    assert_eq!(confined.add_disk(&json!({"path": early})).status, 204);
    confined.vmm.ok(Endpoint::VmBoot, None);
    let inside = json!({"path": confined.path("rule/disk")});
    assert_eq!(confined.add_disk(&inside).status, 200);
    let late = confined.path("late");
    for readonly in [true, false] {
        let refused = confined.add_disk(&json!({"path": late, "readonly": readonly}));
        assert_eq!(refused.status, 400, "{refused:?}");
        let access = if readonly { "r" } else { "rw" };
        let rule = format!(
            "outside the Landlock rules of this process: name it when the VM is created (landlock_rules, path={late},access={access})"
        );
        assert!(refused.body.to_string().contains(&rule), "{refused:?}");
    }
    // A shutdown does not relax the rules.
    confined.vmm.ok(Endpoint::VmShutdown, None);
    assert_eq!(confined.add_disk(&json!({"path": late})).status, 400);
    confined.vmm.ok(Endpoint::VmBoot, None);
}

#[test]
fn landlock_of_an_earlier_vm_binds_the_next_one_by_name() {
    let Some(confined) = Confined::new() else {
        return;
    };
    confined.create("disk");
    confined.vmm.ok(Endpoint::VmBoot, None);
    confined.vmm.ok(Endpoint::VmDelete, None);
    let config = json!({"payload": {"kernel": "/k"}, "disks": [{"path": confined.path("other")}]});
    confined
        .vmm
        .ok(Endpoint::VmCreate, Some(&config.to_string()));
    let refused = confined.vmm.call(Endpoint::VmBoot, None);
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused
            .body
            .to_string()
            .contains("outside the Landlock rules")
    );
}
