//! Tests both sides in one process. The owners only record requests, and the connection can be cut at any byte.
#![allow(clippy::unwrap_used)]

mod connections;
mod handed_over;
mod postponed;
mod proxy;
mod tls;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::config::MemoryConfig;
use api::{ReclaimThresholdsChange, VmConfig};
use hypervisor::Kvm;
use machine::memory::on_demand::{Content, OnDemand};
use machine::memory::{GuestMemory, RamSlots, ZoneFiles};
use serde_json::json;
use state::Saved;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::snapshot::SnapshotState;
use proxy::{After, Way, cut};

const RAM_BYTES: u64 = 64 << 20;
/// For every wait of a test that must end.
const DEADLINE: Duration = Duration::from_secs(60);
/// A test does not wait for long if the other side is really lost.
const LIMITS: Limits = Limits {
    connect: Duration::from_secs(10),
    hello: Duration::from_secs(10),
    running: Duration::from_secs(30),
    paused: Duration::from_secs(30),
    committed: Duration::from_secs(30),
    question: Duration::from_secs(5),
    asks: Duration::from_millis(100),
    answers: Duration::from_secs(60),
};

fn config() -> VmConfig {
    VmConfig {
        memory: MemoryConfig {
            size: RAM_BYTES,
            ..MemoryConfig::default()
        },
        ..VmConfig::default()
    }
}

fn state_text() -> String {
    let state = SnapshotState {
        pc: serde_json::from_value(json!({"version": 1})).unwrap(),
        thresholds: ReclaimThresholdsChange::default(),
        reporting_paused: true,
        memory_size_after_reboot: None,
        link: None,
        next_device_number: 0,
    };
    serde_json::to_string(&Saved::of(&state)).unwrap()
}

/// Writes a page while the source is paused, so that only the last pass has it.
struct FakeSource {
    memory: GuestMemory,
    ends: Sender<SourceEnd>,
    steps: Arc<Mutex<Vec<String>>>,
    refuses_commit: bool,
    busy_pages: u64,
}

const LAST_PAGE: u64 = RAM_BYTES - 4096;

impl SourceOwner for FakeSource {
    fn begin_pass(&mut self, pass: u32) {
        self.steps.lock().unwrap().push(format!("pass {pass}"));
        let ram = self.memory.ram();
        for page in 1000..1000 + self.busy_pages {
            let (value, address) = (page << 8 | u64::from(pass), page * 4096);
            ram.memory()
                .write_obj(value, GuestAddress(address))
                .unwrap();
            ram.writes().record(address, 8);
        }
    }

    fn throttled(&mut self, percent: u8) {
        self.steps.lock().unwrap().push(format!("{percent} %"));
    }

    fn sync(&mut self) -> Result<(), MigrationError> {
        self.steps.lock().unwrap().push("sync".to_owned());
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MigrationError> {
        self.steps.lock().unwrap().push("pause".to_owned());
        let ram = self.memory.ram();
        ram.memory()
            .write_obj(7_u64, GuestAddress(LAST_PAGE))
            .unwrap();
        ram.writes().record(LAST_PAGE, 8);
        Ok(())
    }

    fn save(&mut self) -> Result<String, MigrationError> {
        self.steps.lock().unwrap().push("save".to_owned());
        Ok(state_text())
    }

    fn commit(&mut self) -> Result<bool, MigrationError> {
        self.steps.lock().unwrap().push("commit".to_owned());
        match self.refuses_commit {
            true => Err(MigrationError::Cancelled),
            false => Ok(true),
        }
    }

    fn end(&mut self, end: SourceEnd) {
        self.ends.send(end).unwrap();
    }
}

/// The steps of a target.
#[derive(Debug, Default)]
struct Received {
    memory: Option<GuestMemory>,
    on_demand: Option<OnDemand>,
    runs: bool,
    error: Option<String>,
}

struct FakeTarget {
    received: Received,
    refuses_to: &'static str,
    ends: Sender<Received>,
}

impl FakeTarget {
    fn step(&self, name: &'static str) -> Result<(), MigrationError> {
        match self.refuses_to == name {
            true => Err(MigrationError::Request(name)),
            false => Ok(()),
        }
    }
}

impl TargetOwner for FakeTarget {
    fn begin(&mut self) {}

