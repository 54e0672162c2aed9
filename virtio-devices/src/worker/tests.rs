//! Tests of a worker's guarantees, with a handler that completes every chain.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{EventSources, HOST_CPUS_MAX, Turn, Worker, WorkerHandle};
use crate::device::{
    Activation, ActiveQueue, Doorbell, GuestRam, HandlerState, Interrupt, QueueHandler,
    WorkerError, position_of,
};
use crate::testing::{DriverQueue, MockInterrupt, Segment, TestRam, wait_until};

const SOURCE: u32 = 7;
const IDLE: u32 = 8;

/// Records of the handler that the test reads.
#[derive(Debug)]
struct Seen {
    source: EventFd,
    idle: EventFd,
    source_wakes: AtomicU64,
    idle_wakes: AtomicU64,
    activations: AtomicU64,
    resets: AtomicU64,
    pauses: AtomicU64,
    fail: AtomicBool,
}

struct Echo {
    seen: Arc<Seen>,
    active: Option<(GuestRam, Queue, Arc<dyn Interrupt>)>,
}

impl QueueHandler for Echo {
    fn name(&self) -> String {
        "_echo".into()
    }

    fn activate(
        &mut self,
        mut activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        sources.add(self.seen.source.as_raw_fd(), SOURCE)?;
        let queue = activation.queues.remove(0).queue;
        self.active = Some((activation.mem, queue, activation.interrupt));
        self.seen.activations.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn queue_ready(&mut self, index: u16, _: &mut Turn) -> Result<(), WorkerError> {
        if self.seen.fail.load(Ordering::SeqCst) {
            return Err(WorkerError::Queue {
                index,
                reason: "the test says so".into(),
            });
        }
        let (mem, queue, interrupt) = self.active.as_mut().expect("active");
        let mem = mem.memory();
        while let Some(chain) = queue.iter(&*mem).unwrap().next().map(|c| c.head_index()) {
            queue.add_used(&*mem, chain, 0).unwrap();
        }
        interrupt.signal_queue(index);
        Ok(())
    }

    fn source_ready(
        &mut self,
        token: u32,
        _: &mut EventSources,
        _: &mut Turn,
    ) -> Result<(), WorkerError> {
        let (event, count) = match token {
            SOURCE => (&self.seen.source, &self.seen.source_wakes),
            _ => (&self.seen.idle, &self.seen.idle_wakes),
        };
        event.read().unwrap();
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn idle_sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.seen.idle.as_raw_fd(), IDLE)]
    }

    fn reset(&mut self) {
        self.active = None;
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn state(&self) -> HandlerState {
        let queues = self
            .active
            .iter()
            .map(|(_, queue, _)| position_of(0, queue));
        HandlerState::of_queues(queues)
    }

    fn pause(&mut self) {
        self.seen.pauses.fetch_add(1, Ordering::SeqCst);
    }
}

struct Rig {
    seen: Arc<Seen>,
    worker: WorkerHandle,
    interrupt: Arc<MockInterrupt>,
    doorbell: Arc<Doorbell>,
    driver: DriverQueue,
    ram: TestRam,
}

impl Rig {
    fn new() -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = Arc::new(Seen {
            source: event(),
            idle: event(),
            source_wakes: AtomicU64::new(0),
            idle_wakes: AtomicU64::new(0),
            activations: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            pauses: AtomicU64::new(0),
            fail: AtomicBool::new(false),
        });
        let handler = Box::new(Echo {
            seen: Arc::clone(&seen),
            active: None,
        });
        let ram = TestRam::new(1 << 20);
        Self {
            seen,
            worker: Worker::spawn(handler, Arc::new(|_: &str| {})).unwrap(),
            interrupt: Arc::new(MockInterrupt::default()),
            doorbell: Arc::new(event()),
            driver: DriverQueue::new(&ram, 16),
            ram,
        }
    }

    fn activate(&self) {
        self.worker
            .activate(Activation {
                mem: self.ram.mem(),
                features: 0,
                queues: vec![ActiveQueue {
                    index: 3,
                    queue: self.driver.device_queue(),
                    doorbell: Arc::clone(&self.doorbell),
                    dma: None,
                }],
                interrupt: self.interrupt.clone(),
            })
            .unwrap();
    }

    fn push_and_kick(&mut self) {
        self.driver.push(&[Segment::Readable(b"x")]);
        self.doorbell.write(1).unwrap();
    }
}