    fn prepare(
        &mut self,
        config: VmConfig,
        state: SnapshotState,
        files: ZoneFiles,
    ) -> Result<GuestMemory, MigrationError> {
        assert!(state.reporting_paused);
        self.step("prepare")?;
        let map = GuestMemory::new(&config.memory, 46).unwrap().state();
        let memory = GuestMemory::with_dimms(&config.memory, 46, &map, files);
        memory.map_err(|error| MigrationError::Owner(Box::new(error)))
    }

    fn build(
        &mut self,
        _state: SnapshotState,
        memory: GuestMemory,
        postponed: Option<Content>,
    ) -> Result<(), MigrationError> {
        self.step("build")?;
        self.received.on_demand = postponed.map(|it| postponed::fill(&memory, it));
        self.received.memory = Some(memory);
        Ok(())
    }

    fn commit(&mut self, runs: bool) -> Result<(), MigrationError> {
        self.step("commit")?;
        self.received.runs = runs;
        Ok(())
    }

    fn end(&mut self, end: Result<(), MigrationError>) {
        self.received.error = end.err().map(|error| api::error_line(&error));
        if self.received.error.is_some() {
            // The machine is dropped.
            self.received.on_demand = None;
        }
        self.ends.send(std::mem::take(&mut self.received)).unwrap();
    }
}

/// A source with some data.
struct Source {
    config: VmConfig,
    memory: GuestMemory,
    slots: RamSlots,
    limits: Limits,
    refuses_commit: bool,
    /// Pages that the guest writes in each pass.
    busy_pages: u64,
    downtime: Duration,
    timeout: Duration,
    /// Hands over its memory files; otherwise its writes are tracked.
    local: bool,
    connections: u32,
    postpones: bool,
    bytes_per_second_max: Option<NonZeroU64>,
    tls: Option<SourceTls>,
}

impl Source {
    fn new(kvm: &Kvm) -> Self {
        Self::of(kvm, config())
    }

    fn of(kvm: &Kvm, config: VmConfig) -> Self {
        let memory = GuestMemory::new(&config.memory, 46).unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = memory.attach(&vm).unwrap();
        let ram = memory.ram().memory();
        for page in [0, 3, 511, 512, 5000] {
            ram.write_obj(page | 1 << 40, GuestAddress(page * 4096))
                .unwrap();
        }
        Self {
            config,
            memory,
            slots,
            limits: LIMITS,
            refuses_commit: false,
            busy_pages: 0,
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(30),
            local: false,
            connections: 1,
            postpones: false,
            bytes_per_second_max: None,
            tls: None,
        }
    }

    /// Sends it to `address` from a thread.
    fn send(&self, address: Address) -> (Receiver<SourceEnd>, Arc<Mutex<Vec<String>>>, Cancel) {
        let (ends, end) = channel();
        let steps = Arc::new(Mutex::new(Vec::new()));
        let mut owner = FakeSource {
            memory: self.memory.clone(),
            ends,
            steps: Arc::clone(&steps),
            refuses_commit: self.refuses_commit,
            busy_pages: self.busy_pages,
        };
        let cancel = Cancel::default();
        let outgoing = Outgoing {
            target: Destination {
                address,
                tls: self.tls.clone(),
            },
            config: serde_json::to_string(&self.config).unwrap(),
            state: state_text(),
            ram: match self.local {
                true => Ram::handed_over(&self.memory).unwrap(),
                false => {
                    let tracker = self.slots.track_writes(&self.memory).unwrap();
                    Ram::Copied(Box::new(tracker))
                }
            },
            connections: self.connections,
            bytes_per_second_max: self.bytes_per_second_max,
            postpones: self.postpones,
            convergence: Convergence {
                downtime: self.downtime,
                timeout: self.timeout,
                pauses_at_timeout: false,
            },
            brake: None,
            limits: self.limits,
            cancel: cancel.clone(),
            progress: Arc::default(),
        };
        std::thread::spawn(move || outgoing.run(&mut owner));
        (end, steps, cancel)
    }
}

/// Receives in a thread.
fn receive(address: &Address, refuses_to: &'static str) -> (Receiver<Received>, Address, Cancel) {
    receive_within(address, refuses_to, LIMITS)
}

fn receive_within(
    address: &Address,
    refuses_to: &'static str,
    limits: Limits,
) -> (Receiver<Received>, Address, Cancel) {
    receive_with(address, refuses_to, limits, None)
}

fn receive_with(
    address: &Address,
    refuses_to: &'static str,
    limits: Limits,
    tls: Option<TargetTls>,
) -> (Receiver<Received>, Address, Cancel) {
    let (ends, end) = channel();
    let cancel = Cancel::default();
    let incoming = Incoming {
        listener: Listener::bind(address, tls).unwrap(),
        postpones: true,
        limits,
        cancel: cancel.clone(),
    };
    let address = incoming.listener.address();
    let mut owner = FakeTarget {
        received: Received::default(),
        refuses_to,
        ends,
    };
    std::thread::spawn(move || incoming.run(&mut owner));
    (end, address, cancel)
}

fn local() -> Address {
    Address::parse("tcp:127.0.0.1:0").unwrap()
}

/// How the migration has failed on the source.
fn expect_failure(sent: &Receiver<SourceEnd>, within: Duration) -> String {
    match sent.recv_timeout(within).unwrap() {
        SourceEnd::Failed(error) => api::error_line(&error),
        end => panic!("{end:?}"),
    }
}

/// The machine runs on the target, with its content.
fn expect_arrival(
    source: &Source,
    sent: &Receiver<SourceEnd>,
    received: &Receiver<Received>,
) -> (SendReport, Received) {
    let end = sent.recv_timeout(DEADLINE).unwrap();
    let SourceEnd::Finished(report) = end else {
        panic!("{end:?}");
    };
    let received = received.recv_timeout(DEADLINE).unwrap();
    assert_eq!((received.error.as_deref(), received.runs), (None, true));
    expect_content(source, &received);
    (report, received)
}

/// After the connection was cut behind `bytes`, the machine runs on the target if it `arrives`, else on the source.
fn expect_one_owner(
    end: &SourceEnd,
    received: &Received,
    arrives: bool,
    may_be_unsure: bool,
    bytes: usize,
) {
    let of_target = (received.runs, received.error.is_none());
    assert_eq!(of_target, (arrives, arrives), "{bytes}: {received:?}");
    match end {
        SourceEnd::Failed(_) if !arrives => {}
        SourceEnd::Finished(_) if arrives => {}
        SourceEnd::Unconfirmed(_) if may_be_unsure => {}
        end => panic!("{bytes}: {end:?}"),
    }
}

fn expect_content(source: &Source, received: &Received) {
    let target = received.memory.as_ref().unwrap();
    for page in 0..RAM_BYTES / 4096 {
        let read = |memory: &GuestMemory| -> u64 {
            memory
                .ram()
                .memory()
                .read_obj(GuestAddress(page * 4096))
                .unwrap()
        };
        assert_eq!(read(target), read(&source.memory), "page {page}");
    }
}

fn open_kvm() -> Option<Kvm> {
    Kvm::open().map_err(test_skip::skip).ok()
}

#[test]
fn machine_moves_over_unix_and_tcp_with_what_was_written_last() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    for address in [local(), Address::Unix(path.clone())] {
        let source = Source::new(&kvm);
        let (received, address, _) = receive(&address, "");
        let (sent, steps, _) = source.send(address);
        let SourceEnd::Finished(report) = sent.recv_timeout(DEADLINE).unwrap() else {
            panic!("the source did not finish");
        };
        let received = received.recv_timeout(DEADLINE).unwrap();
        assert_eq!(received.error, None);
        assert!(received.runs);
        expect_content(&source, &received);
        assert_eq!(report.data_bytes, 6 * 4096);
        assert!(report.wire_bytes < report.data_bytes + 8192, "{report:?}");
        let steps = steps.lock().unwrap();
        assert_eq!(
            *steps,
            ["pass 0", "sync", "pause", "save", "pass 1", "commit"]
        );
    }
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn target_that_refuses_names_the_reason_and_the_source_keeps_the_machine() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    for step in ["prepare", "build", "commit"] {
        let source = Source::new(&kvm);
        let (received, address, _) = receive(&local(), step);
        let (sent, ..) = source.send(address);
        let error = expect_failure(&sent, DEADLINE);
        assert!(
            error.contains("ended the migration") && error.contains(step),
            "{error}"
        );
        let received = received.recv_timeout(DEADLINE).unwrap();
        assert_eq!(received.error.as_deref(), Some(step));
        assert!(!received.runs);
    }
}