#[test]
fn worker_kicked_before_and_after_activation_answers() {
    let mut rig = Rig::new();
    rig.push_and_kick();
    rig.activate();
    rig.driver.wait_used();
    rig.push_and_kick();
    rig.driver.wait_used();
    wait_until("the notification", || rig.interrupt.queue_signals(3) >= 2);
}

#[test]
fn worker_paused_keeps_kicks_for_resume() {
    let mut rig = Rig::new();
    rig.activate();
    rig.worker.pause();
    assert_eq!(rig.seen.pauses.load(Ordering::SeqCst), 1);
    rig.push_and_kick();
    // By the second acknowledgement the thread has had every opportunity to serve the kick wrongly.
    rig.worker.pause();
    assert_eq!(rig.driver.used_idx(), 0);
    rig.worker.resume();
    rig.driver.wait_used();
}

#[test]
fn worker_activated_while_paused_starts_at_resume() {
    let mut rig = Rig::new();
    rig.worker.pause();
    rig.push_and_kick();
    rig.activate();
    rig.worker.pause();
    assert_eq!(rig.driver.used_idx(), 0);
    assert_eq!(rig.seen.activations.load(Ordering::SeqCst), 0);
    rig.worker.resume();
    assert_eq!(rig.seen.activations.load(Ordering::SeqCst), 1);
    rig.driver.wait_used();
}

#[test]
fn worker_reset_lets_go_and_can_be_activated_again() {
    let mut rig = Rig::new();
    rig.activate();
    rig.worker.request_reset();
    wait_until("the reset", || rig.worker.reset_done());
    assert_eq!(rig.seen.resets.load(Ordering::SeqCst), 1);
    rig.push_and_kick();
    rig.worker.reset_and_wait();
    assert_eq!(rig.driver.used_idx(), 0);
    rig.driver.clear();
    rig.activate();
    rig.push_and_kick();
    rig.driver.wait_used();
}

#[test]
fn worker_reset_while_paused_is_done_and_stays_paused() {
    let mut rig = Rig::new();
    rig.activate();
    rig.worker.pause();
    rig.worker.reset_and_wait();
    assert!(rig.worker.reset_done());
    rig.activate();
    rig.push_and_kick();
    rig.worker.pause();
    assert_eq!(rig.driver.used_idx(), 0);
    rig.worker.resume();
    rig.driver.wait_used();
}

#[test]
fn worker_whose_handler_fails_stands_still_until_reset() {
    let mut rig = Rig::new();
    rig.activate();
    rig.seen.fail.store(true, Ordering::SeqCst);
    rig.push_and_kick();
    wait_until("NEEDS_RESET", || rig.interrupt.needs_reset());
    assert_eq!(rig.worker.failures(), 1);

    rig.seen.fail.store(false, Ordering::SeqCst);
    rig.push_and_kick();
    rig.worker.pause();
    rig.worker.resume();
    assert_eq!(rig.driver.used_idx(), 0);

    rig.worker.reset_and_wait();
    rig.driver.clear();
    rig.activate();
    rig.push_and_kick();
    rig.driver.wait_used();
}

#[test]
fn worker_serves_idle_sources_always_and_own_sources_while_active() {
    let rig = Rig::new();
    rig.seen.source.write(1).unwrap();
    rig.seen.idle.write(1).unwrap();
    wait_until("the idle source", || {
        rig.seen.idle_wakes.load(Ordering::SeqCst) == 1
    });
    assert_eq!(rig.seen.source_wakes.load(Ordering::SeqCst), 0);
    rig.activate();
    wait_until("the source", || {
        rig.seen.source_wakes.load(Ordering::SeqCst) == 1
    });
    rig.worker.reset_and_wait();
    rig.seen.source.write(1).unwrap();
    rig.seen.idle.write(1).unwrap();
    wait_until("the idle source again", || {
        rig.seen.idle_wakes.load(Ordering::SeqCst) == 2
    });
    assert_eq!(rig.seen.source_wakes.load(Ordering::SeqCst), 1);
}