#[test]
fn client_that_sends_something_else_does_not_end_the_wait_for_a_source() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let source = Source::new(&kvm);
    let (received, address, _) = receive(&local(), "");
    let Address::Tcp(port) = address else {
        panic!("{address}");
    };
    let mut client = TcpStream::connect(port).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // It may be reset, because the target has not read all of it.
    client.read_to_end(&mut answer).ok();
    let (sent, ..) = source.send(address);
    let end = sent.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(end, SourceEnd::Finished(_)), "{end:?}");
    assert_eq!(received.recv_timeout(DEADLINE).unwrap().error, None);
}

#[test]
fn both_sides_can_be_cancelled_while_they_wait() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let (received, _, cancel) = receive(&local(), "");
    cancel.set();
    let error = received.recv_timeout(DEADLINE).unwrap().error.unwrap();
    assert!(error.contains("cancelled"), "{error}");
    // Accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = Source::new(&kvm);
    let (sent, _, cancel) = source.send(Address::Tcp(silent.local_addr().unwrap()));
    let _connection = silent.accept().unwrap();
    cancel.set();
    let end = sent.recv_timeout(DEADLINE).unwrap();
    assert!(
        matches!(end, SourceEnd::Failed(MigrationError::Cancelled)),
        "{end:?}"
    );
}

#[test]
fn guest_that_writes_too_fast_for_its_time_stays_where_it_is() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let mut source = Source::new(&kvm);
    source.busy_pages = 1500;
    source.downtime = Duration::from_nanos(1);
    source.timeout = Duration::ZERO;
    let (received, address, _) = receive(&local(), "");
    let (sent, steps, _) = source.send(address);
    let error = expect_failure(&sent, DEADLINE);
    assert!(error.contains("timed out after 0 s"), "{error}");
    let received = received.recv_timeout(DEADLINE).unwrap();
    assert!(received.error.is_some() && !received.runs);
    let steps = steps.lock().unwrap();
    assert!(!steps.iter().any(|step| step == "pause"), "{steps:?}");
}

const HEADER: usize = 16;
const HELLO_BYTES: usize = HEADER + 25;

/// Migrates over a connection that is cut. Returns how it ended on both sides.
fn migrate(kvm: &Kvm, way: Way, bytes: usize, after: After) -> (SourceEnd, Received, [usize; 2]) {
    migrate_within(LIMITS, kvm, way, bytes, after)
}

fn migrate_within(
    limits: Limits,
    kvm: &Kvm,
    way: Way,
    bytes: usize,
    after: After,
) -> (SourceEnd, Received, [usize; 2]) {
    let mut source = Source::new(kvm);
    source.limits = limits;
    let (received, address, cancel) = receive_within(&local(), "", limits);
    let (proxy, counted) = cut(&address, way, bytes, after);
    let (sent, ..) = source.send(proxy);
    let sent = sent.recv_timeout(DEADLINE).unwrap();
    if bytes == 0 || (way == Way::ToTarget && bytes < HELLO_BYTES) {
        // A client that has not introduced itself; the target waits for the next one.
        cancel.set();
    }
    let received = received.recv_timeout(DEADLINE).unwrap();
    (sent, received, counted.recv_timeout(DEADLINE).unwrap())
}

/// Where the commit begins in the stream to the target, and where that stream ends.
fn commit_place(kvm: &Kvm) -> (usize, usize) {
    let (end, _, [to_target, to_source]) = migrate(kvm, Way::ToTarget, usize::MAX, After::Reopened);
    assert!(matches!(end, SourceEnd::Finished(_)), "{end:?}");
    assert_eq!(to_source, 3 * HEADER, "three answers");
    // The last two messages are the commit, with one byte, and the confirmation.
    (to_target - 2 * HEADER - 1, to_target)
}

#[test]
fn connection_cut_at_any_byte_to_the_target_leaves_exactly_one_owner() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let (commit, end) = commit_place(&kvm);
    let before = [0, 1, 20, 100, 10_000, commit - 5_000];
    for bytes in before.into_iter().chain(commit - 20..end) {
        let arrives = bytes > commit + HEADER;
        for after in [After::Closed, After::Reopened] {
            let (end, received, _) = migrate(&kvm, Way::ToTarget, bytes, after);
            // A source that has tried to send the commit must ask.
            let may_be_unsure = bytes >= commit && after == After::Closed;
            expect_one_owner(&end, &received, arrives, may_be_unsure, bytes);
        }
    }
}

#[test]
fn connection_cut_at_any_byte_to_the_source_leaves_exactly_one_owner() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    for bytes in 0..3 * HEADER {
        for after in [After::Closed, After::Reopened] {
            let (end, received, _) = migrate(&kvm, Way::ToSource, bytes, after);
            let is_last = bytes >= 2 * HEADER;
            match end {
                // The commit has come, and its answer is lost.
                SourceEnd::Finished(_) if is_last && after == After::Reopened => {
                    assert!(received.runs && received.error.is_none(), "{received:?}");
                }
                // The connection may end before the commit has come.
                SourceEnd::Failed(_) if !is_last || after == After::Reopened => {
                    assert!(!received.runs && received.error.is_some(), "{received:?}");
                }
                SourceEnd::Unconfirmed(_) if is_last && after == After::Closed => {}
                end => panic!("{bytes}: {end:?}"),
            }
        }
    }
}

#[test]
fn connection_that_falls_silent_around_the_commit_leaves_exactly_one_owner() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let (commit, end) = commit_place(&kvm);
    let limits = Limits {
        running: Duration::from_secs(3),
        paused: Duration::from_secs(1),
        committed: Duration::from_millis(500),
        question: Duration::from_millis(300),
        asks: Duration::from_secs(30),
        ..LIMITS
    };
    for (way, bytes, arrives) in [
        (Way::ToTarget, commit - 1, false),
        (Way::ToTarget, commit, false),
        (Way::ToTarget, commit + HEADER, false),
        (Way::ToTarget, end - 1, true),
        (Way::ToSource, 2 * HEADER - 1, false),
        (Way::ToSource, 2 * HEADER, false),
        (Way::ToSource, 2 * HEADER + 1, true),
        (Way::ToSource, 3 * HEADER - 1, true),
    ] {
        let (end, received, _) = migrate_within(limits, &kvm, way, bytes, After::Silent);
        assert_eq!(
            (received.runs, received.error.is_none()),
            (arrives, arrives),
            "{way:?} {bytes}: {received:?}"
        );
        assert_eq!(
            matches!(end, SourceEnd::Finished(_)),
            arrives,
            "{way:?} {bytes}: {end:?}"
        );
        assert!(
            matches!(end, SourceEnd::Finished(_) | SourceEnd::Failed(_)),
            "{way:?} {bytes}: {end:?}"
        );
    }
}