#[test]
fn worker_dropped_resets_the_handler_and_ends() {
    let rig = Rig::new();
    rig.activate();
    let seen = Arc::clone(&rig.seen);
    drop(rig);
    assert_eq!(seen.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn worker_runs_the_start_hook_first_on_its_named_thread() {
    let seen = Rig::new().seen;
    let names = Arc::new(std::sync::Mutex::new(Vec::new()));
    let names_of_hook = Arc::clone(&names);
    let hook = Arc::new(move |name: &str| {
        let thread = std::thread::current();
        assert_eq!(thread.name(), Some(name));
        names_of_hook.lock().unwrap().push(name.to_owned());
    });
    let handler = Box::new(Echo { seen, active: None });
    drop(Worker::spawn(handler, hook).unwrap());
    assert_eq!(*names.lock().unwrap(), ["_echo"]);
}

/// An echo handler pinned to the given host CPUs.
struct Pinned(Echo, Vec<usize>);

impl QueueHandler for Pinned {
    fn name(&self) -> String {
        self.0.name()
    }
    fn host_cpus(&self) -> &[usize] {
        &self.1
    }
    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        self.0.activate(activation, sources)
    }
    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.0.queue_ready(queue_index, turn)
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn state(&self) -> HandlerState {
        self.0.state()
    }
}

#[test]
fn worker_runs_on_the_host_cpus_of_its_handler_or_not_at_all() {
    let pinned = |host_cpus: &[usize]| {
        let echo = Echo {
            seen: Rig::new().seen,
            active: None,
        };
        let (sender, threads) = std::sync::mpsc::channel();
        let hook = Arc::new(move |_: &str| {
            sender.send(own_thread_id()).unwrap();
        });
        let worker = Worker::spawn(Box::new(Pinned(echo, host_cpus.to_vec())), hook);
        (worker, threads)
    };
    let allowed = |thread: &str| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    };
    let first = allowed(&own_thread_id());
    let first: usize = first.split([',', '-']).next().unwrap().parse().unwrap();
    let (worker, threads) = pinned(&[first]);
    let _worker = worker.unwrap();
    assert_eq!(allowed(&threads.recv().unwrap()), first.to_string());

    let (worker, _threads) = pinned(&[HOST_CPUS_MAX - 1]);
    let error = worker.unwrap_err();
    assert!(
        matches!(&error, WorkerError::Affinity { host_cpus, .. } if host_cpus[..] == [HOST_CPUS_MAX - 1]),
        "{error}"
    );
}

/// The kernel's id of the calling thread.
fn own_thread_id() -> String {
    let link = std::fs::read_link("/proc/thread-self").unwrap();
    link.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn worker_kicked_by_a_waiting_vcpu_has_answered_when_it_goes_on() {
    let mut rig = Rig::new();
    assert!(!rig.worker.kick_and_wait(3), "not active");
    rig.activate();
    for answered in 1..=100 {
        rig.driver.push(&[Segment::Readable(b"x")]);
        assert!(rig.worker.kick_and_wait(3));
        assert_eq!(rig.driver.used_idx(), answered);
        assert!(rig.driver.pop_used().is_some());
    }
    assert!(!rig.worker.kick_and_wait(2), "no such queue");

    rig.worker.pause();
    rig.driver.push(&[Segment::Readable(b"x")]);
    assert!(!rig.worker.kick_and_wait(3), "paused");
    assert_eq!(rig.driver.used_idx(), 100);
    rig.worker.resume();
    rig.driver.wait_used();

    rig.seen.fail.store(true, Ordering::SeqCst);
    assert!(rig.worker.kick_and_wait(3));
    assert!(rig.interrupt.needs_reset());
    assert!(!rig.worker.kick_and_wait(3), "stands still");
}

/// The other commands still fit, regardless of the number of vCPUs that kick.
#[test]
fn worker_kicked_by_many_vcpus_still_takes_every_command() {
    let rig = Rig::new();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    rig.worker.kick_and_wait(3);
                }
            });
        }
        for round in 0..200 {
            rig.activate();
            if round % 8 == 0 {
                rig.worker.pause();
                rig.worker.resume();
            }
            rig.worker.request_reset();
            wait_until("the reset", || rig.worker.reset_done());
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(rig.worker.failures(), 0);
}

/// A handler that ends its thread on a pause.
struct Dying(Echo);

impl QueueHandler for Dying {
    fn name(&self) -> String {
        self.0.name()
    }
    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut EventSources,
    ) -> Result<(), WorkerError> {
        self.0.activate(activation, sources)
    }
    fn queue_ready(&mut self, queue_index: u16, turn: &mut Turn) -> Result<(), WorkerError> {
        self.0.queue_ready(queue_index, turn)
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn state(&self) -> HandlerState {
        self.0.state()
    }
    fn pause(&mut self) {
        panic!("the test wants the thread to end");
    }
}

#[test]
fn worker_whose_thread_has_ended_has_no_state_to_save() {
    let seen = Rig::new().seen;
    let handler = Box::new(Dying(Echo { seen, active: None }));
    let worker = Worker::spawn(handler, Arc::new(|_: &str| {})).unwrap();
    worker.pause();
    let error = worker.state().unwrap_err();
    assert!(matches!(error, WorkerError::Unresponsive { .. }), "{error}");
}