#[test]
fn target_that_is_told_of_the_end_answers_no_questions() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let mut source = Source::new(&kvm);
    source.refuses_commit = true;
    let (received, address, _) = receive(&local(), "");
    let (sent, ..) = source.send(address.clone());
    let end = sent.recv_timeout(DEADLINE).unwrap();
    assert!(
        matches!(end, SourceEnd::Failed(MigrationError::Cancelled)),
        "{end:?}"
    );
    let error = received.recv_timeout(DEADLINE).unwrap().error.unwrap();
    assert!(error.contains("was cancelled"), "{error}");
    // Its socket is free long before it would end to answer.
    let until = Instant::now() + DEADLINE / 2;
    while let Err(error) = Listener::bind(&address, None) {
        assert!(Instant::now() < until, "{error}");
        std::thread::yield_now();
    }
}

/// A target that accepts the machine and receives everything, but never reports that it is prepared.
fn silent_target() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut answer = wire::Writer::new(Vec::new());
        answer.send(wire::Kind::Accepted, &[]).unwrap();
        source.write_all(answer.get_mut()).unwrap();
        std::io::copy(&mut source, &mut std::io::sink()).ok();
    });
    address
}

#[test]
fn target_that_falls_silent_after_the_pause_gives_the_machine_back() {
    let Some(kvm) = open_kvm() else {
        return;
    };
    let mut source = Source::new(&kvm);
    source.limits.paused = Duration::from_millis(200);
    let (sent, steps, _) = source.send(silent_target());
    let error = expect_failure(&sent, LIMITS.running / 2);
    assert!(error.contains("in time"), "{error}");
    assert_eq!(
        *steps.lock().unwrap(),
        ["pass 0", "sync", "pause", "save", "pass 1"]
    );
}

#[test]
fn target_that_accepts_a_byte_now_and_then_is_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    let limit = Duration::from_millis(300);
    let cancel = Cancel::default();
    let mut peer = address.connect(&cancel, LIMITS.connect).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    let (ends, end) = channel::<()>();
    let drips = std::thread::spawn(move || {
        // A header takes three times the limit; the thread ends when the other side has given up.
        while end.recv_timeout(limit / 5) == Err(RecvTimeoutError::Timeout) {
            if other.write_all(b"C").is_err() {
                return;
            }
        }
    });
    wire::Channel::set_limit(&mut peer, limit);
    // The first byte of the magic number would be refused only after a whole header.
    let mut reader = wire::Reader::new(peer);
    let error = reader
        .next(&[wire::Kind::Accepted], "an answer")
        .unwrap_err();
    let error = api::error_line(&error);
    assert!(error.contains("in time"), "{error}");
    drop(ends);
    drips.join().unwrap();
}

#[test]
fn unix_socket_whose_queue_is_full_is_waited_for_no_longer_than_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let address = Address::Unix(path);
    let limit = Duration::from_millis(50);
    let cancel = Cancel::default();
    let mut peers = Vec::new();
    // The kernel's limit, by default 4096.
    let error = loop {
        match address.connect(&cancel, limit) {
            Ok(peer) => peers.push(peer),
            Err(error) => break api::error_line(&error),
        }
        assert!(peers.len() < 10_000);
    };
    assert!(error.contains("temporarily unavailable"), "{error}");
    cancel.set();
    let error = address.connect(&cancel, DEADLINE).unwrap_err();
    assert!(api::error_line(&error).contains("cancelled"));
}
